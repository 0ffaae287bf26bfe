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

"""Servers with Cinder volumes on fake DAX, through Nova's own code."""

import os

from nova import block_device
from nova import context as nova_context
from nova import objects
from oslo_utils import units
import testscenarios

from nova_fakedax import domain
from nova_fakedax import layout
from tests.functional import base

load_tests = testscenarios.load_tests_apply_scenarios

KNOWS = {'fakedax_guest': 'true'}
#: With which no firmware boots, and no boot view is needed.
WITH_KERNEL = {**KNOWS, 'kernel_id': 'nokernel'}


class VolumesTestCase(base.FakeDaxTestCase):

    def setUp(self):
        super().setUp()
        self.start_compute()

    def volumes_flavor(self, volumes, disks=None, **extra_specs):
        return self.put_flavor(
            disks, **{'fakedax:volumes': volumes, **extra_specs})

    def devices(self, server):
        """Alias, source and size in bytes of each pmem, in order."""
        return [
            (memory.find('./alias').get('name'),
             memory.findtext('./source/path'),
             int(memory.findtext('./target/size')) * units.Ki)
            for memory in self.xml(server).findall(
                "./devices/memory[@model='virtio-pmem']")]

    def device(self, volume, size=4 * units.Mi):
        return f'ua-fakedax-{volume}', self.volume_path(volume), size

    def serials(self, server):
        return [disk.findtext('./serial') for disk in self.xml(
            server).findall('./devices/disk')]

    def mappings(self, server):
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.cell_mappings['cell1']) as context:
            return objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, server['id'])

    def assert_content(self, *volumes):
        """What the test has put there, to the byte."""
        for volume in volumes:
            with open(self.volume_path(volume), 'rb') as file:
                self.assertEqual(self.content, file.read(len(self.content)))
                self.assertEqual({0}, set(file.read()))


class BootFromVolumeTest(VolumesTestCase):

    scenarios = testscenarios.multiply_scenarios(
        [('file', {'kind': 'gpfs'}), ('block', {'kind': 'local'})],
        [('boot', {'volumes': 'boot'}), ('all', {'volumes': 'all'})])

    def setUp(self):
        super().setUp()
        # Or a block device could have no boot view.
        self.useFixture(base.base_fixtures.MockPatch(
            'nova_fakedax.capability.security_models', return_value=['dac']))
        self.root = self.put_volume('root', kind=self.kind, metadata=KNOWS)
        self.data = self.put_volume('data', kind=self.kind)
        self.server = self.boot_volumes(
            self.volumes_flavor(self.volumes), self.root, self.data)

    def assert_as_it_should_be(self):
        wanted = [self.device(self.root)]
        if self.volumes == 'all':
            wanted.append(self.device(self.data))
        self.assertEqual(wanted, self.devices(self.server))
        # The boot view is the first, and the other volume an ordinary disk.
        self.assertEqual(
            [domain.BOOT_VIEW_SERIAL]
            + ([self.data] if self.volumes == 'boot' else []),
            self.serials(self.server))
        view = self.xml(self.server).find('./devices/disk')
        self.assertIsNotNone(view.find('./readonly'))
        self.assertEqual(
            'file' if self.kind == 'gpfs' else 'block', view.get('type'))
        self.assertEqual(
            [self.volume_path(self.root)], view.find('./source').values())
        self.assert_content(self.root, self.data)

    def test_it_stays_so(self):
        self.assert_as_it_should_be()
        self.server = self._stop_server(self.server)
        self.server = self._start_server(self.server)
        self.assert_as_it_should_be()
        self.server = self._reboot_server(self.server, hard=True)
        self.assert_as_it_should_be()

    def test_the_disks_that_nova_knows_are_no_volumes(self):
        # _get_disk_over_committed_size_total() asks for all servers.
        driver = self.driver()
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.cell_mappings['cell1']):
            instance = self.instance(self.server)
            info = base.libvirt_driver.driver.get_block_device_info(
                instance, self.mappings(self.server))
            self.assertEqual(
                [], driver._get_instance_disk_info(instance, info))

    def test_it_can_be_deleted(self):
        self._delete_server(self.server)
        self.assert_nothing_left(self.server)
        self.assertEqual(
            {}, self.cinder.volume_to_attachment[self.root])
        self.assert_content(self.root, self.data)
        self.assertEqual(
            sorted(os.path.basename(self.volume_path(volume))
                   for volume in (self.root, self.data)),
            sorted(os.listdir(self.volumes_path)))


class AppArmorTest(VolumesTestCase):
    """Nova's fake libvirt has it: the boot view needs a second name."""

    def test_a_file_has_one_as_long_as_it_is_connected(self):
        root = self.put_volume('root', metadata=KNOWS)
        server = self.boot_volumes(self.volumes_flavor('boot'), root)
        view = self.volume_path(root) + '.view'
        self.assertEqual([(os.path.basename(view), True)], self.disks(server))
        self.assertTrue(os.path.samefile(self.volume_path(root), view))
        self._delete_server(server)
        self.assertEqual([f'volume-{root}'], os.listdir(self.volumes_path))

    def test_a_block_device_is_refused(self):
        root = self.put_volume('root', kind='local', metadata=KNOWS)
        self.useFixture(base.base_fixtures.MockPatchObject(
            os.path, 'isfile', lambda path, real=os.path.isfile: (
                not path.startswith(self.volumes_path) and real(path))))
        server = self.boot_volumes(
            self.volumes_flavor('boot'), root, state='ERROR')
        self.assertIn(f'Volume {root} cannot be on fake DAX: AppArmor',
                      server['fault']['message'])
        self.assert_nothing_left(server)


class DataVolumeTest(VolumesTestCase):
    """Of a server whose root disk is a file."""

    def boot_with_data(self, disks='root', **extra_specs):
        self.data = self.put_volume('data', mib=6)
        return self.boot_volumes(
            self.volumes_flavor('all', disks, **extra_specs), None, self.data)

    def test_it_is_behind_the_disks(self):
        server = self.boot_with_data()
        root, data = self.devices(server)
        self.assertEqual('ua-fakedax-root', root[0])
        self.assertEqual(self.device(self.data, 6 * units.Mi), data)
        self.assert_content(self.data)

    def test_it_may_be_all_that_is_on_fake_dax(self):
        server = self.boot_with_data(None)
        self.assertEqual([self.device(self.data, 6 * units.Mi)],
                         self.devices(server))

    def test_the_metadata_names_it_as_the_guest_does(self):
        server = self.boot_with_data()
        [name] = [bdm.device_name for bdm in self.mappings(server)
                  if bdm.volume_id == self.data]
        self.assertEqual('/dev/pmem1', name)
        told = block_device.instance_block_mapping(
            self.instance(server), self.mappings(server))
        self.assertEqual('/dev/pmem1', told['ebs0'])
        self.assertEqual('/dev/vda', told['root'])
        # And the next start finds the volume by that name.
        server = self._reboot_server(server, hard=True)
        self.assertEqual(2, len(self.devices(server)))

    def test_there_is_room_for_more(self):
        self.flags(spare_volumes=3, spare_volumes_gib=5, group='fakedax')
        server = self.boot_with_data()
        xml = self.xml(server)
        self.assertEqual('5', xml.find('./maxMemory').get('slots'))
        pmems = sum(size for _alias, _path, size in self.devices(server))
        self.assertEqual(
            512 * units.Ki + pmems // units.Ki + 5 * units.Mi,
            int(xml.findtext('./maxMemory')))

    def test_a_server_without_volumes_has_the_room_too(self):
        server = self.boot(self.volumes_flavor('all', 'root'))
        self.assertEqual(
            '9', self.xml(server).find('./maxMemory').get('slots'))
        for flavor in (self.volumes_flavor('none', 'root'),
                       self.volumes_flavor('boot', 'root')):
            server = self.boot(flavor)
            self.assertEqual(
                '1', self.xml(server).find('./maxMemory').get('slots'))

    def test_a_tag_says_where_the_guest_finds_it(self):
        root = self.put_volume('root', metadata=KNOWS)
        data = self.put_volume('data')
        body = self._build_server(
            image_uuid='', networks='none',
            flavor_id=self.volumes_flavor('all'))
        del body['imageRef']
        body['block_device_mapping_v2'] = [
            {'source_type': 'volume', 'destination_type': 'volume',
             'uuid': volume, 'boot_index': index, 'tag': tag}
            for volume, index, tag in (
                (root, 0, 'system'), (data, -1, 'db'))]
        server = self._wait_for_state_change(
            self.api.post_server({'server': body}), 'ACTIVE')
        self.assertEqual(
            [('system', '/dev/pmem0', root), ('db', '/dev/pmem1', data)],
            [(*device.tags, device.path, device.serial) for device
             in self.instance(server).device_metadata.devices])

    def test_a_memmap_of_the_user_s_is_kept(self):
        data = self.put_volume('data')
        made = layout.planned(8 * units.Mi, True)
        with open(self.volume_path(data), 'wb') as file:
            file.truncate(made.file_size)
            file.seek(layout.INFO_BLOCK_OFFSET)
            file.write(layout.info_block(made))
        server = self.boot_volumes(
            self.volumes_flavor('all', 'root'), None, data)
        self.assertEqual(self.device(data, made.file_size),
                         self.devices(server)[1])
        self.assertEqual(made, layout.read(self.volume_path(data)))


class StopTest(VolumesTestCase):

    def test_what_the_guest_stored_is_flushed(self):
        root = self.put_volume('root', metadata=KNOWS)
        data = self.put_volume('data')
        server = self.boot_volumes(self.volumes_flavor('all'), root, data)
        flush = self.useFixture(base.base_fixtures.MockPatch(
            'nova_fakedax.hostcache.flush')).mock
        paths = [self.volume_path(root), self.volume_path(data)]
        server = self._stop_server(server)
        # While it runs, and once it does not.
        self.assertEqual(
            2 * paths, [call.args[0] for call in flush.mock_calls])
        self._start_server(server)
        flush.reset_mock()
        self._delete_server(server)
        self.assertEqual(paths, [call.args[0] for call in flush.mock_calls])

    def test_no_figures_of_the_boot_view_count_for_the_volume(self):
        root = self.put_volume('root', metadata=KNOWS)
        data = self.put_volume('data')
        server = self.boot_volumes(self.volumes_flavor('boot'), root, data)
        usage = self.driver().get_all_volume_usage(None, [{
            'instance': self.instance(server),
            'instance_bdms': self.mappings(server)}])
        self.assertEqual([data], [each['volume'] for each in usage])


class RefusedTestCase(VolumesTestCase):

    def fault(self, flavor, root, *data):
        server = self.boot_volumes(flavor, root, *data, state='ERROR')
        self.assert_nothing_left(server)
        for volume in filter(None, (root, *data)):
            self.assertEqual([], [
                name for name in os.listdir(self.volumes_path)
                if name.endswith('.view')])
            self.assertFalse(any(
                attachment['connector'] for attachment
                in self.cinder.volume_to_attachment[volume].values()))
        self._delete_server(server)
        return server['fault']['message']


class RefusedVolumeTest(RefusedTestCase):
    """By name, and before it is connected where Cinder says enough."""

    scenarios = [
        ('librbd', {'volume': {'kind': 'rbd'}, 'why': 'librbd'}),
        ('qcow2', {'volume': {'format': 'qcow2'},
                   'why': "its format is 'qcow2'"}),
        ('read-only', {'volume': {'access_mode': 'ro'}, 'why': 'read-only'}),
        ('limits', {'volume': {'qos_specs': {'total_iops_sec': '9'}},
                    'why': 'without limits for the front end'}),
        ('size', {'volume': {'mib': 5},
                  'why': 'it has 5242880 bytes; allowed: a multiple'}),
        ('network', {'volume': {'kind': 'fake'}, 'why': 'over the network'}),
    ]

    def test_as_the_root_volume(self):
        root = self.put_volume('root', metadata=KNOWS, **self.volume)
        message = self.fault(self.volumes_flavor('boot'), root)
        self.assertIn(f'Volume {root} cannot be on fake DAX', message)
        self.assertIn(self.why, message)

    def test_as_a_data_volume(self):
        data = self.put_volume('data', **self.volume)
        self.assertIn(self.why, self.fault(
            self.volumes_flavor('all', 'root'), None, data))


class RefusedTest(RefusedTestCase):

    def test_an_encrypted_volume(self):
        root = self.put_volume('root', metadata=KNOWS, encrypted=True)
        self.useFixture(base.base_fixtures.MockPatch(
            'nova.volume.cinder.API.get_volume_encryption_metadata',
            return_value={'provider': 'luks', 'encryption_key_id': 'x'}))
        self.assertIn(
            'LUKS', self.fault(self.volumes_flavor('boot'), root))

    def test_a_root_volume_whose_guest_does_not_know_fake_dax(self):
        for metadata in {}, {'fakedax_guest': 'false'}:
            root = self.put_volume('root', metadata=metadata)
            message = self.fault(self.volumes_flavor('boot'), root)
            self.assertIn('fakedax:volumes names the root volume, but the '
                          'property fakedax_guest of its image metadata is',
                          message)

    def test_a_guest_with_too_little_ram_for_the_memmap(self):
        # It stays sparse here.
        self.useFixture(base.base_fixtures.MockPatch(
            'nova_fakedax.volumes.fill_holes'))
        data = self.put_volume('data', mib=30 << 10)
        self.assertIn(
            "the flavor's RAM is 512 MiB, and 30 GiB of volumes and 0 GiB of "
            "disk take 480 MiB of it; allowed: 544 MiB or more",
            self.fault(self.volumes_flavor('all', 'root'), None, data))

    def test_a_file_that_has_no_space_for_its_holes(self):
        root = self.put_volume('root', metadata=KNOWS)
        self.useFixture(base.base_fixtures.MockPatch(
            'nova_fakedax.layout.fill_holes', side_effect=OSError(
                28, 'No space left on device')))
        self.assertIn('No space left on device', self.fault(
            self.volumes_flavor('boot'), root))

    def test_a_damaged_memmap(self):
        root = self.put_volume('root', metadata=KNOWS)
        with open(self.volume_path(root), 'r+b') as file:
            file.seek(layout.INFO_BLOCK_OFFSET)
            file.write(layout.info_block(
                layout.planned(8 * units.Mi, True)))
        self.assertIn('info block', self.fault(
            self.volumes_flavor('boot'), root))


class WhatItBootsFromTest(RefusedTestCase):
    """Refused by the scheduler, or by the compute."""

    scenarios = [('with filter', {'FILTER_ENABLED': True}),
                 ('without filter', {'FILTER_ENABLED': False})]

    def test_a_flavor_for_a_root_volume_and_a_server_without_one(self):
        self.assertIn(
            "fakedax:volumes names the root volume, but the server boots from "
            "an image; allowed: a volume, or a flavor with "
            "fakedax:disks='root' as well",
            self.fault(self.volumes_flavor('boot'), None))

    def test_a_flavor_that_serves_both(self):
        flavor = self.volumes_flavor('boot', 'root')
        root = self.put_volume('root', metadata=KNOWS)
        self.assertEqual(
            ['disk'], self.pmems(self.boot_volumes(flavor, None)))
        self.assertEqual([f'volume-{root}'], self.pmems(
            self.boot_volumes(flavor, root)))
