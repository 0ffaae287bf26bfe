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

import errno
import os
import subprocess
from unittest import mock

import fixtures
from oslo_utils import units
from oslotest import base

from nova_fakedax import layout
from tests import fixtures as our_fixtures


class AlignedTest(base.BaseTestCase):

    def test_a_size_is_rounded_up_to_2_mib(self):
        for size, expected in {
            0: 0,
            1: 2 * units.Mi,
            2 * units.Mi - 1: 2 * units.Mi,
            2 * units.Mi: 2 * units.Mi,
            2 * units.Mi + 1: 4 * units.Mi,
            5 * units.Gi: 5 * units.Gi,
        }.items():
            self.assertEqual(expected, layout.aligned(size), size)


class FileTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(directory, 'disk')

    def write(self, content=b'', size=None):
        with open(self.path, 'wb') as image:
            image.write(content)
            if size is not None:
                image.truncate(size)


class AllocateTest(FileTestCase):

    def test_a_sparse_file_becomes_whole_and_aligned(self):
        self.write(b'guest', size=3 * units.Mi)
        layout.allocate(self.path, 5 * units.Mi)
        status = os.stat(self.path)
        self.assertEqual(6 * units.Mi, status.st_size)
        self.assertGreaterEqual(status.st_blocks * 512, 6 * units.Mi)

    def test_what_the_file_holds_is_kept(self):
        content = os.urandom(units.Mi + 7)
        self.write(content)
        layout.allocate(self.path, 4 * units.Mi)
        with open(self.path, 'rb') as image:
            self.assertEqual(content, image.read(len(content)))
            self.assertEqual(b'', image.read().strip(b'\0'))

    def test_a_clone_gets_blocks_of_its_own(self):
        """Nova makes clones by cp(1), of a cached image or for a resize."""
        directory = os.path.dirname(self.path)
        self.useFixture(our_fixtures.XfsFixture(directory))
        content = os.urandom(2 * units.Mi)
        self.write(content)
        clone = os.path.join(directory, 'clone')
        subprocess.run(['cp', '--reflink=always', self.path, clone],
                       check=True)
        self.assertTrue(our_fixtures.shares_blocks(clone))
        layout.allocate(clone, 4 * units.Mi)
        self.assertFalse(our_fixtures.shares_blocks(clone))
        self.assertEqual(4 * units.Mi, layout.mapped_size(clone))
        with open(clone, 'rb') as image:
            self.assertEqual(content, image.read(len(content)))

    def test_a_larger_file_is_not_shortened(self):
        self.write(size=5 * units.Mi)
        layout.allocate(self.path, units.Mi)
        self.assertEqual(6 * units.Mi, os.path.getsize(self.path))

    def test_doing_it_again_changes_nothing(self):
        self.write(b'guest')
        layout.allocate(self.path, 2 * units.Mi)
        before = os.stat(self.path)
        layout.allocate(self.path, 2 * units.Mi)
        after = os.stat(self.path)
        self.assertEqual((before.st_size, before.st_blocks),
                         (after.st_size, after.st_blocks))

    def test_a_file_that_is_not_there_is_not_made(self):
        self.assertRaises(
            FileNotFoundError, layout.allocate, self.path, 2 * units.Mi)
        self.assertFalse(os.path.exists(self.path))

    def test_too_much_is_not_begun(self):
        # Otherwise other instances would find the file system full.
        self.write(b'guest')
        before = os.stat(self.path)
        free = os.statvfs(self.path)
        exc = self.assertRaises(
            OSError, layout.allocate, self.path,
            free.f_blocks * free.f_frsize + units.Gi)
        self.assertEqual(errno.ENOSPC, exc.errno)
        after = os.stat(self.path)
        self.assertEqual((before.st_size, before.st_blocks),
                         (after.st_size, after.st_blocks))

    def test_no_space_is_an_error(self):
        self.write()
        with mock.patch.object(layout, '_take_blocks', side_effect=OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC))):
            exc = self.assertRaises(
                OSError, layout.allocate, self.path, 2 * units.Mi)
        self.assertEqual(errno.ENOSPC, exc.errno)


class MappedSizeTest(FileTestCase):

    def test_what_allocate_leaves_can_be_mapped(self):
        self.write(b'guest')
        layout.allocate(self.path, 3 * units.Mi)
        self.assertEqual(4 * units.Mi, layout.mapped_size(self.path))

    def _refused(self):
        exc = self.assertRaises(
            layout.InvalidLayout, layout.mapped_size, self.path)
        return str(exc)

    def test_a_missing_file_is_refused(self):
        self.assertEqual(f'{self.path} does not exist', self._refused())

    def test_a_directory_is_refused(self):
        os.mkdir(self.path)
        self.assertEqual(f'{self.path} is not a regular file',
                         self._refused())

    def test_an_unaligned_file_is_refused(self):
        self.write(b'x' * (2 * units.Mi + 512))
        self.assertEqual(
            f'{self.path} has 2097664 bytes; allowed: a multiple of 2097152 '
            f'bytes', self._refused())

    def test_an_empty_file_is_refused(self):
        self.write()
        self.assertEqual(
            f'{self.path} has 0 bytes; allowed: a multiple of 2097152 bytes',
            self._refused())

    def test_a_file_with_a_hole_is_refused(self):
        self.write(b'x' * 4096, size=4 * units.Mi)
        allocated = os.stat(self.path).st_blocks * 512
        self.assertLess(allocated, 4 * units.Mi)
        self.assertEqual(
            f'{self.path} has 4194304 bytes, but only {allocated} are '
            f'allocated', self._refused())
