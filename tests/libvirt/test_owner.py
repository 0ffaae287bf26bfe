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

from collections.abc import Sequence
import dataclasses
import shutil

import libvirt
import nova.privsep as context

from nova_fakedax import migration
from tests.libvirt import base
from tests.libvirt import hosts

#: As nova-compute, which is not the user that runs QEMU.
OWNER = 12345
#: The user and group that run QEMU. An unprivileged user could not read the
#: emulator, which is below this user's home.
QEMU = (0, 54321)


@dataclasses.dataclass(frozen=True)
class OwningHost(hosts.Host):
    """A host whose libvirt gives images to the user that runs QEMU.

    libvirt remembers the owner of a file by the time of the host's boot.
    """

    @property
    def namespaces(self) -> Sequence[str]:
        return '--time', '--boottime', str(1000 * self.number)

    def _render(self, number_of_hosts: int) -> None:
        super()._render(number_of_hosts)
        conf = self.state / 'etc/qemu.conf'
        conf.write_text(conf.read_text().replace(
            'dynamic_ownership = 0', 'dynamic_ownership = 1').replace(
            'remember_owner = 0', 'remember_owner = 1').replace(
            'group = "root"', f'group = "+{QEMU[1]}"'))


class OwnerTestCase(base.BootViewTestCase):

    HOST = OwningHost

    def setUp(self) -> None:
        super().setUp()
        shutil.chown(self.image, OWNER, OWNER)

    def owner(self) -> tuple[int, int]:
        """The file's user and group."""
        status = self.image.stat()
        return status.st_uid, status.st_gid


class OwnerTest(OwnerTestCase):

    def owners(self, *models: str) -> list[tuple[int, int]]:
        """The owner before the guest runs, meanwhile and after."""
        shutil.chown(self.image, OWNER, OWNER)
        found = [self.owner()]
        running = self.connection.createXML(
            self.xml(*models), libvirt.VIR_DOMAIN_START_PAUSED)
        found.append(self.owner())
        running.destroy()
        return [*found, self.owner()]

    def test_it_is_given_back(self) -> None:
        for _again in range(2):
            self.assertEqual([(OWNER, OWNER), QEMU, (OWNER, OWNER)],
                             self.owners('dac'))

    def test_libvirt_keeps_it_if_it_is_labelled_twice(self) -> None:
        """What the boot view without a label is for."""
        self.assertEqual([(OWNER, OWNER), QEMU, QEMU], self.owners())


class MoveTest(OwnerTestCase):
    """A guest that migrates to another host and back."""

    def setUp(self) -> None:
        super().setUp()
        other = self.HOST(2, self.directory)
        up = other.up({})
        up.__enter__()
        self.addCleanup(up.__exit__, None, None, None)
        self.hosts = [self.host, other]
        # Else a privileged function starts its daemon.
        context.sys_admin_pctxt.set_client_mode(False)
        self.addCleanup(context.sys_admin_pctxt.set_client_mode, True)
        self.connection.defineXML(self.xml('dac')).create()
        self.assertEqual(QEMU, self.owner())

    def migrate(self) -> None:
        source, destination = self.hosts
        done = source.virsh(
            'migrate', 'guest', '--live', '--p2p', '--undefinesource',
            '--persistent', destination.uri,
            f'unix://{self.directory}/migration')
        self.assertEqual(0, done.returncode, done.stdout)
        self.hosts.reverse()

    def test_it_stays_that_of_the_user_that_runs_qemu(self) -> None:
        for _turn in range(2):
            with migration.keep_owner([str(self.image)]):
                self.migrate()
            self.assertEqual(QEMU, self.owner())

    def test_libvirt_alone_gives_it_to_root(self) -> None:
        self.migrate()
        self.assertEqual((0, 0), self.owner())
