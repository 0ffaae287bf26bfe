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

import inspect
import os
import stat
import threading
from unittest import mock

import fixtures
from lxml import etree
from nova.compute import manager
from nova import exception
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from oslo_utils.fixture import uuidsentinel as uuids
from oslotest import base

from nova_fakedax import migration


class CheckTest(base.BaseTestCase):

    def refused(self, function, *args):
        return self.assertRaises(
            exception.MigrationPreCheckError, function, *args,
        ).format_message()

    def test_a_destination_that_can(self):
        for asked in (False, None):
            migration.check_destination('there', [], asked)

    def test_a_destination_that_cannot_says_who_and_why(self):
        self.assertIn('Fake DAX: host there: too old; too full', self.refused(
            migration.check_destination, 'there', ['too old', 'too full'],
            None))

    def test_block_migration(self):
        self.assertIn('Fake DAX: block migration', self.refused(
            migration.check_destination, 'there', [], True))

    def test_storage(self):
        for shared, block, reason in (
                (True, False, None), (False, False, 'shared storage'),
                (True, True, 'block migration')):
            data = objects.LibvirtLiveMigrateData(
                is_shared_instance_path=shared, block_migration=block)
            if reason:
                self.assertIn(
                    reason, self.refused(migration.check_storage, data))
            else:
                migration.check_storage(data)


class MoveVolumesTest(base.BaseTestCase):
    """Each host has names of its own for the devices of volumes."""

    XML = f"""<domain><devices>
      <disk type='block'><source dev='/dev/loop1'/>
        <serial>fakedax-boot</serial></disk>
      <disk type='block'><source dev='/dev/loop1'/>
        <serial>{uuids.ordinary}</serial></disk>
      <memory model='virtio-pmem'><source><path>/i/disk.eph0</path></source>
        <alias name='ua-fakedax-eph0'/></memory>
      <memory model='virtio-pmem'><source><path>/dev/loop1</path></source>
        <alias name='ua-fakedax-{uuids.root}'/></memory>
      <memory model='virtio-pmem'><source><path>/dev/loop2</path></source>
        <alias name='ua-fakedax-{uuids.data}'/></memory>
      <memory model='nvdimm'><source><path>/dev/loop1</path></source></memory>
    </devices></domain>"""

    def setUp(self):
        super().setUp()
        objects.register_all()

    def move(self, xml=XML, **there):
        """Move the guest to where volumes, by sentinel, have these paths."""
        found = etree.fromstring(xml)
        migration.move_volumes(found, [
            objects.LibvirtLiveMigrateBDMInfo(
                serial=getattr(uuids, name), bus='virtio', dev='vda',
                type='disk', connection_info={'path': path})
            for name, path in there.items()], self.config)
        return ([path.text for path in found.findall('.//path')],
                [dict(source.attrib) for source in found.findall(
                    './devices/disk/source')])

    def config(self, connection_info, disk_info):
        self.assertEqual('vda', disk_info['dev'])
        config = vconfig.LibvirtConfigGuestDisk()
        config.source_path = connection_info['path']
        return config

    def test_the_devices_and_the_boot_view_get_those_of_the_destination(self):
        # The destination has them the other way round.
        memory, disks = self.move(
            root='/dev/loop2', data='/dev/loop1', ordinary='/dev/loop9')
        self.assertEqual(
            ['/i/disk.eph0', '/dev/loop2', '/dev/loop1', '/dev/loop1'], memory)
        # The ordinary one is Nova's.
        self.assertEqual(
            [{'dev': '/dev/loop2'}, {'dev': '/dev/loop1'}], disks)

    def test_a_view_by_another_name(self):
        xml = self.XML.replace(
            "dev='/dev/loop1'", "file='/mnt/a/volume.view'").replace(
                '/dev/loop1', '/mnt/a/volume')
        memory, disks = self.move(
            xml, root='/mnt/b/volume', data='/mnt/b/other')
        self.assertEqual('/mnt/b/volume', memory[1])
        self.assertEqual({'file': '/mnt/b/volume.view'}, disks[0])

    def test_a_volume_that_the_destination_has_not_connected(self):
        self.assertRaisesRegex(
            exception.MigrationError, uuids.data, self.move,
            root='/dev/loop2')

    def test_one_that_it_has_not_connected_to_a_path(self):
        self.assertRaisesRegex(
            exception.MigrationError, uuids.root, self.move,
            root=None, data='/dev/loop1')

    def test_a_guest_without_volumes(self):
        xml = etree.fromstring(
            "<domain><devices><memory model='virtio-pmem'><source><path>/i"
            "</path></source></memory></devices></domain>")
        migration.move_volumes(xml, [], None)
        self.assertEqual('/i', xml.findtext('.//path'))


class MachineTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.instances_path = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.instances_path, 'tmpfile')
        # As LibvirtDriver.check_can_live_migrate_destination leaves it.
        self.data = objects.LibvirtLiveMigrateData(filename='tmpfile')
        with open(self.path, 'w'):
            pass

    def guest(self, machine):
        guest = mock.Mock()
        guest.get_config.return_value.os_mach_type = machine
        return guest

    def offer(self):
        migration.offer_machines(
            self.instances_path, self.data, {'q35', 'pc-q35-7.2'})

    def check(self, machine):
        migration.check_machine(
            self.instances_path, self.data, self.guest(machine))

    def test_a_machine_type_that_both_have(self):
        self.offer()
        self.check('pc-q35-7.2')

    def test_a_machine_type_that_the_destination_lacks_is_named(self):
        self.offer()
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.check, 'pc-q35-10.0')
        self.assertIn("machine type is 'pc-q35-10.0'", error.format_message())

    def assert_no_proof(self):
        self.assertIn(
            'the destination does not say that its driver runs fake DAX',
            self.assertRaises(
                exception.MigrationPreCheckError, self.check, 'pc-q35-10.0',
            ).format_message())

    def test_a_destination_that_offers_nothing(self):
        """It has Nova's own driver."""
        self.assert_no_proof()

    def test_an_offer_that_cannot_be_read(self):
        """The log says why."""
        for break_it in (lambda: self.write('['), lambda: os.unlink(
                self.path)):
            break_it()
            with self.assertLogs(migration.LOG.logger, 'WARNING') as logs:
                self.assert_no_proof()
            self.assertIn('Cannot read the machine types', logs.output[0])

    def write(self, text):
        with open(self.path, 'w') as offer:
            offer.write(text)

    def test_an_offer_that_cannot_be_written(self):
        """An error would keep ComputeManager from removing the file."""
        self.data.filename = 'no/such/directory'
        with self.assertLogs(migration.LOG.logger, 'WARNING') as logs:
            self.offer()
        self.assertIn('Cannot tell the source', logs.output[0])


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes how the machine types travel."""

    def test_the_destination_makes_a_file_that_the_source_looks_for(self):
        for method, call in (
                ('check_can_live_migrate_destination',
                 'data.filename = filename'),
                ('check_can_live_migrate_destination',
                 'self._create_shared_storage_test_file(instance)'),
                ('check_can_live_migrate_source',
                 'self._check_shared_storage_test_file('),
                ('_create_shared_storage_test_file', 'CONF.instances_path'),
                ('cleanup_live_migration_destination_check',
                 'self._cleanup_shared_storage_test_file(')):
            self.assertIn(call, inspect.getsource(
                getattr(libvirt_driver.LibvirtDriver, method)))

    def test_it_is_removed_once_the_source_has_answered(self):
        source = inspect.getsource(
            manager.ComputeManager.check_can_live_migrate_destination)
        self.assertLess(
            source.index('compute_rpcapi.check_can_live_migrate_source('),
            source.index('driver.cleanup_live_migration_destination_check('))


class PreflushTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.flushed = []
        self.twice = threading.Event()

        def flush(path):
            self.flushed.append(path)
            if len(self.flushed) > 2:
                self.twice.set()
            raise OSError(5, 'EIO')

        self._patch('nova_fakedax.hostcache.flush', flush)
        self._patch(
            'nova_fakedax.migration._FLUSH_INTERVAL', 0.01)

    def _patch(self, name, value):
        patch = mock.patch(name, value)
        patch.start()
        self.addCleanup(patch.stop)

    def test_again_and_again_until_the_guest_has_left(self):
        """Also after an error, since only the last sync counts."""
        with migration.preflush(['disk', 'disk.eph0']):
            self.assertEqual(['disk', 'disk.eph0'], self.flushed[:2])
            self.assertTrue(self.twice.wait(30))
        self.assertEqual({'disk', 'disk.eph0'}, set(self.flushed))

    def test_an_error_of_the_migration_is_not_hidden(self):
        def fails():
            with migration.preflush(['disk']):
                raise ValueError

        self.assertRaises(ValueError, fails)


class KeepOwnerTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        #: By path.
        self.owners = {'disk': (1, 2), 'disk.eph0': (3, 4), 'disk.eph1': None}
        for name, value in (
                ('_owner', self.owners.get), ('nova_path', mock.Mock())):
            patch = mock.patch.object(migration, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        self.chown = migration.nova_path.chown

    def move(self, **owners):
        with migration.keep_owner(list(self.owners)):
            self.owners.update(owners)

    def test_a_file_that_went_to_root_is_given_back(self):
        self.move(disk=(0, 0))
        self.chown.assert_called_once_with('disk', 1, 2)

    def test_a_file_that_is_gone_is_left_alone(self):
        self.move(disk=None)
        self.chown.assert_not_called()

    def test_a_failure_does_not_fail_the_migration(self):
        self.chown.side_effect = PermissionError('not permitted')
        with self.assertLogs(migration.LOG.logger, 'WARNING') as logs:
            self.move(disk=(0, 0))
        self.assertIn('disk back to 1:2: not permitted', logs.output[0])


class OwnerTest(base.BaseTestCase):

    def test_of_a_file(self):
        path = self.useFixture(fixtures.TempDir()).join('disk')
        with open(path, 'wb'):
            pass
        self.assertEqual(
            (os.geteuid(), os.getegid()), migration._owner(path))
        os.unlink(path)
        self.assertIsNone(migration._owner(path))

    def test_a_block_device_is_the_hosts_own(self):
        status = mock.Mock(st_mode=stat.S_IFBLK | 0o660, st_uid=1, st_gid=2)
        with mock.patch('os.stat', return_value=status):
            self.assertIsNone(migration._owner('/dev/loop7'))


class ForgetTest(base.BaseTestCase):

    def test_every_image_though_one_is_gone(self):
        with mock.patch('nova_fakedax.hostcache.invalidate',
                        side_effect=[FileNotFoundError, None]) as invalidate:
            migration.forget(['disk', 'disk.eph0'])
        self.assertEqual(
            [mock.call('disk'), mock.call('disk.eph0')],
            invalidate.mock_calls)
