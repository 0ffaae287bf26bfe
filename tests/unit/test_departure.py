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
from unittest import mock

from nova.compute import manager
from nova.compute import resource_tracker
from nova.compute import rpcapi
from nova.network import neutron
from nova import objects
from nova.scheduler.client import report
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import host as libvirt_host
from oslotest import base

from nova_fakedax import departure
from tests import fixtures


objects.register_all()


class _LibvirtError(Exception):

    def __init__(self, code=0):
        super().__init__(f'code {code}')
        self.get_error_code = lambda: code


class DepartureTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.instance = mock.Mock(
            spec=objects.Instance, uuid=fixtures.UUID, host='here',
            task_state='migrating')


class UnfinishedTest(DepartureTestCase):

    def unfinished(self, *statuses):
        migrations = [
            objects.Migration(id=number, status=status, dest_compute='there')
            for number, status in enumerate(statuses)]
        with mock.patch.object(objects.MigrationList, 'get_by_filters',
                               return_value=migrations) as get:
            found = departure.unfinished(mock.sentinel.context, self.instance)
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
                # It failed, but the instance came back or stayed since then.
                (None, 'error', 'completed'),
                (None, 'running', 'cancelled')):
            self.assertEqual(expected, self.unfinished(*statuses), statuses)


class RunsAtTest(DepartureTestCase):

    def setUp(self):
        super().setUp()
        self.host = mock.Mock(spec=libvirt_host.Host)
        self.connection = self.host._connect.return_value
        self.domain = self.connection.lookupByUUIDString.return_value
        patch = mock.patch.object(libvirt_host, 'libvirt', mock.Mock(
            libvirtError=_LibvirtError, VIR_ERR_NO_DOMAIN=42))
        patch.start()
        self.addCleanup(patch.stop)

    def runs(self):
        return departure.runs_at(
            self.host, ['qemu+tcp://there', 'qemu+tcp://192.0.2.2'],
            self.instance)

    def test_a_guest_that_is_active_there(self):
        for active in (1, 0):
            self.domain.isActive.return_value = active
            self.assertIs(bool(active), self.runs())
        self.host._connect.assert_called_with('qemu+tcp://there', True)
        self.assertEqual(2, self.connection.close.call_count)

    def test_a_guest_that_is_not_there(self):
        self.connection.lookupByUUIDString.side_effect = _LibvirtError(42)
        self.assertIs(False, self.runs())
        self.connection.close.assert_called_once_with()

    def test_another_address_is_asked_if_the_name_does_not_answer(self):
        self.host._connect.side_effect = [
            _LibvirtError(), mock.DEFAULT]
        self.assertIs(True, self.runs())
        self.host._connect.assert_called_with('qemu+tcp://192.0.2.2', True)

    def test_it_is_not_known_if_nothing_answers(self):
        self.host._connect.side_effect = _LibvirtError()
        with self.assertLogs(departure.LOG.logger, 'WARNING') as logs:
            self.assertIsNone(self.runs())
        self.assertIn('qemu+tcp://there', logs.output[0])

    def test_it_is_not_known_if_the_answer_is_another_error(self):
        self.connection.lookupByUUIDString.side_effect = _LibvirtError(38)
        self.assertIsNone(self.runs())
        self.assertEqual(2, self.connection.close.call_count)


class CompleteTest(DepartureTestCase):

    def setUp(self):
        super().setUp()
        self.driver = mock.Mock(
            spec=libvirt_driver.LibvirtDriver, _host=mock.sentinel.host)
        self.driver.instance_exists.return_value = False
        self.migration = mock.Mock(
            spec=objects.Migration, dest_compute='there',
            dest_host='192.0.2.2')
        self.patches = {
            name: self.patch(name, value) for name, value in (
                ('unfinished', self.migration), ('runs_at', True),
                ('finish', None))}
        wanted = mock.patch.object(
            departure.spec.FakeDaxSpec, 'from_instance')
        wanted.start()
        self.addCleanup(wanted.stop)

    def patch(self, name, value):
        patch = mock.patch.object(departure, name, return_value=value)
        self.addCleanup(patch.stop)
        return patch.start()

    def complete(self):
        return departure.complete(
            mock.sentinel.context, self.instance, self.driver,
            'qemu+tcp://{}/system'.format)

    def test_a_guest_that_left_is_finished(self):
        self.assertTrue(self.complete())
        self.assertEqual(
            ['qemu+tcp://there/system', 'qemu+tcp://192.0.2.2/system'],
            self.patches['runs_at'].call_args.args[1])
        self.patches['finish'].assert_called_once()

    def test_a_destination_that_does_not_answer(self):
        """nova-compute starts all the same."""
        self.patches['finish'].side_effect = TimeoutError
        with self.assertLogs(departure.LOG.logger, 'ERROR'):
            self.assertTrue(self.complete())

    def test_a_guest_that_stayed_is_novas(self):
        self.patches['runs_at'].return_value = False
        self.assertFalse(self.complete())
        self.patches['finish'].assert_not_called()

    def test_a_guest_that_may_have_left_is_left_alone(self):
        self.patches['runs_at'].return_value = None
        with self.assertLogs(departure.LOG.logger, 'ERROR') as logs:
            self.assertTrue(self.complete())
        self.patches['finish'].assert_not_called()
        self.assertIn('reset the state of the server', logs.output[0])

    def test_nothing_is_asked_without_a_migration(self):
        self.patches['unfinished'].return_value = None
        self.assertFalse(self.complete())
        self.patches['runs_at'].assert_not_called()


class FinishTest(DepartureTestCase):

    def setUp(self):
        super().setUp()
        self.driver = mock.Mock(spec=libvirt_driver.LibvirtDriver)
        self.network = self.patch(
            'nova.network.neutron.API').return_value
        self.compute = self.patch(
            'nova.compute.rpcapi.ComputeAPI').return_value
        self.placement = self.patch(
            'nova.scheduler.client.report.report_client_singleton'
        ).return_value
        self.cinder = self.patch('nova.volume.cinder.API').return_value
        self.mappings = self.patch(
            'nova.objects.BlockDeviceMappingList.get_by_instance_uuid')
        self.mappings.return_value = []
        self.migration = mock.Mock(
            spec=objects.Migration, dest_compute='there', status='running',
            uuid=mock.sentinel.uuid)

    def patch(self, name):
        patch = mock.patch(name)
        self.addCleanup(patch.stop)
        return patch.start()

    def finish(self):
        departure.finish(mock.sentinel.context, self.instance,
                         self.migration, self.driver)

    def test_each_of_novas_services_is_told(self):
        self.finish()
        self.network.migrate_instance_start.assert_called_once_with(
            mock.sentinel.context, self.instance, self.migration)
        self.driver.post_live_migration_at_source.assert_called_once_with(
            mock.sentinel.context, self.instance,
            self.instance.get_network_info.return_value)
        self.compute.post_live_migration_at_destination \
            .assert_called_once_with(
                mock.sentinel.context, self.instance, False, 'there')
        self.placement.delete_allocation_for_instance \
            .assert_called_once_with(
                mock.sentinel.context, mock.sentinel.uuid,
                consumer_type='migration')
        self.assertEqual('completed', self.migration.status)
        self.migration.save.assert_called_once_with()

    def attach(self):
        """Attach a volume to both hosts, as while a server migrates."""
        self.mappings.return_value = [
            objects.BlockDeviceMapping(
                destination_type='volume', volume_id=fixtures.UUID,
                attachment_id='there'),
            objects.BlockDeviceMapping(destination_type='local')]
        self.cinder.attachment_get_all.return_value = [
            {'id': 'here'}, {'id': 'there'}]

    def test_only_the_attachment_of_the_destination_is_left(self):
        self.attach()
        with self.assertLogs(departure.LOG.logger, 'WARNING') as logs:
            self.finish()
        self.cinder.attachment_get_all.assert_called_once_with(
            mock.sentinel.context, fixtures.UUID)
        self.cinder.attachment_delete.assert_called_once_with(
            mock.sentinel.context, 'here')
        self.assertIn(fixtures.UUID, logs.output[-1])

    def test_cinder_that_does_not_answer_keeps_no_server(self):
        self.attach()
        self.cinder.attachment_get_all.side_effect = TimeoutError
        with self.assertLogs(departure.LOG.logger, 'ERROR'):
            self.finish()
        self.assertEqual('completed', self.migration.status)

    def test_without_volumes_cinder_is_not_asked(self):
        self.finish()
        self.assertEqual([], self.cinder.mock_calls)

    def test_an_instance_that_nova_takes_for_one_that_stayed(self):
        """The destination expects it to be migrating."""
        self.instance.task_state = None
        self.finish()
        self.assertEqual('migrating', self.instance.task_state)
        self.instance.save.assert_called_once_with()

    def test_a_destination_that_does_not_answer(self):
        """The instance stays migrating."""
        self.compute.post_live_migration_at_destination.side_effect = (
            TimeoutError)
        self.assertRaises(TimeoutError, self.finish)
        self.assertEqual('running', self.migration.status)
        self.placement.delete_allocation_for_instance.assert_not_called()
        self.assertEqual('migrating', self.instance.task_state)


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes what is relied upon."""

    def parameters(self, function):
        return [name for name in inspect.signature(function).parameters
                if name != 'self']

    def test_a_live_migration_ends_as_finish_ends_it(self):
        source = inspect.getsource(manager.ComputeManager._post_live_migration)
        for call in ('network_api.migrate_instance_start(',
                     'driver.post_live_migration_at_source(',
                     'compute_rpcapi.post_live_migration_at_destination(',
                     "migration.status = 'completed'",
                     '_delete_allocation_after_move('):
            self.assertIn(call, source)
        self.assertIn(
            'self.reportclient.delete_allocation_for_instance(',
            inspect.getsource(
                manager.ComputeManager._delete_allocation_after_move))

    def test_the_interfaces_take_what_they_are_given(self):
        for function, parameters in (
                (neutron.API.migrate_instance_start,
                 ['context', 'instance', 'migration']),
                (libvirt_driver.LibvirtDriver.post_live_migration_at_source,
                 ['context', 'instance', 'network_info']),
                (rpcapi.ComputeAPI.post_live_migration_at_destination,
                 ['ctxt', 'instance', 'block_migration', 'host']),
                (report.SchedulerReportClient.delete_allocation_for_instance,
                 ['context', 'uuid', 'consumer_type', 'force']),
                (report.report_client_singleton, []),
                (libvirt_driver.LibvirtDriver._live_migration_uri, ['dest']),
                (libvirt_host.Host._connect, ['uri', 'read_only'])):
            self.assertEqual(parameters, self.parameters(function), function)

    def test_a_migration_has_the_address_of_its_destination(self):
        for function in ('_create_migration', '_claim_existing_migration'):
            self.assertIn(
                'migration.dest_host = self.driver.get_host_ip_addr()',
                inspect.getsource(getattr(
                    resource_tracker.ResourceTracker, function)))

    def test_the_driver_is_asked_before_nova_touches_an_instance(self):
        source = inspect.getsource(manager.ComputeManager.init_host)
        self.assertLess(source.index('process_instances_at_startup('),
                        source.index('self._init_instance('))
