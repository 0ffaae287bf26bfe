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

"""A Cinder volume as a disk on fake DAX.

Nova's volume drivers and os-brick connect volumes. Here it is said which of an
instance's volumes the flavor wants on fake DAX, what cannot be mapped into a
guest and why, and what a connected volume is: a path, and the bytes there.

The content of a volume stays at byte 0, since the next server that it is
attached to may have an ordinary flavor. So the struct pages are in the guest's
RAM, unless the volume's user gave it a memmap (``ndctl create-namespace
--mode=fsdax --map=dev``): :mod:`.layout` reads that. Nothing is ever written
to a volume here.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import errno
import os
import typing as ty

from nova import exception
from nova.i18n import _
from nova import utils
from nova.virt import block_device
from nova.virt import driver
from nova.virt.libvirt import config as vconfig
from os_brick import encryptors
from oslo_log import log as logging
from oslo_utils import units

from nova_fakedax import disk
from nova_fakedax import layout
from nova_fakedax import privsep
from nova_fakedax import spec

LOG = logging.getLogger(__name__)

#: The only way to connect a volume that gives no path to map.
_LIBRBD = 'rbd'


class VolumeRefused(exception.InvalidInput):
    """A volume cannot be on fake DAX; says which, and why.

    An InvalidInput, so that ComputeManager tries no other host.
    """

    msg_fmt = _('Volume %(volume)s cannot be on fake DAX: %(reason)s')


@dataclasses.dataclass(frozen=True)
class Volume:
    """A volume of an instance, as Nova's block device mapping has it.

    :ivar id: Cinder's, and the serial number of its ``<disk>``
    :ivar root: whether the instance boots from it
    :ivar connection_info: how to connect it, as Cinder says
    :ivar size: its GiB, None if the mapping does not say
    """

    id: str
    root: bool
    connection_info: Mapping[str, ty.Any] = dataclasses.field(
        default_factory=dict, compare=False)
    size: int | None = dataclasses.field(default=None, compare=False)


def attached(block_device_info: ty.Any) -> list[Volume]:
    """The volumes of an instance: its root volume, then the others in order.

    :param block_device_info: of nova.virt.driver.get_block_device_info
    """
    return sorted(
        (Volume(
            volume_id(mapping), mapping.get('boot_index') == 0,
            mapping['connection_info'] or {},
            getattr(mapping, 'volume_size', None))
         for mapping in driver.block_device_info_get_mapping(
             block_device_info)),
        key=lambda volume: not volume.root)


def wanted(
    asked: spec.FakeDaxSpec, block_device_info: ty.Any,
) -> list[Volume]:
    """The volumes that a flavor puts on fake DAX, the root volume first.

    :param asked: what the flavor asks for
    :param block_device_info: as for :func:`attached`
    """
    return [volume for volume in attached(block_device_info)
            if asked.wants_volume(volume.root)]


def boots_from_volume(block_device_info: ty.Any) -> bool:
    """Whether an instance boots from a volume.

    :param block_device_info: as for :func:`attached`
    """
    return any(volume.root for volume in attached(block_device_info))


def volume_id(mapping: ty.Any) -> str:
    """The ID of an attached volume, or of one that is about to be.

    :param mapping: one of block_device_info['block_device_mapping']
    """
    return str(block_device.get_volume_id(mapping['connection_info'])
               or getattr(mapping, 'volume_id', ''))


def check_connection(
    volume_id: str, connection_info: Mapping[str, ty.Any],
    encryption: Mapping[str, ty.Any] | None = None,
) -> None:
    """Check, before a volume is connected, that it can be mapped.

    As far as Cinder says how it will be connected. :func:`check_disk` looks
    at what came of it.

    :param connection_info: as Cinder has it
    :param encryption: as LibvirtDriver._get_volume_encryption has it, empty
        or None if the volume is not encrypted
    :raises VolumeRefused: says what of it cannot be mapped
    """
    data = connection_info.get('data') or {}
    kind = connection_info.get('driver_volume_type')
    if kind == _LIBRBD:
        _refuse(volume_id, _(
            'QEMU reads it over the network (librbd); allowed: a backend with '
            'files or block devices'))
    if _qemu_decrypts(encryption or {}):
        _refuse(volume_id, _LUKS)
    if connection_info.get('multiattach'):
        _refuse(volume_id, _MULTIATTACH)
    if data.get('access_mode') == 'ro':
        _refuse(volume_id, _READ_ONLY)
    if data.get('format') not in (None, 'raw'):
        _refuse(volume_id, _not_raw(data['format']))
    if data.get('qos_specs'):
        _refuse(volume_id, _LIMITS)


def _qemu_decrypts(encryption: Mapping[str, ty.Any]) -> bool:
    """Whether QEMU would decrypt a volume, and not dm-crypt of the host.

    Follows nova.virt.libvirt.driver.LibvirtDriver._allow_native_luksv1; volume
    types may still name classes that are gone.
    """
    provider = encryption.get('provider')
    return bool(encryptors.LUKS == (
        encryptors.LEGACY_PROVIDER_CLASS_TO_FORMAT_MAP.get(
            provider, provider)))


# Short: a fault has 255 characters, of which 130 are before these.
_LUKS = _('QEMU decrypts it (LUKS), after what could be mapped; allowed: a '
          'volume type without encryption')
_MULTIATTACH = _('several servers can attach it, each with a page cache; '
                 'allowed: a volume type without multiattach')
_READ_ONLY = _('it is attached read-only, which a mapping is not; allowed: a '
               'volume that can be written')
_LIMITS = _('nothing limits a mapping; allowed: a volume type without limits '
            'for the front end')


def _not_raw(file_format: object) -> str:
    return str(_(
        "its format is '%s'; allowed: 'raw' (snapshots on a backend of files "
        "change it)") % file_format)


def _refuse(volume_id: str | None, reason: str) -> ty.NoReturn:
    raise VolumeRefused(volume=volume_id, reason=reason)


def check_disk(device: vconfig.LibvirtConfigGuestDisk) -> None:
    """Check the finished ``<disk>`` of a volume that has been connected.

    :param device: as LibvirtDriver._get_volume_config makes it
    :raises VolumeRefused: says what of it cannot be mapped
    """
    def refuse(reason: str) -> ty.NoReturn:
        _refuse(device.serial, reason)

    if device.source_type not in ('file', 'block') or not device.source_path:
        refuse(_(
            'QEMU reads it over the network (%(type)s %(protocol)s); allowed: '
            'a backend with files or block devices') % {
                'type': device.source_type,
                'protocol': device.source_protocol or ''})
    if device.source_device not in (None, 'disk'):
        refuse(_("its device type is '%s'; allowed: 'disk'") %
               device.source_device)
    if device.driver_format != 'raw':
        refuse(_not_raw(device.driver_format))
    if getattr(device, 'volume_encryption', None):
        refuse(_LUKS)
    if device.shareable:
        refuse(_MULTIATTACH)
    if device.readonly:
        refuse(_READ_ONLY)


def of_disk_config(
    device: vconfig.LibvirtConfigGuestDisk,
) -> disk.FakeDaxDisk:
    """The disk that a connected volume is, of its finished ``<disk>``.

    :param device: as for :func:`check_disk`
    :raises VolumeRefused: it cannot be mapped
    :raises nova_fakedax.layout.InvalidLayout: it cannot be read here
    """
    check_disk(device)
    size, block = _head(device.source_path)
    try:
        layout.of_head(device.source_path, size, block)
    except layout.InvalidLayout as exc:
        # The path may be all that fits a fault.
        _refuse(device.serial, str(exc).replace(device.source_path, 'it'))
    if not size or size % layout.ALIGNMENT:
        # The guest's kernel needs whole sections. Less would cut off what an
        # ordinary server has stored there, more would be outside of it.
        _refuse(device.serial, _(
            'it has %(size)d bytes; allowed: a multiple of %(multiple)d '
            'bytes') % {'size': size, 'multiple': layout.ALIGNMENT})
    return disk.FakeDaxDisk(
        disk.DiskId.of_volume(device.serial), device.source_path, size)


def read(path: str) -> layout.Layout:
    """The layout of a connected volume: its size, and a memmap of its user's.

    :param path: of a file or a block device
    :raises nova_fakedax.layout.InvalidLayout: it cannot be read, or has an
        info block that is not valid
    """
    return layout.of_head(path, *_head(path))


def _head(path: str) -> tuple[int, bytes]:
    try:
        size, block = privsep.run(layout.head, privileged_head, path)
    except OSError as exc:
        raise layout.InvalidLayout(f'{path} cannot be read: {exc.strerror}')
    return size, block


@privsep.fakedax_pctxt.entrypoint
def privileged_head(path: str) -> tuple[int, bytes]:
    return layout.head(path)


def view(volume: disk.FakeDaxDisk, confined: bool) -> str:
    """A name of a root volume for its boot view.

    As :func:`layout.view` says, AppArmor needs another name; other security
    models do not. A hard link next to a volume's file would keep its blocks
    when Cinder deletes it, so it is only made where it is needed, and
    :func:`forget_view` removes it when the volume is disconnected.

    :param confined: whether AppArmor confines guests
    :raises VolumeRefused: another name is needed, and none can be made
    """
    if not confined:
        return volume.path
    name = (layout.view(volume.path) if os.path.isfile(volume.path)
            else volume.path)
    if name == volume.path:
        _refuse(volume.id.volume, _(
            'AppArmor confines guests, and the view that firmware boots from '
            'needs a second name; allowed: an image with kernel_id'))
    return name


def forget_view(connection_info: Mapping[str, ty.Any]) -> None:
    """Remove what :func:`view` has made of a volume, if anything."""
    path = (connection_info.get('data') or {}).get('device_path')
    try:
        if path and os.path.isfile(path):
            layout.remove_view(path)
    except OSError as exc:
        LOG.warning('Cannot remove the second name of the volume %(path)s, '
                    'which keeps its blocks when it is deleted: %(reason)s',
                    {'path': path, 'reason': exc.strerror})


def without_memmap(volumes: Iterable[disk.FakeDaxDisk]) -> list[int]:
    """The bytes of the volumes whose struct pages the guest has in its RAM."""
    return [volume.size for volume in volumes if not read(volume.path).memmap]


def sizes_without_memmap(attached: Iterable[Volume]) -> list[int]:
    """The same of volumes that may not be connected here: at most so many.

    The size is Cinder's of one that is not, or that cannot be read.
    """
    sizes = []
    for volume in attached:
        path = (volume.connection_info.get('data') or {}).get('device_path')
        try:
            found = read(path) if path else None
        except layout.InvalidLayout:
            found = None
        if found is None:
            sizes.append((volume.size or 0) * units.Gi)
        elif not found.memmap:
            sizes.append(found.file_size)
    return sizes


def fill_holes(volume: disk.FakeDaxDisk) -> None:
    """Allocate what a volume that is a file lacks of its size.

    The content stays as it is. A store to a hole that a local file system
    cannot fill ends QEMU by SIGBUS; one that cannot allocate space (NFS before
    4.2) reports that by a failed flush instead.

    :raises VolumeRefused: there is not enough space, or the file cannot be
        opened for writing
    """
    if not os.path.isfile(volume.path):
        return
    try:
        if filled := utils.tpool_wrap(layout).fill_holes(volume.path):
            LOG.info('Allocated %(size)d bytes of the volume %(path)s, which '
                     'was a sparse file',
                     {'size': filled, 'path': volume.path})
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            LOG.info('The file system of the volume %(path)s cannot allocate '
                     'its holes', {'path': volume.path})
            return
        _refuse(volume.id.volume, _(
            'its file is sparse and cannot be allocated: %s') % exc.strerror)
