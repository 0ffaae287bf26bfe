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

"""A Cinder volume as a disk on fake DAX."""

import errno
import os
from unittest import mock

import fixtures as base_fixtures
from nova import exception
from nova import objects
from nova.virt import block_device as driver_block_device
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from os_brick import encryptors
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units
from oslotest import base
import testscenarios

from nova_fakedax import disk
from nova_fakedax import layout
from nova_fakedax import privsep
from nova_fakedax import spec
from nova_fakedax import volumes
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios


def mapping(volume, boot_index=None, connection_info=None, size=3):
    """A volume's mapping, as Nova hands it to the driver."""
    return driver_block_device.DriverVolumeBlockDevice(
        objects.BlockDeviceMapping(
            source_type='volume', destination_type='volume', no_device=False,
            volume_id=volume, volume_size=size, boot_index=boot_index,
            device_name='/dev/vdb', delete_on_termination=False,
            guest_format=None, device_type='disk', disk_bus='virtio',
            attachment_id=uuids.attachment, volume_type=None,
            connection_info=jsonutils.dumps(connection_info)))


def block_device_info(*mappings):
    return {'block_device_mapping': list(mappings), 'ephemerals': [],
            'swap': None, 'root_device_name': '/dev/vda', 'image': []}


class AttachedTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()
        self.info = block_device_info(
            mapping(uuids.first, boot_index=-1,
                    connection_info={'serial': uuids.first, 'data': {}}),
            mapping(uuids.second),
            mapping(uuids.root, boot_index=0, size=7,
                    connection_info={'serial': uuids.root}))

    def wanted(self, value):
        return volumes.wanted(
            spec.FakeDaxSpec(volumes=value), self.info)

    def test_the_root_volume_is_the_first(self):
        self.assertEqual(
            [volumes.Volume(uuids.root, True),
             volumes.Volume(uuids.first, False),
             volumes.Volume(uuids.second, False)],
            volumes.attached(self.info))

    def test_what_the_mappings_say_of_them(self):
        root, first, second = volumes.attached(self.info)
        self.assertEqual([7, 3, 3], [root.size, first.size, second.size])
        self.assertEqual({'serial': uuids.first, 'data': {}},
                         first.connection_info)
        # It has not been attached yet.
        self.assertEqual({}, second.connection_info)

    def test_the_flavor_says_which_are_on_fake_dax(self):
        self.assertEqual([], self.wanted('none'))
        self.assertEqual(
            [uuids.root], [volume.id for volume in self.wanted('boot')])
        self.assertEqual(volumes.attached(self.info), self.wanted('all'))

    def test_whether_a_server_boots_from_a_volume(self):
        self.assertTrue(volumes.boots_from_volume(self.info))
        for info in (None, {}, block_device_info(),
                     block_device_info(mapping(uuids.data, boot_index=1))):
            self.assertFalse(volumes.boots_from_volume(info))
            self.assertEqual(
                [], volumes.wanted(spec.FakeDaxSpec(volumes='boot'), info))


class RefusedTestCase(base.BaseTestCase):

    def assert_fits(self, exc):
        """A fault has 255 characters, with what Nova writes before it."""
        before = f'Build of instance {fixtures.UUID} aborted: '
        self.assertLessEqual(len(before + str(exc)), 255)


class RefusedConnectionTest(RefusedTestCase):
    """What Cinder says is enough to refuse it before it is connected."""

    scenarios = [(name, {'said': said, 'why': why, **others})
                 for name, said, why, others in (
        ('librbd', {'driver_volume_type': 'rbd'}, 'librbd', {}),
        ('LUKS', {}, 'LUKS', {'encryption': {'provider': 'luks'}}),
        ('LUKS, by the name of old volume types', {}, 'LUKS', {'encryption': {
            'provider': 'nova.volume.encryptors.luks.LuksEncryptor'}}),
        ('multiattach', {'multiattach': True}, 'several servers', {}),
        ('read-only', {'data': {'access_mode': 'ro'}}, 'read-only', {}),
        ('qcow2', {'data': {'format': 'qcow2'}}, "format is 'qcow2'", {}),
        ('limits', {'data': {'qos_specs': {'total_iops_sec': '9'}}},
         'without limits for the front end', {}),
    )]
    encryption = None

    def test_it_is_refused_by_name(self):
        exc = self.assertRaises(
            volumes.VolumeRefused, volumes.check_connection, uuids.volume,
            {'driver_volume_type': 'nfs', 'data': {}, **self.said},
            self.encryption)
        self.assertIn(
            f'Volume {uuids.volume} cannot be on fake DAX: ', str(exc))
        self.assertIn(self.why, str(exc))
        self.assertIn('allowed: ', str(exc))
        # So that ComputeManager gives up at once.
        self.assertIsInstance(exc, exception.InvalidInput)
        self.assert_fits(exc)


class ConnectionTest(base.BaseTestCase):

    def test_what_can_be_mapped(self):
        for said in (
            {}, {'data': None},
            {'driver_volume_type': 'nfs', 'data': {
                'format': 'raw', 'access_mode': 'rw', 'qos_specs': None}},
            {'driver_volume_type': 'iscsi', 'multiattach': False, 'data': {
                'encrypted': True}},
        ):
            volumes.check_connection(uuids.volume, said, {})

    def test_what_dm_crypt_decrypts(self):
        for provider in (
            'plain', 'luks2', 'os_brick.encryptors.nop.NoopEncryptor',
            'nova.volume.encryptors.cryptsetup.CryptsetupEncryptor',
        ):
            volumes.check_connection(
                uuids.volume, {'driver_volume_type': 'iscsi'},
                {'provider': provider})

    def test_it_agrees_with_nova(self):
        for provider in (None, 'vendor.Encryptor', *(
                encryptors.FORMAT_TO_FRONTEND_ENCRYPTOR_MAP),
                *encryptors.LEGACY_PROVIDER_CLASS_TO_FORMAT_MAP):
            encryption = {'provider': provider}
            self.assertEqual(
                libvirt_driver.LibvirtDriver._allow_native_luksv1(
                    None, encryption),
                volumes._qemu_decrypts(encryption), provider)


class DiskTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.PrivsepFixture())
        self.path = os.path.join(
            self.useFixture(base_fixtures.TempDir()).path, 'volume')
        self.put(4 * units.Mi)

    def put(self, size, content=b''):
        with open(self.path, 'wb') as file:
            file.write(content)
            file.truncate(size)

    def device(self, **fields):
        """As Nova's drivers of volumes make it."""
        device = vconfig.LibvirtConfigGuestDisk()
        device.source_device = 'disk'
        device.source_type = 'file'
        device.source_path = self.path
        device.driver_format = 'raw'
        device.serial = uuids.volume
        for name, value in fields.items():
            self.assertTrue(hasattr(device, name), name)
            setattr(device, name, value)
        return device


class RefusedDiskTest(DiskTestCase, RefusedTestCase):
    """The finished <disk> says what Cinder did not."""

    scenarios = [(name, {'fields': fields, 'why': why})
                 for name, fields, why in (
        ('network', {'source_type': 'network', 'source_protocol': 'rbd'},
         'over the network (network rbd)'),
        ('vhost-user', {'source_type': 'vhostuser'}, 'vhostuser'),
        ('no path', {'source_path': None}, 'over the network'),
        ('cdrom', {'source_device': 'cdrom'}, "device type is 'cdrom'"),
        ('lun', {'source_device': 'lun'}, "device type is 'lun'"),
        ('qcow2', {'driver_format': 'qcow2'}, "format is 'qcow2'"),
        ('shareable', {'shareable': True}, 'several servers'),
        ('read-only', {'readonly': True}, 'read-only'),
    )]

    def test_it_is_refused_by_name(self):
        exc = self.assertRaises(
            volumes.VolumeRefused, volumes.of_disk_config,
            self.device(**self.fields))
        self.assertIn(
            f'Volume {uuids.volume} cannot be on fake DAX: ', str(exc))
        self.assertIn(self.why, str(exc))
        self.assert_fits(exc)


class DiskTest(DiskTestCase):

    def test_a_file(self):
        self.assertEqual(
            disk.FakeDaxDisk(disk.DiskId.of_volume(uuids.volume), self.path,
                             4 * units.Mi),
            volumes.of_disk_config(self.device()))

    def test_a_secret_of_luks_is_refused(self):
        device = self.device()
        device.volume_encryption = vconfig.LibvirtConfigGuestDiskEncryption()
        self.assertIn('LUKS', str(self.assertRaises(
            volumes.VolumeRefused, volumes.of_disk_config, device)))

    def test_a_size_that_no_guest_can_map(self):
        for size in 0, 4 * units.Mi - 512, 3 * units.Mi:
            self.put(size)
            exc = self.assertRaises(
                volumes.VolumeRefused, volumes.of_disk_config, self.device())
            self.assertIn(
                f'it has {size} bytes; allowed: a multiple of 2097152 bytes',
                str(exc))
            # Nothing was cut off, and nothing added.
            self.assertEqual(size, os.path.getsize(self.path))

    def test_what_is_not_there(self):
        os.unlink(self.path)
        exc = self.assertRaises(
            layout.InvalidLayout, volumes.of_disk_config, self.device())
        self.assertIn(f'{self.path} cannot be read', str(exc))

    def test_a_file_that_only_the_helper_may_read(self):
        with mock.patch.object(
                layout, 'head', side_effect=[
                    PermissionError(errno.EACCES, 'no'), (2097152, b'x')]):
            self.assertEqual(
                2 * units.Mi, volumes.read(self.path).file_size)

    def test_without_the_helper_the_reason_is_told(self):
        with mock.patch.object(privsep, 'run', side_effect=privsep.HelperError(
                errno.EACCES, 'sudo is not there', self.path)):
            self.assertIn('sudo is not there', str(self.assertRaises(
                layout.InvalidLayout, volumes.read, self.path)))


class MemmapTest(DiskTestCase):

    def put_memmap(self, size):
        """As ndctl in a guest does, by the kernel."""
        made = layout.planned(size, True)
        self.put(made.file_size, bytes(
            layout.INFO_BLOCK_OFFSET) + layout.info_block(made))
        return made

    def test_one_of_the_user_s_is_seen(self):
        self.assertFalse(volumes.read(self.path).memmap)
        made = self.put_memmap(8 * units.Mi)
        self.assertEqual(made, volumes.read(self.path))
        # The guest's device is all of the volume.
        self.assertEqual(
            made.file_size, volumes.of_disk_config(self.device()).size)

    def test_only_volumes_without_one_take_ram(self):
        found = volumes.of_disk_config(self.device())
        self.assertEqual([4 * units.Mi], volumes.without_memmap([found]))
        self.put_memmap(8 * units.Mi)
        self.assertEqual([], volumes.without_memmap([found]))

    def test_a_damaged_one_is_refused(self):
        made = self.put_memmap(8 * units.Mi)
        with open(self.path, 'r+b') as file:
            file.seek(layout.INFO_BLOCK_OFFSET + 100)
            file.write(b'damaged')
        for error, read in (
            (volumes.VolumeRefused,
             lambda: volumes.of_disk_config(self.device())),
            (layout.InvalidLayout, lambda: volumes.read(self.path)),
        ):
            self.assertIn('checksum', str(self.assertRaises(error, read)))
        self.assertEqual(made.file_size, os.path.getsize(self.path))


class FillHolesTest(DiskTestCase):

    def setUp(self):
        super().setUp()
        self.put(4 * units.Mi, b'content')
        self.volume = volumes.of_disk_config(self.device())

    def read(self):
        with open(self.path, 'rb') as file:
            return file.read()

    def test_a_sparse_file_is_allocated_and_keeps_its_content(self):
        before = self.read()
        self.assertLess(os.stat(self.path).st_blocks * 512, 4 * units.Mi)
        volumes.fill_holes(self.volume)
        self.assertGreaterEqual(
            os.stat(self.path).st_blocks * 512, 4 * units.Mi)
        self.assertEqual(before, self.read())

    def fail(self, error):
        return mock.patch.object(layout, 'fill_holes', side_effect=OSError(
            error, os.strerror(error)))

    def test_where_there_is_no_space_it_is_refused(self):
        with self.fail(errno.ENOSPC):
            exc = self.assertRaises(
                volumes.VolumeRefused, volumes.fill_holes, self.volume)
        self.assertIn('No space left on device', str(exc))
        self.assertIn(uuids.volume, str(exc))

    def test_a_file_system_that_cannot_is_left_alone(self):
        with self.fail(errno.EOPNOTSUPP):
            volumes.fill_holes(self.volume)

    def test_a_block_device_has_none(self):
        with self.fail(errno.EIO), mock.patch.object(
                os.path, 'isfile', return_value=False):
            volumes.fill_holes(self.volume)
