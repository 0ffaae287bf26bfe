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

"""The diagnostics of a server: what libvirt counts as memory, and the disks.

libvirt counts the images on fake DAX as the guest's memory, and has no figures
of them as disks.
"""

from __future__ import annotations

from collections.abc import Iterator
import typing as ty

from nova import exception
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from oslo_utils import units

from nova_fakedax import domain
from nova_fakedax import monitor


def correct(
    diagnostics: objects.Diagnostics, guest: libvirt_guest.Guest,
) -> objects.Diagnostics:
    """Take the images out of a guest's memory, and add them as disks.

    No host counts what a guest reads from and stores to a mapping, so these
    disks have a number of errors only: syncs of the image that failed.

    :param diagnostics: as LibvirtDriver.get_instance_diagnostics makes them;
        changed
    """
    maximum = guest._get_domain_info()[1] - _images_size(guest)
    # In GiB, rounded down, as LibvirtDriver.get_instance_diagnostics has it.
    diagnostics.memory_details.maximum = maximum / units.Mi
    for counters in _disks(guest):
        diagnostics.add_disk(errors_count=counters.get('errors'))
    return diagnostics


def correct_legacy(
    diagnostics: dict[str, ty.Any], guest: libvirt_guest.Guest,
) -> dict[str, ty.Any]:
    """Do the same to what microversions before 2.48 return.

    :param diagnostics: as LibvirtDriver.get_diagnostics makes them; changed
    """
    diagnostics['memory'] -= _images_size(guest)
    for number, counters in enumerate(_disks(guest)):
        for key, counter in (('flush_req', 'requests'), ('errors', 'errors')):
            if counter in counters:
                diagnostics[f'pmem{number}_{key}'] = counters[counter]
    return diagnostics


def is_boot_view(
    host: libvirt_host.Host, instance: objects.Instance, name: str,
) -> bool:
    """Whether a ``<disk>`` is the boot view of a root on fake DAX.

    :param host: the connection to libvirt
    :param name: such as ``vda``
    """
    try:
        guest = host.get_guest(instance).get_config()
    except exception.InstanceNotFound:
        return False
    return any(
        isinstance(device, vconfig.LibvirtConfigGuestDisk)
        and device.target_dev == name
        and device.serial == domain.BOOT_VIEW_SERIAL
        for device in guest.devices)


def _images_size(guest: libvirt_guest.Guest) -> int:
    """The KiB that libvirt counts as memory and that are images."""
    return sum(device.target_size for _disk, device
               in domain.fake_dax_disks(guest.get_config()))


def _disks(guest: libvirt_guest.Guest) -> Iterator[dict[str, int]]:
    """The counters of each disk on fake DAX; none where QEMU has none."""
    for fake_dax_disk, _device in domain.fake_dax_disks(guest.get_config()):
        try:
            yield {name: monitor.device_property(
                guest, fake_dax_disk.id.alias, name)
                for name in ('requests', 'errors')}
        except monitor.MonitorError:
            # Stock QEMU, or the guest has ended.
            yield {}
