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

"""An image's pages in the host's page cache.

Images can mostly be read by everybody. Where they cannot, a helper with the
package's privilege opens them (:mod:`.privsep`).
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import tempfile

from nova import utils

from nova_fakedax import privsep


HelperError = privsep.HelperError


class _Local:
    """What is done without the helper."""

    @staticmethod
    def flush(path: str) -> None:
        with _opened(path) as descriptor:
            os.fsync(descriptor)

    @staticmethod
    def invalidate(path: str) -> None:
        with _opened(path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@privsep.fakedax_pctxt.entrypoint
def privileged_flush(path: str) -> None:
    _Local.flush(path)


@privsep.fakedax_pctxt.entrypoint
def privileged_invalidate(path: str) -> None:
    _Local.invalidate(path)


def flush(path: str) -> None:
    """Write the file's dirty pages to its storage and wait for them.

    Includes what a guest stored through a mapping: fsync(2) writes all dirty
    pages of the file, whoever dirtied them.

    :raises HelperError: nothing was done
    :raises OSError: the storage failed; what was acknowledged to the guest
        before is not affected, the rest may be lost
    """
    privsep.run(utils.tpool_wrap(_Local).flush, privileged_flush, path)


def invalidate(path: str) -> None:
    """Drop the file's clean pages that nobody has mapped.

    For an image that another host writes from now on: pages cached here
    would be stale when the guest comes back, and take memory until then.

    :raises OSError: the file cannot be opened
    """
    privsep.run(utils.tpool_wrap(_Local).invalidate, privileged_invalidate,
                path)


def sync_all() -> None:
    """Write all dirty pages of this host, and wait for them.

    Needs no file and no privilege, but says nothing of errors (sync(2)).
    """
    utils.tpool_wrap(os).sync()


def probe(directory: str) -> None:
    """Try on a file what images will need.

    :param directory: where images are
    :raises OSError: says what failed
    """
    with tempfile.TemporaryDirectory(dir=directory) as made:
        path = os.path.join(made, 'probe')
        with open(path, 'xb') as file:
            mode = os.fstat(file.fileno()).st_mode
        if not mode & 0o004:
            # As one that libvirt has given to another user.
            os.chmod(path, 0)
        flush(path)
        invalidate(path)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
