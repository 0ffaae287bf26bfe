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

"""Resize and cold migration, between hosts with shared storage."""

import libvirt

from lab.deploy import host
from lab.deploy import servers
from tests.cloud import base

KEEP = '/root/keep'


class ResizeTest(base.CloudTestCase):

    def begin(self) -> servers.Server:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7', check=True)
        return server

    def assert_kept(self, server: servers.Server, gib: int) -> None:
        """Assert that its root is on fake DAX, with its size and data."""
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            size = agent.run('cat /sys/block/pmem0/size', check=True).stdout
            self.assertEqual(gib << 30, int(size) * 512)
            agent.run(f'probe verify {KEEP} 4 7', check=True)
            agent.run('probe fsync /root/after 3', check=True)

    def assert_on_one_host(self, server: servers.Server) -> None:
        for node in host.HOSTS:
            with node.libvirt() as connection:
                try:
                    connection.lookupByUUIDString(server.id)
                    found = True
                except libvirt.libvirtError:
                    found = False
            self.assertEqual(node == server.host, found, node.name)
        self.assertFalse(
            server.host.path(host.INSTANCES / f'{server.id}_resize').exists())

    def test_to_a_larger_root_disk_which_the_guest_gets(self) -> None:
        server = self.begin()
        source = server.host
        self.act(server, 'VERIFY_RESIZE', 'resize_server',
                 self.flavor(disk=2).id)
        server = servers.Server(self.cloud, server.id)
        self.assertNotEqual(source, server.host)
        self.assert_kept(server, 2)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_on_one_host(server)
        # The guest writes on this host, and then moves back.
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7', check=True)
        self.act(server, 'VERIFY_RESIZE', 'migrate_server')
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assertEqual(source, server.host)
        self.assert_kept(server, 2)
        self.assert_on_one_host(server)
        self.delete(server.id)
        self.assert_nothing_left(server.id)

    def test_revert_brings_the_old_disk_back(self) -> None:
        server = self.begin()
        source = server.host
        self.act(server, 'VERIFY_RESIZE', 'resize_server',
                 self.flavor(disk=2).id)
        with servers.Server(self.cloud, server.id).agent() as agent:
            agent.run(f'probe write {KEEP} 4 8', check=True)
        server = self.finish_resize(server, 'revert_server_resize')
        self.assertEqual(source, server.host)
        self.assert_kept(server, 1)
        self.assert_on_one_host(server)


class ResizeKindTest(base.CloudTestCase):

    ORDINARY: dict[str, str] = {}

    def assert_kept(self, server: servers.Server, device: str) -> None:
        """Assert that it is on this disk of 2 GiB, with its data."""
        self.assertTrue(
            self.mounts(server)['/'][0].startswith(f'/dev/{device}'))
        with server.agent() as agent:
            size = agent.run(
                f'cat /sys/block/{device}/size', check=True).stdout
            self.assertEqual(2 << 30, int(size) * 512)
            agent.run(f'probe verify {KEEP} 4 7', check=True)

    def test_from_an_ordinary_flavor_and_back(self) -> None:
        server = self.create(self.flavor(self.ORDINARY), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
        self.act(server, 'VERIFY_RESIZE', 'resize_server',
                 self.flavor(disk=2).id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, 'pmem0')
        with server.agent() as agent:
            # The image was converted, and is written to by the guest.
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
        self.act(server, 'VERIFY_RESIZE', 'resize_server',
                 self.flavor(self.ORDINARY, disk=2).id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, 'vda')
