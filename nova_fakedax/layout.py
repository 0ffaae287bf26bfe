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

What holds of every image on fake DAX: it is raw, its size is a multiple of
2 MiB, and all of it is allocated. The guest's content starts at byte 0.
"""

import errno
import os
import stat

from oslo_utils import units

#: The guest maps a device in sections of 2 MiB; Linux refuses a device of
#: another size ("misaligned, unable to map", drivers/nvdimm/pmem.c).
ALIGNMENT: int = 2 * units.Mi


class InvalidLayout(Exception):
    """The file cannot be the backing file of a pmem device."""


def aligned(size: int) -> int:
    """The smallest size that holds ``size`` bytes and can be mapped."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def allocate(path: str, size: int) -> None:
    """Make the file at least ``size`` bytes, aligned, with no hole in it.

    QEMU maps the file: a store to a hole that the file system cannot fill
    any more kills the emulator with SIGBUS. So the space is taken now.
    What the file holds is kept; it is never shortened.

    :raises OSError: for example ENOSPC; the file may then have grown
    """
    with open(path, 'r+b') as image:
        status = os.fstat(image.fileno())
        wanted = aligned(max(size, status.st_size))
        # Asked first, or the attempt would take what is left from everybody
        # else on the file system until it fails.
        missing = wanted - _allocated(status)
        system = os.fstatvfs(image.fileno())
        if missing > system.f_bavail * system.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.posix_fallocate(image.fileno(), 0, wanted)


def mapped_size(path: str) -> int:
    """The size in bytes at which the file can be mapped into a guest.

    :raises InvalidLayout: there is no such file (QEMU would create it), or
        it is not what :func:`allocate` leaves
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
