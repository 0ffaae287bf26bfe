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

import json
import os
from unittest import mock

from nova import block_device
from nova import context as nova_context
from nova import objects
from nova.tests.fixtures import libvirt
from oslo_utils import units
import testscenarios

from nova_fakedax import layout
from tests.functional import base

load_tests = testscenarios.load_tests_apply_scenarios

VIEW = ('disk.view', True)


class LifecycleTestCase(base.FakeDaxTestCase):

    MEMMAP = 'device'

    def setUp(self):
        super().setUp()
        self.start_compute()

    def boot_both(self, **kwargs):
        return self.boot(self.put_flavor('root,ephemeral', ephemeral=1),
                         **kwargs)

    def assert_layout(self, server, name='disk'):
        """As the flavor has it, with the content and the boot view in it."""
        wanted = layout.planned(units.Gi, self.MEMMAP == 'device')
        self.assertEqual(wanted, self.layout_of(server, name))
        if name == 'disk':
            self.assertEqual({'disk.view': wanted} if wanted.memmap else {},
                             self.slices(server))

    def assert_both(self, server):
        self.assertEqual(['disk', 'disk.eph0'], self.pmems(server))
        self.assertEqual([VIEW], self.disks(server))
        self.assert_layout(server)
        self.assert_layout(server, 'disk.eph0')


class NamesTest(LifecycleTestCase):
    """The metadata calls disks as Linux does.

    Which numbers the disks of a bus in their order, and those on fake DAX
    in theirs.
    """

    scenarios = [
        ('ordinary', {
            'on_fake_dax': None,
            'names': {'ephemeral0': '/dev/vdb', 'ephemeral1': '/dev/vdc',
                      'swap': '/dev/vdd'}}),
        ('root', {
            'on_fake_dax': 'root',
            'names': {'ephemeral0': '/dev/vdb', 'ephemeral1': '/dev/vdc',
                      'swap': '/dev/vdd'}}),
        ('ephemeral', {
            'on_fake_dax': 'ephemeral',
            'names': {'ephemeral0': '/dev/pmem0', 'ephemeral1': '/dev/pmem1',
                      'swap': '/dev/vdb'}}),
        ('both', {
            'on_fake_dax': 'root,ephemeral',
            'names': {'ephemeral0': '/dev/pmem1', 'ephemeral1': '/dev/pmem2',
                      'swap': '/dev/vdb'}}),
    ]

    def test_names(self):
        self.flags(max_local_block_devices=4)
        server = self._build_server(
            image_uuid='', networks='none', flavor_id=self.put_flavor(
                self.on_fake_dax, ephemeral=2, swap=8))
        server |= {'imageRef': self.image, 'config_drive': True}
        server['block_device_mapping_v2'] = [
            {'source_type': 'image', 'destination_type': 'local',
             'boot_index': 0, 'uuid': self.image},
            *[{'source_type': 'blank', 'destination_type': 'local',
               'boot_index': -1, 'volume_size': 1} for _ in range(2)]]
        server = self.api.post_server({'server': server})
        server = self._wait_for_state_change(server, 'ACTIVE')
        self.assertNames(server)
        self.assertNames(self._reboot_server(server, hard=True))

    def assertNames(self, server):
        instance = self.instance(server)
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.cell_mappings['cell1']) as context:
            bdms = objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, instance.uuid)
        told = block_device.instance_block_mapping(instance, bdms)
        self.assertEqual(self.names, {
            key: told[key] for key in self.names})
        self.assertEqual('/dev/vda', told['root'])
        # The guest's order is that of the names.
        disks = sorted(
            (disk.find('./target').get('dev'),
             os.path.basename(disk.find('./source').get('file'))
             .removesuffix('.view'))
            for disk in self.xml(server).findall('./devices/disk')
            if disk.find('./target').get('bus') == 'virtio')
        files = {'ephemeral0': 'disk.eph0', 'ephemeral1': 'disk.eph1',
                 'swap': 'disk.swap'}
        self.assertEqual(
            [('vda', 'disk')] + sorted(
                (name.removeprefix('/dev/'), files[key])
                for key, name in self.names.items() if 'vd' in name), disks)
        self.assertEqual([f'vd{letter}' for letter in 'abcd'[:len(disks)]],
                         [name for name, _file in disks])


class LifecycleTest(LifecycleTestCase):

    def test_root(self):
        server = self.boot()
        self.assertEqual(['disk'], self.pmems(server))
        self.assertEqual([VIEW], self.disks(server))
        self.assert_layout(server)
        self.assertEqual(
            self.content, self.stored(server, len(self.content)))

    def test_ephemeral(self):
        server = self.boot(self.put_flavor('ephemeral', ephemeral=1),
                           image_uuid=self.ordinary_image)
        self.assertEqual(['disk.eph0'], self.pmems(server))
        self.assertEqual([('disk', False)], self.disks(server))
        self.assert_layout(server, 'disk.eph0')
        self.assertEqual({}, self.slices(server))
        # The magic number of Nova's ext4.
        self.assertEqual(b'\x53\xef', self.stored(
            server, 1082, 'disk.eph0')[1080:])

    def test_root_and_ephemeral(self):
        server = self.boot_both()
        self.assert_both(server)

    def test_an_ordinary_flavor(self):
        server = self.boot(self.put_flavor(None, ephemeral=1),
                           image_uuid=self.ordinary_image)
        self.assertEqual([], self.pmems(server))
        self.assertEqual([('disk', False), ('disk.eph0', False)],
                         self.disks(server))
        with open(self.path(server), 'rb') as image:
            self.assertEqual(b'QFI\xfb', image.read(4))

    def test_the_emulator_option_is_for_fake_dax_only(self):
        self.flags(emulator=self.emulator.path, group='fakedax')
        server = self.boot()
        self.assertEqual(self.emulator.path,
                         self.xml(server).findtext('./devices/emulator'))
        ordinary = self.boot(self.put_flavor(None))
        self.assertEqual('/usr/bin/kvm', self.xml(ordinary).findtext(
            './devices/emulator'))

    def test_each_way_to_start_it_again_keeps_the_disks(self):
        server = self.boot_both()
        self.store(server, b'DATA')
        server = self._reboot_server(server, hard=True)
        self.assert_both(server)
        server = self._reboot_server(server)
        self.assert_both(server)
        server = self._stop_server(server)
        server = self._start_server(server)
        self.assert_both(server)
        self.act(server, 'pause')
        server = self._wait_for_state_change(server, 'PAUSED')
        self.assert_both(server)
        self.act(server, 'unpause')
        server = self._wait_for_state_change(server, 'ACTIVE')
        self.assert_both(server)
        self.assertEqual(b'DATA', self.stored(server, 4))

    def test_deleting_leaves_nothing(self):
        server = self.boot_both()
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_soft_delete_and_restore(self):
        self.flags(reclaim_instance_interval=3600)
        server = self.boot_both()
        self.store(server, b'DATA')
        self.api.delete_server(server['id'])
        server = self._wait_for_state_change(server, 'SOFT_DELETED')
        [domain] = self.domains()
        self.assertEqual(libvirt.VIR_DOMAIN_SHUTOFF, domain._state)
        self.act(server, 'restore')
        server = self._wait_for_state_change(server, 'ACTIVE')
        self.assert_both(server)
        self.assertEqual(b'DATA', self.stored(server, 4))
        self.api.delete_server(server['id'])
        self._wait_for_state_change(server, 'SOFT_DELETED')
        self.act(server, 'forceDelete')
        self._wait_until_deleted(server)
        self.assert_nothing_left(server)

    def test_guests_run_again_when_their_host_has_booted(self):
        self.flags(resume_guests_state_on_host_boot=True)
        server = self.boot_both()
        self.store(server, b'DATA')
        [domain] = self.domains()
        domain.destroy()
        self.restart_compute_service('compute1', keep_hypervisor_state=True)
        [domain] = self.domains()
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain._state)
        self.assert_both(server)
        self.assertEqual(b'DATA', self.stored(server, 4))

    def test_a_restart_of_the_compute_keeps_everything(self):
        server = self.boot_both()
        self.restart_compute_service('compute1')
        self.assertIn(base.TRAIT, self.traits())
        self.assert_both(server)
        server = self._reboot_server(server, hard=True)
        self.assert_both(server)
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_rebuilding_keeps_the_disks_and_takes_the_new_image(self):
        server = self.boot_both()
        old, self.content = self.content, os.urandom(units.Mi)
        self.assertNotEqual(old, self.content)
        image = self.put_image('newer', fakedax_guest='true')
        server = self._rebuild_server(server, image)
        self.assert_both(server)
        self.assertEqual(
            self.content, self.stored(server, len(self.content)))

    def test_a_rescue_has_ordinary_disks(self):
        server = self.boot_both()
        server = self._rescue_server(server)
        self.assertEqual([], self.pmems(server))
        self.assertEqual([('disk.rescue', False), ('disk', False)],
                         self.disks(server))
        wanted = self.layout_of(server)
        self.assertEqual({'disk': wanted} if wanted.memmap else {},
                         self.slices(server))
        server = self._unrescue_server(server)
        self.assert_both(server)
        server = self._reboot_server(server, hard=True)
        self.assert_both(server)

    def test_a_rescue_by_a_disk_has_them_all(self):
        image = self.put_image('rescue', fakedax_guest='true',
                               hw_rescue_device='disk', hw_rescue_bus='virtio')
        server = self.boot_both()
        self.act(server, 'rescue', rescue_image_ref=image)
        server = self._wait_for_state_change(server, 'RESCUE')
        self.assertEqual([], self.pmems(server))
        self.assertEqual(
            [('disk', False), ('disk.eph0', False), ('disk.rescue', False)],
            sorted(self.disks(server)))
        names = [target.get('dev') for target in self.xml(server).findall(
            './devices/disk/target')]
        self.assertEqual(['vda', 'vdb', 'vdc'], sorted(names))
        server = self._unrescue_server(server)
        self.assert_both(server)

    def test_the_disk_info_has_each_disk_with_the_size_of_its_file(self):
        server = self.boot_both()
        infos = json.loads(
            self.driver().get_instance_disk_info(self.instance(server)))
        size = layout.planned(units.Gi, self.MEMMAP == 'device').file_size
        self.assertEqual(
            [('raw', self.path(server, name), '', size)
             for name in ('disk', 'disk.eph0')],
            [(info['type'], info['path'], info['backing_file'],
              info['virt_disk_size']) for info in infos])
        for info in infos:
            # The file system may count blocks of its own.
            self.assertGreaterEqual(info['disk_size'], size)
            self.assertLessEqual(info['over_committed_disk_size'], 0)

    def test_tagged_disks_are_found_by_the_address_of_their_device(self):
        server = self._build_server(
            image_uuid='', networks='none',
            flavor_id=self.put_flavor('root,ephemeral', ephemeral=1))
        server['imageRef'] = self.image
        server['block_device_mapping_v2'] = [
            {'source_type': 'image', 'destination_type': 'local',
             'boot_index': 0, 'uuid': self.image, 'tag': 'system'},
            {'source_type': 'blank', 'destination_type': 'local',
             'boot_index': -1, 'tag': 'scratch'},
        ]
        server = self.api.post_server({'server': server})
        self._wait_for_state_change(server, 'ACTIVE')
        instance = self.instance(server)
        self.assertEqual(
            [(['system'], '/dev/pmem0', '0000:07:01.0'),
             (['scratch'], '/dev/pmem1', '0000:07:02.0')],
            [(device.tags, device.path, device.bus.address)
             for device in instance.device_metadata.devices])

    def test_an_info_block_that_the_guest_has_damaged(self):
        """The user reads why; the image stays as it is."""
        server = self._stop_server(self.boot())
        with open(self.path(server), 'r+b') as image:
            image.seek(4096 + 56)
            image.write(b'\1')
            size = image.seek(0, os.SEEK_END)
        self.act(server, 'reboot', type='HARD')
        server = self._wait_for_state_change(server, 'ERROR')
        self.assertIn(f'{self.path(server)} has {size} bytes and an info '
                      f'block whose checksum is', server['fault']['message'])
        self.assertEqual(size, os.path.getsize(self.path(server)))


class BootViewTest(base.FakeDaxTestCase):
    """The image asks for a bus on which no boot view works."""

    scenarios = [(bus, {'bus': bus}) for bus in ('sata', 'ide', 'usb')]

    def targets(self, server):
        return [(target.get('bus'), target.get('dev')) for target in
                self.xml(server).findall('./devices/disk/target')]

    def test_the_view_is_a_virtio_disk_and_the_rest_as_asked(self):
        self.start_compute()
        image = self.put_image('bus', fakedax_guest='true',
                               hw_disk_bus=self.bus)
        server = self.boot(self.put_flavor(ephemeral=1), image_uuid=image)
        self.assertEqual([VIEW, ('disk.eph0', False)], self.disks(server))
        view, ephemeral = self.targets(server)
        self.assertEqual(('virtio', 'vda'), view)
        self.assertEqual(self.bus, ephemeral[0])
        server = self._reboot_server(server, hard=True)
        self.assertEqual([view, ephemeral], self.targets(server))


class SparseImageTest(base.FakeDaxTestCase):
    """An operator has restored an image as a sparse file."""

    MEMMAP = 'device'

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self._stop_server(self.boot())
        path = self.path(self.server)
        self.before = self.layout_of(self.server)
        with open(path, 'r+b') as image:
            data = image.read(self.before.offset + len(self.content))
            image.truncate(0)
            image.seek(0)
            image.write(data)
            image.truncate(self.before.file_size)

    def assert_is_sparse(self):
        status = os.stat(self.path(self.server))
        self.assertEqual(self.before.file_size, status.st_size)
        self.assertLess(512 * status.st_blocks, status.st_size)

    def test_a_start_says_what_is_wrong_and_what_helps(self):
        self.act(self.server, 'os-start')
        message = self.failure(
            self.server, 'start', 'compute_start_instance')
        self.assertIn(f'{self.path(self.server)} has '
                      f'{self.before.file_size} bytes, but only ', message)
        self.assertIn('a hard reboot of the server allocates the rest',
                      message)
        self.assert_is_sparse()

    def test_a_hard_reboot_allocates_it_and_goes_on(self):
        self.act(self.server, 'reboot', type='HARD')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.assertEqual(['disk'], self.pmems(self.server))
        self.assertEqual(self.before, self.layout_of(self.server))
        self.assertEqual(
            self.content, self.stored(self.server, len(self.content)))

    def test_a_hard_reboot_without_space_says_so(self):
        with mock.patch('nova_fakedax.layout.available', return_value=4096):
            self.act(self.server, 'reboot', type='HARD')
            server = self._wait_for_state_change(self.server, 'ERROR')
        self.assertRegex(
            server['fault']['message'],
            r'Cannot allocate \d+ bytes for \S+/disk: No space left')
        self.assert_is_sparse()


class StorageErrorTest(base.FakeDaxTestCase):
    """The user reads what the storage said, not the name of a class."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self.boot()

    def test_a_flush_after_the_guests_end(self):
        with mock.patch('nova_fakedax.hostcache.flush',
                        side_effect=OSError(5, 'Input/output error')):
            self.act(self.server, 'os-stop')
            self.assertEqual(
                f'Cannot flush {self.path(self.server)}: Input/output error; '
                f'what the guest has stored since its last fsync may be lost',
                self.failure(self.server, 'stop', 'compute_stop_instance'))

    def test_an_image_that_cannot_be_read(self):
        self._stop_server(self.server)
        with mock.patch('os.pread', side_effect=OSError(5, 'EIO')):
            self.act(self.server, 'os-start')
            self.assertEqual(
                f'{self.path(self.server)} cannot be read: EIO', self.failure(
                    self.server, 'start', 'compute_start_instance'))

    def test_a_copy_that_cannot_be_begun(self):
        with mock.patch('tempfile.TemporaryFile',
                        side_effect=OSError(28, 'No space left on device')):
            self.act(self.server, 'createBackup', name='copy',
                     backup_type='daily', rotation=1)
            self.assertEqual(
                f'Cannot copy {self.path(self.server)}: No space left on '
                f'device', self.failure(
                    self.server, 'createBackup', 'compute_backup_instance'))


class LifecycleMemmapInGuestTest(LifecycleTestCase):

    MEMMAP = 'guest'
    test_root = LifecycleTest.test_root
    test_ephemeral = LifecycleTest.test_ephemeral
    test_a_rescue = LifecycleTest.test_a_rescue_has_ordinary_disks
    test_rebuilding = (
        LifecycleTest
        .test_rebuilding_keeps_the_disks_and_takes_the_new_image)
