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

"""The copies of a server's disks that a resize or cold migration makes.

Nova's source host copies each file as it is. Here it makes the copy as the new
flavor needs it: with the layout of a disk on fake DAX, or as the plain raw
file of an ordinary disk, which the destination turns into what its
configuration wants. The files that were copied stay as they are for a revert.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import contextvars
import dataclasses
import functools
import os
import typing as ty

from nova.privsep import qemu
from nova import utils
from nova.virt.libvirt import imagebackend as nova_imagebackend
from oslo_concurrency import processutils
from oslo_serialization import jsonutils
from oslo_utils import fileutils
from oslo_utils import units

from nova_fakedax import imagebackend
from nova_fakedax import layout
from nova_fakedax import spec

#: Where Nova keeps the format of each disk of an instance
#: (nova.virt.libvirt.imagebackend.Image.resolve_driver_format).
_FORMATS = 'disk.info'

#: A copy for another host, next to what it is made of.
_TO_SEND = '.to-send'


@dataclasses.dataclass(frozen=True)
class _Copy:
    """How a file is copied.

    :ivar make: makes the copy, of the second path at the first
    :ivar converts: whether the destination could not use the file as it is
    """

    make: Callable[[str, str], None]
    converts: bool


#: By the paths that the files have before and after.
_copies: contextvars.ContextVar[Mapping[str, _Copy]] = (
    contextvars.ContextVar('fakedax_copies', default={}))


def concerns(*flavors: ty.Any) -> bool:
    """Whether one of these flavors has disks on fake DAX, or means to."""
    return any(flavor and spec.given(flavor) for flavor in flavors)


@contextlib.contextmanager
def copies(
    instance: ty.Any, flavor: ty.Any,
    disk_infos: Collection[Mapping[str, ty.Any]],
) -> Iterator[None]:
    """A block in which Nova copies the disks of an instance.

    :param instance: a nova.objects.Instance
    :param flavor: the nova.objects.Flavor that the copies are for
    :param disk_infos: of the disks, as of
        LibvirtDriver._get_instance_disk_info
    """
    token = _copies.set(_planned(
        spec.FakeDaxSpec.from_instance(instance),
        spec.FakeDaxSpec.from_flavor(flavor), flavor, disk_infos))
    try:
        yield
    finally:
        _copies.reset(token)


def _planned(
    old: spec.FakeDaxSpec, new: spec.FakeDaxSpec, flavor: ty.Any,
    disk_infos: Collection[Mapping[str, ty.Any]],
) -> dict[str, _Copy]:
    planned = {}
    for info in disk_infos:
        path = info['path']
        # Others stay as large as they are.
        size = (flavor.root_gb * units.Gi
                if os.path.basename(path) == 'disk' else 0)
        if old.wants(path) and new.wants(path):
            planned[path] = _Copy(functools.partial(
                _copy_image, size=size, memmap=new.memmap), False)
        elif old.wants(path):
            planned[path] = _Copy(functools.partial(
                _extract_content, size=size), True)
        elif new.wants(path):
            planned[path] = _Copy(functools.partial(
                _make_image, source_format=info['type'],
                size=max(size, info['virt_disk_size']),
                memmap=new.memmap), True)
    if converted := [path for path, copy in planned.items() if copy.converts]:
        planned[os.path.join(os.path.dirname(converted[0]), _FORMATS)] = _Copy(
            functools.partial(_note_raw, paths=converted), True)
    return planned


def to_convert(
    instance: ty.Any, disk_info: str, backend: nova_imagebackend.Backend,
) -> str:
    """The disks that a destination may make qcow2 files of.

    LibvirtDriver.finish_migration does so with each raw disk if use_cow_images
    is on, as it is by default, also where images_type says that disks are raw.

    :param instance: a nova.objects.Instance that was resized
    :param disk_info: as LibvirtDriver.migrate_disk_and_power_off returns it
    :returns: without the disks that are raw on this host, if there are disks
        on fake DAX before or after
    """
    if not concerns(instance.old_flavor, instance.flavor):
        return disk_info
    infos = []
    for info in jsonutils.loads(disk_info):
        name = os.path.basename(info['path'])
        # Asking for an image also notes its format for the guest's XML. Nova
        # notes none of the config drive, which is always raw.
        if name != 'disk.config' and not isinstance(
                backend.by_name(instance, name), nova_imagebackend.Flat):
            infos.append(info)
    dumped: str = jsonutils.dumps(infos)
    return dumped


def copy(
    path: str, source: str, host: str | None,
    send: Callable[[str], None],
) -> bool:
    """Copy a file if it is one of those of :func:`copies`.

    :param path: of the copy
    :param host: where it is, None for this one
    :param send: copies a file to that path on that host
    :returns: whether it was copied
    :raises nova_fakedax.imagebackend.CopyFailed: names the file
    """
    wanted = _copies.get().get(path)
    if not wanted:
        return False
    made = source + _TO_SEND if host else path
    try:
        if host and not wanted.converts:
            send(source)
            return True
        wanted.make(made, source)
        if host:
            send(made)
    except OSError as exc:
        raise imagebackend.CopyFailed(path=source, reason=exc.strerror)
    except processutils.ProcessExecutionError as exc:
        raise imagebackend.CopyFailed(
            path=source, reason=' '.join(str(exc.stderr).split()))
    finally:
        if host:
            fileutils.delete_if_exists(made)
    return True


def _copy_image(path: str, source: str, size: int, memmap: bool) -> None:
    """Copy an image, so that it need not be copied again to make it larger."""
    utils.tpool_wrap(layout).copy(path, source, size, memmap)


def _extract_content(path: str, source: str, size: int) -> None:
    """Make the raw file of an ordinary disk.

    Not less than the size that it will have: a host whose ordinary disks are
    qcow2 cannot resize it before it has made that of it
    (LibvirtDriver.finish_migration).
    """
    utils.tpool_wrap(layout).copy(
        path, source, max(size, layout.read(source).size), False)


def _make_image(
    path: str, source: str, source_format: str, size: int, memmap: bool,
) -> None:
    """Make an image of the file of an ordinary disk.

    :param source_format: as libvirt knows it: the guest may have stored what
        looks like the header of another format
    """
    if source_format == 'raw':
        utils.tpool_wrap(layout).make(path, source, size, memmap)
        return
    with _unfinished(path, layout.planned(size, memmap)) as target:
        try:
            # Follows nova.privsep.qemu.unprivileged_convert_image, which
            # makes the file that it converts to.
            processutils.execute(
                'qemu-img', 'convert', '-n', '--target-is-zero',
                '-t', 'writeback', '-f', source_format, '-O', 'raw',
                source, target, prlimit=qemu.QEMU_IMG_LIMITS)
        except processutils.ProcessExecutionError as exc:
            raise imagebackend.CopyFailed(
                path=source, reason=exc.stderr.strip())


@contextlib.contextmanager
def _unfinished(path: str, planned: layout.Layout) -> Iterator[str]:
    """An image that is at the path once the block has filled it.

    :returns: its content, as QEMU names it
    """
    native = utils.tpool_wrap(layout)
    unfinished = native.begin(path, planned)
    try:
        yield planned.qemu_filename(unfinished)
        native.finish(path, planned)
    finally:
        # After the end there is none.
        fileutils.delete_if_exists(unfinished)


def _note_raw(path: str, source: str, paths: Collection[str]) -> None:
    """Copy the formats of the disks, and note that some are raw now."""
    with open(source) as file:
        formats = jsonutils.loads(file.read())
    formats.update(dict.fromkeys(paths, 'raw'))
    with open(path, 'w') as file:
        file.write(f'{jsonutils.dumps(formats)}\n')
