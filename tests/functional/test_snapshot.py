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

"""Snapshot, backup and shelve: what the guest has stored is in the copy."""

import threading
import time
from unittest import mock

import fixtures
from nova.compute import utils as compute_utils
from nova.tests.fixtures import libvirt
from oslo_concurrency import processutils
from oslo_utils import units

from nova_fakedax import imagebackend
from tests.functional import base


class SnapshotTestCase(base.FakeDaxTestCase):

    MEMMAP = 'device'

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.calls = []
        for name in ('fsFreeze', 'fsThaw', 'suspend', 'resume'):
            function = getattr(libvirt.Domain, name)
            self.useFixture(fixtures.MockPatchObject(
                libvirt.Domain, name, self._noted(name, function)))
        self.useFixture(fixtures.MockPatchObject(
            imagebackend, 'extract', self._noted(
                'copy', imagebackend.extract)))
        self.sizes = self.keep_uploads()
        # An ordinary disk, which would come first without a boot view.
        self.flags(force_config_drive=True)
        self.server = self.boot()
        # Written to the file itself, where a block job would miss it.
        self.store(self.server, b'DATA')

    def _noted(self, name, function):
        def note_and_call(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)
        return note_and_call

    def copy(self, action='createImage', event='compute_snapshot_instance',
             **body):
        self.act(self.server, action, name='copy', **body)
        self._wait_for_instance_action_event(
            self.server, action, event, 'success')
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        return self.copied()

    def copied(self):
        [image] = [image for image in self.glance.detail(None)
                   if image['name'].startswith('copy')]
        return image

    def assert_copied(self, image):
        self.assertEqual('raw', image['disk_format'])
        # Without it no server could be made of the image.
        self.assertEqual('true', image['properties']['fakedax_guest'])
        self.assertEqual(units.Gi, self.sizes[image['id']])
        self.assertEqual(b'DATA' + self.content[4:],
                         self.glance._imagedata[image['id']])

    def assert_state(self, state):
        [domain] = self.domains()
        self.assertEqual(state, domain._state)


class SnapshotTest(SnapshotTestCase):

    def test_the_guest_is_paused_while_its_image_is_copied(self):
        self.assert_copied(self.copy())
        self.assertEqual(['suspend', 'copy', 'resume'], self.calls)
        self.assert_state(libvirt.VIR_DOMAIN_RUNNING)

    def test_backup(self):
        self.assert_copied(self.copy(
            'createBackup', 'compute_backup_instance', backup_type='daily',
            # The fake Glance lists every image as a backup.
            rotation=99))
        self.assertEqual(['suspend', 'copy', 'resume'], self.calls)

    def test_a_guest_with_an_agent_writes_all_it_has_first(self):
        self.server = self.boot(image_uuid=self.put_image(
            'agent', fakedax_guest='true', hw_qemu_guest_agent='yes'))
        self.copy()
        self.assertEqual(
            ['fsFreeze', 'suspend', 'copy', 'resume', 'fsThaw'], self.calls)

    def test_a_guest_that_has_to_and_cannot_is_not_copied(self):
        self.server = self.boot(image_uuid=self.put_image(
            'required', fakedax_guest='true', hw_qemu_guest_agent='yes',
            os_require_quiesce='yes'))
        with mock.patch.object(
                libvirt.Domain, 'fsFreeze',
                side_effect=libvirt.make_libvirtError(
                    libvirt.libvirtError, 'no agent',
                    error_code=libvirt.VIR_ERR_AGENT_UNRESPONSIVE)):
            self.act(self.server, 'createImage', name='copy')
            self._wait_for_server_parameter(
                self.server, {'OS-EXT-STS:task_state': None})
        self.assertEqual([], self.calls)

    def test_a_paused_guest_stays_paused(self):
        self.act(self.server, 'pause')
        self._wait_for_state_change(self.server, 'PAUSED')
        self.calls.clear()
        self.assert_copied(self.copy())
        self.assertEqual(['copy'], self.calls)
        self.assert_state(libvirt.VIR_DOMAIN_PAUSED)

    def test_a_guest_that_is_off(self):
        self._stop_server(self.server)
        with mock.patch('nova_fakedax.imagebackend.extract', autospec=True,
                        side_effect=self._convert) as convert:
            self.copy()
        convert.assert_called_once()
        path = self.path(self.server)
        self.assertEqual(self.layout_of(self.server).qemu_filename(path),
                         convert.call_args.args[0])
        self.assertEqual([], self.calls)

    @staticmethod
    def _convert(_source, target, *_args, **_kwargs):
        with open(target, 'wb'):
            pass

    def test_where_nova_takes_no_snapshot_of_a_guest_that_runs(self):
        """Nova would save the guest's memory, but a pause is enough."""
        self.flags(disable_libvirt_livesnapshot=True, group='workarounds')
        self.assert_copied(self.copy())
        self.assertEqual(['suspend', 'copy', 'resume'], self.calls)
        self.assert_state(libvirt.VIR_DOMAIN_RUNNING)

    def test_a_guest_runs_while_its_copy_waits_for_others(self):
        """[compute]max_concurrent_disk_ops, held by a download for example."""
        for disabled in (False, True):
            self.flags(disable_libvirt_livesnapshot=disabled,
                       group='workarounds')
            self.calls.clear()
            semaphore = threading.BoundedSemaphore(1)
            self.useFixture(fixtures.MockPatchObject(
                compute_utils, 'disk_ops_semaphore', semaphore))
            with semaphore:
                self.act(self.server, 'createImage', name='copy')
                self._wait_for_server_parameter(self.server, {
                    'OS-EXT-STS:task_state': 'image_pending_upload'})
                # Long enough for what would come next.
                time.sleep(1)
                self.assertEqual([], self.calls)
                self.assert_state(libvirt.VIR_DOMAIN_RUNNING)
            self._wait_for_server_parameter(
                self.server, {'OS-EXT-STS:task_state': None})
            self.assertEqual(['suspend', 'copy', 'resume'], self.calls)
            image = self.copied()
            self.assert_copied(image)
            self.glance.delete(None, image['id'])

    def test_another_format(self):
        self.flags(snapshot_image_format='qcow2', group='libvirt')
        image = self.copy()
        self.assertEqual('qcow2', image['disk_format'])
        self.assertEqual(
            b'QFI\xfb', self.glance._imagedata[image['id']][:4])

    def test_a_copy_that_fails_lets_the_guest_run_on(self):
        with mock.patch.object(
                imagebackend, 'extract',
                side_effect=processutils.ProcessExecutionError('full')):
            self.act(self.server, 'createImage', name='copy')
            self._wait_for_server_parameter(
                self.server, {'OS-EXT-STS:task_state': None})
        self.assertEqual(['suspend', 'resume'], self.calls)
        self.assert_state(libvirt.VIR_DOMAIN_RUNNING)
        self.assertEqual('ACTIVE', self.api.get_server(
            self.server['id'])['status'])

    def test_shelve_and_unshelve(self):
        server = self._shelve_server(self.server)
        self.assertEqual([], self.domains())
        self.assert_copied(next(
            image for image in self.glance.detail(None)
            if image['name'].endswith('-shelved')))
        self._unshelve_server(server)
        self.assertEqual(['disk'], self.pmems(self.server))
        self.assertEqual(self.MEMMAP == 'device',
                         self.layout_of(self.server).memmap)
        self.assertEqual(b'DATA', self.stored(self.server, 4))

    def test_shelve_without_offload(self):
        self.flags(shelved_offload_time=-1)
        self.act(self.server, 'shelve')
        self._wait_for_state_change(self.server, 'SHELVED')
        self.assert_state(libvirt.VIR_DOMAIN_SHUTOFF)
        self.act(self.server, 'unshelve')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.assertEqual(['disk'], self.pmems(self.server))
        self.assertEqual(b'DATA', self.stored(self.server, 4))

    def test_a_guest_left_paused_by_a_dead_compute_runs_on(self):
        [domain] = self.domains()
        domain.suspend()
        instance = self.instance(self.server)
        instance.task_state = 'image_uploading'
        with base.nova_context.target_cell(
                base.nova_context.get_admin_context(),
                self.cell_mappings['cell1']) as context:
            instance._context = context
            instance.save()
        self.restart_compute_service('compute1', keep_hypervisor_state=True)
        self.assert_state(libvirt.VIR_DOMAIN_RUNNING)
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None, 'status': 'ACTIVE'})


class SnapshotMemmapInGuestTest(SnapshotTestCase):

    MEMMAP = 'guest'
    _convert = staticmethod(SnapshotTest._convert)
    test_running = (
        SnapshotTest.test_the_guest_is_paused_while_its_image_is_copied)
    test_off = SnapshotTest.test_a_guest_that_is_off
    test_shelve_and_unshelve = SnapshotTest.test_shelve_and_unshelve


class OrdinaryRootTest(base.FakeDaxTestCase):

    def test_the_snapshot_of_an_ordinary_root_disk_is_novas(self):
        self.start_compute()
        server = self.boot(self.put_flavor('ephemeral', ephemeral=1),
                           image_uuid=self.ordinary_image)
        with mock.patch('nova.virt.libvirt.driver.LibvirtDriver.'
                        '_live_snapshot') as method:
            self.act(server, 'createImage', name='copy')
            self._wait_for_server_parameter(
                server, {'OS-EXT-STS:task_state': None})
        method.assert_called_once()
        self.assertEqual(self.path(server), method.call_args.args[3])
