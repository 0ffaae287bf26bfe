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

import os
from typing import Any

import testtools

from lab.deploy import host
from lab.deploy import servers
from nova_fakedax import layout
from tests.cloud import base
from tests.cloud import moving

KEEP = '/root/keep'
BOTH = ('device', 'guest')

#: Other cloud tests do the same with images of the default layout, and the
#: functional tests with all layouts and a libvirt that is not real.
on_demand = testtools.skipUnless(
    'FAKEDAX_LAYOUTS' in os.environ,
    'takes too long for CI; set FAKEDAX_LAYOUTS in the environment to run it')


class LayoutTestCase(moving.MigrationTestCase):

    def flavor_with(self, memmap: str, disk: int = 1,
                    **sizes: int) -> Any:
        return self.flavor(
            base.ROOT | {'fakedax:memmap': memmap}, disk=disk, **sizes)

    def begin(self, memmap: str) -> servers.Server:
        server = self.create(self.flavor_with(memmap), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
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

    def move_there_and_back(self, server: servers.Server) -> None:
        churn = moving.Churn(server)
        for _turn in range(2):
            self.migrate(server)
            churn.wait_round()
            self.assertEqual([], churn.bad())


class EachLayoutTest(LayoutTestCase):
    """One server of each layout, through all that can be done with it."""

    @on_demand
    def test_memmap_on_the_device(self) -> None:
        self.walk('device')

    @on_demand
    def test_memmap_in_the_guest(self) -> None:
        self.walk('guest')

    def walk(self, memmap: str) -> None:
        """Do all that can be done, and look for the guest's data after each.

        :param memmap: as in the flavor
        """
        server = self.begin(memmap)
        self.assert_kept(server, memmap)
        self.act(server, 'ACTIVE', 'reboot_server', 'HARD')
        self.assert_kept(server, memmap)
        self.rescue_and_write(server)
        self.act(server, 'ACTIVE', 'unrescue_server')
        self.assert_kept(server, memmap)
        with server.agent() as agent:
            self.assertEqual('rescued\n', agent.run(
                'cat /root/note', check=True).stdout)
        running = self.snapshot(server)
        self.move_there_and_back(server)
        self.assert_kept(server, memmap)
        self.act(server, 'SHUTOFF', 'stop_server')
        stopped = self.snapshot(server)
        self.act(server, 'SHELVED_OFFLOADED', 'shelve_server')
        self.act(server, 'ACTIVE', 'unshelve_server')
        server = servers.Server(self.cloud, server.id)
        self.assert_kept(server, memmap)
        # Snapshots hold the content only, so that they fit either layout.
        for image, restored in zip((running, stopped), BOTH, strict=True):
            copy = self.create(self.flavor_with(restored), image)
            self.assert_kept(copy, restored)
            self.delete(copy.id)
        self.cloud.compute.rebuild_server(server.id, image=self.image().id)
        self.wait(server.id, 'ACTIVE')
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
        self.assert_kept(server, memmap)

    def rescue_and_write(self, server: servers.Server) -> None:
        """Rescue the server, and write to its old root."""
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


class LargeDiskTest(LayoutTestCase):
    """A disk whose memmap is six times the guest's RAM."""

    alone = True
    #: A file of this many MiB, and a few more with content.
    FAR = 90 << 10
    #: Seconds: the guest first writes its memmap, 1.6 GiB, to the storage.
    BOOT = 600

    @on_demand
    def test_100_gib_on_a_flavor_of_256_mib(self) -> None:
        space = os.statvfs(host.HOSTS[0].path(host.INSTANCES))
        if space.f_bavail * space.f_frsize < 220 << 30:
            self.skipTest('the shared storage has less than 220 GiB; start '
                          'with "lab/cloud up --storage 300"')
        # A raw image of 100 GiB may not fit into Glance's storage.
        self.configure({'libvirt': {'snapshot_image_format': 'qcow2'}})
        server = self.create(
            self.flavor_with('device', disk=100, ram=256), self.image())
        with server.agent(self.BOOT) as agent:
            agent.run(f'probe write {KEEP} 4 7 &&'
                      f' fallocate -l {self.FAR}M /root/far &&'
                      f' cat {KEEP} >> /root/far && sync', check=True)
        self.assert_far(server, 100)
        self.move_there_and_back(server)
        self.assert_far(server, 100)
        image = self.snapshot(server, 'qcow2')
        larger = self.flavor_with('device', disk=104, ram=256)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', larger.id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_far(server, 104)
        self.move_there_and_back(server)
        self.assert_far(server, 104)
        self.delete(server.id)
        copy = self.create(
            self.flavor_with('device', disk=100, ram=256), image)
        self.assert_far(copy, 100)

    def assert_far(self, server: servers.Server, gib: int) -> None:
        with server.agent(self.BOOT) as agent:
            agent.run(f'dd if=/root/far bs=1M skip={self.FAR} | cmp - {KEEP}',
                      check=True)
        self.assert_kept(server, 'device', gib)


class ChangedLayoutTest(LayoutTestCase):

    def test_a_resize_grows_and_converts(self) -> None:
        server = self.begin('guest')
        larger = self.flavor_with('device', disk=2)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', larger.id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, 'device', 2)

    @on_demand
    def test_a_resize_comes_back(self) -> None:
        server = self.begin('guest')
        larger = self.flavor_with('device', disk=2)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', larger.id)
        self.assert_kept(servers.Server(self.cloud, server.id), 'device', 2)
        server = self.finish_resize(server, 'revert_server_resize')
        self.assert_kept(server, 'guest')
        self.act(server, 'VERIFY_RESIZE', 'resize_server', larger.id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, 'device', 2)
        largest = self.flavor_with('device', disk=3)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', largest.id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, 'device', 3)
        back = self.flavor_with('guest', disk=3)
        self.act(server, 'VERIFY_RESIZE', 'resize_server', back.id)
        server = self.finish_resize(server, 'confirm_server_resize')
        self.assert_kept(server, 'guest', 3)

    @on_demand
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
