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
"""What of a file is in the host's page cache."""

import contextlib
import ctypes
import dataclasses
import mmap
import os

#: Of x86_64 and every architecture of the unified table: arch/*/syscall.tbl.
_NR_CACHESTAT = 451

#: Bytes of a file that are mapped at a time.
_PIECE = 1 << 30

#: Of a page, mincore(2) defines only the lowest bit.
_LOWEST_BIT = bytes(value & 1 for value in range(256))

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    """struct cachestat_range of linux/mman.h."""

    _fields_ = [('off', ctypes.c_uint64), ('len', ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    """struct cachestat of linux/mman.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        'nr_cache', 'nr_dirty', 'nr_writeback', 'nr_evicted',
        'nr_recently_evicted')]


@dataclasses.dataclass(frozen=True)
class Cached:
    """The bytes of a file that are in the page cache.

    :ivar cached: all of them, None if Linux does not tell this user
    :ivar dirty: those that are not on storage, None if Linux does not tell
    :ivar writeback: those that are being written, None likewise
    """

    cached: int | None
    dirty: int | None = None
    writeback: int | None = None


def of_file(path: str) -> Cached:
    """Count by cachestat(2) (Linux 6.5), else by mincore(2).

    Both tell only who may write to the file or owns it. Neither reads it.

    :raises OSError: the file cannot be opened or asked about
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = None
        with contextlib.suppress(OSError):
            found = _cachestat(descriptor)
        if found is not None and found.nr_cache:
            return Cached(found.nr_cache * mmap.PAGESIZE,
                          found.nr_dirty * mmap.PAGESIZE,
                          found.nr_writeback * mmap.PAGESIZE)
        if not _is_told(path):
            return Cached(None)
        # Also of overlayfs: cachestat does not look at the file below.
        pages = _mincore(descriptor)
        if pages or found is None:
            return Cached(pages * mmap.PAGESIZE)
        return Cached(0, 0, 0)
    finally:
        os.close(descriptor)


def _is_told(path: str) -> bool:
    """Whether mincore(2) tells this user, not that all is cached.

    As can_do_mincore of Linux's mm/mincore.c has it.
    """
    return (os.stat(path).st_uid == os.geteuid()
            or os.access(path, os.W_OK, effective_ids=True))


def _cachestat(descriptor: int) -> _CacheStat:
    # A length of 0 means to the end of the file.
    whole = _Range(0, 0)
    found = _CacheStat()
    if _libc.syscall(_NR_CACHESTAT, descriptor, ctypes.byref(whole),
                     ctypes.byref(found), 0):
        raise OSError(ctypes.get_errno(), 'cachestat')
    return found


def _mincore(descriptor: int) -> int:
    # In pieces: Linux refuses a private mapping larger than its memory. Not
    # by stat(2), where a block device has no size.
    size = os.lseek(descriptor, 0, os.SEEK_END)
    return sum(_mincore_piece(descriptor, start, min(_PIECE, size - start))
               for start in range(0, size, _PIECE))


def _mincore_piece(descriptor: int, start: int, size: int) -> int:
    # Private, as the descriptor may only read; the pages are those of the
    # file.
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY,
                   offset=start) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        status = _libc.mincore(ctypes.byref(first), ctypes.c_size_t(size),
                               resident)
        # The mapping cannot be closed while a pointer into it exists.
        del first
        if status:
            raise OSError(ctypes.get_errno(), 'mincore')
    return bytes(resident).translate(_LOWEST_BIT).count(1)
