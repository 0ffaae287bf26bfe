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

"""Device metadata: where the guest finds a disk that the user has tagged."""

from __future__ import annotations

from collections.abc import Callable
import itertools
import typing as ty

from nova import block_device
from nova import objects
from nova.virt import driver
from nova.virt.libvirt import config as vconfig

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import volumes

_PMEM = f'/dev/{domain.PMEM}'


def with_fake_dax_disks(
    metadata: objects.InstanceDeviceMetadata | None,
    guest: vconfig.LibvirtConfigGuest,
    bdms: objects.BlockDeviceMappingList,
    bus: Callable[[vconfig.LibvirtConfigGuestDevice], ty.Any],
) -> objects.InstanceDeviceMetadata | None:
    """Give tagged disks on fake DAX the address of their pmem device.

    LibvirtDriver._build_device_metadata gives the root disk that of its boot
    view, and the other disks none.

    :param metadata: as LibvirtDriver makes it, None for no devices
    :param guest: the guest, as libvirt runs it
    :param bdms: the instance's
    :param bus: makes the metadata of a device's bus, as
        LibvirtDriver._prepare_device_bus
    """
    devices = list(metadata.devices) if metadata else []
    for number, (fake_dax_disk, device) in enumerate(
            domain.fake_dax_disks(guest)):
        bdm = _mapping(fake_dax_disk.id, bdms)
        if bdm is None or not bdm.tag:
            continue
        devices = [other for other in devices
                   if getattr(other, 'tags', None) != [bdm.tag]]
        found = objects.DiskMetadata(
            tags=[bdm.tag], path=f'{_PMEM}{number}', bus=bus(device))
        if fake_dax_disk.id.volume:
            # By which Nova removes it when the volume is detached.
            found.serial = fake_dax_disk.id.volume
        devices.append(found)
    return (objects.InstanceDeviceMetadata(devices=devices)
            if devices else None)


def _mapping(
    disk_id: disk.DiskId, bdms: objects.BlockDeviceMappingList,
) -> objects.BlockDeviceMapping | None:
    """The mapping of a disk, None if there is none.

    Ephemeral disks have their numbers in the order of their mappings
    (nova.virt.libvirt.blockinfo.get_disk_mapping).
    """
    of_role = [
        bdm for bdm in bdms
        if (bdm.volume_id == disk_id.volume if disk_id.volume
            else bdm.is_root if disk_id.role == disk.ROOT
            else block_device.new_format_is_ephemeral(bdm))]
    return of_role[disk_id.index] if disk_id.index < len(of_role) else None


def name_volumes(
    block_device_info: dict[str, ty.Any] | None,
    guest: vconfig.LibvirtConfigGuest,
) -> None:
    """Name the volumes as a guest that is about to start numbers them.

    But the root volume, whose name Nova keeps in the instance, too. Each start
    may number them otherwise: when some were attached or detached before.

    :param block_device_info: of nova.virt.driver.get_block_device_info; its
        mappings are changed and saved
    :param guest: as domain.convert leaves it
    """
    names = {found.id.volume: f'{_PMEM}{number}' for number, (found, _device)
             in enumerate(domain.fake_dax_disks(guest))}
    for mapping in driver.block_device_info_get_mapping(block_device_info):
        name = names.get(volumes.volume_id(mapping))
        if name and mapping.get('boot_index') != 0 and (
                mapping['mount_device'] != name):
            mapping['mount_device'] = name
            mapping.save()


def forget_names(
    block_device_info: dict[str, ty.Any] | None, first: int | None,
) -> bool:
    """Name the ephemeral disks as the guest does; take the others' names.

    Nova has numbered all disks of a bus, but those on fake DAX leave it, and
    the guest numbers the rest: the EC2 metadata would call swap /dev/vdc
    where the guest has it as /dev/vdb. A volume loses its name, too; if it is
    on fake DAX, :func:`name_volumes` gives it one when the guest starts.

    :param block_device_info: of nova.virt.driver.get_block_device_info;
        changed. nova.virt.libvirt.blockinfo.default_device_names names what
        has no name.
    :param first: the number of the first pmem that is an ephemeral disk, None
        if these are ordinary disks
    :returns: whether names were wrong; if not, nothing was changed
    """
    ephemerals = driver.block_device_info_get_ephemerals(block_device_info)
    pmems = ([f'{_PMEM}{first + number}' for number in range(len(ephemerals))]
             if first is not None else [])
    names = [bdm['device_name'] or '' for bdm in ephemerals]
    of_volumes = [
        bdm['mount_device'] or '' for bdm in
        driver.block_device_info_get_mapping(block_device_info)]
    if not block_device_info or not any(
            name.startswith(_PMEM) for name in of_volumes) and pmems == [
            name for name in names if name.startswith(_PMEM)]:
        return False
    for bdm in itertools.chain(
            block_device_info['image'], ephemerals,
            filter(None, [block_device_info['swap']]),
            block_device_info['block_device_mapping']):
        bdm['mount_device' if 'mount_device' in bdm else 'device_name'] = None
    for bdm, name in zip(ephemerals, pmems):
        # blockinfo would not know the bus of that name.
        bdm.update(device_name=name, disk_bus='virtio')
    return True
