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

"""A raw image's geometry.

Every image on fake DAX is raw, its size is a multiple of 2 MiB, and it is
allocated in full. The guest's content starts at byte 0.
"""

import ctypes
import errno
import os
import stat

from oslo_utils import units

#: The guest maps a device in sections of 2 MiB; Linux refuses a device of
#: another size ("misaligned, unable to map", drivers/nvdimm/pmem.c).
ALIGNMENT: int = 2 * units.Mi

# fallocate(2), for a flag of linux/falloc.h: os.posix_fallocate() has none.
_FALLOC_FL_UNSHARE_RANGE = 0x40
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (
    ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class InvalidLayout(Exception):
    """The file cannot be the backing file of a pmem device."""


def aligned(size: int) -> int:
    """The smallest size that holds ``size`` bytes and can be mapped."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def allocate(path: str, size: int) -> None:
    """Make the file at least ``size`` bytes, aligned, all blocks its own.

    QEMU maps the file. If the file system has no space left, a store to a
    hole kills the emulator with SIGBUS. So does a store to a block that the
    file shares with one that it was cloned from; cp(1) clones on XFS since
    coreutils 9. So the space is taken now. The file keeps its content and is
    never shortened.

    :raises OSError: for example ENOSPC; the file may then have grown
    """
    with open(path, 'r+b') as image:
        status = os.fstat(image.fileno())
        wanted = aligned(max(size, status.st_size))
        # Checked first: an attempt that fails would take all space that is
        # left on the file system for a while.
        missing = wanted - _allocated(status)
        if missing > available(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        _take_blocks(image.fileno(), wanted)


def _take_blocks(descriptor: int, size: int) -> None:
    """Give the file blocks of its own for its first ``size`` bytes.

    :raises OSError: for example ENOSPC
    """
    if _fallocate(descriptor, _FALLOC_FL_UNSHARE_RANGE, 0, size) == 0:
        return
    error = ctypes.get_errno()
    if error != errno.EOPNOTSUPP:
        raise OSError(error, os.strerror(error))
    # A file system whose files share no blocks, or that does not know.
    os.posix_fallocate(descriptor, 0, size)


def available(path: str) -> int:
    """The bytes that can still be allocated on a file's file system."""
    system = os.statvfs(path)
    return system.f_bavail * system.f_frsize


def mapped_size(path: str) -> int:
    """The size in bytes of a file that can be mapped into a guest.

    :raises InvalidLayout: there is no such file (QEMU would create it), or
        it is not as :func:`allocate` leaves it
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InvalidLayout(f'{path} does not exist')
    if not stat.S_ISREG(status.st_mode):
        raise InvalidLayout(f'{path} is not a regular file')
    if not status.st_size or status.st_size % ALIGNMENT:
        raise InvalidLayout(
            f'{path} has {status.st_size} bytes; allowed: a multiple of '
            f'{ALIGNMENT} bytes')
    allocated = _allocated(status)
    if allocated < status.st_size:
        raise InvalidLayout(
            f'{path} has {status.st_size} bytes, but only {allocated} are '
            f'allocated')
    return status.st_size


def _allocated(status: os.stat_result) -> int:
    """The bytes that the file takes on its file system."""
    # st_blocks counts 512 bytes whatever the file system's block size is.
    return status.st_blocks * 512
