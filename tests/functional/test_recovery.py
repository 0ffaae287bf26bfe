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

"""Moves that nova-compute has left half done, and their recovery."""

import os
import shutil
from unittest import mock

import fixtures as base_fixtures
from nova import context as nova_context
from nova import objects
from nova.virt.libvirt import host as libvirt_host
from oslo_utils import units

from nova_fakedax import filelock
from nova_fakedax import layout
from nova_fakedax import recovery
from tests.functional import test_migration
from tests.functional import test_resize


class RecoveryMixin:
    """An operator on compute1, whose libvirt can ask compute2's."""

    def recovery_set_up(self):
        self.context = nova_context.get_admin_context()
        nova_context.set_target_cell(
            self.context, self.cell_mappings['cell1'])
        self.there = 'compute2'
        self.useFixture(base_fixtures.MockPatchObject(
            libvirt_host.Host, '_connect', self._connect))
        self.up = {'compute1', 'compute2'}
        self.useFixture(base_fixtures.MockPatch(
            'nova.servicegroup.API.service_is_up',
            lambda _api, service: service['host'] in self.up))

    def _connect(self, uri, _read_only):
        self.assertEqual('qemu+tcp://compute2/system', uri)
        if self.there is None:
            raise libvirt_host.libvirt.libvirtError('does not answer')
        connection = mock.Mock(
            wraps=self.driver(self.there)._host.get_connection())
        connection.close = lambda: None
        return connection

    def change(self, **values):
        """As nova-compute left the server in Nova's database."""
        instance = self.instance(self.server)
        with nova_context.target_cell(
                self.context, self.cell_mappings['cell1']) as context:
            instance._context = context
            for name, value in values.items():
                setattr(instance, name, value)
            instance.save()

    def last_migration(self):
        return max(objects.MigrationList.get_by_filters(
            self.context, {'instance_uuid': self.server['id']}),
            key=lambda migration: migration.id)

    def moves(self, *servers):
        return recovery.moves(self.context, 'compute1', servers)

    def step(self):
        [move] = self.moves(self.server['id'])
        return recovery.step(self.context, move, self.driver())

    def recover(self, finishes):
        """Do what is to do; return the server afterwards."""
        step = self.step()
        self.assertEqual(finishes, step.finishes, step.reason)
        step.do()
        server = self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        self.assertEqual([], self.moves())
        return server['status'], server['OS-EXT-SRV-ATTR:host']

    def assert_left(self, reason):
        self.assertIn(reason, str(self.assertRaises(
            recovery.RecoveryRefused, self.step)))


class LiveTest(RecoveryMixin, test_migration.MigrationTestCase):

    def setUp(self):
        super().setUp()
        self.recovery_set_up()
        self.migration = objects.Migration(
            self.context, instance_uuid=self.server['id'], status='running',
            source_compute='compute1', dest_compute='compute2',
            migration_type='live-migration', user_id='user',
            project_id=self.server['tenant_id'])
        self.migration.create()
        self.placement_client = self.src.reportclient
        self.placement_client.move_allocations(
            self.context, self.server['id'], self.migration.uuid)
        self.change(task_state='migrating')
        self.up = {'compute2'}

    def arrive(self):
        [domain] = self.domains('compute1')
        self.driver('compute2')._host.get_connection().createXML(
            domain.XMLDesc(0), 0)

    def leave(self):
        [domain] = self.domains('compute1')
        domain.destroy()
        domain.undefine()

    def test_a_guest_that_left_is_finished(self):
        self.arrive()
        self.leave()
        self.assertEqual(('ACTIVE', 'compute2'), self.recover(True))
        self.assertEqual('completed', self.last_migration().status)

    def test_a_guest_that_stayed_is_its_hosts_again(self):
        self.assertEqual({}, self.allocations(self.server))
        self.assertEqual(('ACTIVE', 'compute1'), self.recover(False))
        self.assertEqual('failed', self.last_migration().status)
        self.assertIn(self.compute_rp_uuids['compute1'],
                      self.allocations(self.server))
        self.up.add('compute1')
        self.act(self.server, 'os-migrateLive', host=None,
                 block_migration='auto')
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-SRV-ATTR:host': 'compute2',
                          'OS-EXT-STS:task_state': None})

    def test_a_guest_that_is_nowhere_can_be_started(self):
        self.leave()
        self.assertEqual(('SHUTOFF', 'compute1'), self.recover(False))
        self._start_server(self.server)
        self.assertEqual(['disk', 'disk.eph0'], self.pmems(self.server))

    def test_a_server_in_error_is_recovered_while_nova_compute_runs(self):
        self.up.add('compute1')
        self.migration.status = 'error'
        self.migration.save()
        self.change(task_state=None, vm_state='error')
        self.assertEqual(('ACTIVE', 'compute1'), self.recover(False))

    def test_a_nova_compute_that_may_be_at_it(self):
        self.up.add('compute1')
        self.assert_left(
            "'migrating', which nova-compute of compute1 may still work on")

    def test_a_migration_that_libvirt_goes_on_with(self):
        with mock.patch('nova.virt.libvirt.guest.Guest.get_job_info',
                        return_value=mock.Mock(type=2)):
            self.assert_left('libvirt still migrates the guest')

    def test_a_guest_at_both_ends(self):
        self.arrive()
        self.assert_left('runs on compute1 and on compute2')

    def test_a_libvirt_that_does_not_answer(self):
        self.leave()
        self.there = None
        self.assert_left('libvirt of compute2 does not answer')

    def test_a_destination_without_nova_compute(self):
        self.arrive()
        self.leave()
        self.up.clear()
        self.assert_left('nova-compute of compute2 does not run')

    def test_a_server_with_volumes(self):
        objects.BlockDeviceMapping(
            self.context, instance_uuid=self.server['id'],
            source_type='volume', destination_type='volume').create()
        self.assert_left('it has volumes')

    def test_servers_that_have_no_unfinished_move(self):
        self.up.add('compute1')
        other = self.boot(host='compute1')
        exc = self.assertRaises(
            recovery.NoSuchMove, self.moves, self.server['id'], other['id'])
        self.assertIn(f"server '{other['id']}'", str(exc))
        self.assertIn(self.server['id'], str(exc).partition(';')[2])
        self.assertEqual(
            [self.server['id']],
            [move.instance.uuid for move in self.moves()])
        self.migration.status = 'completed'
        self.migration.save()
        self.assertEqual([], self.moves())


class ColdTest(RecoveryMixin, test_resize.ResizeTestCase):

    def setUp(self):
        super().setUp()
        self.recovery_set_up()

    def fail_there(self):
        """Let the move fail at the destination."""
        with mock.patch.object(layout, 'fit',
                               side_effect=OSError(28, 'No space left')):
            self.resize(status='ERROR')

    def die_late(self):
        """Let nova-compute die once the guest runs at the destination."""
        self.resize()
        migration = self.last_migration()
        migration.status = 'post-migrating'
        migration.save()
        self.change(vm_state='active', task_state='resize_finish')
        self.up.remove('compute2')

    def assert_back(self):
        self.assert_disks('compute1', units.Gi)
        self.assertEqual(
            {self.compute_rp_uuids['compute1']},
            set(self.allocations(self.server)))
        self.assertFalse(os.path.exists(
            f'{os.path.dirname(self.path(self.server))}_resize'))

    def test_a_move_that_failed_is_undone(self):
        self.fail_there()
        self.assertEqual(('ACTIVE', 'compute1'), self.recover(False))
        self.assertIn(self.last_migration().status, ('reverting', 'reverted'))
        self.assert_back()
        self.resize()
        self.assert_disks('compute2', 2 * units.Gi)

    def test_a_source_without_room(self):
        self.fail_there()
        step = self.step()
        with mock.patch('nova.scheduler.client.report.SchedulerReportClient.'
                        'put_allocations', return_value=False):
            exc = self.assertRaises(recovery.RecoveryRefused, step.do)
        self.assertIn('no room on compute1', str(exc))
        self.assertEqual('ERROR', self.api.get_server(
            self.server['id'])['status'])

    def test_a_guest_that_runs_at_the_destination_is_its_users_to_confirm(
            self):
        self.die_late()
        self.assertEqual(('VERIFY_RESIZE', 'compute2'), self.recover(True))
        self.up.add('compute2')
        self.revert()
        self.assert_back()

    def test_a_guest_that_died_at_the_destination(self):
        self.die_late()
        [domain] = self.domains('compute2')
        domain.destroy()
        domain.undefine()
        self.assertEqual(('ACTIVE', 'compute1'), self.recover(False))
        self.assert_back()

    def test_old_images_that_are_gone(self):
        self.fail_there()
        shutil.rmtree(f'{os.path.dirname(self.path(self.server))}_resize')
        self.assert_left('there are no old images in')

    def test_what_keeps_the_old_images_where_they_are(self):
        self.fail_there()
        with mock.patch.object(filelock, 'is_image_owned', lambda path:
                               path.endswith('_resize/disk.eph0')):
            self.assert_left('disk.eph0 locked')
        self.up.clear()
        self.assert_left('nova-compute of compute1 does not run')
        self.change(task_state='resize_finish')
        self.up.add('compute2')
        self.assert_left('which nova-compute of compute2 may still work on')

    def test_disks_that_have_not_left(self):
        self.fail_there()
        self.change(host='compute1', task_state='resize_migrating')
        self.up.clear()
        self.assert_left('its disks have not left compute1')
