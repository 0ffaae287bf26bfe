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


"""What guest-image-elements/build does of its own, without an image."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile

from oslotest import base as oslotest_base
import psutil

from lab import paths
from lab import wait
from tests.image import base


class EndedBuildTestCase(oslotest_base.BaseTestCase):
    """A build that a signal ends."""

    def setUp(self) -> None:
        super().setUp()
        # This makes diskimage-builder's environment, if need be.
        base.build()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='build-test-'))
        self.addCleanup(shutil.rmtree, self.directory)
        cache = self.directory / 'nova-fakedax/guest-image'
        cache.mkdir(parents=True)
        for path in (paths.CACHE / 'guest-image').glob('python-*'):
            (cache / path.name).symlink_to(path)
        self.cache = cache
        # It answers nobody.
        self.mirror = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(self.mirror.close)
        self.mirror.settimeout(base.BOOT_SECONDS)

    def _start(self) -> subprocess.Popen[str]:
        port = self.mirror.getsockname()[1]
        process = subprocess.Popen(
            [base.ELEMENTS / 'build'], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {
                'XDG_CACHE_HOME': str(self.directory),
                'DIB_DISTRIBUTION_MIRROR': f'http://127.0.0.1:{port}/debian',
                'no_proxy': '127.0.0.1'},
            # A shell in the background, as this one may be, ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.addCleanup(process.kill)
        return process

    def _begun(self) -> list[pathlib.Path]:
        return list(self.cache.glob('building-*'))

    def test_before_it_asks_the_mirror(self) -> None:
        process = self._start()
        wait.until('the build to begin', self._begun, base.BOOT_SECONDS,
                   interval=0.01)
        self.assertEnds(process, signal.SIGTERM)

    def test_while_it_waits_for_the_mirror(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self._start()
            connection, _ = self.mirror.accept()
            with connection:
                # It is the mirror that the user has set.
                self.assertIn(b' /debian/dists/bookworm/',
                              connection.recv(4096))
                self.assertEnds(process, number)

    def assertEnds(self, process: subprocess.Popen[str],
                   number: signal.Signals) -> None:
        """Assert that a signal ends the build, and that nothing is left."""
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        # A whole build takes more than a minute.
        output, errors = process.communicate(timeout=50)
        self.assertEqual(128 + number, process.returncode, errors)
        self.assertEqual('', output)
        self.assertEqual([], [child for child in children
                              if child.is_running()])
        self.assertEqual([], self._begun())
        self.assertNotIn(str(self.directory),
                         pathlib.Path('/proc/self/mounts').read_text())
        self.assertNotIn(str(self.directory), subprocess.run(
            ['losetup', '--list', '--output', 'BACK-FILE'], check=True,
            capture_output=True, text=True).stdout)
