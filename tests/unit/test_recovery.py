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

from unittest import mock

from nova import objects
from nova.virt.libvirt import host as libvirt_host
from oslotest import base

from nova_fakedax import recovery
from tests import fixtures


objects.register_all()


class _LibvirtError(Exception):
    pass


class RecoveryTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.instance = mock.Mock(
            spec=objects.Instance, uuid=fixtures.UUID, host='here',
            task_state='migrating')


class DepartureTest(RecoveryTestCase):

    def departure(self, *statuses):
        migrations = [
            objects.Migration(id=number, status=status, dest_compute='there')
            for number, status in enumerate(statuses)]
        with mock.patch.object(objects.MigrationList, 'get_by_filters',
                               return_value=migrations) as get:
            found = recovery.departure(mock.sentinel.context, self.instance)
        self.assertEqual(
            {'instance_uuid': fixtures.UUID, 'source_compute': 'here',
             'migration_type': 'live-migration'}, get.call_args.args[1])
        return found and found.id

    def test_it_is_the_last_one_and_unfinished(self):
        for expected, *statuses in (
                (None,),
                (None, 'completed'),
                (0, 'running'),
                (1, 'failed', 'error'),
                # It failed, and the instance came back or stayed since.
                (None, 'error', 'completed'),
                (None, 'running', 'cancelled')):
            self.assertEqual(expected, self.departure(*statuses), statuses)


class RunsAtTest(RecoveryTestCase):

    def setUp(self):
        super().setUp()
        self.host = mock.Mock(spec=libvirt_host.Host)
        self.connection = self.host._connect.return_value
        self.domain = self.connection.lookupByUUIDString.return_value
        patch = mock.patch.object(
            libvirt_host, 'libvirt', mock.Mock(libvirtError=_LibvirtError))
        patch.start()
        self.addCleanup(patch.stop)

    def runs(self):
        return recovery.runs_at(self.host, 'qemu+tcp://there', self.instance)

    def test_a_guest_that_is_active_there(self):
        for active in (1, 0):
            self.domain.isActive.return_value = active
            self.assertIs(bool(active), self.runs())
        self.host._connect.assert_called_with('qemu+tcp://there', True)
        self.assertEqual(2, self.connection.close.call_count)

    def test_a_guest_that_is_not_there(self):
        self.connection.lookupByUUIDString.side_effect = _LibvirtError
        self.assertFalse(self.runs())
        self.connection.close.assert_called_once_with()

    def test_a_host_that_does_not_answer_is_named(self):
        self.host._connect.side_effect = _LibvirtError('refused')
        with self.assertLogs(recovery.LOG.logger, 'ERROR') as logs:
            self.assertFalse(self.runs())
        self.assertIn('qemu+tcp://there', logs.output[0])


class FinishTest(RecoveryTestCase):

    def setUp(self):
        super().setUp()
        self.compute = mock.Mock()
        self.migration = mock.Mock(
            spec=objects.Migration, dest_compute='there', status='running')

    def finish(self):
        recovery.finish(mock.sentinel.context, self.instance, self.migration,
                        self.compute)

    def test_the_destination_is_told_before_it_counts_as_done(self):
        self.finish()
        self.compute.compute_rpcapi.post_live_migration_at_destination \
            .assert_called_once_with(
                mock.sentinel.context, self.instance, False, 'there')
        self.compute._delete_allocation_after_move.assert_called_once_with(
            mock.sentinel.context, self.instance, self.migration)
        self.assertEqual('completed', self.migration.status)
        self.migration.save.assert_called_once_with()

    def test_an_instance_that_nova_has_taken_for_one_that_stayed(self):
        """The destination expects it to be migrating."""
        self.instance.task_state = None
        self.finish()
        self.assertEqual('migrating', self.instance.task_state)
        self.instance.save.assert_called_once_with()

    def test_a_destination_that_does_not_answer(self):
        """It is left migrating; nova-compute starts all the same."""
        self.compute.compute_rpcapi.post_live_migration_at_destination \
            .side_effect = TimeoutError
        with self.assertLogs(recovery.LOG.logger, 'ERROR'):
            self.finish()
        self.assertEqual('running', self.migration.status)
        self.compute._delete_allocation_after_move.assert_not_called()
        self.assertEqual('migrating', self.instance.task_state)
