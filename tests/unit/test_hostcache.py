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

import contextlib
import os
import subprocess
import sys
import textwrap
from unittest import mock

import fixtures as base_fixtures
from oslo_privsep import daemon
from oslotest import base
import testscenarios

from nova_fakedax import hostcache
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios


class FlushTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.PrivsepFixture())
        directory = self.useFixture(base_fixtures.TempDir()).path
        self.path = os.path.join(directory, 'disk')
        with open(self.path, 'wb') as image:
            image.write(b'guest')

    def _open_files(self):
        """How often the image is open; other threads open other files."""
        found = 0
        for descriptor in os.listdir('/proc/self/fd'):
            with contextlib.suppress(FileNotFoundError):
                found += os.path.realpath(self.path) == os.readlink(
                    f'/proc/self/fd/{descriptor}')
        return found

    def test_the_file_is_synced(self):
        synced = []
        with mock.patch('os.fsync', side_effect=lambda descriptor: (
                synced.append(os.readlink(f'/proc/self/fd/{descriptor}')))):
            hostcache.flush(self.path)
        self.assertEqual([os.path.realpath(self.path)], synced)

    def test_an_error_of_the_storage_is_an_error(self):
        with mock.patch('os.fsync', side_effect=OSError(5, 'EIO')):
            self.assertRaises(OSError, hostcache.flush, self.path)
        self.assertEqual(0, self._open_files())
        with open(self.path, 'rb'):
            self.assertEqual(1, self._open_files())

    def test_a_missing_file_is_an_error_and_is_not_made(self):
        self.assertRaises(
            FileNotFoundError, hostcache.flush, self.path + '.eph0')
        self.assertFalse(os.path.exists(self.path + '.eph0'))


class HelperTest(base.BaseTestCase):
    """The image belongs to the user that runs QEMU."""

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(base_fixtures.TempDir()).path
        self.path = os.path.join(self.directory, 'disk')
        with open(self.path, 'wb'):
            pass
        self.tried = []
        self.error = None
        for name in 'flush', 'invalidate':
            self.useFixture(base_fixtures.MockPatchObject(
                hostcache._Local, name, self.denied))
            self.useFixture(base_fixtures.MockPatchObject(
                hostcache, f'privileged_{name}', self.help))

    def denied(self, path):
        self.tried.append('local')
        raise PermissionError(13, 'Permission denied', path)

    def help(self, path):
        self.tried.append('helper')
        if self.error:
            raise self.error

    def test_the_helper_opens_it(self):
        hostcache.flush(self.path)
        hostcache.invalidate(self.path)
        self.assertEqual(['local', 'helper'] * 2, self.tried)

    def test_one_that_does_not_run_says_why(self):
        for self.error, why in (
            (daemon.FailedToDropPrivileges('exited non-zero (1)'),
             'exited non-zero (1)'),
            (FileNotFoundError(2, 'No such file', 'sudo'), "'sudo'"),
            (PermissionError(13, 'Permission denied'), 'denied'),
        ):
            for function in hostcache.flush, hostcache.invalidate:
                self.assertIn(why, str(self.assertRaises(
                    hostcache.HelperError, function, self.path)))

    def test_what_it_says_of_the_storage_is_an_error_of_the_storage(self):
        self.error = OSError(5, 'EIO')
        self.assertEqual(5, self.assertRaises(
            OSError, hostcache.flush, self.path).errno)
        os.unlink(self.path)
        self.error = FileNotFoundError(2, 'No such file')
        self.assertNotIsInstance(self.assertRaises(
            FileNotFoundError, hostcache.flush, self.path),
            hostcache.HelperError)

    def test_a_host_where_it_runs_has_tried_it(self):
        hostcache.probe(self.directory)
        self.assertEqual(['local', 'helper'] * 2, self.tried)

    def test_a_host_where_it_does_not_run_has_tried_it(self):
        self.error = daemon.FailedToDropPrivileges('no')
        self.assertRaises(
            hostcache.HelperError, hostcache.probe, self.directory)
        self.assertEqual(['disk'], os.listdir(self.directory))


class ProbeTest(base.BaseTestCase):

    scenarios = [('read by all', {'umask': 0o022, 'mode': 0o644}),
                 ('read by one user', {'umask': 0o077, 'mode': 0})]

    def test_the_file_is_like_an_image(self):
        directory = self.useFixture(base_fixtures.TempDir()).path
        self.addCleanup(os.umask, os.umask(self.umask))
        modes = []
        for name in 'flush', 'invalidate':
            self.useFixture(base_fixtures.MockPatchObject(
                hostcache, name, lambda path: modes.append(
                    os.stat(path).st_mode & 0o777)))
        hostcache.probe(directory)
        self.assertEqual([self.mode] * 2, modes)
        self.assertEqual([], os.listdir(directory))


class PrivilegeTest(base.BaseTestCase):

    def test_one_capability_is_needed_and_enough(self):
        """To open what belongs to the user that runs QEMU."""
        if os.geteuid():
            self.skipTest('only root can give a file away')
        directory = self.useFixture(base_fixtures.TempDir()).path
        path = os.path.join(directory, 'disk')
        with open(path, 'wb') as image:
            image.write(b'guest')
        for each in path, directory:
            os.chmod(each, 0o700)
            os.chown(each, 65534, 65534)
        done = subprocess.run(
            [sys.executable, '-c', textwrap.dedent("""\
                import sys
                from oslo_privsep import capabilities
                from nova_fakedax import hostcache, privsep

                context = privsep.fakedax_pctxt
                context.client_mode = False
                for kept in context.conf.capabilities, []:
                    capabilities.drop_all_caps_except(kept, kept, [])
                    for function in hostcache.flush, hostcache.invalidate:
                        try:
                            function(sys.argv[1])
                            print('done')
                        except PermissionError:
                            print('denied')
                print(*map(capabilities.CAPS_BYVALUE.get,
                           context.conf.capabilities))
                """), path],
            cwd='/', text=True, capture_output=True)
        self.assertEqual(
            ['done', 'done', 'denied', 'denied', 'CAP_DAC_READ_SEARCH'],
            done.stdout.splitlines(), done.stderr)
