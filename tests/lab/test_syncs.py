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

"""Sync calls that lab.machine.syncs counts, of a process that makes them."""

import contextlib
import pathlib
import subprocess
import sys
import tempfile

from oslotest import base

from lab.machine import loop
from lab.machine import syncs

# Maps a file, and makes a call on it for each line that it is sent.
PROGRAM = """
import mmap, os, sys
file, other = (open(name, 'r+b') for name in sys.argv[1:])
mapping, others = (mmap.mmap(each.fileno(), 8192) for each in (file, other))
print('ready', flush=True)
for line in sys.stdin:
    eval(line)
    print('done', flush=True)
"""


class WatchTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        files = [pathlib.Path(directory.name) / name
                 for name in ('disk', 'other')]
        for file in files:
            file.write_bytes(bytes(8192))
        disk = self.opened(files[0])
        #: The end of its path.
        self.name = f'/{disk.name}'
        self.process = subprocess.Popen(
            [sys.executable, '-c', PROGRAM, str(disk), str(files[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(self.process.wait)
        assert self.process.stdin and self.process.stdout
        self.addCleanup(self.process.stdout.close)
        self.addCleanup(self.process.stdin.close)
        self.process.stdout.readline()

    def opened(self, file: pathlib.Path) -> pathlib.Path:
        """What the process opens of a file."""
        return file

    def call(self, expression: str) -> None:
        assert self.process.stdin and self.process.stdout
        print(expression, file=self.process.stdin, flush=True)
        self.assertEqual('done\n', self.process.stdout.readline())

    def test_calls_on_the_file_count_and_others_do_not(self) -> None:
        with syncs.watch(self.process.pid, self.name) as seen:
            self.call('os.fdatasync(file.fileno())')
            self.call('mapping.flush(4096, 4096)')
            self.call('os.fdatasync(other.fileno())')
            self.call('others.flush()')
        self.assertEqual((2, 0), (seen.succeeded, seen.failed))

    def test_process_that_cannot_be_watched(self) -> None:
        watch = syncs.watch(self.process.pid, self.name)
        self.process.terminate()
        self.process.wait()
        self.assertRaises(syncs.WatchError, watch.__enter__)


class BlockDeviceTestCase(WatchTestCase):
    """The same of a block device."""

    def opened(self, file: pathlib.Path) -> pathlib.Path:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(loop.device(file, direct=False))
