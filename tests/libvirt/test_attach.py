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

"""A device that is attached to a running guest, and detached again.

By the functions that LibvirtDriver.attach_interface and detach_interface
call. Nova never writes a whole domain back, so that what it does not know of
the images' devices is kept by libvirt.
"""

import libvirt
from lxml import etree
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import guest as libvirt_guest

from lab import guest
from lab.machine import agent
from lab.machine import emulators
from lab import wait
from nova_fakedax import domain
from tests.libvirt import base
from tests.libvirt import guests

NAME = 'guest'
#: What libvirt knows of the images, and Nova's parser does not.
_KEPT = ('maxMemory', 'memory', 'cpu/numa', 'devices/memory')


class AttachTest(base.OneHostTestCase):

    def setUp(self) -> None:
        super().setUp()
        built = guest.build()
        self.make_image(built.disk, built.disk.stat().st_size)
        made = guests.guest(NAME, self.image)
        made.os_kernel, made.os_initrd = str(built.kernel), str(built.initrd)
        made.os_cmdline = guest.COMMAND_LINE
        made.add_device(vconfig.LibvirtConfigGuestPCIeRootController())
        for _port in range(8):
            made.add_device(vconfig.LibvirtConfigGuestPCIeRootPortController())
        domain.convert(made, str(self.image.parent), lambda _path: True,
                       emulators.project())
        self.domain = self.connect().defineXML(made.to_xml())
        self.agent = agent.Agent(
            agent.DomainTransport(self.domain),
            lambda: self.host.console.read_text(errors='replace'))
        self.boot()

    def boot(self) -> None:
        self.domain.create()
        self.agent.wait_ready()

    def kept(self, flags: int = 0) -> list[bytes]:
        """What must be as before, in the XML of the domain."""
        tree = etree.fromstring(self.domain.XMLDesc(flags))
        found = [etree.tostring(node, method='c14n').strip()
                 for path in _KEPT for node in tree.findall(path)]
        self.assertEqual(len(_KEPT), len(found))
        self.assertIn(b'<address ', found[-1])
        return found

    def interfaces(self) -> int:
        """How many network devices the guest has on its PCI bus."""
        return self.agent.run('cat /sys/bus/pci/devices/*/class',
                              check=True).stdout.split().count('0x020000')

    def assert_disk_works(self) -> None:
        self.agent.run('probe fsync /root/f 3', check=True)

    def test_an_interface_comes_and_goes(self) -> None:
        running = libvirt_guest.Guest(self.domain)
        interface = vconfig.LibvirtConfigGuestInterface()
        interface.net_type = 'ethernet'
        interface.mac_addr = '52:54:00:12:34:56'
        interface.model = 'virtio'
        interface.target_dev = 'tap0'
        inactive = libvirt.VIR_DOMAIN_XML_INACTIVE
        before = [self.kept(), self.kept(inactive)]

        running.attach_device(interface, persistent=True, live=True)
        wait.until('the guest to find the interface',
                   lambda: self.interfaces() == 1, 30, interval=0.2)
        self.assert_disk_works()
        self.assertEqual(before, [self.kept(), self.kept(inactive)])

        running.detach_device(interface, persistent=True, live=True)
        wait.until('the guest to let go of the interface',
                   lambda: running.get_interface_by_cfg(interface) is None,
                   30, interval=0.2)
        self.assertEqual(0, self.interfaces())
        self.assert_disk_works()
        self.assertEqual(before, [self.kept(), self.kept(inactive)])

        # The definition is good for the next start.
        self.domain.destroy()
        self.boot()
        self.assert_disk_works()
        self.assertEqual(before, [self.kept(), self.kept(inactive)])
