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

"""Guests as Nova makes them, before their disks are converted."""

import pathlib

from nova.virt.libvirt import config as vconfig
from oslo_utils import units


def guest(
    name: str, *images: pathlib.Path,
) -> vconfig.LibvirtConfigGuest:
    """A guest with ordinary disks, a console and an agent.

    :param name: the domain's
    :param images: the disks, raw
    """
    made = vconfig.LibvirtConfigGuest()
    made.virt_type = 'qemu'
    made.name = name
    made.memory = 256 * units.Ki
    made.vcpus = 1
    made.os_type = 'hvm'
    made.os_mach_type = 'q35'
    made.features = [vconfig.LibvirtConfigGuestFeatureACPI()]
    for number, image in enumerate(images):
        device = vconfig.LibvirtConfigGuestDisk()
        device.source_type = 'file'
        device.source_path = str(image)
        device.driver_name = 'qemu'
        device.driver_format = 'raw'
        device.target_dev = f'vd{"abc"[number]}'
        device.target_bus = 'virtio'
        made.add_device(device)
    serial = vconfig.LibvirtConfigGuestSerial()
    serial.type = 'file'
    serial.source_path = '/var/log/libvirt/console'
    made.add_device(serial)
    channel = vconfig.LibvirtConfigGuestChannel()
    channel.type = 'unix'
    channel.target_name = 'org.qemu.guest_agent.0'
    channel.source_path = f'/var/lib/libvirt/qemu/{name}.agent'
    made.add_device(channel)
    return made
