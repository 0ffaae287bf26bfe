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

"""Whether another host's guest is gone, by locks on real files."""

import errno
import fcntl
import os
import pathlib
import struct
import tempfile
from unittest import mock

from nova import objects
from oslotest import base
import testscenarios

from nova_fakedax import evacuation
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios


class HostsTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name)
        self.image = self.path / 'disk'
        self.image.write_bytes(bytes(4096))
        for name, value in (
                ('imagebackend.image_paths', [str(self.image)]),
                ('hostcache.invalidate', None)):
            patch = mock.patch(f'nova_fakedax.evacuation.{name}',
                               return_value=value)
            setattr(self, name.rpartition('.')[2], patch.start())
            self.addCleanup(patch.stop)
        self.here, self.there = (self.host(name) for name in ('here', 'there'))
        self.instance = objects.Instance(
            uuid=fixtures.UUID, host='there',
            flavor=objects.Flavor(extra_specs={'fakedax:disks': 'root'}))

    def host(self, name):
        host = evacuation.Hosts(str(self.path), name)
        self.addCleanup(host.release)
        return host

    def look(self):
        for host in (self.here, self.there, self.here):
            host.look()

    def own(self, byte, kind=fcntl.F_WRLCK):
        """As QEMU on another host does."""
        descriptor = os.open(self.image, os.O_RDWR)
        self.addCleanup(os.close, descriptor)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(
            'hhqqi4x', kind, os.SEEK_SET, byte, 1, 0))

    def assertRefused(self, pattern):
        self.assertRaisesRegex(
            evacuation.EvacuationRefused, f"from host there: .*{pattern}",
            self.here.check_gone, self.instance)
        self.invalidate.assert_not_called()


class VolumesTest(HostsTestCase):
    """Of which Cinder's attachments are the fence, not locks."""

    def setUp(self):
        super().setUp()
        self.image_paths.return_value = []
        self.instance.flavor.extra_specs = {'fakedax:volumes': 'all'}

    def test_hosts_that_have_never_seen_each_other(self):
        self.here.look()
        self.here.check_gone(self.instance)

    def test_host_that_shows_that_it_is_alive(self):
        self.look()
        self.assertRefused('its nova-compute still runs')
        self.there.release()
        self.here.check_gone(self.instance)

    def test_images_need_them_all_the_same(self):
        self.instance.flavor.extra_specs['fakedax:disks'] = 'ephemeral'
        self.here.look()
        self.assertRefused('has never seen a lock of it')


class CheckGoneTest(HostsTestCase):

    def test_host_whose_lock_was_seen_and_is_gone(self):
        self.look()
        self.there.release()
        self.here.check_gone(self.instance)
        self.invalidate.assert_called_once_with(str(self.image))

    def test_it_is_remembered_when_nova_compute_starts_again(self):
        self.look()
        self.there.release()
        self.here.release()
        self.here = self.host('here')
        self.here.look()
        self.here.check_gone(self.instance)

    def test_host_whose_lock_was_never_seen(self):
        self.here.look()
        self.assertRefused('has never seen a lock of it')

    def test_storage_whose_locks_do_not_reach_other_hosts(self):
        with mock.patch('nova_fakedax.filelock.is_held', return_value=False):
            self.look()
        self.there.release()
        self.assertRefused('has never seen a lock of it')

    def age(self, name, seconds):
        """Move the last change of a file into the past, or the future."""
        path = self.path / 'fakedax-hosts' / name
        changed = path.stat().st_mtime - seconds
        os.utime(path, (changed, changed))

    def test_storage_whose_locks_do_not_reach_other_hosts_any_more(self):
        """As after a mount with other options: the host showed itself."""
        self.look()
        self.there.release()
        self.age('seen/here/there', 3600)
        self.assertRefused('has lately not seen a lock of it')

    def test_host_that_failed_long_ago(self):
        self.look()
        self.there.release()
        for name in ('seen/here/there', 'locks/there'):
            self.age(name, 3600)
        self.here.look()
        self.here.check_gone(self.instance)

    def test_note_is_made_again_while_the_lock_is_seen(self):
        self.look()
        self.age('seen/here/there', 3600)
        self.here.look()
        self.there.release()
        self.here.check_gone(self.instance)

    def test_host_whose_nova_compute_runs(self):
        self.look()
        self.assertRefused('its nova-compute still runs')

    def test_storage_that_fails(self):
        self.look()
        self.there.release()
        with mock.patch('nova_fakedax.filelock.is_image_owned',
                        side_effect=OSError(errno.EIO, 'storage is gone')):
            self.assertRefused('storage is gone')


class GuestThatRunsTest(HostsTestCase):

    scenarios = [('owner', {'byte': 300}), ('next owner', {'byte': 301})]

    def test_it_keeps_its_image(self):
        self.look()
        self.there.release()
        self.own(self.byte)
        self.assertRefused(f'its guest still has {self.image} locked')

    def test_one_that_only_reads_does_too(self):
        self.look()
        self.there.release()
        self.own(self.byte, fcntl.F_RDLCK)
        self.assertRefused(f'its guest still has {self.image} locked')

    def test_other_locks_do_not_count(self):
        self.look()
        self.there.release()
        for byte in (0, 100, 299, 302):
            self.own(byte)
        self.here.check_gone(self.instance)


class LookTest(HostsTestCase):

    def test_nova_compute_that_starts_while_the_last_one_ends(self):
        self.look()
        again = self.host('there')
        again.look()
        self.there.release()
        self.here.check_gone(self.instance)
        again.look()
        self.assertRaisesRegex(
            evacuation.EvacuationRefused, 'still runs',
            self.here.check_gone, self.instance)

    def test_storage_that_cannot_be_written_is_not_fatal(self):
        with mock.patch('os.makedirs',
                        side_effect=OSError(errno.EROFS, 'read-only')), \
                self.assertLogs(evacuation.LOG.logger, 'WARNING') as logs:
            self.here.look()
        self.assertIn('cannot be evacuated', logs.output[0])
        self.assertIn('read-only', logs.output[0])
