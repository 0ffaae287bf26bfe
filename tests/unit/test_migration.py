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

import threading
from unittest import mock

from nova import exception
from nova import objects
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


class MachineTest(base.BaseTestCase):

    def guest(self, machine):
        guest = mock.Mock()
        guest.get_config.return_value.os_mach_type = machine
        return guest

    def check(self, machine):
        data = objects.LibvirtLiveMigrateData()
        migration.offer_machines(data, {'q35', 'pc-q35-7.2'})
        # As it travels between hosts.
        data = objects.LibvirtLiveMigrateData.obj_from_primitive(
            data.obj_to_primitive())
        migration.check_machine(data, self.guest(machine))

    def test_a_machine_type_that_both_have(self):
        self.check('pc-q35-7.2')

    def test_a_machine_type_that_the_destination_lacks_is_named(self):
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.check, 'pc-q35-10.0')
        self.assertIn("machine type is 'pc-q35-10.0'", error.format_message())

    def test_a_destination_that_does_not_say(self):
        """One that runs an older release of ours."""
        migration.check_machine(
            objects.LibvirtLiveMigrateData(), self.guest('pc-q35-10.0'))


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
        """Also if it fails: it is the last sync that counts."""
        with migration.preflush(['disk', 'disk.eph0']):
            self.assertEqual(['disk', 'disk.eph0'], self.flushed[:2])
            self.assertTrue(self.twice.wait(30))
        self.assertEqual({'disk', 'disk.eph0'}, set(self.flushed))

    def test_an_error_of_the_migration_is_not_hidden(self):
        def fails():
            with migration.preflush(['disk']):
                raise ValueError

        self.assertRaises(ValueError, fails)


class ForgetTest(base.BaseTestCase):

    def test_every_image_though_one_is_gone(self):
        with mock.patch('nova_fakedax.hostcache.invalidate',
                        side_effect=[FileNotFoundError, None]) as invalidate:
            migration.forget(['disk', 'disk.eph0'])
        self.assertEqual(
            [mock.call('disk'), mock.call('disk.eph0')],
            invalidate.mock_calls)
