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

"""The size of the pages in which the host caches and writes the image."""

import pathlib
import shutil
import tempfile

from lab.machine import pagecache
from lab import paths
import testscenarios

from tests.device import base
from tests.device import emulator

load_tests = testscenarios.load_tests_apply_scenarios


class PageSizeTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        # Temporary files may be in RAM, where nothing is ever dirty.
        directory = pathlib.Path(tempfile.mkdtemp(dir=paths.STATE))
        self.addCleanup(shutil.rmtree, directory)
        self.image = directory / 'image'

    def dirtied(self, vm: emulator.Emulator) -> int:
        """The bytes that QEMU has made dirty, see proc_pid_io(5)."""
        fields = dict(line.split(': ') for line in pathlib.Path(
            f'/proc/{vm.process.pid}/io').read_text().splitlines())
        return int(fields['write_bytes'])

    def test_a_store_dirties_one_page(self) -> None:
        pagecache.evict(self.make_image())
        vm = self.start_vm(self.image)
        before = self.dirtied(vm)
        vm.qtest.write_bytes(self.memaddr(vm) + base.SIZE // 2, b'B')
        self.assertEqual(base.PAGE, self.dirtied(vm) - before)

    def test_huge_pages_can_be_turned_on(self) -> None:
        vm = self.start_vm(self.make_image(), device='huge-pages=on')
        self.assertIn('hg', vm.mapping_flags(self.image))
