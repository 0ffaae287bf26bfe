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

"""The life of a server, with nothing faked."""

import json
import re
import shutil
import subprocess

import libvirt_qemu
import openstack
from oslo_utils import units

from lab.deploy import host
from lab.deploy import servers
from lab.machine import emulators
from lab.machine import pagecache
from lab.machine import syncs
from tests.cloud import base

KEEP = '/root/keep'


class ServerLifeTest(base.CloudTestCase):

    def test_root_by_firmware_survives_all_that_is_right(self) -> None:
        server = self.create(self.flavor(), self.image())
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7', check=True)

        for status, action, *arguments in (
                ('SHUTOFF', 'stop_server'), ('ACTIVE', 'start_server'),
                ('ACTIVE', 'reboot_server', 'SOFT'),
                ('ACTIVE', 'reboot_server', 'HARD'),
                ('PAUSED', 'pause_server'), ('ACTIVE', 'unpause_server')):
            self.act(server, status, action, *arguments)
            if status == 'ACTIVE':
                with server.agent() as agent:
                    agent.run(f'probe verify {KEEP} 4 7', check=True)
                    agent.run('probe fsync /root/after 3', check=True)
                self.assert_root_is_pmem(server)

        with server.agent() as agent:
            boots = agent.run('wc -l < /root/boots', check=True).stdout
        # The first, and one for start, soft and hard reboot each.
        self.assertEqual(4, int(boots))
        self.assertIn('GUEST-READY', server.console())
        self.delete(server.id)
        self.assert_nothing_left(server.id)

    def test_suspend_and_resume_keep_the_guest_as_it_was(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && touch /run/same-boot',
                      check=True)
        for _again in range(2):
            self.act(server, 'SUSPENDED', 'suspend_server')
            self.assertEqual(0, pagecache.dirty_bytes(server.file('disk')))
            self.act(server, 'ACTIVE', 'resume_server')
            with server.agent() as agent:
                agent.run('test -e /run/same-boot', check=True)
                agent.run(f'probe verify {KEEP} 4 7', check=True)
                agent.run('probe fsync /root/after 3', check=True)
        self.assert_root_is_pmem(server)

    def test_root_and_ephemeral_by_kernel_are_pmem_in_that_order(
            self) -> None:
        server = self.create(
            self.flavor({'fakedax:disks': 'root,ephemeral',
                         'trait:CUSTOM_FAKEDAX': 'required'}, ephemeral=1),
            self.image(kernel=True))
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            agent.run('mkdir -p /mnt/e && mount -t ext4 -o dax=always '
                      '/dev/pmem1 /mnt/e', check=True)
            disks = agent.run('ls /sys/block', check=True).stdout.split()
        # With a kernel from Glance it needs no boot view.
        self.assertFalse([name for name in disks if name.startswith('vd')])
        with server.domain() as domain:
            xml = domain.XMLDesc()
        self.assertEqual(
            ['disk', 'disk.eph0'],
            re.findall(r'<path>.*/([^/]+)</path>', xml))
        self.assert_diagnostics_tell_ram_from_disks(server)

    def assert_diagnostics_tell_ram_from_disks(
            self, server: servers.Server) -> None:
        ram = server.show().flavor['ram']
        with server.domain() as domain:
            # In KiB: libvirt counts the images as memory.
            self.assertEqual(
                (ram << 10) + sum(server.file(name).stat().st_size >> 10
                                  for name in ('disk', 'disk.eph0')),
                domain.maxMemory())
        with server.agent() as agent:
            agent.run('probe fsync /root/counted 1', check=True)
        old, new = (
            self.cloud.compute.get(f'/servers/{server.id}/diagnostics',
                                   microversion=microversion).json()
            for microversion in ('2.47', '2.48'))
        self.assertEqual(ram << 10, old['memory'])
        self.assertLess(0, old['pmem0_flush_req'])
        self.assertEqual((0, 0), (old['pmem0_errors'], old['pmem1_errors']))
        self.assertEqual(ram >> 10, new['memory_details']['maximum'])
        self.assertEqual(
            [0, 0], [disk['errors_count'] for disk in new['disk_details']])

    def test_ephemeral_alone_leaves_the_root_disk_as_it_is(self) -> None:
        server = self.create(
            self.flavor({'fakedax:disks': 'ephemeral',
                         'trait:CUSTOM_FAKEDAX': 'required'}, ephemeral=1),
            self.image(fakedax_guest=''))
        with server.agent() as agent:
            disks = agent.run(
                'cat /sys/block/pmem0/size', check=True).stdout
            agent.run('mkdir -p /mnt/e && mount -t ext4 -o dax=always '
                      '/dev/pmem0 /mnt/e', check=True)
        self.assertEqual((1 << 30) // 512, int(disks))
        device, _options = self.mounts(server)['/']
        self.assertTrue(device.startswith('/dev/vda'), device)

    def test_rescue_boots_the_ordinary_way_and_unrescue_comes_back(
            self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 1', check=True)
        self.cloud.compute.rescue_server(server.id)
        self.wait(server.id, 'RESCUE')
        device, _options = self.mounts(server)['/']
        self.assertTrue(device.startswith('/dev/vd'), device)

        self.act(server, 'ACTIVE', 'unrescue_server')
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            agent.run(f'probe verify {KEEP} 4 1', check=True)

    def test_rebuild_gives_a_new_root_on_pmem(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 1 1', check=True)
        self.cloud.compute.rebuild_server(server.id, image=self.image().id)
        self.wait(server.id, 'ACTIVE')
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            self.assertNotEqual(0, agent.run(['test', '-e', KEEP]).status)

    def test_metadata_names_disks_as_the_guest_does(self) -> None:
        image = self.image()
        server = self.create(
            self.flavor({'fakedax:disks': 'root,ephemeral'}, ephemeral=1,
                        swap=8),
            image, config_drive=True, block_device_mapping=[
                {'boot_index': 0, 'uuid': image.id, 'source_type': 'image',
                 'destination_type': 'local', 'tag': 'system'},
                {'boot_index': -1, 'source_type': 'blank', 'volume_size': 1,
                 'destination_type': 'local', 'tag': 'scratch',
                 'delete_on_termination': True}])
        # The guest has no driver for the CD-ROM that holds the metadata.
        metadata, names = (json.loads(subprocess.run(
            ['isoinfo', '-J', '-i', server.file('disk.config'), '-x', file],
            check=True, capture_output=True).stdout) for file in (
                '/openstack/latest/meta_data.json',
                '/ec2/latest/meta-data.json'))
        names = names['block-device-mapping']
        self.assertEqual('/dev/pmem1', names['ephemeral0'])
        with server.agent() as agent:
            swap = names['swap'].removeprefix('/dev/')
            sectors = agent.run(f'cat /sys/block/{swap}/size', check=True)
            self.assertEqual(8 * units.Mi, int(sectors.stdout) * 512)
            found = {}
            for device in metadata['devices']:
                link = agent.run(
                    f'readlink -f /sys/bus/pci/devices/{device["address"]}'
                    f'/virtio*/ndbus*/region*/*/block/*',
                    check=True).stdout
                found[device['tags'][0]] = (
                    device['path'], '/dev/' + link.strip().rpartition('/')[2])
        self.assertEqual({'system': ('/dev/pmem0', '/dev/pmem0'),
                          'scratch': ('/dev/pmem1', '/dev/pmem1')}, found)


class ManyDisksTest(base.CloudTestCase):

    def test_two_ephemeral_disks_and_a_numa_topology(self) -> None:
        image = self.image()
        blank = {'boot_index': -1, 'source_type': 'blank', 'volume_size': 1,
                 'destination_type': 'local', 'delete_on_termination': True}
        server = self.create(
            self.flavor(base.ROOT | {
                'fakedax:disks': 'root,ephemeral', 'hw:numa_nodes': '1',
                'hw:mem_page_size': 'small'}, ephemeral=2),
            image, block_device_mapping=[
                {'boot_index': 0, 'uuid': image.id, 'source_type': 'image',
                 'destination_type': 'local'}, blank, blank])
        self.on_each(server, 'probe write /run/eph{0}/f 1 {0}')
        self.assertEqual('completed', server.live_migrate())
        self.wait(server.id, 'ACTIVE')
        server = servers.Server(self.cloud, server.id)
        with server.agent() as agent:
            for number in 1, 2:
                agent.run(f'probe verify /run/eph{number}/f 1 {number}',
                          check=True)
        self.act(server, 'ACTIVE', 'reboot_server', 'HARD')
        self.on_each(server, 'probe verify /run/eph{0}/f 1 {0}')

    def on_each(self, server: servers.Server, command: str) -> None:
        """Mount the ephemeral disks, and run a command for each."""
        with server.agent() as agent:
            for number in 1, 2:
                agent.run(
                    f'mkdir -p /run/eph{number} && mount -o dax=always '
                    f'/dev/pmem{number} /run/eph{number}', check=True)
                agent.run(command.format(number), check=True)


class EmulatorTest(base.CloudTestCase):

    def test_device_counts_what_the_guest_flushes(self) -> None:
        """Servers run on the device of this project."""
        server = self.create(self.flavor(), self.image())
        self.assertEqual(emulators.project(), server.emulator().exe())
        before = self._requests(server)
        with server.agent() as agent:
            agent.run(f'probe fsync {KEEP} 10', check=True)
        self.assertGreaterEqual(self._requests(server), before + 10)

    def _requests(self, server: servers.Server) -> int:
        query = {'execute': 'qom-get', 'arguments': {
            'path': '/machine/peripheral/ua-fakedax-root',
            'property': 'requests'}}
        with server.domain() as domain:
            return json.loads(libvirt_qemu.qemuMonitorCommand(
                domain, json.dumps(query), 0))['return']


class HostTest(base.CloudTestCase):
    """Hosts that are reconfigured, or fail."""

    alone = True

    def test_host_restart_brings_the_guest_back_with_its_data(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 3 && sync', check=True)
        server.host.power_off()
        self.configure(
            {'DEFAULT': {'resume_guests_state_on_host_boot': 'true'}},
            server.host)
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            agent.run(f'probe verify {KEEP} 4 3', check=True)

    def test_server_runs_on_stock_qemu(self) -> None:
        """Without [fakedax]emulator, only migration and suspend fail."""
        self.configure({'fakedax': {'emulator': ''}})
        server = self.create(self.flavor(), self.image())
        self.assertEqual(
            shutil.which('qemu-system-x86_64'), server.emulator().exe())
        self.assert_root_is_pmem(server)
        source = server.host
        [other] = [node.name for node in host.HOSTS if node != source]
        for target in (None, other):
            error = self.assertRaises(
                openstack.exceptions.BadRequestException,
                self.cloud.compute.live_migrate_server,
                server.id, block_migration='auto', host=target)
            self.assertIn('No valid host', str(error))
            self.wait(server.id, 'ACTIVE')
            self.assertEqual(source.name, server.show().compute_host)
        self.cloud.compute.suspend_server(server.id)
        self.wait(server.id, 'ACTIVE')
        self.assertIn('Fake DAX: suspend',
                      self.event(server, 'suspend')['details'])
        with server.agent() as agent:
            agent.run(f'probe fsync {KEEP} 10', check=True)


class FlushTest(base.CloudTestCase):

    def test_guest_fsync_makes_the_emulator_sync_the_image(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            pid = server.emulator().pid
            with syncs.watch(pid, f'/{server.id}/disk') as idle:
                agent.run('sleep 2')
            with syncs.watch(pid, f'/{server.id}/disk') as busy:
                agent.run(f'probe fsync {KEEP} 10', check=True)
        self.assertEqual(0, busy.failed)
        self.assertGreaterEqual(busy.succeeded, 10)
        self.assertLess(idle.succeeded, 5)

    def test_stop_leaves_no_dirty_page_of_the_image(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 32 1', check=True)
        self.act(server, 'SHUTOFF', 'stop_server')
        self.assertEqual(0, pagecache.dirty_bytes(server.file('disk')))

    def test_guest_reads_are_cached_by_the_host_alone(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 200 1 && sync', check=True,
                      timeout=300)
            before = self._cached(agent)
            agent.run(f'sha256sum {KEEP}', check=True, timeout=300)
            after = self._cached(agent)
        self.assertLess(after - before, 8 << 20)
        self.assertGreater(
            pagecache.cached_bytes(server.file('disk')), 200 << 20)

    def _cached(self, agent) -> int:
        text = agent.run('cat /proc/meminfo', check=True).stdout
        return sum(int(size) << 10 for size in
                   re.findall(r'^(?:Cached|Buffers): +(\d+)', text, re.M))
