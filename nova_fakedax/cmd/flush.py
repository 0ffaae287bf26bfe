# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.
"""Write what guests have stored and not flushed."""

from __future__ import annotations

import argparse
import time

from nova_fakedax.cmd import common
from nova_fakedax import hostcache
from nova_fakedax import inventory
from nova_fakedax import pagecache


class Flush(common.ServersLister):
    """Flush images: write their dirty pages to storage, and wait for that.

    The guests go on meanwhile. The exit status is 1 if one failed.
    """

    def take_action(
        self, parsed_args: argparse.Namespace,
    ) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        with common.libvirt() as connection:
            rows = [_flush(image) for image in inventory.images(
                connection, parsed_args.servers)]
        self.failed = any(row[-1] != 'flushed' for row in rows)
        return ('Server', 'Disk', 'Dirty MiB', 'Seconds', 'Result'), rows


def _flush(image: inventory.Image) -> tuple[str, ...]:
    started = time.monotonic()
    dirty, result = None, 'flushed'
    try:
        dirty = pagecache.of_file(image.disk.path).dirty
        hostcache.flush(image.disk.path)
    except OSError as exc:
        result = f'failed: {exc.strerror}'
    return (*common.title(image), common.mib(dirty),
            f'{time.monotonic() - started:.2f}', result)
