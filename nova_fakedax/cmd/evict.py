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
"""Take the host's memory back."""

from __future__ import annotations

import argparse
import time

from nova_fakedax.cmd import common
from nova_fakedax import hostcache
from nova_fakedax import inventory
from nova_fakedax import pagecache
from nova_fakedax import process


class Evict(common.ServersLister):
    """Drop what the host has cached of images, and say what it gave back.

    Clean pages are dropped, whether or not QEMU has them mapped; the guests
    go on and read again what they need. What is dirty stays: flush first. The
    exit status is 1 if an image could not be evicted.
    """

    def take_action(
        self, parsed_args: argparse.Namespace,
    ) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        with common.libvirt() as connection:
            rows = [_evict(image) for image in inventory.images(
                connection, parsed_args.servers)]
        self.failed = any(row[-1].startswith('failed') for row in rows)
        return ('Server', 'Disk', 'Cached MiB', 'Given back MiB', 'Seconds',
                'Result'), rows


def _evict(image: inventory.Image) -> tuple[str, ...]:
    started = time.monotonic()
    before = after = None
    try:
        before = pagecache.of_file(image.disk.path)
        pid = process.of_server(image.server)
        if pid is not None:
            process.page_out(pid, image.disk.path)
        hostcache.invalidate(image.disk.path)
        after = pagecache.of_file(image.disk.path)
        result = _result(after)
    except OSError as exc:
        result = f'failed: {exc.strerror}'
    had = before.cached if before else None
    has = after.cached if after else None
    gave = None if had is None or has is None else had - has
    return (*common.title(image), common.mib(had), common.mib(gave),
            f'{time.monotonic() - started:.2f}', result)


def _result(after: pagecache.Cached) -> str:
    dirty = (after.dirty or 0) + (after.writeback or 0)
    if dirty:
        return (f'{common.amount(dirty)} are not on storage yet: '
                f'nova-fakedax flush')
    if after.cached:
        return f'{common.amount(after.cached)} are in use'
    return 'evicted'
