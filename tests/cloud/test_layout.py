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

"""Every verb on images with the memmap on the device, and in the guest."""

from typing import Any

import ddt

from lab.deploy import servers
from nova_fakedax import layout
from tests.cloud import base
from tests.cloud import moving

KEEP = '/root/keep'
BOTH = ('device', 'guest')


class LayoutTestCase(moving.MigrationTestCase):

    def flavor_with(self, memmap: str, disk: int = 1,
                    **sizes: int) -> Any:
        return self.flavor(
            base.ROOT | {'fakedax:memmap': memmap}, disk=disk, **sizes)

    def begin(self, memmap: str) -> servers.Server:
        server = self.create(self.flavor_with(memmap), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7', check=True)
        return server

    def assert_kept(self, server: servers.Server, memmap: str,
                    gib: int = 1) -> None:
        """The image has the layout, and the guest its data; it can flush."""
        self.assertEqual(layout.planned(gib << 30, memmap == 'device'),
                         layout.read(str(server.file('disk'))))
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            size = agent.run('cat /sys/block/pmem0/size', check=True).stdout
            self.assertEqual(gib << 30, int(size) * 512)
            modes = agent.run('cat /sys/bus/nd/devices/pfn*/mode',
                              check=True).stdout.split()
            self.assertEqual(memmap == 'device', 'pmem' in modes)
            agent.run(f'probe verify {KEEP} 4 7', check=True)
            agent.run('probe fsync /root/after 3', check=True)


@ddt.ddt
class LayoutTest(LayoutTestCase):

    @ddt.data(*BOTH)
    def test_a_new_server_and_each_way_to_start_it_again(
            self, memmap: str) -> None:
        server = self.begin(memmap)
        self.assert_kept(server, memmap)
        self.act(server, 'ACTIVE', 'reboot_server', 'HARD')
        self.assert_kept(server, memmap)
        self.act(server, 'SHUTOFF', 'stop_server')
        self.act(server, 'ACTIVE', 'start_server')
        self.assert_kept(server, memmap)

    @ddt.data(*BOTH)
    def test_a_rescued_guest_writes_to_its_old_root(self, memmap: str) -> None:
        server = self.begin(memmap)
        self.cloud.compute.rescue_server(server.id)
        self.wait(server.id, 'RESCUE')
        with server.agent() as agent:
            # The rescue image is the same, and so are the partitions.
            old = agent.run(
                'for d in /dev/vd?2; do grep -q "^$d / " /proc/mounts ||'
                ' echo $d; done', check=True).stdout.split()[0]
            agent.run(f'mount {old} /mnt && probe verify /mnt{KEEP} 4 7 &&'
                      f' echo rescued > /mnt/root/note && umount /mnt && sync',
                      check=True)
        self.act(server, 'ACTIVE', 'unrescue_server')
        self.assert_kept(server, memmap)
        with server.agent() as agent:
            self.assertEqual('rescued\n', agent.run(
                'cat /root/note', check=True).stdout)

    @ddt.data(*BOTH)
    def test_a_snapshot_of_each_becomes_each(self, memmap: str) -> None:
        server = self.begin(memmap)
        running = self.snapshot(server)
        self.act(server, 'SHUTOFF', 'stop_server')
        stopped = self.snapshot(server)
        for image, restored in ((running, 'device'), (stopped, 'guest')):
            copy = self.create(self.flavor_with(restored), image)
            self.assert_kept(copy, restored)
            self.delete(copy.id)

    @ddt.data(*BOTH)
    def test_shelve_and_unshelve(self, memmap: str) -> None:
        server = self.begin(memmap)
        self.act(server, 'SHELVED_OFFLOADED', 'shelve_server')
        self.act(server, 'ACTIVE', 'unshelve_server')
        self.assert_kept(servers.Server(self.cloud, server.id), memmap)

    @ddt.data(('device', 'device'), ('device', 'guest'), ('guest', 'device'))
    @ddt.unpack
    def test_a_resize_grows_and_converts_and_comes_back(
            self, old: str, new: str) -> None:
        server = self.begin(old)
        larger = self.flavor_with(new, disk=2)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', larger.id)
        self.assert_kept(servers.Server(self.cloud, server.id), new, 2)
        server = self.finish_resize(server, 'revert_server_resize')
        self.assert_kept(server, old)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', larger.id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, new, 2)
        self.act(server, 'VERIFY_RESIZE', 'migrate_server')
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, new, 2)

    @ddt.data(*BOTH)
    def test_a_rebuild_makes_the_image_again(self, memmap: str) -> None:
        server = self.begin(memmap)
        self.cloud.compute.rebuild_server(server.id, image=self.image().id)
        self.wait(server.id, 'ACTIVE')
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7', check=True)
        self.assert_kept(server, memmap)

    @ddt.data(*BOTH)
    def test_a_live_migration_there_and_back(self, memmap: str) -> None:
        server = self.begin(memmap)
        churn = moving.Churn(server)
        for _turn in range(2):
            self.migrate(server)
            churn.wait_round()
            self.assertEqual([], churn.bad())
        self.assert_kept(server, memmap)

    def test_an_info_block_that_is_damaged(self) -> None:
        """The user reads why, and the file stays as it is."""
        server = self.begin('device')
        self.act(server, 'SHUTOFF', 'stop_server')
        path = server.file('disk')
        with path.open('r+b') as image:
            image.seek(4096 + 56)
            good = image.read(1)
            image.seek(-1, 1)
            image.write(bytes([good[0] ^ 1]))
        self.cloud.compute.reboot_server(server.id, 'HARD')
        self.wait(server.id, 'ERROR')
        self.assertIn('an info block whose checksum is', self.fault(server))
        with path.open('r+b') as image:
            image.seek(4096 + 56)
            image.write(good)
        self.act(server, 'ACTIVE', 'reboot_server', 'HARD')
        self.assert_kept(server, 'device')
