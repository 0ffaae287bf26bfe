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

import fixtures as base_fixtures
from nova.compute import power_state
from nova import exception
from nova import objects
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import host as libvirt_host
from oslotest import base

from nova_fakedax import conf
from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import quiesce
from tests import fixtures

PATH = '/dev/loop7'


class Instance:
    """An instance whose database is a dict."""

    def __init__(self, saved):
        self.uuid = fixtures.UUID
        self.vm_state = 'active'
        self.image_meta = objects.ImageMeta.from_dict({})
        self._saved = saved
        self.refresh()

    def save(self):
        self._saved.clear()
        self._saved.update(self.system_metadata)

    def refresh(self):
        self.system_metadata = dict(self._saved)


class QuiesceTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()
        self.useFixture(fixtures.ConfFixture())
        conf.register_opts(quiesce.CONF)
        self.order = mock.Mock()
        self.useFixture(base_fixtures.MockPatchObject(
            hostcache, 'flush', self.order.flush))
        self.useFixture(base_fixtures.MockPatchObject(
            imagebackend, 'image_paths', return_value=[]))
        self.timer = self.useFixture(base_fixtures.MockPatchObject(
            threading, 'Timer')).mock
        self.host = mock.Mock(spec=libvirt_host.Host)
        self.guest = self.host.get_guest.return_value
        self.state = power_state.RUNNING
        self.guest.get_power_state.side_effect = lambda host: self.state
        self.guest.pause.side_effect = self._pause
        self.guest.resume.side_effect = self._resume
        self.driver = mock.Mock(
            spec=libvirt_driver.LibvirtDriver, _host=self.host)
        # There is no agent.
        self.driver._set_quiesced.side_effect = (
            exception.QemuGuestAgentNotEnabled)
        self.driver._requires_quiesce.return_value = False
        self.saved = {'image_fakedax_guest': 'true'}
        self.instance = Instance(self.saved)
        #: nova-api's, as it was before.
        self.stale = Instance(self.saved)

    def _pause(self):
        self.state = power_state.PAUSED
        self.order.pause()

    def _resume(self):
        self.state = power_state.RUNNING
        self.order.resume()

    def _quiesced(self, _context, _instance, _image_meta, frozen):
        self.order.agent(frozen)

    def quiesce(self):
        quiesce.quiesce(self.driver, None, self.instance, None, [PATH])

    def unquiesce(self):
        quiesce.unquiesce(self.driver, None, self.stale, None)


class QuiesceTest(QuiesceTestCase):

    def test_the_guest_is_paused_with_all_on_storage(self):
        self.quiesce()
        self.assertEqual(
            [mock.call.flush(PATH), mock.call.pause(), mock.call.flush(PATH)],
            self.order.mock_calls)
        self.assertEqual(power_state.PAUSED, self.state)
        self.unquiesce()
        self.assertEqual(power_state.RUNNING, self.state)
        self.assertEqual({'image_fakedax_guest': 'true'}, self.saved)

    def test_its_file_systems_are_frozen_first_and_thawed_last(self):
        self.driver._set_quiesced.side_effect = self._quiesced
        self.quiesce()
        self.unquiesce()
        self.assertEqual(
            [mock.call.flush(PATH), mock.call.agent(True), mock.call.pause(),
             mock.call.flush(PATH), mock.call.resume(),
             mock.call.agent(False)], self.order.mock_calls)

    def test_an_image_that_demands_an_agent(self):
        self.driver._requires_quiesce.return_value = True
        self.assertRaises(exception.QemuGuestAgentNotEnabled, self.quiesce)
        self.assertEqual(power_state.RUNNING, self.state)
        self.assertNotIn(quiesce.MARK, self.saved)

    def test_storage_that_fails_lets_the_guest_run_on(self):
        self.order.flush.side_effect = OSError(5, 'no storage')
        self.assertRaisesRegex(
            imagebackend.FlushFailed, PATH, self.quiesce)
        self.assertEqual(power_state.RUNNING, self.state)
        self.assertNotIn(quiesce.MARK, self.saved)
        self.timer.assert_not_called()

    def test_a_guest_that_does_not_run_is_not_resumed(self):
        for self.state in (power_state.PAUSED, power_state.SHUTDOWN):
            before = self.state
            self.quiesce()
            self.unquiesce()
            self.assertEqual(before, self.state)
        self.guest.pause.assert_not_called()

    def test_one_that_its_user_has_paused_meanwhile_stays_so(self):
        self.quiesce()
        self.stale.vm_state = 'paused'
        self.unquiesce()
        self.assertEqual(power_state.PAUSED, self.state)
        self.assertNotIn(quiesce.MARK, self.saved)

    def test_one_that_is_gone_meanwhile(self):
        self.quiesce()
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id=fixtures.UUID)
        self.unquiesce()
        self.assertNotIn(quiesce.MARK, self.saved)

    def test_a_guest_that_nobody_has_paused_is_only_thawed(self):
        self.driver._set_quiesced.side_effect = self._quiesced
        self.state = power_state.PAUSED
        self.unquiesce()
        self.assertEqual([mock.call.agent(False)], self.order.mock_calls)

    def test_it_does_not_migrate(self):
        quiesce.check_migration(self.instance)
        self.quiesce()
        self.stale.refresh()
        self.assertRaisesRegex(
            exception.MigrationPreCheckError, 'paused for snapshots',
            quiesce.check_migration, self.stale)


class DeadApiTest(QuiesceTestCase):
    """Nobody asks for the guest to be resumed."""

    def time_out(self, number=0):
        seconds, function, arguments = self.timer.call_args_list[number].args
        self.assertEqual(300, seconds)
        function(*arguments)

    def test_the_guest_runs_on_after_a_while(self):
        self.quiesce()
        with self.assertLogs(quiesce.LOG.logger, 'WARNING') as logs:
            self.time_out()
        self.assertIn('quiesce_timeout', logs.output[0])
        self.assertEqual(power_state.RUNNING, self.state)
        self.assertNotIn(quiesce.MARK, self.saved)

    def test_a_later_pause_has_a_time_of_its_own(self):
        self.quiesce()
        self.unquiesce()
        self.instance.refresh()
        self.quiesce()
        self.time_out(0)
        self.assertEqual(power_state.PAUSED, self.state)
        self.time_out(1)
        self.assertEqual(power_state.RUNNING, self.state)

    def test_libvirt_that_fails_is_logged(self):
        self.quiesce()
        self.guest.resume.side_effect = libvirt_driver.libvirt.libvirtError(
            'no')
        with self.assertLogs(quiesce.LOG.logger, 'ERROR'):
            self.time_out()
        # The next start of nova-compute tries again.
        self.assertIn(quiesce.MARK, self.saved)

    def test_a_server_that_was_deleted(self):
        self.quiesce()
        with mock.patch.object(
                Instance, 'refresh', side_effect=exception.InstanceNotFound(
                    instance_id=fixtures.UUID)):
            self.time_out()
        self.guest.resume.assert_not_called()


class DeadComputeTest(QuiesceTestCase):

    def resume_interrupted(self):
        quiesce.resume_interrupted(self.driver, None, self.stale)

    def test_the_guest_runs_on_when_it_is_back(self):
        self.quiesce()
        self.stale.refresh()
        with self.assertLogs(quiesce.LOG.logger, 'WARNING'):
            self.resume_interrupted()
        self.assertEqual(power_state.RUNNING, self.state)
        self.assertNotIn(quiesce.MARK, self.saved)

    def test_a_guest_that_was_paused_by_others_stays_so(self):
        self.state = power_state.PAUSED
        self.resume_interrupted()
        self.guest.resume.assert_not_called()
