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

"""What the host's page cache holds of a file."""

from collections.abc import Iterator
import contextlib
import os
import pathlib

from nova_fakedax import pagecache


def cached_bytes(path: pathlib.Path) -> int:
    """The bytes of the file that are in the page cache, dirty ones included.

    :raises OSError: the file cannot be opened or asked about
    """
    cached = pagecache.of_file(str(path)).cached
    # The lab is root.
    assert cached is not None
    return cached


def dirty_bytes(path: pathlib.Path) -> int:
    """The bytes of the file that are cached but not yet written.

    :raises OSError: it cannot be opened, or the kernel has no cachestat(2)
    """
    found = pagecache.of_file(str(path))
    if found.dirty is None or found.writeback is None:
        raise OSError('this kernel has no cachestat(2)')
    return found.dirty + found.writeback


def evict(path: pathlib.Path) -> None:
    """Drop the file from the page cache, except for pages that are mapped.

    :raises OSError: it cannot be opened, or cannot be written to storage
    """
    with _opened(path) as descriptor:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
