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

"""What becomes of volumes on fake DAX when servers change and move."""

import os
from unittest import mock

import fixtures as base_fixtures
from nova.tests.fixtures import libvirt
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import base as libvirt_base
from nova.volume import cinder
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova_fakedax import hostcache
from nova_fakedax import hotplug
from nova_fakedax import monitor
from nova_fakedax import quiesce
from nova_fakedax import refusals
from tests import fixtures
from tests.functional import base

#: Bytes of each volume.
SIZE = 4 * units.Mi

ROOT, DATA, OTHER = uuids.volume_root, uuids.volume_data, uuids.volume_other


class VolumesTestCase(base.FakeDaxTestCase):
    """A Cinder whose volumes have other paths on each host."""

    def setUp(self):
        super().setUp()
        for hostname in ('compute1', 'compute2'):
            os.mkdir(os.path.join(self.volumes_path, hostname))
        self.put_volume('root', metadata={'fakedax_guest': 'true'})
        for name in ('data', 'other'):
            self.put_volume(name)
        for volume in self.cinder.volumes.values():
            volume['display_description'] = ''
        find = self.cinder._find_connection_info
        self.useFixture(base_fixtures.MockPatchObject(
            self.cinder, '_find_connection_info',
            lambda *args: self._as_of_host(find(*args))))

    def start_compute(self, hostname='compute1', *args, **kwargs):
        super().start_compute(hostname, *args, **kwargs)
        # Nova's tests give all computes of a process the same one.
        self.driver(hostname).get_volume_connector = lambda instance: {
            'host': hostname, 'ip': '192.0.2.1', 'initiator': hostname}
        return hostname

    def volume_path(self, volume, hostname='compute1'):
        return os.path.join(self.volumes_path, hostname, volume)

    def _as_of_host(self, connection_info):
        """Connect a volume by the path that its host has."""
        data = connection_info['data']
        volume, attachment = data['volume_id'], data['attachment_id']
        connector = self.cinder.volume_to_attachment[volume].get(
            attachment, {}).get('connector') or {}
        data['device_path'] = self.volume_path(
            volume, connector.get('host', 'compute1'))
        if not os.path.lexists(data['device_path']):
            os.link(self.volume_path(volume), data['device_path'])
        return connection_info

    def boot_from_volume(self, volumes='all', **kwargs):
        """Create a server with its root on a volume."""
        body = self._build_server(
            image_uuid='', networks='none', flavor_id=kwargs.pop(
                'flavor', None) or self.put_flavor(
                    None, disk=0, **{'fakedax:volumes': volumes}), **kwargs)
        body['block_device_mapping_v2'] = [{
            'boot_index': 0, 'uuid': ROOT, 'source_type': 'volume',
            'destination_type': 'volume'}]
        server = self.api.post_server({'server': body})
        return self._wait_for_state_change(server, 'ACTIVE')

    def attach(self, server, volume=DATA):
        self.api.post_server_volume(
            server['id'], {'volumeAttachment': {'volumeId': volume}})
        self._wait_for_assert(lambda: self.assertEqual(
            'in-use', self.cinder.volumes[volume].get('status')))

    def volumes_of(self, server, hostname='compute1'):
        """The volumes that are memory, by alias, with their paths."""
        return {
            memory.find('./alias').get('name'):
                memory.findtext('./source/path')
            for memory in self.xml(server, hostname).findall(
                "./devices/memory[@model='virtio-pmem']")
            if memory.findtext('./source/path').startswith(
                self.volumes_path)}

    def assert_volumes(self, server, *volumes, hostname='compute1'):
        self.assertEqual(
            {f'ua-fakedax-{volume}': self.volume_path(volume, hostname)
             for volume in volumes}, self.volumes_of(server, hostname))

    def attached(self, server):
        """The IDs of the volumes that Nova says are attached."""
        return {found['volumeId'] for found in
                self.api.get_server_volumes(server['id'])}

    def hosts_of(self, volume):
        """The hosts for which Cinder has attachments of a volume."""
        return [attachment['connector']['host'] for attachment in
                self.cinder.volume_to_attachment[volume].values()]


class AttachTest(VolumesTestCase):

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self.boot(
            self.put_flavor('root', **{'fakedax:volumes': 'all'}))

    def state(self):
        [domain] = self.domains()
        return domain._state

    def stop(self):
        self._stop_server(self.server)

    def test_a_running_guest_gets_a_volume_and_keeps_it(self):
        self.attach(self.server)
        self.assert_volumes(self.server, DATA)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.state())
        self._reboot_server(self.server, hard=True)
        self.assert_volumes(self.server, DATA)
        self.assertEqual({DATA}, self.attached(self.server))
        self.assertEqual(['compute1'], self.hosts_of(DATA))

    def test_so_does_one_that_is_off(self):
        self.stop()
        self.attach(self.server)
        self.assert_volumes(self.server, DATA)
        self._start_server(self.server)
        self.assert_volumes(self.server, DATA)

    def test_a_guest_without_room_does_not(self):
        self.flags(spare_volumes=1, group='fakedax')
        self._reboot_server(self.server, hard=True)
        self.attach(self.server)
        self.api.post_server_volume(
            self.server['id'], {'volumeAttachment': {'volumeId': OTHER}})
        message = self.failure(
            self.server, 'attach_volume', 'compute_attach_volume')
        self.assertIn(OTHER, message)
        self.assertIn("all of the guest's 2 slots", message)
        self.assert_volumes(self.server, DATA)
        self.assertEqual({DATA}, self.attached(self.server))
        self.assertEqual([], self.hosts_of(OTHER))
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.state())
        # What it says to do works.
        self.stop()
        self.attach(self.server, OTHER)
        self._start_server(self.server)
        self.assert_volumes(self.server, DATA, OTHER)

    def test_a_running_guest_does_not_give_it_back(self):
        self.attach(self.server)
        [domain] = self.domains()
        before = domain.XMLDesc(0)
        self.api.delete_server_volume(self.server['id'], DATA)
        self.assertIn(
            refusals.refused(hotplug.DETACH).format_message(),
            self.failure(
                self.server, 'detach_volume', 'compute_detach_volume'))
        self.assertEqual(before, domain.XMLDesc(0))
        self.assertEqual({DATA}, self.attached(self.server))
        self.assertEqual(['compute1'], self.hosts_of(DATA))
        self.assertEqual('in-use', self.cinder.volumes[DATA]['status'])
        self.assertEqual('ACTIVE', self.api.get_server(
            self.server['id'])['status'])

    def test_one_that_is_off_does(self):
        self.attach(self.server)
        self.stop()
        self.api.delete_server_volume(self.server['id'], DATA)
        self._wait_for_volume_detach(self.server['id'], DATA)
        self.assert_volumes(self.server)
        self.assertEqual([], self.hosts_of(DATA))
        self._start_server(self.server)
        self.assertEqual(['disk'], self.pmems(self.server))

    def extend(self):
        self.cinder.volumes[DATA]['size'] = 2
        self.admin_api.create_server_external_events([{
            'name': 'volume-extended', 'server_uuid': self.server['id'],
            'tag': DATA}])

    def test_it_is_not_extended_while_the_guest_runs(self):
        self.attach(self.server)
        [domain] = self.domains()
        before = domain.XMLDesc(0)
        self.extend()
        self.assertIn(
            refusals.refused(hotplug.EXTEND).format_message(),
            self.failure(
                self.server, 'extend_volume', 'compute_extend_volume'))
        self.assertEqual(before, domain.XMLDesc(0))
        # The next start has it as large as it is.
        os.truncate(self.volume_path(DATA), 2 * SIZE)
        self._reboot_server(self.server, hard=True)
        self.assertEqual(
            str(2 * SIZE // units.Ki), self.xml(self.server).findtext(
                f"./devices/memory/alias[@name='ua-fakedax-{DATA}']"
                f"/../target/size"))

    def test_it_is_not_swapped(self):
        self.attach(self.server)
        # As Cinder does.
        self.cinder.volumes[DATA].update(
            migration_status='migrating',
            attachments={self.server['id']: {'mountpoint': '/dev/vdb'}})
        self.api.put_server_volume(self.server['id'], DATA, OTHER)
        self.assertIn(
            refusals.refused(hotplug.SWAP).format_message(),
            self.failure(
                self.server, 'swap_volume', 'compute_swap_volume'))
        self.assert_volumes(self.server, DATA)
        self.assertEqual({DATA}, self.attached(self.server))
        self.assertEqual([], self.hosts_of(OTHER))
        self.assertEqual('in-use', self.cinder.volumes[DATA]['status'])

    def test_nova_makes_no_qcow2_of_it(self):
        self.attach(self.server)
        with mock.patch.object(
                cinder.API, 'update_snapshot_status') as update:
            self.admin_api.api_post('/os-assisted-volume-snapshots', {
                'snapshot': {'volume_id': DATA, 'create_info': {
                    'snapshot_id': uuids.snapshot, 'type': 'qcow2',
                    'new_file': 'new'}}})
            self._wait_for_assert(lambda: update.assert_called_once_with(
                mock.ANY, uuids.snapshot, 'error'))
        self.assert_volumes(self.server, DATA)

    def test_an_ordinary_volume_comes_and_goes_as_before(self):
        # Nova's fake libvirt has no event for a disk that has gone.
        self.flags(device_detach_timeout=1, group='libvirt')
        server = self.boot(self.put_flavor('root'))
        self.attach(server)
        self.assertEqual({}, self.volumes_of(server))
        self.api.delete_server_volume(server['id'], DATA)
        self._wait_for_volume_detach(server['id'], DATA)


class SnapshotTest(VolumesTestCase):
    """Of a server that boots from a volume."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self.boot_from_volume()
        self.attach(self.server)
        self.seen = []
        self.useFixture(base_fixtures.MockPatchObject(
            hostcache, 'flush', lambda path: self.seen.append(
                ('flush', path, self.state()))))
        self.useFixture(base_fixtures.MockPatch(
            'nova.volume.cinder.API.create_snapshot_force',
            side_effect=self._create_snapshot, autospec=False))
        self.error = None

    def _create_snapshot(self, context, volume, *args):
        if self.error:
            raise self.error
        self.seen.append(('snapshot', volume, self.state()))
        return self.cinder.fake_create_snapshot_force(context, volume, *args)

    def state(self):
        # A host that starts tries a flush.
        [domain] = self.domains() if self.computes else [None]
        return domain and domain._state

    def create_image(self):
        return self.api.post_server_action(
            self.server['id'], {'createImage': {'name': 'snapshot'}})

    def assert_runs(self):
        self._wait_for_assert(lambda: self.assertEqual(
            libvirt.VIR_DOMAIN_RUNNING, self.state()))
        self._wait_for_assert(lambda: self.assertNotIn(
            quiesce.MARK, self.instance(self.server).system_metadata))

    def test_it_is_taken_of_all_that_the_guest_has_stored(self):
        self.create_image()
        self.assert_runs()
        paused = [seen[:2] for seen in self.seen
                  if seen[2] == libvirt.VIR_DOMAIN_PAUSED]
        paths = {self.volume_path(volume) for volume in (ROOT, DATA)}
        self.assertEqual({('flush', path) for path in paths},
                         set(paused[:2]))
        self.assertEqual(
            {('snapshot', volume) for volume in (ROOT, DATA)},
            set(paused[2:]))
        # So that the guest is not paused for long.
        self.assertEqual(
            {('flush', path, libvirt.VIR_DOMAIN_RUNNING) for path in paths},
            set(self.seen[:2]))

    def test_a_guest_runs_on_after_a_snapshot_that_failed(self):
        self.error = Exception('no snapshots today')
        self.assertRaises(client.OpenStackApiException, self.create_image)
        self.assert_runs()

    def test_a_guest_runs_on_when_nova_api_has_died(self):
        with mock.patch('nova.compute.rpcapi.ComputeAPI.unquiesce_instance'):
            self.create_image()
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, self.state())
        self.restart_compute_service('compute1')
        self.assert_runs()

    def test_its_image_names_the_snapshots(self):
        self.create_image()
        self.assert_runs()
        [image] = [image for image in self.glance.images.values()
                   if image['name'] == 'snapshot']
        self.assertEqual(set(self.cinder.volume_snapshots), {
            mapping['snapshot_id'] for mapping in
            image['properties']['block_device_mapping']})
        self.assertEqual(2, len(self.cinder.volume_snapshots))


class MigrationTest(libvirt_base.LibvirtMigrationMixin, VolumesTestCase):

    def setUp(self):
        super().setUp()
        self.emulator.answer(fixtures.MIGRATING_HELP)
        self.useFixture(base_fixtures.MockPatchObject(
            monitor, 'device_property',
            lambda _guest, _alias, name: {
                'drop-cache': True, 'cache-dropped': 8192, 'cache-left': 0,
                'last-error': 0}[name]))
        for name in ('compute1', 'compute2'):
            self.start_compute(name)
        self.src = self.computes['compute1']
        self.dest = self.computes['compute2']
        self.server = self.boot_from_volume(host='compute1')
        self.attach(self.server)
        self.seen = []
        for name in ('flush', 'invalidate'):
            self.useFixture(base_fixtures.MockPatchObject(
                hostcache, name, lambda path, name=name: self.seen.append(
                    (name, path, self.migrate_stub_ran))))

    def test_the_destination_gets_paths_of_its_own(self):
        self.assert_volumes(self.server, ROOT, DATA)
        with self.assertLogs('nova_fakedax.migration', 'INFO') as logs:
            self._live_migrate(self.server, 'completed')
        self.assert_volumes(self.server, ROOT, DATA, hostname='compute2')
        [view] = [disk.find('./source').attrib.values() for disk in self.xml(
            self.server, 'compute2').findall('./devices/disk')
            if disk.findtext('./serial') == 'fakedax-boot']
        self.assertTrue(view[0].startswith(
            self.volume_path(ROOT, 'compute2')))
        for volume in (ROOT, DATA):
            here, there = (self.volume_path(volume, name)
                           for name in ('compute1', 'compute2'))
            # The source writes all, the destination believes nothing that it
            # had, and the source forgets.
            self.assertIn(('flush', here, False), self.seen)
            self.assertIn(('invalidate', there, False), self.seen)
            self.assertIn(('invalidate', here, True), self.seen)
            self.assertNotIn(('flush', here, True), self.seen)
            self.assertIn(f'ua-fakedax-{volume} came in: 8192 bytes of '
                          f'{there}', '\n'.join(logs.output))
            self.assertEqual(['compute2'], self.hosts_of(volume))
        self.src, self.dest = self.dest, self.src
        self._live_migrate(self.server, 'completed')
        self.assert_volumes(self.server, ROOT, DATA)

    def test_one_that_fails_leaves_them_where_they_were(self):
        with mock.patch('nova.tests.fixtures.libvirt.Domain.migrateToURI3',
                        lambda domain, *_args, **_kwargs: domain.fail_job()):
            self._live_migrate(
                self.server, 'failed', server_expected_state='ACTIVE')
        self.assert_volumes(self.server, ROOT, DATA)
        for volume in (ROOT, DATA):
            self.assertEqual(['compute1'], self.hosts_of(volume))
        self.assertEqual({ROOT, DATA}, self.attached(self.server))

    def test_one_whose_destination_does_not_say_where_they_are(self):
        with mock.patch.object(
                self.src.driver, '_get_volume_config',
                return_value=mock.Mock(source_path=None)):
            self._live_migrate(
                self.server, 'failed', server_expected_state='ACTIVE')
        self.assertFalse(self.migrate_stub_ran)
        self.assert_volumes(self.server, ROOT, DATA)

    def test_not_while_they_are_being_copied(self):
        with mock.patch('nova.compute.rpcapi.ComputeAPI.unquiesce_instance'):
            self.act(self.server, 'createImage', name='snapshot')
        self.act(self.server, 'os-migrateLive', host=None,
                 block_migration='auto')
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        self.assertIn('paused for snapshots of its volumes', self.failure(
            self.server, 'live-migration',
            'compute_check_can_live_migrate_source'))

    def test_a_server_that_is_off_takes_them_along(self):
        server = self._migrate_server(self.server)
        self.assert_volumes(server, ROOT, DATA, hostname='compute2')
        self.assertIn(('flush', self.volume_path(DATA), False), self.seen)
        self._revert_resize(server)
        self.assert_volumes(server, ROOT, DATA)
        for volume in (ROOT, DATA):
            self.assertEqual(['compute1'], self.hosts_of(volume))
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_volumes(server, ROOT, DATA, hostname='compute2')

    def test_shelve_and_unshelve(self):
        server = self._shelve_server(self.server)
        service = self.admin_api.get_services(
            host='compute1', binary='nova-compute')[0]['id']
        self.admin_api.put_service(service, {'status': 'disabled'})
        self.assertEqual([], self.domains('compute1'))
        self._unshelve_server(server)
        self.assert_volumes(server, ROOT, DATA, hostname='compute2')


class ResizeTest(VolumesTestCase):
    """To a flavor that puts volumes on fake DAX, or takes them off."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.start_compute('compute2')

    def flavor(self, volumes):
        return self.put_flavor(None, disk=0, **(
            {'fakedax:volumes': volumes} if volumes else {}))

    def ordinary(self, server, hostname):
        """The volumes that are ordinary disks."""
        return {disk.findtext('./serial') for disk in self.xml(
            server, hostname).findall('./devices/disk')} - {'fakedax-boot'}

    def assert_resized(self, before, after, memory_before, memory_after):
        server = self.boot_from_volume(
            flavor=self.flavor(before), host='compute1')
        self.attach(server)
        both = {ROOT, DATA}
        self.assert_volumes(server, *memory_before)
        server = self._resize_server(server, self.flavor(after))
        self.assert_volumes(server, *memory_after, hostname='compute2')
        self.assertEqual(both - memory_after,
                         self.ordinary(server, 'compute2'))
        server = self._revert_resize(server)
        self.assert_volumes(server, *memory_before)
        self.assertEqual(both - memory_before,
                         self.ordinary(server, 'compute1'))
        self.assertEqual(both, self.attached(server))
        self._resize_server(server, self.flavor(after))
        self._confirm_resize(server)
        self.assert_volumes(server, *memory_after, hostname='compute2')

    def test_from_the_root_volume_to_all(self):
        self.assert_resized('boot', 'all', {ROOT}, {ROOT, DATA})

    def test_from_all_to_none(self):
        self.assert_resized('all', None, {ROOT, DATA}, set())

    def test_a_root_volume_that_does_not_know_fake_dax(self):
        del self.cinder.volumes[ROOT]['volume_image_metadata']['fakedax_guest']
        server = self.boot_from_volume(
            flavor=self.put_flavor(None, disk=0), host='compute1')
        self.act(server, 'resize', flavorRef=self.flavor('boot'))
        self.assertIn('fakedax_guest', self.failure(
            server, 'resize', 'compute_resize_instance'))
        self._wait_for_server_parameter(
            server, {'OS-EXT-STS:task_state': None, 'status': 'ACTIVE'})
        self.assertEqual({ROOT}, self.ordinary(server, 'compute1'))


class EvacuateTest(VolumesTestCase):
    """Of servers that have nothing but volumes."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self.boot_from_volume()
        self.attach(self.server)
        self.start_compute('compute2')

    def fail_host(self):
        service = self.admin_api.get_services(
            host='compute1', binary='nova-compute')[0]['id']
        self.computes['compute1'].stop()
        self.admin_api.put_service_force_down(service, True)
        self.driver()._hosts.release()

    def test_cinder_keeps_the_failed_host_from_them(self):
        """With QEMU's own device, and hosts that share no storage."""
        self.fail_host()
        with mock.patch.object(hostcache, 'invalidate') as invalidate:
            server = self._evacuate_server(
                self.server, expected_host='compute2')
        for volume in (ROOT, DATA):
            self.assertEqual(['compute2'], self.hosts_of(volume))
            invalidate.assert_any_call(self.volume_path(volume, 'compute2'))
        self._start_server(server)
        self.assert_volumes(server, ROOT, DATA, hostname='compute2')

    def test_a_host_that_is_seen_to_live_keeps_them(self):
        self.driver()._hosts.look()
        self.addCleanup(self.driver()._hosts.release)
        with mock.patch.object(self.driver()._hosts, 'release'):
            self.fail_host()
        self._evacuate_server(
            self.server, expected_state='ACTIVE', expected_host='compute1',
            expected_migration_status='failed')
        self.assertIn('its nova-compute still runs', self.failure(
            self.server, 'evacuate', 'compute_rebuild_instance'))
        for volume in (ROOT, DATA):
            self.assertEqual(['compute1'], self.hosts_of(volume))


class RebuildTest(VolumesTestCase):
    """Cinder writes the new image while no guest has the volume."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self.boot_from_volume()
        self.attach(self.server)
        self.reimaged = []
        self.useFixture(base_fixtures.MockPatch(
            'nova.volume.cinder.API.reimage_volume',
            side_effect=self._reimage, autospec=False))

    def _reimage(self, _context, volume, image, reimage_reserved):
        self.assertTrue(reimage_reserved)
        self.reimaged.append((volume, image, self.domains()))
        self.admin_api.create_server_external_events([{
            'name': 'volume-reimaged', 'server_uuid': self.server['id'],
            'tag': volume, 'status': 'completed'}])

    def test_the_root_volume_gets_the_new_image(self):
        image = self.put_image('newer', fakedax_guest='true')
        self._rebuild_server(self.server, image)
        self.assertEqual([(ROOT, image, [])], self.reimaged)
        self.assert_volumes(self.server, ROOT, DATA)
        for volume in (ROOT, DATA):
            self.assertEqual(['compute1'], self.hosts_of(volume))

    def test_not_an_image_that_does_not_know_fake_dax(self):
        self.act(self.server, 'rebuild', imageRef=self.ordinary_image)
        self.assertIn('fakedax_guest', self.failure(
            self.server, 'rebuild', 'compute_rebuild_instance'))
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None, 'status': 'ACTIVE'})
        self.assertEqual([], self.reimaged)
        self.assert_volumes(self.server, ROOT, DATA)
        [domain] = self.domains()
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain._state)
        self.assertEqual('true', self.instance(
            self.server).system_metadata['image_fakedax_guest'])
