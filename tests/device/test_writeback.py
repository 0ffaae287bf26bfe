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

"""Writeback that starts before a flush asks for it."""

import errno
import time

import testscenarios

from lab import wait
from tests.device import base
from tests.device import driver
from tests.device import emulator

load_tests = testscenarios.load_tests_apply_scenarios

#: Far longer than the device takes to notice dirty pages, and far shorter than
#: the kernel takes to write them by itself (vm.dirty_expire_centisecs, 30 s).
SECONDS = 1


class EarlyWritebackTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def bring_up_with(
        self, threshold: str
    ) -> tuple[emulator.Emulator, driver.PmemDriver]:
        self.mounted = self.mount()
        vm = self.start_vm(self.mounted.path,
                           device=f'early-writeback={threshold}')
        return vm, self.bring_up(vm)

    def dirty(self, vm: emulator.Emulator, pages: int) -> None:
        vm.qtest.write_bytes(self.memaddr(vm), b'B' * base.PAGE * pages)

    def written(self) -> int:
        """Bytes at the image's start that reached the file below."""
        data = self.image.read_bytes()
        return len(data) - len(data.lstrip(b'B'))

    def wait_written(self, size: int) -> None:
        wait.until(f'{size} bytes to be written',
                   lambda: self.written() >= size, 20, interval=0.02,
                   state=self.written)

    def test_much_is_written_before_a_flush_asks_for_it(self) -> None:
        vm, pmem = self.bring_up_with('64k')
        self.assertEqual(0, pmem.flush())
        self.dirty(vm, 16)
        self.wait_written(16 * base.PAGE)
        # It was not a sync: nothing is durable, and nothing was answered.
        self.assertEqual(1, self.mounted.begun)
        self.assertEqual((1, 1), (vm.pmem('syncs'), vm.pmem('writebacks')))
        # Early writeback continues.
        vm.qtest.write_bytes(self.memaddr(vm) + 16 * base.PAGE,
                             b'B' * base.PAGE * 16)
        self.wait_written(32 * base.PAGE)
        self.assertEqual(2, vm.pmem('writebacks'))
        self.assertEqual(0, pmem.flush())

    def test_little_is_left_to_the_flush(self) -> None:
        vm, pmem = self.bring_up_with('64k')
        self.assertEqual(0, pmem.flush())
        self.dirty(vm, 15)
        time.sleep(SECONDS)
        self.assertEqual(0, self.written())
        self.assertEqual(0, vm.pmem('writebacks'))
        self.assertEqual(0, pmem.flush())
        self.assertEqual(15 * base.PAGE, self.written())

    def test_zero_turns_it_off(self) -> None:
        vm, pmem = self.bring_up_with('0')
        self.assertEqual(0, pmem.flush())
        self.dirty(vm, 16)
        time.sleep(SECONDS)
        self.assertEqual(0, self.written())
        self.assertEqual(0, pmem.flush())

    def test_guest_that_does_not_flush_is_left_alone(self) -> None:
        vm, pmem = self.bring_up_with('64k')
        self.dirty(vm, 16)
        time.sleep(SECONDS)
        self.assertEqual(0, self.written())
        self.assertEqual(0, pmem.flush())

    def test_its_error_fails_the_next_flush(self) -> None:
        vm, pmem = self.bring_up_with('64k')
        self.assertEqual(0, pmem.flush())
        self.mounted.fail_writes(errno.EIO)
        self.dirty(vm, 16)
        self.mounted.wait(lambda: self.mounted.refused > 0)
        self.assertEqual(0, vm.pmem('last-error'))
        # By now the pages are clean, and every write succeeds again.
        self.mounted.fail_writes(0)
        self.assertEqual(-1, pmem.flush())
        self.assertEqual(errno.EIO, vm.pmem('last-error'))
        self.assertEqual(-1, pmem.flush())

    def test_its_error_is_reported_by_a_stop(self) -> None:
        vm, pmem = self.bring_up_with('64k')
        self.assertEqual(0, pmem.flush())
        self.mounted.fail_writes(errno.EIO)
        self.dirty(vm, 16)
        self.mounted.wait(lambda: self.mounted.refused > 0)
        self.mounted.fail_writes(0)
        vm.qmp.cmd('stop')
        self.assertEqual(errno.EIO, vm.pmem('last-error'))

    def test_it_goes_on_after_a_stop(self) -> None:
        vm, pmem = self.bring_up_with('64k')
        self.assertEqual(0, pmem.flush())
        vm.qmp.cmd('stop')
        vm.qmp.cmd('cont')
        self.dirty(vm, 16)
        self.wait_written(16 * base.PAGE)
        self.assertEqual(2, self.mounted.begun)


class LimitTestCase(base.DeviceTestCase):
    """A guest that flushes all the time writes no more than its limit."""

    scenarios = base.EACH_VERSION

    def start(self, device: str) -> None:
        self.mounted = self.mount()
        self.vm = self.start_vm(self.mounted.path, device=device)
        self.pmem = self.bring_up(self.vm)

    def store(self, pages: int) -> None:
        self.vm.qtest.write_bytes(self.memaddr(self.vm),
                                  b'B' * base.PAGE * pages)

    def test_flush_waits_for_what_the_last_one_wrote(self) -> None:
        self.start('sync-bps=64k')
        self.store(16)
        self.assertEqual(0, self.pmem.flush())
        started = time.monotonic()
        self.store(1)
        heads = [self.pmem.submit(), self.pmem.submit()]
        self.assertNoAnswer(self.pmem, 0.5)
        self.assertEqual(1, self.mounted.begun)
        # They share the delayed sync.
        self.assertEqual([(head, 0) for head in heads], self.pmem.wait(2))
        self.assertGreater(time.monotonic() - started, 0.9)
        self.assertEqual(2, self.mounted.begun)

    def test_nothing_waits_without_a_limit(self) -> None:
        self.start('')
        self.store(16)
        for _ in range(3):
            self.assertEqual(0, self.pmem.flush())
        self.assertEqual(3, self.mounted.begun)

    def test_limit_may_be_more_than_any_storage_writes(self) -> None:
        self.start('sync-bps=1T')
        self.store(16)
        for _ in range(3):
            self.assertEqual(0, self.pmem.flush())

    def test_limit_that_must_be_a_mistake_is_refused(self) -> None:
        error = self.assertRaises(RuntimeError, self.start, 'sync-bps=100')
        self.assertIn('sync-bps=100: must be 0 or at least 1024', str(error))

    def test_flush_of_nothing_counts_as_one_page(self) -> None:
        self.start('sync-bps=16k')
        started = time.monotonic()
        for _ in range(5):
            self.assertEqual(0, self.pmem.flush())
        self.assertGreater(time.monotonic() - started, 0.9)

    def test_early_writeback_counts(self) -> None:
        self.start('sync-bps=64k,early-writeback=64k')
        self.assertEqual(0, self.pmem.flush())
        self.store(16)
        wait.until('early writeback', lambda: self.vm.pmem('writebacks'), 20,
                   interval=0.02)
        head = self.pmem.submit()
        self.assertNoAnswer(self.pmem, 0.4)
        self.assertEqual([(head, 0)], self.pmem.wait(1))

    def test_stop_and_reset_do_not_wait(self) -> None:
        self.start('sync-bps=1k')
        self.store(16)
        self.assertEqual(0, self.pmem.flush())
        # The limit delays the next sync by a minute.
        head = self.pmem.submit()
        self.assertNoAnswer(self.pmem)
        self.vm.qmp.cmd('stop')
        self.assertEqual([(head, 0)], self.pmem.wait(1))
        self.vm.qmp.cmd('cont')
        self.pmem.submit()
        self.pmem.start()
        self.assertEqual(2, self.mounted.begun)
        self.vm.qmp.cmd('quit')
        self.vm.wait_exit()
        self.mounted.wait(lambda: self.mounted.begun == 3)

    def test_guest_does_not_pay_for_a_stop(self) -> None:
        self.start('sync-bps=1k')
        self.store(16)
        self.vm.qmp.cmd('stop')
        self.vm.qmp.cmd('cont')
        self.assertEqual(0, self.pmem.flush())
