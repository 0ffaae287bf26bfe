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

"""Live migrations by Nova's services, with a fake libvirt."""

import os
import re
from unittest import mock

import fixtures as base_fixtures
from nova import context as nova_context
from nova import objects
from nova.tests.functional.libvirt import base as libvirt_base

from nova_fakedax import emulator
from nova_fakedax import hostcache
from nova_fakedax import migration
from nova_fakedax import monitor
from nova_fakedax import refusals
from tests import fixtures
from tests.functional import base

TRAIT = 'CUSTOM_FAKEDAX_MIGRATION'


class MigrationTestCase(
        libvirt_base.LibvirtMigrationMixin, base.FakeDaxTestCase):

    def setUp(self):
        super().setUp()
        self.emulator.answer(fixtures.MIGRATING_HELP)
        self.counters = {'drop-cache': True, 'cache-dropped': 8192,
                         'cache-left': 0, 'last-error': 0}
        self.useFixture(base_fixtures.MockPatchObject(
            monitor, 'device_property', self._device_property))
        self.seen = []
        for name in ('flush', 'invalidate'):
            self.useFixture(base_fixtures.MockPatchObject(
                hostcache, name, lambda path, name=name: self.seen.append(
                    (name, os.path.basename(path), self.migrate_stub_ran))))
        for name in ('compute1', 'compute2'):
            self.start_compute(name)
        # A host tries this at its start.
        self.seen.clear()
        self.src = self.computes['compute1']
        self.dest = self.computes['compute2']
        self.server = self.boot(
            self.put_flavor('root,ephemeral', 1, 1), host='compute1')

    def _device_property(self, _guest, _alias, name):
        try:
            return self.counters[name]
        except KeyError:
            raise monitor.MonitorError(f'Property {name!r} not found')

    def assert_stays(self, event, reason, **action):
        """The migration is refused, and the user can read why."""
        self.act(self.server, 'os-migrateLive',
                 **{'host': None, 'block_migration': 'auto'} | action)
        server = self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        self.assertIn(
            reason, self.failure(self.server, 'live-migration', event))
        self.assertEqual(
            ('ACTIVE', 'compute1'),
            (server['status'], server['OS-EXT-SRV-ATTR:host']))
        self.assertFalse(self.migrate_stub_ran)
        self.assertEqual([], self.domains('compute2'))


class LiveMigrationTest(MigrationTestCase):

    def test_the_server_moves_with_its_disks(self):
        pmems = self.pmems(self.server)
        with self.assertLogs('nova_fakedax.migration', 'INFO') as logs:
            self._live_migrate(self.server, 'completed')
        self.assertEqual(['disk', 'disk.eph0'], pmems)
        self.assertEqual(pmems, self.pmems(self.server, 'compute2'))
        # The images are flushed while the guest still runs, and the source
        # forgets them once it has left.
        self.assertIn(('flush', 'disk', False), self.seen)
        self.assertIn(('flush', 'disk.eph0', False), self.seen)
        self.assertEqual(
            [('invalidate', 'disk', True), ('invalidate', 'disk.eph0', True)],
            [seen for seen in self.seen if seen[0] == 'invalidate'])
        text = '\n'.join(logs.output)
        for alias in ('ua-fakedax-root', 'ua-fakedax-eph0'):
            self.assertIn(f'{alias} came in: 8192 bytes of', text)
        # The operator can read it among the instance's events, too.
        event = self._wait_for_instance_action_event(
            self.server, 'live-migration', migration.EVENT, 'success')
        self.assertEqual('compute2', event['host'])
        self.assertEqual(
            [f'{alias} came in: 8192 bytes of'
             for alias in ('ua-fakedax-root', 'ua-fakedax-eph0')],
            re.findall(r'ua-\S+ came in: \d+ bytes of', event['details']))

    def test_a_failed_sync_is_told_where_the_guest_comes_in(self):
        self.counters['last-error'] = 5
        with self.assertLogs('nova_fakedax.migration', 'ERROR') as logs:
            self._live_migrate(self.server, 'completed')
        self.assertIn('Input/output error', logs.output[0])
        self.assertIn('Input/output error', self.failure(
            self.server, 'live-migration', migration.EVENT))

    def test_hosts_that_can_have_the_trait(self):
        for name in ('compute1', 'compute2'):
            self.assertIn(TRAIT, self.traits(name))

    def test_a_host_without_the_trait_is_not_tried(self):
        self.dest.driver._migration_reasons_against = ['too old']
        self._run_periodics()
        self.assertNotIn(TRAIT, self.traits('compute2'))
        with mock.patch.object(
                self.dest.driver, 'check_can_live_migrate_destination',
        ) as check:
            self.assert_stays(
                'conductor_live_migrate_instance', 'No valid host')
        check.assert_not_called()

    def test_a_host_whose_trait_is_out_of_date_says_why_not(self):
        self.dest.driver._migration_reasons_against = ['too old']
        self.assert_stays('compute_check_can_live_migrate_destination',
                          'too old', host='compute2')

    def test_a_guest_that_was_started_by_another_qemu(self):
        del self.counters['drop-cache']
        self.assert_stays(
            'compute_check_can_live_migrate_source',
            refusals.refused('live migration').format_message())

    def test_a_source_that_permits_post_copy(self):
        self.driver('compute1')._migration_reasons_against = ['post-copy']
        self.assert_stays('compute_check_can_live_migrate_source',
                          'post-copy')

    def test_a_destination_that_lacks_the_machine_type(self):
        with mock.patch('nova_fakedax.capability.machines',
                        return_value={'pc-q35-7.2'}):
            self.assert_stays('compute_check_can_live_migrate_source',
                              'machine type is')

    def test_a_destination_whose_emulator_is_gone(self):
        with mock.patch('nova_fakedax.emulator.machines',
                        side_effect=emulator.ProbeError('/qemu: is gone')):
            self.assert_stays('compute_check_can_live_migrate_destination',
                              'Fake DAX: host compute2: /qemu: is gone',
                              host='compute2')

    def test_a_forced_destination_with_novas_own_driver(self):
        self.flags(compute_driver='libvirt.LibvirtDriver')
        self.start_compute('compute3')
        for name in 'api', 'admin_api':
            getattr(self, name).microversion = '2.67'
        self.act(self.server, 'os-migrateLive', host='compute3',
                 block_migration='auto', force=True)
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        self.admin_api.microversion = 'latest'
        self.assertIn(
            'the destination does not say that its driver runs fake DAX',
            self.failure(self.server, 'live-migration',
                         'compute_check_can_live_migrate_source'))
        self.assertFalse(self.migrate_stub_ran)
        self.assertEqual([], self.domains('compute3'))
        self.assertEqual(['disk', 'disk.eph0'], self.pmems(self.server))

    def test_block_migration(self):
        self.assert_stays(
            'compute_check_can_live_migrate_destination',
            'Fake DAX: block migration', block_migration=True)

    def test_storage_that_is_not_shared(self):
        with mock.patch.object(
                self.src.driver, '_check_shared_storage_test_file',
                return_value=False), \
            mock.patch.object(
                self.src.driver, '_assert_dest_node_has_enough_disk'):
            self.assert_stays('compute_check_can_live_migrate_source',
                              'not on the same shared storage')

    def test_a_migration_that_fails_leaves_the_server_where_it_was(self):
        with mock.patch('nova.tests.fixtures.libvirt.Domain.migrateToURI3',
                        lambda domain, *_args, **_kwargs: domain.fail_job()):
            self._live_migrate(
                self.server, 'failed', server_expected_state='ACTIVE')
        self.assertEqual(['disk', 'disk.eph0'], self.pmems(self.server))
        self.assertNotIn('invalidate', [seen[0] for seen in self.seen])


class DepartedTest(MigrationTestCase):
    """nova-compute died, and the guest has left by the time it is back."""

    def setUp(self):
        super().setUp()
        [domain] = self.domains('compute1')
        self.dest.driver._host.get_connection().createXML(
            domain.XMLDesc(0), 0)
        domain.destroy()
        domain.undefine()
        self.context = nova_context.get_admin_context()
        mapping = self.cell_mappings['cell1']
        nova_context.set_target_cell(self.context, mapping)
        self.migration = objects.Migration(
            self.context, instance_uuid=self.server['id'], status='running',
            source_compute='compute1', dest_compute='compute2',
            migration_type='live-migration')
        self.migration.create()
        instance = self.instance(self.server)
        instance.task_state = 'migrating'
        with nova_context.target_cell(self.context, mapping) as context:
            instance._context = context
            instance.save()

    def start(self, connection):
        """Start as nova-compute does; return the instances left to it."""
        asked = []

        def connect(uri, read_only):
            asked.append(uri)
            return connection

        instances = objects.InstanceList.get_by_host(
            self.context, 'compute1', expected_attrs=['flavor', 'info_cache'])
        with mock.patch.object(
                self.src.driver._host, '_connect', side_effect=connect), \
                mock.patch.object(connection, 'close', create=True):
            left = self.src.driver.process_instances_at_startup(
                self.context, instances)
        self.assertEqual(['qemu+tcp://compute2/system'], asked)
        return [instance.uuid for instance in left]

    def test_nova_finds_it_where_it_is(self):
        self.assertEqual(
            [], self.start(self.dest.driver._host.get_connection()))
        server = self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        self.assertEqual(
            ('ACTIVE', 'compute2'),
            (server['status'], server['OS-EXT-SRV-ATTR:host']))
        self.assertEqual('completed', objects.Migration.get_by_id(
            self.context, self.migration.id).status)
        self.assertEqual(['disk', 'disk.eph0'],
                         self.pmems(self.server, 'compute2'))

    def test_a_guest_that_is_nowhere_is_left_to_nova(self):
        self.assertEqual(
            [self.server['id']],
            self.start(self.src.driver._host.get_connection()))


class OrdinaryServerTest(MigrationTestCase):

    def test_an_ordinary_server_moves_as_before(self):
        self.server = self.boot(self.put_flavor(None), host='compute1')
        self.seen.clear()
        self._live_migrate(self.server, 'completed')
        self.assertEqual([], self.seen)
