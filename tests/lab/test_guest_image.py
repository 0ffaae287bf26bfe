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

"""The test guest in the cache stays as it was built."""

from collections.abc import Callable
import mmap
import pathlib
import tempfile
from unittest import mock

from oslotest import base
import testscenarios

from lab.guest import image
from lab.guest import tools
from lab import paths


def write(path: pathlib.Path) -> None:
    with path.open('r+b') as file:
        file.write(b'boot')


def write_mapped(path: pathlib.Path) -> None:
    with path.open('r+b') as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 1
        mapped.flush()


class BuildTest(testscenarios.WithScenarios, base.BaseTestCase):

    scenarios = [(change.__name__, {'change': staticmethod(change)})
                 for change in (write, write_mapped)]
    change: Callable[[pathlib.Path], None]

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        for target, name, new in (
                (paths, 'CACHE', pathlib.Path(directory.name)),
                (image, '_kernel', mock.Mock(
                    return_value=mock.Mock(key='kernel'))),
                (image.debian, 'find', mock.Mock(
                    return_value=[mock.Mock(checksum='agent')])),
                (image, '_build', self._build)):
            patch = mock.patch.object(target, name, new)
            patch.start()
            self.addCleanup(patch.stop)
        self.builds = 0

    def _build(self, _size: int, _kernel: object, _agent: object,
               work: pathlib.Path, *_options: object) -> None:
        self.builds += 1
        built = image.Guest(work / 'out')
        built.directory.mkdir()
        built.disk.write_bytes(bytes(mmap.PAGESIZE))

    def test_disk_that_was_written_to_is_refused_and_built_again(
            self) -> None:
        built = image.build()
        self.assertEqual(built, image.build())
        self.assertEqual(1, self.builds)
        self.change(built.disk)
        error = self.assertRaises(tools.GuestBuildError, image.build)
        self.assertIn(f'{built.disk} was written to', str(error))
        self.assertEqual(bytes(mmap.PAGESIZE),
                         image.build().disk.read_bytes())
        self.assertEqual(2, self.builds)

    def test_copy_of_the_disk_may_be_written_to(self) -> None:
        built = image.build()
        copy = built.directory.with_name('copy')
        built.copy_disk(copy)
        write(copy)
        self.assertEqual(built, image.build())
        self.assertEqual(mmap.PAGESIZE, copy.stat().st_size)
