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

"""Snapshots and shelving: what the guest has stored is in the image."""

import libvirt

from lab.deploy import servers
from tests.cloud import base
from tests.cloud import moving
from tests.cloud import test_recovery

KEEP = '/root/keep'


class SnapshotTest(base.CloudTestCase):

    def test_of_a_guest_that_writes_and_a_new_server_of_it(self) -> None:
        server = self.create(self.flavor(), self.image())
        churn = moving.Churn(server)
        churn.wait_round()
        acknowledged = len(churn.lines)
        image = self.snapshot(server)
        # It runs on, and no flush hangs.
        churn.wait_round()
        self.assertEqual([], churn.bad())
        self.assertEqual('true', image.properties['fakedax_guest'])

        copy = self.create(self.flavor(disk=2), image)
        self.assert_root_is_pmem(copy)
        self.assertEqual([], churn.lost(copy, acknowledged))
        with copy.agent() as agent:
            agent.run(f'probe fsync {KEEP} 3', check=True)

    def test_of_a_guest_that_is_off_and_one_that_is_paused(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
        self.act(server, 'PAUSED', 'pause_server')
        paused = self.snapshot(server)
        with server.domain() as domain:
            self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, domain.state()[0])
        self.act(server, 'ACTIVE', 'unpause_server')
        self.act(server, 'SHUTOFF', 'stop_server')
        stopped = self.snapshot(server)
        for image in (paused, stopped):
            copy = self.create(self.flavor(), image)
            with copy.agent() as agent:
                agent.run(f'probe verify {KEEP} 4 7', check=True)
            self.delete(copy.id)

    def test_of_an_ordinary_root_with_an_ephemeral_disk(self) -> None:
        """It is Nova's own, which undefines the domain for a while."""
        server = self.create(
            self.flavor({'fakedax:disks': 'ephemeral',
                         'trait:CUSTOM_FAKEDAX': 'required'}, ephemeral=1),
            self.image(fakedax_guest=''))
        with server.domain() as domain:
            devices = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).count(
                "model='virtio-pmem'")
        self.snapshot(server)
        with server.domain() as domain:
            self.assertEqual(
                devices,
                domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).count(
                    "model='virtio-pmem'"))
        self.act(server, 'ACTIVE', 'reboot_server', 'HARD')
        with server.agent() as agent:
            agent.run('test -e /dev/pmem0', check=True)

    def test_shelve_and_unshelve(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
        self.act(server, 'SHELVED_OFFLOADED', 'shelve_server')
        self.act(server, 'ACTIVE', 'unshelve_server')
        # Perhaps on another host.
        server = servers.Server(self.cloud, server.id)
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            agent.run(f'probe verify {KEEP} 4 7', check=True)


class InterruptedSnapshotTest(test_recovery.RecoveryTestCase):

    def test_nova_compute_dies_while_the_guest_is_paused(self) -> None:
        server = self.begin()
        churn = self.churn
        self.begin_snapshot(server)

        def is_paused() -> bool:
            with server.domain() as domain:
                return domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED

        self.wait_for('Nova to pause the guest', is_paused)
        service = f'nova-compute{server.host.number}'
        self.kill_service(service)
        self.assertTrue(is_paused())
        self.revive(service)
        churn.wait_round()
        self.assertEqual([], churn.bad())
        self.wait(server.id, 'ACTIVE')
