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

"""Resize and cold migration: the disks move, grow, and stay raw."""

import os
import shutil
import subprocess
from unittest import mock

import fixtures
from nova import block_device
from nova import context as nova_context
from nova import objects
from nova.virt.libvirt import driver as libvirt_driver
from oslo_utils import units
import testscenarios

from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import layout
from tests.functional import base

load_tests = testscenarios.load_tests_apply_scenarios

VIEW = ('disk.view', True)


class SharedPathTestCase(base.FakeDaxTestCase):
    """Computes with one instances path, as on shared storage."""

    HOSTS = ('compute1', 'compute2')
    #: The format of ordinary disks.
    FORMAT = 'qcow2'

    def setUp(self):
        super().setUp()
        if self.FORMAT == 'raw':
            # use_cow_images stays on, as it is by default.
            self.flags(group='libvirt', images_type='raw')
        # Nova asks by ssh; the fake computes share one directory.
        self.useFixture(fixtures.MockPatchObject(
            libvirt_driver.LibvirtDriver, '_is_path_shared_with',
            lambda *_args: True))
        for name in self.HOSTS:
            self.start_compute(name)

    def resize(self, flavor=None, status='VERIFY_RESIZE'):
        self.act(self.server, 'resize', flavorRef=flavor or self.larger)
        return self._wait_for_state_change(self.server, status)

    def confirm(self):
        self.act(self.server, 'confirmResize')
        self._wait_for_state_change(self.server, 'ACTIVE')

    def revert(self):
        self.act(self.server, 'revertResize')
        self._wait_for_state_change(self.server, 'ACTIVE')


class ResizeTestCase(SharedPathTestCase):

    MEMMAP = 'device'

    def setUp(self):
        self.flushed = []
        flush = hostcache.flush

        def flush_and_note(path):
            self.flushed.append(os.path.basename(path))
            flush(path)

        self.useFixture(fixtures.MockPatchObject(
            hostcache, 'flush', flush_and_note))
        super().setUp()
        # A host tries this at its start.
        self.flushed.clear()
        self.server = self.boot(
            self.put_flavor('root,ephemeral', 1, 1), host='compute1')
        self.store(self.server, b'DATA')
        self.larger = self.put_flavor('root,ephemeral', 2, 2)

    def assert_disks(self, host, size, memmap=None):
        """Assert that they are raw, allocated and mapped, with their data.

        Nova takes an ephemeral disk along and leaves its size alone.
        """
        memmap = (memmap or self.MEMMAP) == 'device'
        wanted = [layout.planned(size, memmap),
                  layout.planned(units.Gi, memmap)]
        self.assertEqual(
            ['disk', 'disk.eph0'], self.pmems(self.server, host))
        self.assertEqual([VIEW], self.disks(self.server, host))
        self.assertEqual(wanted, [
            self.layout_of(self.server, name)
            for name in ('disk', 'disk.eph0')])
        self.assertEqual({'disk.view': wanted[0]} if memmap else {},
                         self.slices(self.server, host))
        targets = self.xml(self.server, host).findall(
            "./devices/memory[@model='virtio-pmem']/target/size")
        self.assertEqual(
            [found.file_size for found in wanted],
            [int(target.text) * units.Ki for target in targets])
        self.assertEqual(b'DATA' + self.content[4:],
                         self.stored(self.server, len(self.content)))


class ResizeTest(ResizeTestCase):

    def test_to_larger_disks_on_another_host(self):
        self.resize()
        self.assert_disks('compute2', 2 * units.Gi)
        # At the source before the guest ends and after, and at the
        # destination.
        self.assertEqual(['disk', 'disk.eph0'] * 3, self.flushed)
        self.confirm()
        self.assert_disks('compute2', 2 * units.Gi)
        self._delete_server(self.server)
        self.assertFalse(os.path.exists(self.path(self.server, '')))
        self.assertEqual({}, self.allocations(self.server))

    def test_revert_brings_the_old_disks_back(self):
        self.resize()
        self.revert()
        self.assert_disks('compute1', units.Gi)
        self.assertEqual([], self.domains('compute2'))

    def test_cold_migration(self):
        self.act(self.server, 'migrate')
        self._wait_for_state_change(self.server, 'VERIFY_RESIZE')
        self.assert_disks('compute2', units.Gi)
        self.confirm()
        self.act(self.server, 'migrate')
        self._wait_for_state_change(self.server, 'VERIFY_RESIZE')
        self.assert_disks('compute1', units.Gi)

    def test_a_server_that_is_off_stays_off(self):
        self._stop_server(self.server)
        self.resize()
        self.act(self.server, 'confirmResize')
        self._wait_for_state_change(self.server, 'SHUTOFF')
        self._start_server(self.server)
        self.assert_disks('compute2', 2 * units.Gi)

    def test_no_space_for_the_larger_disks(self):
        """The destination cannot allocate them; the old ones are whole."""
        with mock.patch.object(layout, 'fit',
                               side_effect=OSError(28, 'No space left')):
            self.resize(status='ERROR')
        self.assertIn('No space left', self.failure(
            self.server, 'resize', 'compute_finish_resize'))
        self.assertEqual([], self.domains('compute2'))
        # What an operator does to recover.
        directory = os.path.join(self.instances_path, self.server['id'])
        shutil.rmtree(directory)
        os.rename(f'{directory}_resize', directory)
        self.admin_api.post_server_action(
            self.server['id'], {'os-resetState': {'state': 'active'}})
        self._reboot_server(self.server, hard=True)
        self.assert_disks('compute2', units.Gi)

    def test_a_flavor_with_the_memmap_elsewhere_converts(self):
        other = 'guest' if self.MEMMAP == 'device' else 'device'
        self.resize(self.put_flavor(
            'root,ephemeral', 2, 2, **{'fakedax:memmap': other}))
        self.assert_disks('compute2', 2 * units.Gi, other)
        self.revert()
        self.assert_disks('compute1', units.Gi)

    def test_an_image_that_is_larger_than_the_flavor_is_kept(self):
        """As when a guest overwrites its info block."""
        self._stop_server(self.server)
        path = self.path(self.server)
        with open(path, 'r+b') as image:
            image.seek(4096)
            image.write(bytes(4096))
        size = layout.planned(units.Gi, True).file_size
        os.truncate(path, size)
        layout.allocate(path, size)
        self.act(self.server, 'migrate')
        self._wait_for_state_change(self.server, 'VERIFY_RESIZE')
        self.assertEqual(layout.Layout(0, size), self.layout_of(self.server))

    def test_a_host_that_cannot_run_it_says_why(self):
        self.driver('compute2')._reasons_against = ['too old']
        self.resize(status='ERROR')
        self.assertIn('too old', self.failure(
            self.server, 'resize', 'compute_finish_resize'))
        self.assertEqual([], self.domains('compute2'))

    def test_ordinary_disks_are_left_to_nova(self):
        """Nova converts them to qcow2 here."""
        server = self.boot(
            self.put_flavor(None), image_uuid=self.ordinary_image,
            host='compute1')
        with mock.patch.object(imagebackend.FakeDaxImage, 'cache') as cache:
            self.act(server, 'resize', flavorRef=self.put_flavor(None, 2))
            self._wait_for_state_change(server, 'VERIFY_RESIZE')
        cache.assert_not_called()
        with open(self.path(server), 'rb') as image:
            self.assertEqual(b'QFI\xfb', image.read(4))


class ResizeOnTheSameHostTest(ResizeTestCase):

    HOSTS = ('compute1',)

    def test_to_larger_disks(self):
        self.flags(allow_resize_to_same_host=True)
        self.resize()
        self.assert_disks('compute1', 2 * units.Gi)
        self.confirm()
        self.assert_disks('compute1', 2 * units.Gi)


class ResizeMemmapInGuestTest(ResizeTestCase):

    MEMMAP = 'guest'
    test_to_larger_disks = ResizeTest.test_to_larger_disks_on_another_host
    test_conversion = (
        ResizeTest.test_a_flavor_with_the_memmap_elsewhere_converts)


class ResizeKindTest(SharedPathTestCase):
    """Disks that a resize puts on fake DAX, or takes off it."""

    scenarios = [
        ('all on', {'old': '', 'new': 'root,ephemeral'}),
        ('all off', {'old': 'root,ephemeral', 'new': ''}),
        ('ephemeral on', {'old': 'root', 'new': 'root,ephemeral'}),
        ('root off', {'old': 'root,ephemeral', 'new': 'ephemeral'}),
        ('swapped', {'old': 'ephemeral', 'new': 'root'}),
    ]

    FILES = {'root': 'disk', 'ephemeral': 'disk.eph0'}

    def setUp(self):
        super().setUp()
        self.server = self.boot(self.flavor(self.old), host='compute1')
        for name in self.FILES.values():
            self.write(name)
        self.before = {name: self.whole(name) for name in self.FILES.values()}

    def flavor(self, disks, disk=1):
        return self.put_flavor(disks or None, disk, ephemeral=1, swap=8)

    def write(self, name):
        """Write to a disk, as the guest does."""
        path = self.path(self.server, name)
        if name in self.kinds(self.old):
            with open(path, 'r+b') as image:
                image.seek(layout.read(path).offset + units.Mi)
                image.write(b'guest')
        else:
            subprocess.run(
                ['qemu-io', '-f', self.FORMAT, '-c',
                 'write -P 0x67 1M 4k', path], check=True,
                stdout=subprocess.DEVNULL)

    def kinds(self, disks):
        """The files that are on fake DAX."""
        return [self.FILES[role] for role in disks.split(',') if role]

    def whole(self, name):
        """The beginning of a disk of either kind, from its file."""
        path = self.path(self.server, name)
        with open(path, 'rb') as file:
            if file.read(4) != b'QFI\xfb':
                return self.stored(self.server, 4 * units.Mi, name)
        raw = f'{self.instances_path}/raw'
        subprocess.run(['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw',
                        path, raw], check=True)
        with open(raw, 'rb') as file:
            return file.read(4 * units.Mi)

    def assert_kind(self, disks, host, gib):
        on_fake_dax = self.kinds(disks)
        self.assertEqual(on_fake_dax, self.pmems(self.server, host))
        for name, before in self.before.items():
            self.assertEqual(before, self.whole(name), name)
            path = self.path(self.server, name)
            if name in on_fake_dax:
                size = gib if name == 'disk' else 1
                self.assertEqual(layout.planned(size * units.Gi, True),
                                 self.layout_of(self.server, name))
            else:
                with open(path, 'rb') as file:
                    self.assertEqual(self.FORMAT == 'qcow2',
                                     file.read(4) == b'QFI\xfb')
        # Each guest numbers the disks of a bus in their order.
        names = {}
        for disk in self.xml(self.server, host).findall('./devices/disk'):
            if disk.find('./target').get('bus') == 'virtio':
                name = os.path.basename(disk.find('./source').get('file'))
                names[name.removesuffix('.view')] = (
                    disk.find('./target').get('dev'))
        ordinary = [name for name in ('disk', 'disk.eph0', 'disk.swap')
                    if name == 'disk' or name not in on_fake_dax]
        self.assertEqual(
            {name: f'vd{letter}' for name, letter in zip(ordinary, 'abc')},
            names)
        self.assertEqual(
            [f'/dev/pmem{int("disk" in on_fake_dax)}'
             if 'disk.eph0' in on_fake_dax else '/dev/vdb'],
            self.ephemeral_names())

    def ephemeral_names(self):
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.cell_mappings['cell1']) as context:
            bdms = objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, self.server['id'])
        return [bdm.device_name for bdm in bdms
                if block_device.new_format_is_ephemeral(bdm)]

    def test_there_and_back_and_there(self):
        self.assert_kind(self.old, 'compute1', 1)
        larger = self.flavor(self.new, 2)
        self.resize(larger)
        self.assert_kind(self.new, 'compute2', 2)
        self.revert()
        self.assert_kind(self.old, 'compute1', 1)
        self.resize(larger)
        self.confirm()
        self.assert_kind(self.new, 'compute2', 2)
        self._reboot_server(self.server, hard=True)
        self.assert_kind(self.new, 'compute2', 2)
        self._delete_server(self.server)
        self.assertFalse(os.path.exists(self.path(self.server, '')))
        self.assertEqual({}, self.allocations(self.server))


class ResizeKindOfRawDisksTest(ResizeKindTest):
    """On hosts whose ordinary disks are raw."""

    scenarios = [('on', {'old': '', 'new': 'root,ephemeral'}),
                 ('off', {'old': 'root,ephemeral', 'new': ''})]
    FORMAT = 'raw'
