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
import ctypes
import mmap
import os
import pathlib

# x86_64 and every architecture of the unified table: arch/*/syscall.tbl.
_NR_CACHESTAT = 451

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    """struct cachestat_range of linux/mman.h."""

    _fields_ = [('off', ctypes.c_uint64), ('len', ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    """struct cachestat of linux/mman.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        'nr_cache', 'nr_dirty', 'nr_writeback', 'nr_evicted',
        'nr_recently_evicted')]


def cached_bytes(path: pathlib.Path) -> int:
    """The bytes of the file that are in the page cache, dirty ones included.

    By cachestat(2) where the kernel has it (6.5), else by mincore(2), which
    may tell only the owner of the file. Neither reads the file.

    :raises OSError: the file cannot be opened or asked about
    """
    with _opened(path) as descriptor:
        try:
            pages = int(_cachestat(descriptor).nr_cache)
        except OSError:
            pages = _mincore(descriptor)
    return pages * mmap.PAGESIZE


def dirty_bytes(path: pathlib.Path) -> int:
    """The bytes of the file that are cached but not yet written.

    :raises OSError: it cannot be opened, or the kernel has no cachestat(2)
    """
    with _opened(path) as descriptor:
        found = _cachestat(descriptor)
    return int(found.nr_dirty + found.nr_writeback) * mmap.PAGESIZE


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


def _cachestat(descriptor: int) -> _CacheStat:
    # A length of 0 means to the end of the file.
    whole = _Range(0, 0)
    found = _CacheStat()
    if _libc.syscall(_NR_CACHESTAT, descriptor, ctypes.byref(whole),
                     ctypes.byref(found), 0):
        raise OSError(ctypes.get_errno(), 'cachestat')
    return found


def _mincore(descriptor: int) -> int:
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    with mmap.mmap(descriptor, size) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        status = _libc.mincore(ctypes.byref(first), ctypes.c_size_t(size),
                               resident)
        # The mapping cannot be closed while a pointer into it exists.
        del first
        if status:
            raise OSError(ctypes.get_errno(), 'mincore')
    return sum(page & 1 for page in resident)
