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

"""Volumes on fake DAX that come to a server that exists, and leave it.

A running guest gets the device of a volume on a spare root port, within the
room that its domain was started with. It cannot give the device back, since
QEMU cannot unplug virtio-pmem. Where the guest does not run, only its
definition changes; each start makes that of Nova's block device mappings.
"""

from __future__ import annotations

import typing as ty

from lxml import etree
from nova.compute import power_state
from nova.compute import task_states
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt import block_device
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from oslo_log import log as logging
from oslo_utils import excutils
from oslo_utils import units

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import hostcache
from nova_fakedax import refusals
from nova_fakedax import spec
from nova_fakedax import volumes

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: The states of a guest that has a QEMU.
_LIVE = (power_state.RUNNING, power_state.PAUSED)

DETACH = 'detach of a volume from a running guest'
EXTEND = 'extension of a volume of a running guest'
SWAP = 'swap or retype of an attached volume'
SNAPSHOT = "snapshot of an attached volume by Nova's help"


class NoRoom(exception.NovaException):
    msg_fmt = _('Fake DAX: volume %(volume)s cannot be attached while the '
                'guest runs: %(reason)s; stop the server, attach the volume '
                'and start it again')


def attach(
    driver: ty.Any, context: nova_context.RequestContext,
    connection_info: dict[str, ty.Any], instance: objects.Instance,
    mountpoint: str, disk_bus: str | None = None,
    device_type: str | None = None,
    encryption: dict[str, ty.Any] | None = None,
) -> None:
    """Attach a volume on fake DAX.

    Follows nova.virt.libvirt.driver.LibvirtDriver.attach_volume. After an
    error the volume is not connected, and ComputeManager gives its attachment
    up.

    :param driver: the LibvirtDriver that runs the guest
    :param connection_info: Cinder's; what connects the volume adds to it
    :raises nova_fakedax.volumes.VolumeRefused: it cannot be mapped
    :raises NoRoom: the running guest cannot take it
    """
    guest = driver._host.get_guest(instance)
    volumes.check_connection(
        block_device.get_volume_id(connection_info), connection_info,
        encryption)
    driver._connect_volume(
        context, connection_info, instance, encryption=encryption)
    try:
        disk_info = blockinfo.get_info_from_bdm(
            instance, CONF.libvirt.virt_type, instance.image_meta, {
                'device_name': mountpoint.rpartition('/')[2],
                'disk_bus': disk_bus, 'device_type': device_type})
        volume = volumes.of_disk_config(
            driver._get_volume_config(connection_info, disk_info))
        _check_ram(instance, guest, volume)
        _plug(driver._host, guest, volume)
    except Exception:
        with excutils.save_and_reraise_exception():
            LOG.exception('Cannot attach a volume as %s', mountpoint,
                          instance=instance)
            driver._disconnect_volume(
                context, connection_info, instance, encryption=encryption)
    try:
        instance.device_metadata = driver._build_device_metadata(
            context, instance)
        instance.save()
    except Exception:
        # The guest has the device, and it cannot be taken from it.
        LOG.exception("Cannot update the metadata of the server's devices",
                      instance=instance)


def _check_ram(
    instance: objects.Instance, guest: libvirt_guest.Guest,
    volume: disk.FakeDaxDisk,
) -> None:
    """Check that the guest's RAM holds the memmap of one more volume.

    :raises nova_fakedax.volumes.VolumeRefused: it does not
    """
    there = [found for found, _device in domain.fake_dax_volumes(
        guest.get_config())]
    try:
        spec.FakeDaxSpec.from_instance(instance).check_volumes_ram(
            instance.flavor, volumes.without_memmap([*there, volume]))
    except spec.InvalidSpec as exc:
        raise volumes.VolumeRefused(
            volume=volume.id.volume, reason=str(exc))


def _plug(
    host: libvirt_host.Host, guest: libvirt_guest.Guest,
    volume: disk.FakeDaxDisk,
) -> None:
    live = guest.get_power_state(host) in _LIVE
    reason = _reason_against(guest.get_xml_desc(), volume.size)
    if reason and live:
        raise NoRoom(volume=volume.id.volume, reason=reason)
    if reason:
        LOG.info('The next start of the guest gives it volume %(volume)s: '
                 '%(reason)s', {'volume': volume.id.volume, 'reason': reason})
        return
    volumes.fill_holes(volume)
    guest.attach_device(
        domain.device_of(volume), persistent=True, live=live)


def _reason_against(xml: str, size: int) -> str:
    """Why a domain has no room for one more device, empty if it has.

    Nova's parser leaves most of it out.

    :param xml: the domain, as libvirt shows it
    :param size: of the device, in bytes
    """
    found = etree.fromstring(xml)
    devices = found.findall('./devices/memory')
    limit = found.find('./maxMemory')
    if limit is None:
        return 'the guest was started without room for one'
    slots = int(limit.get('slots', '0'))
    if len(devices) >= slots:
        return (f"all of the guest's {slots} slots for disks on fake DAX are "
                f'in use; allowed: more of them, by [fakedax]spare_volumes='
                f'{CONF.fakedax.spare_volumes}')
    used = sum(int(memory) for memory in [
        *(cell.get('memory', '0')
          for cell in found.findall('./cpu/numa/cell')),
        *(device.findtext('./target/size', '0') for device in devices)])
    free = max(int(limit.text or 0) - used, 0) * units.Ki
    if size > free:
        return (f'it has {size} bytes; allowed: {free}, with '
                f'[fakedax]spare_volumes_gib='
                f'{CONF.fakedax.spare_volumes_gib}')
    return _reason_against_ports(found)


def _reason_against_ports(xml: etree._Element) -> str:
    """Why there is no root port for a device, empty if there is.

    A machine type without PCI Express needs none. libvirt's error does not
    say what to do.
    """
    ports = {controller.get('index') for controller in xml.findall(
        "./devices/controller[@model='pcie-root-port']")}
    used = {str(int(address.get('bus', '0'), 16)) for address in xml.findall(
        "./devices/*/address[@type='pci']")}
    if xml.find("./devices/controller[@model='pcie-root']") is None or (
            ports - used):
        return ''
    return (f"all of the guest's {len(ports)} PCIe root ports are in use; "
            f'allowed: more of them, by [fakedax]spare_volumes='
            f'{CONF.fakedax.spare_volumes} or [libvirt]num_pcie_ports')


def device_of(
    guest: libvirt_guest.Guest, volume_id: str | None,
    from_persistent_config: bool = False,
) -> domain.LibvirtConfigGuestVirtioPMEM | None:
    """The device of a volume, None if the guest has none on fake DAX.

    :param volume_id: Cinder's
    :param from_persistent_config: as for
        nova.virt.libvirt.guest.Guest.get_device_by_alias
    """
    device: domain.LibvirtConfigGuestVirtioPMEM | None = (
        guest.get_device_by_alias(
            disk.DiskId.of_volume(volume_id).alias,
            domain.LibvirtConfigGuestVirtioPMEM, from_persistent_config)
        if volume_id else None)
    return device


def refuse(
    operation: str, host: libvirt_host.Host, instance: objects.Instance,
    volume_id: str | None, also_off: bool = False,
) -> None:
    """Refuse an operation on a volume that is on fake DAX.

    :param operation: of refusals.REFUSED
    :param volume_id: Cinder's
    :param also_off: also where the guest does not run
    :raises nova_fakedax.refusals.OperationRefused: says why
    """
    try:
        guest = host.get_guest(instance)
    except exception.InstanceNotFound:
        # A live migration to this host has ended, or an evacuation.
        return
    if device_of(guest, volume_id) and (
            also_off or guest.get_power_state(host) in _LIVE):
        raise refusals.refused(operation)


def refuse_detach(
    host: libvirt_host.Host, instance: objects.Instance,
    volume_id: str | None,
) -> None:
    """Refuse to detach a volume from a running guest.

    Before anything is changed: LibvirtDriver.detach_volume takes the device
    out of the definition first. nova.virt.block_device.
    DriverVolumeBlockDevice.driver_detach then tells Cinder that the volume
    stays attached.

    :param volume_id: Cinder's
    :raises nova.exception.DeviceDetachFailed: says why
    """
    try:
        refuse(DETACH, host, instance, volume_id)
    except refusals.OperationRefused as exc:
        raise exception.DeviceDetachFailed(
            device=volume_id, reason=exc.format_message())


def forget(connection_info: ty.Mapping[str, ty.Any]) -> None:
    """Drop what this host has cached of a volume that no guest here has.

    Another host may write to it before it is connected here again, or has
    done so. The pages of a block device go by themselves at its last close;
    those of a file stay as long as the share is mounted.

    :param connection_info: of the volume, while it is connected
    """
    path = (connection_info.get('data') or {}).get('device_path')
    if not path:
        return
    try:
        hostcache.invalidate(path)
    except FileNotFoundError:
        # It is not connected any more.
        return
    except OSError as exc:
        # The device does so, too, when a guest comes in.
        LOG.warning('Cannot drop the cached pages of %(path)s: %(exc)s',
                    {'path': path, 'exc': exc})


def give_up(
    connection_info: ty.Mapping[str, ty.Any], instance: objects.Instance,
) -> None:
    """Leave nothing of a volume on this host that is about to lose it.

    In a live migration the guest boots by the same view at the destination, if
    the volume is a file that both hosts share.

    :param connection_info: as for :func:`forget`
    """
    forget(connection_info)
    if instance.task_state != task_states.MIGRATING:
        volumes.forget_view(connection_info)
