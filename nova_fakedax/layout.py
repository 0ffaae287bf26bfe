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

"""Where in an image the guest's content lies, and how an image is made.

Every image on fake DAX is raw, its size is a multiple of 2 MiB, and it is
allocated in full. There are two layouts:

* memmap on the device: an fsdax info block, with which the guest's kernel
  keeps its struct pages (the memmap) in the image, then the memmap, then the
  content at an offset that is a multiple of 2 MiB;
* memmap in the guest: the content begins at byte 0, and the struct pages take
  16 MiB of the guest's RAM for each GiB.

Which one an image has is read from the image alone, whatever the flavor or
the configuration says. The guest can write to all of it. So nothing in it is
believed but a block that is exactly as this module would write it for a file
of that size; whatever a guest stores there, it can only move the beginning of
its own content inside its own file.

The block is ``struct nd_pfn_sb`` of drivers/nvdimm/pfn.h; which values Linux
accepts is in nd_pfn_validate() of drivers/nvdimm/pfn_devs.c (6.1, 6.12).
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import stat
import struct
import typing as ty
import uuid

from nova import exception
from oslo_log import log as logging
from oslo_utils import units

LOG = logging.getLogger(__name__)

#: The guest maps a device in sections of 2 MiB; Linux refuses a device of
#: another size ("misaligned, unable to map", drivers/nvdimm/pmem.c).
ALIGNMENT: int = 2 * units.Mi

_PAGE = 4096
_STRUCT_PAGE = 64
#: nvdimm_read_bytes(ndns, SZ_4K, ...); the 4 KiB before it are not used.
INFO_BLOCK_OFFSET = 4096
#: nd_info_block_reserve().
_RESERVED = 8192

_SIGNATURE = b'NVDIMM_PFN_INFO\0'
_FIELDS: dict[str, str] = {
    'signature': '16s', 'uuid': '16s', 'parent_uuid': '16s', 'flags': 'I',
    'version_major': 'H', 'version_minor': 'H', 'dataoff': 'Q', 'npfns': 'Q',
    'mode': 'I', 'start_pad': 'I', 'end_trunc': 'I', 'align': 'I',
    'page_size': 'I', 'page_struct_size': 'H', 'padding': '3994s',
    'checksum': 'Q'}
_FORMAT = ''.join(_FIELDS.values())
_BLOCK_SIZE = 4096
#: enum nd_pfn_mode: the memmap is on the device.
_PFN_MODE_PMEM = 2

#: An image's name for those who may only read it.
_VIEW = '.view'
#: What is being made, next to what it replaces.
_UNFINISHED = '.unfinished'
_CHUNK: int = 4 * units.Mi

# fallocate(2), for a flag of linux/falloc.h: os.posix_fallocate() has none.
_FALLOC_FL_UNSHARE_RANGE = 0x40
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (
    ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class InvalidLayout(exception.NovaException):
    """The file cannot be the backing file of a pmem device.

    Nova's, so that the user who starts the instance reads why.
    """


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the content of an image lies.

    :ivar offset: the bytes before the content: info block and memmap, or 0
    :ivar size: the bytes of content, which is what the guest's disk holds
    """

    offset: int
    size: int

    @property
    def file_size(self) -> int:
        """The bytes of the file, and of the device."""
        return self.offset + self.size

    @property
    def memmap(self) -> bool:
        """Whether the memmap is on the device."""
        return bool(self.offset)

    def qemu_filename(self, path: str) -> str:
        """What to call the content where QEMU wants a raw image's filename.

        https://www.qemu.org/docs/master/system/invocation.html, ``json:``
        """
        if not self.offset:
            return path
        return 'json:' + json.dumps({
            'driver': 'raw', 'offset': self.offset, 'size': self.size,
            'file': {'driver': 'file', 'filename': os.path.abspath(path)}})


def aligned(size: int) -> int:
    """The smallest size that holds ``size`` bytes and can be mapped."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def planned(size: int, memmap: bool) -> Layout:
    """The layout of a new image.

    :param size: the bytes of content; rounded up to what can be mapped
    :param memmap: whether the memmap goes on the device
    """
    layout = Layout(0, aligned(size))
    if memmap:
        # The memmap has struct pages for itself too.
        while layout.offset != (offset := _offset(layout.file_size)):
            layout = Layout(offset, layout.size)
    return layout


def _offset(file_size: int) -> int:
    """Where the content begins in a file of this size with a memmap.

    As nd_pfn_init() of drivers/nvdimm/pfn_devs.c computes it, so that a guest
    that makes its info block again (ndctl) makes a valid one.
    """
    pages = (file_size - _RESERVED) // _PAGE
    return aligned(_RESERVED + pages * _STRUCT_PAGE)


def read(path: str) -> Layout:
    """The layout of an image, from what it holds.

    :raises InvalidLayout: its info block is damaged, or is not one that this
        module writes into a file of that size; or it cannot be read
    """
    try:
        size, block = head(path)
    except OSError as exc:
        raise InvalidLayout(f'{path} cannot be read: {exc.strerror}')
    return of_head(path, size, block)


def head(path: str) -> tuple[int, bytes]:
    """What says where the content lies: for who may open it, and :func:`read`.

    :param path: of a file or a block device
    :returns: its bytes, and what stands where an info block would be
    :raises OSError: it cannot be read
    """
    with open(path, 'rb') as image:
        # A block device has no size of its own (stat(2)).
        size = os.lseek(image.fileno(), 0, os.SEEK_END)
        return size, os.pread(
            image.fileno(), _BLOCK_SIZE, INFO_BLOCK_OFFSET)


def of_head(path: str, size: int, block: bytes) -> Layout:
    """The layout, of what :func:`head` returns.

    :raises InvalidLayout: as :func:`read`
    """
    if not block.startswith(_SIGNATURE):
        return Layout(0, size)
    return _parse(path, block, size)


def _parse(path: str, block: bytes, file_size: int) -> Layout:
    """Check an info block that has the signature.

    :raises InvalidLayout: names the field, its value and what is allowed
    """
    def refuse(field: str, value: object, allowed: object) -> ty.NoReturn:
        raise InvalidLayout(
            f'{path} has {file_size} bytes and an info block whose {field} '
            f'is {value}; allowed: {allowed}')

    layout = Layout(_offset(file_size), file_size - _offset(file_size))
    if len(block) != _BLOCK_SIZE or layout.size < ALIGNMENT or (
            file_size % ALIGNMENT):
        raise InvalidLayout(
            f'{path} has {file_size} bytes and an info block; allowed: a '
            f'multiple of {ALIGNMENT} bytes from '
            f'{planned(1, True).file_size}')
    found = _unpack('<', block)
    allowed = _fields(layout, found['uuid'])
    checksum = _checksum('<', block)
    if found['checksum'] != checksum:
        if _unpack('>', block)['checksum'] == _checksum('>', block):
            refuse('byte order', 'big-endian', 'little-endian')
        refuse('checksum', f'{found["checksum"]:#x}', f'{checksum:#x}')
    for field, value in allowed.items():
        if found[field] != value:
            refuse(field, *(
                item.strip(b'\0').hex() or 'zeros'
                if isinstance(item, bytes) else item
                for item in (found[field], value)))
    return layout


def _fields(layout: Layout, identity: bytes) -> dict[str, ty.Any]:
    """The fields of a layout's info block, but for the checksum."""
    return {
        'signature': _SIGNATURE, 'uuid': identity,
        # The namespace of a virtio-pmem device has no labels, thus no UUID.
        'parent_uuid': bytes(16), 'flags': 0,
        'version_major': 1, 'version_minor': 4,
        'dataoff': layout.offset, 'npfns': layout.size // _PAGE,
        'mode': _PFN_MODE_PMEM, 'start_pad': 0, 'end_trunc': 0,
        'align': ALIGNMENT, 'page_size': _PAGE,
        'page_struct_size': _STRUCT_PAGE, 'padding': bytes(3994)}


def _unpack(order: str, block: bytes) -> dict[str, ty.Any]:
    return dict(zip(_FIELDS, struct.unpack(order + _FORMAT, block)))


def _checksum(order: str, block: bytes) -> int:
    """Fletcher-64 of a block whose checksum counts as 0.

    As nd_sb_checksum() and nd_fletcher64() of drivers/nvdimm/core.c.
    """
    low = high = 0
    for (word,) in struct.iter_unpack(f'{order}I', block[:-8] + bytes(8)):
        low = (low + word) & 0xffffffff
        high = (high + low) & 0xffffffff
    return high << 32 | low


def info_block(layout: Layout) -> bytes:
    """What stands at INFO_BLOCK_OFFSET of an image with this layout."""
    fields = _fields(layout, uuid.uuid4().bytes)
    block = struct.pack(f'<{_FORMAT}', *fields.values(), 0)
    return block[:-8] + struct.pack('<Q', _checksum('<', block))


def make(path: str, source: str, size: int, memmap: bool) -> None:
    """Make an image from a raw file of content.

    A crash leaves what was at the path before, or all of the new image.

    :param source: the file to copy; what it lacks of the content is zeros
    :param size: the bytes of content
    :param memmap: whether the memmap goes on the device
    :raises InvalidLayout: the source is larger
    :raises OSError: for example ENOSPC; nothing has changed
    """
    content = Layout(0, os.path.getsize(source))
    layout = planned(size, memmap)
    if content.size > layout.size:
        raise InvalidLayout(
            f'{source} has {content.size} bytes; allowed: at most '
            f'{layout.size}')
    _make(path, layout, source, content)


def copy(path: str, source: str, size: int, memmap: bool) -> None:
    """Copy an image, as :func:`fit` would change the copy.

    What was never written is not read. A crash leaves nothing at the path, or
    all of the copy. The copy's memmap is zeros.

    :param size: the least bytes of content
    :param memmap: whether the memmap goes on the device
    :raises InvalidLayout: the image's info block is not valid
    :raises OSError: for example ENOSPC
    """
    found = read(source)
    _make(path, _fitting(found, size, memmap), source, found)


def fit(path: str, size: int, memmap: bool) -> None:
    """Give an image more content, or the other layout, where it needs that.

    A crash leaves the old or the new image whole.

    :param size: the least bytes of content; what is added is zeros
    :param memmap: whether the memmap goes on the device
    :raises InvalidLayout: the image's info block is not valid
    :raises OSError: for example ENOSPC; the content has not changed
    """
    found = read(path)
    wanted = _fitting(found, size, memmap)
    if wanted.offset == found.offset == 0 or wanted == found:
        allocate(path, wanted.file_size)
    else:
        _make(path, wanted, path, found)


def _fitting(found: Layout, size: int, memmap: bool) -> Layout:
    """The layout that an image gets where it needs more content or another.

    An image whose content is larger stays as it is: a guest that overwrites
    its info block, so that all of the file counts as content, would gain
    another memmap's space with every conversion.
    """
    wanted = planned(size, memmap)
    return found if found.size > wanted.size else wanted


def _make(path: str, layout: Layout, source: str, content: Layout) -> None:
    """Make an image next to the path and rename it once it is whole.

    :param content: where in the source the content lies
    """
    unfinished = begin(path, layout)
    try:
        with open(source, 'rb') as old, open(unfinished, 'r+b') as new:
            _copy(old.fileno(), content.offset, new.fileno(), layout.offset,
                  content.size)
        finish(path, layout)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise


def begin(path: str, layout: Layout) -> str:
    """Begin an image, whose content the caller fills in.

    :returns: the path of its file; :func:`finish` gives it the one it is for
    :raises OSError: for example ENOSPC
    """
    unfinished = path + _UNFINISHED
    # Left there by a crash.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unfinished)
    _check_space(os.path.dirname(path) or '.', layout.file_size, path)
    with open(unfinished, 'xb') as new:
        os.truncate(new.fileno(), layout.file_size)
        if layout.memmap:
            os.pwrite(new.fileno(), info_block(layout), INFO_BLOCK_OFFSET)
    return unfinished


def finish(path: str, layout: Layout) -> None:
    """Give an image that was begun its blocks and its path.

    A crash leaves what was at the path before, or all of the new image.

    :raises OSError: for example ENOSPC
    """
    unfinished = path + _UNFINISHED
    with open(unfinished, 'r+b') as new:
        _take_blocks(new.fileno(), layout.file_size)
        os.fsync(new.fileno())
    os.rename(unfinished, path)
    _sync_directory(os.path.dirname(path) or '.')


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(
    source: int, source_offset: int, target: int, target_offset: int,
    size: int,
) -> None:
    """Copy what is not a hole from one file into an empty one.

    copy_file_range(2) clones where the file system can: what was cloned is
    copied once, when the file takes blocks of its own.
    """
    # A network file system may not know the holes of what is not written.
    os.fsync(source)
    shift = target_offset - source_offset
    # All of them before anything is read: what readahead caches of a part that
    # was never written counts as data (mapping_seek_hole_data() of Linux).
    for start, end in list(_data(source, source_offset, source_offset + size)):
        while start < end:
            copied = _copy_chunk(
                source, start, target, start + shift, end - start)
            if not copied:
                raise OSError(errno.EIO, 'the file has become shorter')
            start += copied


def _data(
    descriptor: int, start: int, end: int,
) -> Iterator[tuple[int, int]]:
    """The parts of a range of a file that are not holes."""
    while start < end:
        try:
            data = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # A hole to the file's end.
                return
            raise
        if data >= end:
            return
        start = min(end, os.lseek(descriptor, data, os.SEEK_HOLE))
        yield data, start


def _copy_chunk(
    source: int, source_offset: int, target: int, target_offset: int,
    size: int,
) -> int:
    """Copy some of a range; returns how many bytes."""
    try:
        return os.copy_file_range(
            source, target, size, source_offset, target_offset)
    except OSError as exc:
        # Not between these files, or not on this file system.
        if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS,
                             errno.EOPNOTSUPP):
            raise
    return os.pwrite(
        target, os.pread(source, min(size, _CHUNK), source_offset),
        target_offset)


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
        _check_space(path, wanted - _allocated(status), path)
        _take_blocks(image.fileno(), wanted)


def fill_holes(path: str) -> int:
    """Allocate the holes of an image, as of one restored as a sparse file.

    Leaves its size and its content alone, also while a guest stores to it.
    So not by posix_fallocate(3), which may read and write back what it
    allocates (NFSv3).

    :returns: the bytes that were not allocated
    :raises OSError: for example ENOSPC; the content has not changed
    """
    status = os.stat(path)
    missing = max(0, status.st_size - _allocated(status))
    # While a guest runs, the file belongs to QEMU's user and nova-compute's
    # may not write to it.
    if missing:
        _check_space(path, missing, path)
        with open(path, 'r+b') as image:
            if _fallocate(image.fileno(), 0, 0, status.st_size):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), path)
    return missing


def _check_space(where: str, size: int, path: str) -> None:
    """Refuse what would take all space that is left for a while.

    :param where: a path on the file system
    :param size: the bytes that a file would take
    :param path: the file
    :raises OSError: ENOSPC
    """
    if size > available(where):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


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


def view(path: str) -> str:
    """Another name of an image, for what may only read it.

    AppArmor knows files by their names, and libvirt's helper denies all writes
    to the file of a read-only disk, also those that it allows elsewhere
    (virt-aa-helper.c, vah_add_path()).

    :returns: a hard link, which is made if there is none; the path itself
        where none can be made, as on some network file systems, or of a file
        that another user owns (proc(5), fs.protected_hardlinks)
    """
    name = path + _VIEW
    if _same_file(path, name):
        return name
    unfinished = name + _UNFINISHED
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        os.link(path, unfinished)
        # In place of a link to an image that this one has replaced.
        os.rename(unfinished, name)
    except OSError as exc:
        LOG.info('%(path)s has no second name for its boot view: %(reason)s; '
                 'with AppArmor, libvirt denies its guest to write to it',
                 {'path': path, 'reason': exc.strerror})
        return path
    return name


def remove_view(path: str) -> None:
    """Remove what :func:`view` has made, if it has.

    :raises OSError: it cannot be removed
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + _VIEW)


def is_view(path: str) -> bool:
    """Whether a path is one that :func:`view` makes."""
    return path.endswith(_VIEW)


def _same_file(path: str, other: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samefile(path, other)
    return False


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
            f'allocated; a hard reboot of the server allocates the rest')
    return status.st_size


def _allocated(status: os.stat_result) -> int:
    """The bytes that the file takes on its file system."""
    # st_blocks counts 512 bytes whatever the file system's block size is.
    return status.st_blocks * 512
