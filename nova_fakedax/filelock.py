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

"""Locks of files that other hosts see, where the storage is shared.

They are of the open file description, as those of the virtio-pmem device
(qemu-device/SPEC.rst, "The lock"): closing another descriptor of the file does
not release them, and the kernel does when the process ends.
"""

import errno
import fcntl
import os
import struct

from nova_fakedax import privsep

#: The first byte and the number of bytes that the device locks: the owner's,
#: and the next owner's.
_IMAGE = (300, 2)

_HOST = (0, 1)

#: struct flock of fcntl(2): type, whence, start, length, pid.
_FLOCK = 'hhqqi4x'


class Locked(Exception):
    """Another process or host holds the lock."""


def hold(path: str) -> int:
    """Lock a file, which is made if there is none, until the process ends.

    :returns: the descriptor, which must stay open
    :raises Locked: another holds it
    :raises OSError: the file cannot be made, or its file system has no locks
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(*_HOST))
    except OSError as exc:
        os.close(descriptor)
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            raise Locked(path)
        raise
    return descriptor


def is_held(path: str) -> bool:
    """Whether a process of any host holds a file by :func:`hold`.

    :raises OSError: the file cannot be opened, or has no locks
    """
    return _is_locked(path, *_HOST)


def is_image_owned(path: str) -> bool:
    """Whether a virtio-pmem device of any host owns or claims an image.

    :raises OSError: the file cannot be opened, or has no locks
    """
    owned: bool = privsep.run(
        _is_image_owned, privileged_is_image_owned, path)
    return owned


def _is_image_owned(path: str) -> bool:
    return _is_locked(path, *_IMAGE)


@privsep.fakedax_pctxt.entrypoint
def privileged_is_image_owned(path: str) -> bool:
    return _is_image_owned(path)


def _is_locked(path: str, first: int, length: int) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = fcntl.fcntl(
            descriptor, fcntl.F_OFD_GETLK, _flock(first, length))
    finally:
        os.close(descriptor)
    kind: int = struct.unpack(_FLOCK, found)[0]
    return kind != fcntl.F_UNLCK


def _flock(first: int, length: int) -> bytes:
    return struct.pack(
        _FLOCK, fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
