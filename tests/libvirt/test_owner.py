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

"""The file of an image goes back to its owner when the guest ends.

With ``dynamic_ownership`` and ``remember_owner``, as libvirt has it unless it
is told otherwise.
"""

import dataclasses
import shutil

import libvirt
from oslo_utils import units

from lab.machine import emulators
from nova_fakedax import domain
from tests.libvirt import base
from tests.libvirt import guests
from tests.libvirt import hosts

NAME = 'guest'
#: As nova-compute, which is not the user that runs QEMU.
OWNER = 12345


@dataclasses.dataclass(frozen=True)
class OwningHost(hosts.Host):
    """A host whose libvirt gives images to the user that runs QEMU."""

    def _render(self, number_of_hosts: int) -> None:
        super()._render(number_of_hosts)
        conf = self.state / 'etc/qemu.conf'
        conf.write_text(conf.read_text().replace(
            'dynamic_ownership = 0', 'dynamic_ownership = 1').replace(
            'remember_owner = 0', 'remember_owner = 1'))


class OwnerTest(base.OneHostTestCase):

    HOST = OwningHost

    def setUp(self) -> None:
        super().setUp()
        source = self.directory / 'source'
        source.write_bytes(b'content')
        self.make_image(source, 4 * units.Mi)
        self.connection = self.connect()

    def owners(self, *models: str) -> list[int]:
        """The file's owner before its guest runs, meanwhile and after."""
        shutil.chown(self.image, OWNER)
        made = guests.guest(NAME, self.image)
        made.os_boot_dev = ['hd']
        domain.convert(made, str(self.image.parent), lambda _path: True,
                       emulators.project(), models)
        found = [self.image.stat().st_uid]
        running = self.connection.createXML(
            made.to_xml(), libvirt.VIR_DOMAIN_START_PAUSED)
        found.append(self.image.stat().st_uid)
        running.destroy()
        return [*found, self.image.stat().st_uid]

    def test_it_is_given_back(self) -> None:
        for _again in range(2):
            self.assertEqual([OWNER, 0, OWNER], self.owners('dac'))

    def test_libvirt_keeps_it_if_it_is_labelled_twice(self) -> None:
        """What the boot view without a label is for."""
        self.assertEqual([OWNER, 0, 0], self.owners())
