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

"""Firmware boots from the content of an image, as libvirt and QEMU show it."""

import pathlib

from nova.virt.libvirt import config as vconfig
from oslo_utils import units

from lab import guest
from lab.machine import agent
from lab.machine import emulators
from lab import wait
from nova_fakedax import domain
from nova_fakedax import layout
from tests.libvirt import base
from tests.libvirt import guests

NAME = 'guest'
_BOOT_SECONDS = 300


def firmware_guest(image: pathlib.Path) -> vconfig.LibvirtConfigGuest:
    """A guest without a kernel of its own, before it is converted."""
    made = guests.guest(NAME, image)
    made.os_boot_dev = ['hd']
    return made


class BootViewTest(base.OneHostTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.make_image(guest.build().disk, 256 * units.Mi)

    def boot(self, made: vconfig.LibvirtConfigGuest) -> agent.Agent:
        """Start the guest; its agent, once it answers."""
        started = self.connect().defineXML(made.to_xml())
        started.create()
        self.addCleanup(started.destroy)
        wait.until(
            'the guest', lambda: 'GUEST-READY' in self.console(),
            _BOOT_SECONDS, state=self.console)
        found = agent.Agent(agent.DomainTransport(started), self.console)
        found.wait_ready()
        return found

    def console(self) -> str:
        return self.host.console.read_text(errors='replace')

    def test_firmware_boots_from_the_boot_view(self) -> None:
        made = firmware_guest(self.image)
        domain.convert(made, str(self.image.parent), lambda _path: True,
                       emulators.project())
        run = self.boot(made).run
        self.assertIn('/dev/pmem0p2 / ',
                      run('cat /proc/mounts', check=True).stdout)
        # The view is the content, to the byte.
        for disk in 'vda', 'pmem0':
            self.assertEqual(str(256 * units.Mi // 512), run(
                f'cat /sys/block/{disk}/size', check=True).stdout.strip())

    def test_firmware_boots_though_the_image_asks_for_sata(self) -> None:
        made = firmware_guest(self.image)
        made.devices[0].target_bus = 'sata'
        made.devices[0].target_dev = 'sda'
        domain.convert(made, str(self.image.parent), lambda _path: True,
                       emulators.project())
        self.assertIn('/dev/pmem0p2 / ', self.boot(made).run(
            'cat /proc/mounts', check=True).stdout)

    def test_a_rescued_guest_boots_from_the_content_and_writes(self) -> None:
        """Here it is the only disk; in Nova's rescue it is the second."""
        made = firmware_guest(self.image)
        domain.convert_rescue(
            made, str(self.image.parent), lambda _path: True)
        run = self.boot(made).run
        self.assertIn('/dev/vda2 / ',
                      run('cat /proc/mounts', check=True).stdout)
        run('echo rescued > /root/note && sync', check=True)
        # Neither the block nor what comes before the content has changed.
        layout.read(str(self.image))
