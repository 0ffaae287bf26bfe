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

import os
import subprocess
import sys
import textwrap
from unittest import mock

import fixtures as base_fixtures
from oslotest import base

from nova_fakedax import hostcache
from tests import fixtures


class FlushTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.PrivsepFixture())
        directory = self.useFixture(base_fixtures.TempDir()).path
        self.path = os.path.join(directory, 'disk')
        with open(self.path, 'wb') as image:
            image.write(b'guest')

    def _open_files(self):
        return len(os.listdir('/proc/self/fd'))

    def test_the_file_is_synced(self):
        synced = []
        with mock.patch('os.fsync', side_effect=lambda descriptor: (
                synced.append(os.readlink(f'/proc/self/fd/{descriptor}')))):
            hostcache.flush(self.path)
        self.assertEqual([os.path.realpath(self.path)], synced)

    def test_an_error_of_the_storage_is_an_error(self):
        before = self._open_files()
        with mock.patch('os.fsync', side_effect=OSError(5, 'EIO')):
            self.assertRaises(OSError, hostcache.flush, self.path)
        self.assertEqual(before, self._open_files())

    def test_a_missing_file_is_an_error_and_is_not_made(self):
        self.assertRaises(
            FileNotFoundError, hostcache.flush, self.path + '.eph0')
        self.assertFalse(os.path.exists(self.path + '.eph0'))


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
