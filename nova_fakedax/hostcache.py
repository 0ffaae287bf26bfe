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

"""An image's pages in the host's page cache."""

from collections.abc import Iterator
import contextlib
import os

from nova_fakedax import privsep


@privsep.fakedax_pctxt.entrypoint
def flush(path: str) -> None:
    """Write the file's dirty pages to its storage and wait for them.

    Includes what a guest stored through a mapping: fsync(2) writes all dirty
    pages of the file, whoever dirtied them.

    :raises OSError: the storage failed; what was acknowledged to the guest
        before is not affected, the rest may be lost
    """
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@privsep.fakedax_pctxt.entrypoint
def invalidate(path: str) -> None:
    """Drop the file's clean pages that nobody has mapped.

    For an image that another host writes from now on: pages cached here
    would be stale when the guest comes back, and take memory until then.

    :raises OSError: the file cannot be opened
    """
    with _opened(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
