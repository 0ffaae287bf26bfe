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

"""Copying an image, also on a file system that clones files."""

import contextlib
import os
import struct
import subprocess
from unittest import mock

import fixtures
from nova.compute import power_state
from nova.compute import utils as compute_utils
from nova import exception
from nova import objects
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import host as libvirt_host
from oslo_utils import units
from oslotest import base
import testscenarios

from nova_fakedax import imagebackend
from nova_fakedax import layout
from nova_fakedax import snapshot
from tests import fixtures as our_fixtures

load_tests = testscenarios.load_tests_apply_scenarios


class TakeTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.content = os.urandom(2 * units.Mi)
        self.paused = False
        self.copied_while_paused = []
        self.useFixture(fixtures.MockPatchObject(
            imagebackend, 'extract', self._extract))

    def _extract(self, source, target, target_format):
        self.copied_while_paused.append(self.paused)
        subprocess.run(['qemu-img', 'convert', '-f', 'raw', '-O',
                        target_format, source, target], check=True)

    @contextlib.contextmanager
    def nothing_stored(self):
        self.paused = True
        yield
        self.paused = False

    def take(self, image_format, memmap=False):
        image, copy, content = (os.path.join(self.directory, name)
                                for name in ('image', 'copy', 'content'))
        with open(content, 'wb') as file:
            file.write(self.content)
        layout.make(image, content, len(self.content), memmap)
        os.unlink(content)
        snapshot.take(image, copy, image_format, self.nothing_stored())
        # Nothing else is left, and the copy shares nothing with the image.
        self.assertEqual(
            ['copy', 'image'], sorted(os.listdir(self.directory)))
        with open(image, 'r+b') as file:
            file.write(b'later')
        raw = self.useFixture(fixtures.TempDir()).join('raw')
        subprocess.run(['qemu-img', 'convert', '-f', image_format, '-O',
                        'raw', copy, raw], check=True)
        with open(raw, 'rb') as file:
            self.assertEqual(self.content, file.read())
        os.unlink(copy)

    def test_a_clone_is_copied_while_the_guest_runs_on(self):
        self.useFixture(our_fixtures.XfsFixture(self.directory))
        self.take('raw')
        self.take('qcow2')
        self.assertEqual([False, False], self.copied_while_paused)
        # The image shares its blocks with nothing any more.
        self.assertFalse(our_fixtures.shares_blocks(
            os.path.join(self.directory, 'image')))

    def test_there_is_no_clone_where_the_guest_could_run_out_of_space(self):
        self.useFixture(our_fixtures.XfsFixture(self.directory))
        with mock.patch.object(snapshot.layout, 'available',
                               side_effect=[units.Gi, 4 * units.Mi - 1]):
            self.take('raw')
        self.assertEqual([True], self.copied_while_paused)

    def test_what_cannot_be_cloned_is_copied_while_nothing_is_stored(self):
        with mock.patch('fcntl.ioctl', side_effect=OSError(95, 'no clones')):
            self.take('raw')
            self.take('qcow2')
        self.assertEqual([True, True], self.copied_while_paused)

    def test_the_guest_is_not_paused_while_others_keep_the_disks_busy(self):
        """A download of another image, for example."""
        order = []

        class Semaphore:
            def __enter__(self):
                order.append('wait')

            def __exit__(self, *_exc):
                order.append('release')

        @contextlib.contextmanager
        def nothing_stored():
            order.append('pause')
            yield
            order.append('resume')

        self.nothing_stored = nothing_stored
        self.useFixture(fixtures.MockPatchObject(
            compute_utils, 'disk_ops_semaphore', Semaphore()))
        with mock.patch('fcntl.ioctl', side_effect=OSError(95, 'no clones')):
            self.take('raw')
        self.assertEqual(['wait', 'pause', 'resume', 'release'], order)

    def test_the_copy_has_the_content_and_no_memmap(self):
        with mock.patch('fcntl.ioctl', side_effect=OSError(95, 'no clones')):
            self.take('raw', memmap=True)
            self.take('qcow2', memmap=True)
        self.assertEqual([True, True], self.copied_while_paused)

    def test_so_does_the_copy_of_a_clone(self):
        self.useFixture(our_fixtures.XfsFixture(self.directory))
        self.take('raw', memmap=True)
        self.take('qcow2', memmap=True)
        self.assertEqual([False, False], self.copied_while_paused)

    def test_the_request_is_the_kernels(self):
        # From its header, since Python has no name for it.
        with open('/usr/include/linux/fs.h') as header:
            self.assertIn('#define FICLONERANGE\t_IOW(0x94, 13, '
                          'struct file_clone_range)', header.read())
        size = struct.calcsize(snapshot._FILE_CLONE_RANGE)
        self.assertEqual(32, size)
        self.assertEqual(1 << 30 | size << 16 | 0x94 << 8 | 13,
                         snapshot._FICLONERANGE)


class GuestTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.host = mock.Mock(spec=libvirt_host.Host)
        self.guest = self.host.get_guest.return_value
        self.guest.get_power_state.return_value = power_state.RUNNING
        self.driver = mock.Mock(
            spec=libvirt_driver.LibvirtDriver, _host=self.host)
        self.instance = mock.Mock(
            spec=objects.Instance, uuid=our_fixtures.UUID,
            vm_state='active', task_state='image_uploading')


class PausedTest(GuestTestCase):

    def test_it_runs_on_also_after_an_error(self):
        def fail():
            with snapshot.vcpus_stopped(
                    self.host, self.guest, self.instance):
                self.guest.resume.assert_not_called()
                raise ValueError

        self.assertRaises(ValueError, fail)
        self.guest.pause.assert_called_once_with()
        self.guest.resume.assert_called_once_with()

    def test_one_that_does_not_run_is_left_as_it_is(self):
        for state in (power_state.PAUSED, power_state.SHUTDOWN):
            self.guest.get_power_state.return_value = state
            with snapshot.vcpus_stopped(
                    self.host, self.guest, self.instance):
                pass
        self.guest.pause.assert_not_called()
        self.guest.resume.assert_not_called()


class InterruptedTestCase(GuestTestCase):

    def resume_interrupted(self):
        context = mock.sentinel.context
        snapshot.resume_interrupted(self.driver, context, self.instance)


class InterruptedTest(InterruptedTestCase):

    def test_nova_compute_starts_whatever_becomes_of_it(self):
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id='gone')
        self.resume_interrupted()
        self.driver._set_quiesced.assert_not_called()


class LeftPausedTest(InterruptedTestCase):

    scenarios = [(task_state, {'task_state': task_state}) for task_state in (
        'image_snapshot_pending', 'image_snapshot', 'image_backup',
        'image_pending_upload', 'image_uploading')]

    def test_it_runs_on(self):
        self.instance.task_state = self.task_state
        self.guest.get_power_state.return_value = power_state.PAUSED
        # Its file systems may be frozen or not: nobody remembers.
        for error in None, exception.QemuGuestAgentNotEnabled():
            self.driver._set_quiesced.side_effect = error
            self.resume_interrupted()
        self.assertEqual(2, self.guest.resume.call_count)
        self.driver._set_quiesced.assert_called_with(
            mock.sentinel.context, self.instance, self.instance.image_meta,
            False)


class NotInterruptedTest(InterruptedTestCase):

    scenarios = [
        ('paused by its user', {
            'vm_state': 'paused', 'task_state': 'image_uploading',
            'power_state': power_state.PAUSED}),
        ('no task', {
            'vm_state': 'active', 'task_state': None,
            'power_state': power_state.PAUSED}),
        ('another task', {
            'vm_state': 'active', 'task_state': 'migrating',
            'power_state': power_state.PAUSED}),
        ('running', {
            'vm_state': 'active', 'task_state': 'image_uploading',
            'power_state': power_state.RUNNING}),
    ]

    def test_it_is_not_touched(self):
        self.instance.vm_state = self.vm_state
        self.instance.task_state = self.task_state
        self.guest.get_power_state.return_value = self.power_state
        self.resume_interrupted()
        self.guest.resume.assert_not_called()
        self.driver._set_quiesced.assert_not_called()
