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

"""Loop devices, which need root as the rest of the lab does."""

import os
import pathlib
import signal
import subprocess
import sys

import fixtures
from oslotest import base

from lab.machine import loop
from lab import paths
from lab import wait

SIZE = 1 << 20

# Keeps a device until it is killed.
KEEPER = """
import pathlib, signal, sys
from lab.machine import loop
with loop.device(pathlib.Path(sys.argv[1])) as node:
    print(node, flush=True)
    signal.pause()
"""


def backing(node: pathlib.Path) -> str | None:
    """The file of a loop device, None if it has none."""
    file = pathlib.Path('/sys/block', node.name, 'loop/backing_file')
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return None


class LoopTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        # The directory for temporary files may be one without direct I/O.
        paths.STATE.mkdir(exist_ok=True)
        directory = self.useFixture(fixtures.TempDir(rootdir=paths.STATE))
        self.file = pathlib.Path(directory.path) / 'file'
        self.file.write_bytes(b'A' * SIZE)

    def test_device_has_the_content_of_the_file(self):
        with loop.device(self.file) as node:
            self.assertTrue(node.is_block_device())
            self.assertEqual(SIZE, loop.size(node))
            with node.open('r+b', buffering=0) as opened:
                self.assertEqual(b'A' * SIZE, opened.read())
                opened.seek(0)
                opened.write(b'B' * 4096)
                os.fsync(opened.fileno())
            self.assertEqual(b'B' * 4096 + b'A' * 4096,
                             self.file.read_bytes()[:8192])

    def test_it_is_free_at_the_end(self):
        with loop.device(self.file) as node:
            self.assertEqual(str(self.file), backing(node))
        self.assertNotEqual(str(self.file), backing(node))

    def test_it_is_free_after_a_failure(self):
        def fail():
            with loop.device(self.file) as node:
                seen.append(node)
                raise ZeroDivisionError

        seen = []
        self.assertRaises(ZeroDivisionError, fail)
        self.assertNotEqual(str(self.file), backing(seen[0]))

    def test_it_is_free_when_its_process_is_killed(self):
        with subprocess.Popen(
                [sys.executable, '-c', KEEPER, self.file], cwd=paths.ROOT,
                stdout=subprocess.PIPE, text=True) as keeper:
            node = pathlib.Path(keeper.stdout.readline().strip())
            self.assertEqual(str(self.file), backing(node))
            keeper.send_signal(signal.SIGKILL)
        wait.until('the device to be free',
                   lambda: backing(node) != str(self.file), 10)

    def test_what_has_it_open_is_told_at_the_end(self):
        self.useFixture(fixtures.MockPatchObject(loop, '_FREE_SECONDS', 0.2))

        def leave():
            with loop.device(self.file) as node:
                opened.append(node.open('rb'))

        opened = []
        error = self.assertRaises(loop.LoopError, leave)
        node = pathlib.Path(opened[0].name)
        self.assertIn(f'{node} of {self.file} to be free', str(error))
        # Nobody has to free it, then.
        opened[0].close()
        wait.until('the device to be free',
                   lambda: backing(node) != str(self.file), 10)

    def test_each_is_another_device_with_a_page_cache_of_its_own(self):
        with (loop.device(self.file) as one, loop.device(self.file) as two):
            self.assertNotEqual(os.stat(one).st_rdev, os.stat(two).st_rdev)
            for node in (one, two):
                self.assertEqual(b'A' * SIZE, node.read_bytes())
            with one.open('r+b') as opened:
                opened.write(b'B')
                opened.flush()
                os.fsync(opened.fileno())
            # Closing it has not dropped what the other has cached.
            self.assertEqual(b'A', two.read_bytes()[:1])
            with two.open('rb') as opened:
                os.posix_fadvise(
                    opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                self.assertEqual(b'B', opened.read(1))

    def test_page_cache_of_the_file_is_left_out(self):
        for direct, cached in ((True, 0), (False, SIZE)):
            with self.file.open('rb') as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(
                    opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with loop.device(self.file, direct=direct) as node:
                node.read_bytes()
            self.assertEqual(cached, int(subprocess.run(
                ['fincore', '--bytes', '--noheadings', '--output', 'RES',
                 self.file], check=True, capture_output=True).stdout))

    def test_it_is_resized_with_the_file(self):
        with loop.device(self.file) as node:
            os.truncate(self.file, SIZE // 2)
            self.assertEqual(SIZE, loop.size(node))
            loop.resize(node)
            self.assertEqual(SIZE // 2, loop.size(node))

    def test_file_that_is_missing(self):
        error = self.assertRaises(
            loop.LoopError, loop.device(self.file / 'x').__enter__)
        self.assertIn(str(self.file / 'x'), str(error))

    def test_file_that_cannot_be_read_directly(self):
        def without(node: pathlib.Path, name: str) -> str | None:
            nodes.append(node)
            return '0' if name == 'dio' else attribute(node, name)

        nodes, attribute = [], loop._attribute
        self.useFixture(fixtures.MockPatchObject(loop, '_attribute', without))
        error = self.assertRaises(
            loop.LoopError, loop.device(self.file).__enter__)
        self.assertIn(f'{self.file} cannot be read and written directly',
                      str(error))
        self.assertNotEqual(str(self.file), backing(nodes[0]))
        with loop.device(self.file, direct=False):
            pass
