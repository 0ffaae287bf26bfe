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

"""Hosts whose QEMUs differ, as in every rolling upgrade."""

import openstack

from lab.deploy import config
from lab.deploy import host
from lab.deploy import lifecycle
from lab.deploy import servers
from lab.machine import emulators
from tests.cloud import moving


class MixedHostsTestCase(moving.MigrationTestCase):

    alone = True

    def use(self, *choices: str) -> None:
        """Give each host one of emulators.CHOICES for this test."""
        computes = [f'nova-compute{node.number}' for node in host.HOSTS]
        self.addCleanup(lifecycle.restart, computes)
        for node, choice in zip(host.HOSTS, choices, strict=True):
            self.addCleanup(node.emulator_script.write_text,
                            node.emulator_script.read_text())
            self.addCleanup(node.configure)
            if choice == 'debian':
                node.configure({'fakedax': {'emulator': ''}})
            else:
                config.write_emulator(node, emulators.project(choice))
        lifecycle.restart(computes)

    def create_on(self, node: host.Host, **properties: str) -> servers.Server:
        return self.create(self.flavor(), self.image(**properties),
                           availability_zone=f'nova:{node.name}')

    def machine(self, server: servers.Server) -> str:
        """The machine type of its guest."""
        for word in server.emulator().cmdline():
            if word.startswith('pc-q35-'):
                return word.partition(',')[0]
        self.fail('its emulator was started without a machine type')

    def assert_refused(self, server: servers.Server, reason: str) -> None:
        """Assert that it stays, and that the user can read why."""
        node = server.host
        with self.assertRaisesRegex(
                openstack.exceptions.BadRequestException, 'No valid host'):
            self.cloud.compute.live_migrate_server(
                server.id, block_migration='auto')
        self.wait(server.id, 'ACTIVE')
        self.assertEqual(node.name, server.show().compute_host)
        self.assertIn(reason, '\n'.join(
            each['details'] or '' for each in self.events(
                server, 'live-migration')))
        with server.agent() as agent:
            agent.run('probe fsync /root/after 3', check=True)


class ReleasesTest(MixedHostsTestCase):

    def test_as_far_as_machine_types_go(self) -> None:
        old, new = host.HOSTS
        self.use('7.2', '10.0')
        # A server made on the old host moves to the new one and back.
        server = self.create_on(old)
        self.assertEqual('pc-q35-7.2', self.machine(server))
        churn = moving.Churn(server)
        for node in (new, old):
            self.assertEqual(node.name, self.migrate(server))
            self.assertEqual('pc-q35-7.2', self.machine(server))
            churn.wait_round()
            self.assertEqual([], churn.bad())
        # One made on the new host does not move to the old one.
        server = self.create_on(new)
        self.assertEqual('pc-q35-10.0', self.machine(server))
        self.assert_refused(server, "machine type is 'pc-q35-10.0'")
        # It does with a machine type that both have.
        server = self.create_on(new, hw_machine_type='pc-q35-7.2')
        self.assertEqual(old.name, self.migrate(server))


class StockTest(MixedHostsTestCase):

    def test_a_host_without_our_device(self) -> None:
        with_device, stock = host.HOSTS
        self.use('10.0', 'debian')
        # It is no destination.
        self.assert_refused(
            self.create_on(with_device), 'No valid host was found')
        # And no source.
        self.assert_refused(
            self.create_on(stock),
            "QEMU's virtio-pmem does not save its state")
