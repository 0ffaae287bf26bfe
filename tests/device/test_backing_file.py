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

"""What happens to a guest that loses its backing file.

When a page of the file cannot be read or allocated, SIGBUS ends QEMU, whatever
the device does. So whoever makes the image must allocate all of it and must
never shrink it.
"""

import os
import signal
import subprocess

from lab.machine import emulators
import testscenarios

from tests.device import base
from tests.device import emulator

load_tests = testscenarios.load_tests_apply_scenarios


class BackingFileTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def _touch(self, vm: emulator.Emulator, offset: int) -> None:
        vm.qtest.write_bytes(self.memaddr(vm) + offset, b'B')

    def assertKilled(self, vm: emulator.Emulator, offset: int) -> None:
        """An access within the page ends QEMU, which names the page."""
        self.assertRaises(
            emulator.QTestError, self._touch, vm, offset + 40)
        self.assertEqual(-signal.SIGBUS, vm.wait_exit())
        self.assertIn(f"virtio-pmem: memory backend 'mem0': no page at offset "
                      f'{offset:#x}: the file was truncated, its file system '
                      'is full, or its storage cannot be read', vm.log())

    def test_truncated_file_serves_what_is_left_of_it(self) -> None:
        self.make_image()
        vm = self.start_vm(self.image)
        pmem = self.bring_up(vm)
        os.truncate(self.image, base.SIZE // 2)
        self._touch(vm, 0)
        self.assertEqual(0, pmem.flush())
        self.assertEqual(b'B', self.image.read_bytes()[:1])
        vm.qmp.cmd('stop')
        self.assertEqual(0, vm.pmem('last-error'))
        vm.qmp.cmd('cont')
        self.assertKilled(vm, base.SIZE // 2)

    def test_removed_file_lives_as_long_as_the_guest(self) -> None:
        self.make_image()
        vm = self.start_vm(self.image)
        pmem = self.bring_up(vm)
        self.image.unlink()
        self._touch(vm, 0)
        self.assertEqual(0, pmem.flush())
        vm.qmp.cmd('stop')
        self.assertEqual(0, vm.pmem('last-error'))
        # The name is free, so another QEMU creates a new file there.
        self.assertFalse(self.image.exists())
        self.start_vm(self.image, name='other')
        self.assertEqual(base.SIZE, self.image.stat().st_size)

    def test_hole_that_cannot_be_filled(self) -> None:
        mount = self.directory / 'full'
        mount.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'fakedax',
                        mount], check=True)
        self.addCleanup(subprocess.run, ['umount', mount], check=True)
        sparse = mount / 'image'
        with sparse.open('wb') as file:
            file.truncate(base.SIZE)
        vm = self.start_vm(sparse)
        pmem = self.bring_up(vm)
        self._touch(vm, 0)
        self.assertEqual(0, pmem.flush())
        (mount / 'other').write_bytes(bytes(
            os.statvfs(mount).f_bavail * base.PAGE))
        self._touch(vm, 0)
        self.assertKilled(vm, base.SIZE // 2)

    def test_smaller_file_is_refused(self) -> None:
        self.make_image(base.SIZE // 2)
        self.assertRaisesRegex(
            RuntimeError, 'does not match|too small|larger',
            self.start_vm, self.image)

    def test_file_missing_at_the_destination(self) -> None:
        here, there = self.mount('here'), self.directory / 'there'
        vm = self.start_vm(here.path)
        pmem = self.bring_up(vm)
        there.mkdir()
        # QEMU creates the missing file, which has no content.
        empty = self.incoming(there / 'image', 'destination',
                              binary=emulators.project(self.version))
        self.assertEqual('failed', self.migrate(vm, 'destination')['status'])
        self.assertIn("the file is not the guest's image", empty.log())
        self.wait_status(vm, 'running')
        self.assertEqual(0, pmem.flush())
