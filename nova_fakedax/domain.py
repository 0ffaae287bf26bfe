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

"""Disks on fake DAX in a domain, as Nova's LibvirtConfig objects.

As in nova.virt.libvirt.config: objects to XML and back. The alias of a device
says which disk it is, so that a domain can be read back by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
import dataclasses
import os
import string
import typing as ty

from lxml import etree
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import host as libvirt_host
from oslo_config import cfg
from oslo_utils import units

from nova_fakedax import disk
from nova_fakedax import layout
from nova_fakedax import spec
from nova_fakedax import volumes

#: The serial number of the read-only view of the root disk's file, by which
#: firmware and GRUB read the kernel.
BOOT_VIEW_SERIAL = 'fakedax-boot'
#: Its alias, where Nova's own would be that of a volume.
BOOT_VIEW_ALIAS = f'{disk.ALIAS_PREFIX}boot'


#: What Linux calls the disks, before their numbers.
PMEM = 'pmem'

#: The buses that it can be on: libvirt has no read-only disks on ide and sata,
#: and SeaBIOS does not boot from it on usb.
_BOOT_VIEW_BUSES = ('virtio', 'scsi')

#: Security models by which libvirt labels files. AppArmor has rules instead.
_LABELS = ('dac', 'selinux')
_APPARMOR = 'apparmor'

#: Devices that libvirt adds to a guest by itself and that take a PCIe root
#: port: the controllers of USB and of virtio-serial, and the balloon.
_IMPLICIT_DEVICES = 3

#: Devices of Nova's that take no port.
_NOT_ON_PCI = (
    vconfig.LibvirtConfigGuestSerial, vconfig.LibvirtConfigGuestConsole,
    vconfig.LibvirtConfigGuestInput, vconfig.LibvirtConfigGuestGraphics,
    vconfig.LibvirtConfigGuestPCIeRootController,
    vconfig.LibvirtConfigGuestPCIeRootPortController)


@dataclasses.dataclass(frozen=True)
class Spare:
    """Room in a guest for volumes that are attached while it runs.

    :ivar count: how many they can be
    :ivar size: their KiB together
    """

    count: int = 0
    size: int = 0


class LibvirtConfigGuestVirtioPMEM(vconfig.LibvirtConfigGuestDevice):
    """``<memory model='virtio-pmem'>``.

    https://libvirt.org/formatdomain.html#memory-devices

    :ivar source_path: the backing file
    :ivar target_size: its size in KiB
    :ivar alias: ``ua-fakedax-...``
    :ivar device_addr: where libvirt put it on the PCI bus, None if it has not
    """

    def __init__(self) -> None:
        super().__init__(root_name='memory')
        self.source_path: str = ''
        self.target_size: int = 0
        self.alias: str = ''
        self.device_addr: (
            vconfig.LibvirtConfigGuestDeviceAddressPCI | None) = None

    def format_dom(self) -> ty.Any:
        memory = super().format_dom()
        memory.set('model', 'virtio-pmem')
        memory.set('access', 'shared')
        source = etree.SubElement(memory, 'source')
        source.append(self._text_node('path', self.source_path))
        target = etree.SubElement(memory, 'target')
        target.append(
            self._text_node('size', self.target_size, unit='KiB'))
        etree.SubElement(memory, 'alias', name=self.alias)
        return memory

    def parse_dom(self, xmldoc: etree._Element) -> None:
        super().parse_dom(xmldoc)
        self.source_path = xmldoc.findtext('./source/path', '')
        self.target_size = int(xmldoc.findtext('./target/size', '0'))
        alias = xmldoc.find('./alias')
        if alias is not None:
            self.alias = alias.get('name', '')
        address = xmldoc.find("./address[@type='pci']")
        if address is not None:
            self.device_addr = vconfig.LibvirtConfigGuestDeviceAddressPCI()
            self.device_addr.parse_dom(address)


class LibvirtConfigGuestSlicedDisk(vconfig.LibvirtConfigGuestDisk):
    """A ``<disk>`` that is a part of a file, the content of an image.

    https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms,
    ``slices`` and ``seclabel``

    :ivar slice_offset: where the part begins, in bytes
    :ivar slice_size: its bytes, 0 for all of the file
    :ivar unlabelled: the security models by which libvirt does not label the
        file for this disk, as another device does
    """

    def __init__(self, **kwargs: ty.Any) -> None:
        super().__init__(**kwargs)
        self.slice_offset: int = 0
        self.slice_size: int = 0
        self.unlabelled: Sequence[str] = ()

    @classmethod
    def of(
        cls, device: vconfig.LibvirtConfigGuestDisk, content: layout.Layout,
    ) -> 'LibvirtConfigGuestSlicedDisk':
        """The same disk, of a file with this layout."""
        sliced = cls()
        sliced.__dict__.update(vars(device))
        if content.memmap:
            sliced.slice_offset = content.offset
            sliced.slice_size = content.size
        return sliced

    def format_dom(self) -> ty.Any:
        disk_node = super().format_dom()
        source = disk_node.find('./source')
        for model in self.unlabelled:
            etree.SubElement(source, 'seclabel', model=model, relabel='no')
        if self.slice_size:
            slices = etree.SubElement(source, 'slices')
            etree.SubElement(
                slices, 'slice', type='storage', offset=str(self.slice_offset),
                size=str(self.slice_size))
        return disk_node


class LibvirtConfigGuestEmulator(vconfig.LibvirtConfigGuestDevice):
    """``<emulator>``: the binary that runs the domain."""

    def __init__(self, path: str) -> None:
        super().__init__(root_name='emulator')
        self.path = path

    def format_dom(self) -> ty.Any:
        return self._text_node('emulator', self.path)


def parse_virtio_pmems(
    guest: vconfig.LibvirtConfigGuest, xmldoc: etree._Element,
) -> None:
    """Add to a guest the devices that Nova's parser leaves out.

    :param guest: as nova.virt.libvirt.config.LibvirtConfigGuest.parse_dom
        has read it; changed
    :param xmldoc: the ``<domain>``
    """
    for node in xmldoc.findall("./devices/memory[@model='virtio-pmem']"):
        device = LibvirtConfigGuestVirtioPMEM()
        device.parse_dom(node)
        guest.add_device(device)


def parse_slices(
    guest: vconfig.LibvirtConfigGuest, xmldoc: etree._Element,
) -> None:
    """Give a guest's disks the slices that Nova's parser leaves out.

    :param guest: as of :func:`parse_virtio_pmems`
    :param xmldoc: the ``<domain>``
    """
    nodes: list[ty.Any] = xmldoc.findall('./devices/disk')
    slices = {
        node.find('./target').get('dev'): part for node in nodes
        for part in node.findall("./source/slices/slice[@type='storage']")}
    for index, device in enumerate(guest.devices):
        if isinstance(device, vconfig.LibvirtConfigGuestDisk) and (
                device.target_dev in slices):
            part = slices[device.target_dev]
            guest.devices[index] = LibvirtConfigGuestSlicedDisk.of(
                device, layout.Layout(
                    int(part.get('offset')), int(part.get('size'))))


def fake_dax_disks(
    guest: vconfig.LibvirtConfigGuest,
) -> list[tuple[disk.FakeDaxDisk, LibvirtConfigGuestVirtioPMEM]]:
    """The disks on fake DAX of a guest, with their devices, in order.

    As :func:`convert` has put them into the domain, and as the guest numbers
    them: the root, a volume or a file, the other files, the other volumes.
    libvirt adds those that are attached later at the end.
    """
    found = []
    for device in guest.devices:
        if isinstance(device, LibvirtConfigGuestVirtioPMEM):
            disk_id = disk.DiskId.from_alias(device.alias)
            if disk_id is not None:
                found.append((
                    disk.FakeDaxDisk(disk_id, device.source_path,
                                     device.target_size * units.Ki),
                    device))
    attached = [pair for pair in found if pair[0].id.role == disk.VOLUME]
    roots = attached[:1] if found[:1] == attached[:1] else []
    files = sorted((pair for pair in found if pair not in attached),
                   key=lambda pair: pair[0])
    return [*roots, *files, *attached[len(roots):]]


def spare(conf: cfg.ConfigOpts, asked: spec.FakeDaxSpec) -> Spare:
    """The room that guests of a flavor keep.

    :param conf: nova's configuration, with ``[fakedax]``
    """
    if not asked.wants_volume(root=False):
        return Spare()
    return Spare(conf.fakedax.spare_volumes,
                 conf.fakedax.spare_volumes_gib * units.Gi // units.Ki)


def root_disk(guest: vconfig.LibvirtConfigGuest) -> disk.FakeDaxDisk | None:
    """The root disk of a guest, None if it is no file on fake DAX."""
    for fake_dax_disk, _device in fake_dax_disks(guest):
        if fake_dax_disk.id.role == disk.ROOT:
            return fake_dax_disk
    return None


def fake_dax_volumes(guest: vconfig.LibvirtConfigGuest) -> list[
        tuple[disk.FakeDaxDisk, LibvirtConfigGuestVirtioPMEM]]:
    """The volumes on fake DAX of a guest, with their devices."""
    return [pair for pair in fake_dax_disks(guest)
            if pair[0].id.role == disk.VOLUME]


def volume_paths(
    host: libvirt_host.Host, instance: objects.Instance,
) -> list[str]:
    """The paths of the volumes on fake DAX of a guest that libvirt knows.

    :param host: the connection to libvirt
    :returns: none if libvirt does not know it
    """
    try:
        guest = host.get_guest(instance).get_config()
    except exception.InstanceNotFound:
        return []
    return [found.path for found, _device in fake_dax_volumes(guest)]


def fake_dax_volume(
    guest: vconfig.LibvirtConfigGuest, volume: str,
) -> tuple[disk.FakeDaxDisk, LibvirtConfigGuestVirtioPMEM] | None:
    """The volume with this ID, None if the guest has none on fake DAX."""
    return next((pair for pair in fake_dax_volumes(guest)
                 if pair[0].id.volume == volume), None)


def with_fake_dax_disks(
    guest: vconfig.LibvirtConfigGuest, infos: list[dict[str, ty.Any]],
) -> list[dict[str, ty.Any]]:
    """What Nova keeps of each disk, with the disks on fake DAX.

    As LibvirtDriver._get_instance_disk_info_from_config makes it of each
    ``<disk>``; sizes are in bytes, and those of the files: with a memmap they
    are larger than the guest's disks, and Nova asks what they take.

    :param infos: of the guest's ordinary disks and its boot view
    """
    found = [
        {'type': 'raw', 'path': fake_dax_disk.path, 'backing_file': '',
         'virt_disk_size': fake_dax_disk.size,
         'disk_size': fake_dax_disk.size, 'over_committed_disk_size': 0}
        for fake_dax_disk, _device in fake_dax_disks(guest)
        # What Nova asks for is not on volumes.
        if fake_dax_disk.id.role != disk.VOLUME]
    if not found:
        return infos
    # A boot view may have the path of the image.
    paths = {info['path'] for info in found}
    return found + [info for info in infos if info['path'] not in paths
                    and not layout.is_view(info['path'])]


def convert(
    guest: vconfig.LibvirtConfigGuest,
    instance_path: str,
    wants: Callable[[str], bool],
    emulator: str | None = None,
    security_models: Collection[str] = (),
    attached: Sequence[volumes.Volume] = (),
    spare: Spare = Spare(),
) -> None:
    """Turn ordinary disks of a guest into disks on fake DAX.

    :param guest: as LibvirtDriver._get_guest_config makes it; changed
    :param instance_path: the directory of the instance's own disks
    :param wants: whether the flavor puts the disk with this path on fake DAX
    :param emulator: the QEMU binary to run it, None for libvirt's choice
    :param security_models: of libvirt on this host
    :param attached: the volumes that the flavor puts on fake DAX, connected,
        the root volume first
    :param spare: room to leave for more of them
    :raises nova.exception.InvalidInput: a device or setting of the guest
        is incompatible with fake DAX
    :raises nova_fakedax.volumes.VolumeRefused: a volume cannot be mapped
    :raises nova_fakedax.layout.InvalidLayout: a backing file is missing or
        cannot be mapped
    """
    files = sorted(
        _convert_file(guest, device, security_models)
        for device in _wanted_disks(guest, instance_path, wants))
    roots = [_convert_volume(guest, volume, security_models)
             for volume in attached if volume.root]
    others = [_convert_volume(guest, volume, security_models)
              for volume in attached if not volume.root]
    disks = [*roots, *files, *others]
    if not disks and not spare.count:
        return
    _refuse_conflicts(guest)
    _add_numa_cell(guest)
    guest.max_memory_size = guest.memory + spare.size
    guest.max_memory_slots = len(disks) + spare.count
    for fake_dax_disk in disks:
        pmem = device_of(fake_dax_disk)
        guest.max_memory_size += pmem.target_size
        guest.add_device(pmem)
    if spare.count:
        _add_root_ports(guest, spare.count)
    if emulator:
        guest.add_device(LibvirtConfigGuestEmulator(emulator))


def device_of(
    fake_dax_disk: disk.FakeDaxDisk,
) -> LibvirtConfigGuestVirtioPMEM:
    """The device by which a guest sees a disk."""
    pmem = LibvirtConfigGuestVirtioPMEM()
    pmem.source_path = fake_dax_disk.path
    pmem.target_size = fake_dax_disk.size // units.Ki
    pmem.alias = fake_dax_disk.id.alias
    return pmem


def _convert_file(
    guest: vconfig.LibvirtConfigGuest,
    device: vconfig.LibvirtConfigGuestDisk,
    security_models: Collection[str],
) -> disk.FakeDaxDisk:
    """Take a disk that is a file of the instance off the guest.

    Leaves its boot view, if it needs one.
    """
    disk_id = disk.DiskId.from_path(device.source_path)
    assert disk_id is not None  # Otherwise it would not be wanted.
    found = disk.FakeDaxDisk(disk_id, device.source_path,
                             layout.mapped_size(device.source_path))
    # Also where it is not used: of a device whose info block is not valid
    # the guest's kernel takes all for the content.
    content = _content_of(device)
    guest.devices.remove(device)
    if disk_id.role == disk.ROOT and not guest.os_kernel:
        _add_boot_view(guest, content, layout.view(device.source_path),
                       security_models)
    return found


def _convert_volume(
    guest: vconfig.LibvirtConfigGuest, volume: volumes.Volume,
    security_models: Collection[str],
) -> disk.FakeDaxDisk:
    """Do the same with a volume."""
    device = volume_disk(guest, volume.id)
    found = volumes.of_disk_config(device)
    volumes.fill_holes(found)
    content = LibvirtConfigGuestSlicedDisk.of(
        device, volumes.read(device.source_path))
    guest.devices.remove(device)
    if volume.root and not guest.os_kernel:
        # Nova's alias is that of the volume, which this is not.
        content.alias = BOOT_VIEW_ALIAS
        _add_boot_view(guest, content, volumes.view(
            found, _APPARMOR in security_models), security_models)
    return found


def volume_disk(
    guest: vconfig.LibvirtConfigGuest, volume: str,
) -> vconfig.LibvirtConfigGuestDisk:
    """The ``<disk>`` of a volume, as LibvirtDriver has made it.

    LibvirtBaseVolumeDriver.get_config gives it the volume's ID for a serial
    number.

    :raises nova.exception.DiskNotFound: it has none
    """
    for device in guest.devices:
        if isinstance(device, vconfig.LibvirtConfigGuestDisk) and (
                device.serial == volume):
            return device
    raise exception.DiskNotFound(location=volume)


def _add_root_ports(guest: vconfig.LibvirtConfigGuest, spare: int) -> None:
    """Keep PCIe root ports free, on the machine type that has them.

    libvirt puts each device on a port of its own, and adds as many as there
    are devices. To those of ``[libvirt]num_pcie_ports`` so many are added that
    the spare ones are left.
    """
    if 'q35' not in (guest.os_mach_type or ''):
        return
    ports = taken = 0
    root = False
    for device in guest.devices:
        root |= isinstance(
            device, vconfig.LibvirtConfigGuestPCIeRootController)
        ports += isinstance(
            device, vconfig.LibvirtConfigGuestPCIeRootPortController)
        taken += not isinstance(device, _NOT_ON_PCI)
    if not root:
        guest.add_device(vconfig.LibvirtConfigGuestPCIeRootController())
    for _port in range(taken + _IMPLICIT_DEVICES + spare - ports):
        guest.add_device(vconfig.LibvirtConfigGuestPCIeRootPortController())


def convert_rescue(
    guest: vconfig.LibvirtConfigGuest,
    instance_path: str,
    wants: Callable[[str], bool],
    attached: Sequence[volumes.Volume] = (),
) -> None:
    """Let a rescued guest see the content of its disks on ordinary disks.

    Any rescue image will do: it need not know fake DAX. Nova gives a rescued
    guest its volumes, or none of them.

    The parameters are those of :func:`convert`.

    :raises nova_fakedax.layout.InvalidLayout: an info block is not valid
    """
    ids = {volume.id for volume in attached}
    files = _wanted_disks(guest, instance_path, wants)
    for index, device in enumerate(guest.devices):
        if device in files:
            ordinary = _content_of(device)
        elif isinstance(device, vconfig.LibvirtConfigGuestDisk) and (
                device.serial in ids):
            ordinary = LibvirtConfigGuestSlicedDisk.of(
                device, volumes.read(device.source_path))
        else:
            continue
        guest.devices[index] = ordinary
        if ordinary.target_dev.startswith(PMEM):
            ordinary.target_dev = _free_name(guest)


def _free_name(guest: vconfig.LibvirtConfigGuest) -> str:
    """A name that no virtio disk of the guest has."""
    used = {getattr(device, 'target_dev', None) for device in guest.devices}
    return next(name for name in map('vd{}'.format, string.ascii_lowercase)
                if name not in used)


def _wanted_disks(
    guest: vconfig.LibvirtConfigGuest, instance_path: str,
    wants: Callable[[str], bool],
) -> list[vconfig.LibvirtConfigGuestDisk]:
    """The ordinary disks that the flavor puts on fake DAX."""
    return [
        device for device in guest.devices
        if isinstance(device, vconfig.LibvirtConfigGuestDisk) and
        device.source_type == 'file' and device.source_path and
        os.path.dirname(device.source_path) == instance_path and
        wants(device.source_path)]


def _content_of(
    device: vconfig.LibvirtConfigGuestDisk,
) -> LibvirtConfigGuestSlicedDisk:
    """The disk, without what comes before the content in its file."""
    return LibvirtConfigGuestSlicedDisk.of(
        device, layout.read(device.source_path))


def _add_boot_view(
    guest: vconfig.LibvirtConfigGuest,
    device: LibvirtConfigGuestSlicedDisk,
    path: str, security_models: Collection[str],
) -> None:
    """Let firmware, which has no pmem driver, read the kernel from the file.

    The boot view is the first disk, so that ``<boot dev='hd'/>`` means it.
    libvirt labels the file for the pmem device alone: a label for the view
    could conflict with that, and keeps the file from its owner afterwards.

    :param device: the content
    :param path: the name of the file, or block device, for the view
    :param security_models: as for :func:`convert`
    :raises nova.exception.InvalidInput: it cannot be the first
    """
    if device.target_bus not in _BOOT_VIEW_BUSES:
        _move_to_virtio(guest, device)
    device.source_path = path
    device.unlabelled = [
        model for model in security_models if model in _LABELS]
    device.readonly = True
    device.serial = BOOT_VIEW_SERIAL
    # The guest cannot write to it, and so cannot discard.
    device.driver_discard = None
    first = next(
        (index for index, other in enumerate(guest.devices)
         if isinstance(other, vconfig.LibvirtConfigGuestDisk)),
        len(guest.devices))
    guest.devices.insert(first, device)


def _move_to_virtio(
    guest: vconfig.LibvirtConfigGuest,
    device: vconfig.LibvirtConfigGuestDisk,
) -> None:
    """Put the boot view on a bus of which all firmware can boot.

    The guest does not use it, whatever bus the image asks for.

    :raises nova.exception.InvalidInput: another disk has its name; libvirt
        sorts the disks of a bus by their names, so no other would come first
    """
    wanted = device.target_bus
    device.target_bus, device.target_dev = 'virtio', 'vda'
    if any(getattr(other, 'target_dev', None) == device.target_dev
           for other in guest.devices):
        raise exception.InvalidInput(reason=_(
            "the image's property hw_disk_bus is '%(bus)s', on which no "
            "guest with its root disk on fake DAX boots, and another virtio "
            "disk is %(name)s; allowed: %(allowed)s") % {
                'bus': wanted, 'name': device.target_dev,
                'allowed': ', '.join(f"'{bus}'" for bus in _BOOT_VIEW_BUSES)})


def _add_numa_cell(guest: vconfig.LibvirtConfigGuest) -> None:
    """State how much of the domain's memory is RAM.

    libvirt requires a NUMA cell with maxMemory. Without one, libvirt 11.3
    takes the images' size out of the RAM.
    """
    if guest.cpu is None:
        guest.cpu = vconfig.LibvirtConfigGuestCPU()
    if guest.cpu.numa is not None:
        return
    cell = vconfig.LibvirtConfigGuestCPUNUMACell()
    cell.id = 0
    cell.cpus = set(range(guest.vcpus))
    cell.memory = guest.memory
    guest.cpu.numa = vconfig.LibvirtConfigGuestCPUNUMA()
    guest.cpu.numa.cells.append(cell)


def _refuse_conflicts(guest: vconfig.LibvirtConfigGuest) -> None:
    """Refuse what would pin, lock or encrypt the images.

    spec.CONFLICTS does not see it all: devices also come from ports, images
    and the host's configuration.
    """
    conflict = None
    for device in guest.devices:
        if isinstance(device, vconfig.LibvirtConfigGuestHostdev):
            conflict = 'a passed-through device'
        elif isinstance(device, vconfig.LibvirtConfigGuestInterface):
            if device.net_type in ('hostdev', 'vdpa'):
                conflict = f'a network interface of type {device.net_type}'
        elif isinstance(device, vconfig.LibvirtConfigGuestVPMEM):
            conflict = 'a vPMEM device (hw:pmem)'
    if guest.membacking is not None and guest.membacking.locked:
        conflict = 'locked memory'
    if guest.launch_security is not None:
        conflict = 'encrypted memory'
    if conflict:
        raise exception.InvalidInput(reason=_(
            '%s is incompatible with disks on fake DAX') % conflict)
