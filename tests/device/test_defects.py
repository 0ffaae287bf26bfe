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

"""Defects of QEMU's own device that the project's device does not have.

Each test runs on QEMU's device (Debian's 7.2 and 10.0, and the one installed
on this machine) and on the project's, and says what it expects of each.
"""

import contextlib
import errno
import json
import signal
import subprocess
import time
import typing as ty

from lab.machine import emulators
from lab import wait
import testscenarios

from qemu.qmp import qmp_client
from tests.device import base
from tests.device import driver
from tests.device import emulator

load_tests = testscenarios.load_tests_apply_scenarios

SCENARIOS = [
    ('stock-7.2', {'own': False, 'version': '7.2'}),
    ('stock-10.0', {'own': False, 'version': '10.0'}),
    ('7.2', {'own': True, 'version': '7.2'}),
    ('10.0', {'own': True, 'version': '10.0'}),
]
#: How long something that must not follow is waited for.
_STAYS_SECONDS = 0.3

INSTALLED = ('stock-installed', {'own': False, 'version': 'installed'})


class DefectTestCase(base.DeviceTestCase):

    own: bool

    def binary(self) -> str:
        if self.own:
            return emulators.project(self.version)
        return emulators.stock(self.version)

    def assertDefect(
        self, seen: ty.Any, *, stock: ty.Any, project: ty.Any
    ) -> None:
        self.assertEqual(project if self.own else stock, seen)

    def assertDefectSeen(
        self, look: ty.Callable[[], ty.Any], *, stock: ty.Any, project: ty.Any
    ) -> None:
        """Wait until this is seen, and expect that it stays so."""
        expected = project if self.own else stock
        with contextlib.suppress(wait.WaitError):
            wait.until('QEMU', lambda: look() == expected, 20)
        time.sleep(_STAYS_SECONDS)
        self.assertEqual(expected, look())


class AnyVersionTestCase(DefectTestCase):
    """Defects that every version of QEMU's device has."""

    scenarios = [INSTALLED, *SCENARIOS]

    def test_state_is_not_in_the_migration_stream(self) -> None:
        path = self.directory / 'vmstate'
        subprocess.run(
            [self.binary(), '-machine', 'q35', '-nodefaults', '-display',
             'none', '-dump-vmstate', path], check=True)
        described = json.loads(path.read_text())
        self.assertDefect('virtio-pmem' in described,
                          stock=False, project=True)

    def test_stores_dirty_huge_pages(self) -> None:
        """The kernel dirties huge pages because QEMU asks for them."""
        vm = self.start_vm(self.make_image())
        self.assertDefect('hg' in vm.mapping_flags(self.image),
                          stock=True, project=False)

    def _flush_after(self, vm: emulator.Emulator,
                     pmem: driver.PmemDriver) -> int | None:
        """The answer to a flush of the driver, after it moved to ``vm``."""
        pmem.qtest = vm.qtest
        pmem.submit()
        try:
            ((_, answer),) = pmem.wait(1, timeout=2)
        except TimeoutError:
            return None
        return answer

    def test_flush_after_migration_hangs(self) -> None:
        mounted = self.mount()
        source = self.start_vm(mounted.path)
        pmem = self.bring_up(source)
        self.assertEqual(0, pmem.flush())
        destination = self.incoming(mounted.path, 'destination')
        # Nothing refuses the migration.
        info = self.migrate(source, 'destination')
        self.assertEqual('completed', info['status'])
        self.wait_status(destination, 'running')
        self.assertDefect(self._flush_after(destination, pmem),
                          stock=None, project=0)

    def test_flush_after_managed_save_hangs(self) -> None:
        mounted = self.mount()
        saved = self.directory / 'saved'
        source = self.start_vm(mounted.path)
        pmem = self.bring_up(source)
        source.qmp.cmd('stop')
        source.qmp.cmd('migrate', uri=f'exec:cat >{saved}')
        self.assertEqual('completed', source.wait_migrated()['status'])
        source.qmp.cmd('quit')
        source.wait_exit()
        restored = self.start_vm(
            mounted.path, '-incoming', f'exec:cat {saved}', name='restored')
        # It was paused when it was saved.
        self.wait_status(restored, 'paused')
        restored.qmp.cmd('cont')
        self.assertDefect(self._flush_after(restored, pmem),
                          stock=None, project=0)

    def test_stop_does_not_wait_for_a_flush(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        self.submit_held(mounted, pmem)
        stop = self.background(vm.qmp.cmd, 'stop')
        self.assertDefectSeen(stop.done, stock=True, project=False)
        mounted.release()
        stop.result(20)
        if self.own:
            self.assertEqual([(0, 0)], pmem.completed())

    def test_stopped_source_leaves_data_in_its_page_cache(self) -> None:
        here, there = self.mount('here'), self.mount('there')
        source = self.start_vm(here.path)
        source.qtest.write_bytes(self.memaddr(source), b'B' * base.PAGE)
        destination = self.incoming(there.path, 'destination')
        self.migrate(source, 'destination')
        self.wait_status(destination, 'running')
        seen = destination.qtest.read_bytes(self.memaddr(destination), 1)
        self.assertDefect(seen, stock=b'A', project=b'B')

    def test_destination_reads_its_stale_page_cache(self) -> None:
        here, there = self.mount('here'), self.mount('there')
        source = self.start_vm(here.path)
        pmem = self.bring_up(source)
        # The destination has read the image before, as when a guest comes
        # back to it.
        there.path.read_bytes()
        source.qtest.write_bytes(self.memaddr(source), b'B' * base.PAGE)
        self.assertEqual(0, pmem.flush())
        destination = self.incoming(there.path, 'destination')
        self.migrate(source, 'destination')
        self.wait_status(destination, 'running')
        seen = destination.qtest.read_bytes(self.memaddr(destination), 1)
        self.assertDefect(seen, stock=b'A', project=b'B')

    def test_late_completion_lands_in_the_ring_after_a_driver_reset(
        self
    ) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        self.submit_held(mounted, pmem)
        pmem.start()
        mounted.release()
        mounted.wait(lambda: len(mounted.ended) == 1)
        # QEMU's device answers a request that this driver did not make.
        self.assertDefectSeen(lambda: vm.qtest.read(pmem.used + 2, 2),
                              stock=1, project=0)
        if self.own:
            self.assertEqual(0, pmem.flush())

    def test_late_completion_lands_in_the_ring_after_a_reboot(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        self.submit_held(mounted, self.bring_up(vm))
        vm.qmp.cmd('system_reset')
        vm.qmp.cmd('query-status')
        pmem = self.bring_up(vm)
        mounted.release()
        mounted.wait(lambda: len(mounted.ended) == 1)
        self.assertDefectSeen(lambda: vm.qtest.read(pmem.used + 2, 2),
                              stock=1, project=0)
        if self.own:
            self.assertEqual(0, pmem.flush())

    def test_error_is_forgotten_by_the_next_flush(self) -> None:
        mounted = self.mount()
        pmem = self.bring_up(self.start_vm(mounted.path))
        mounted.fail(errno.EIO)
        # The specification allows only 0 and -1.
        self.assertDefect([pmem.flush(), pmem.flush()],
                          stock=[1, 0], project=[-1, -1])

    def test_sync_writes_metadata_that_nobody_needs(self) -> None:
        mounted = self.mount()
        pmem = self.bring_up(self.start_vm(mounted.path))
        pmem.flush()
        # The project's device calls fdatasync(2), QEMU's calls fsync(2).
        self.assertDefect(mounted.datasync, stock=[False], project=[True])

    def test_each_request_has_a_sync_of_its_own(self) -> None:
        mounted = self.mount()
        pmem = self.bring_up(self.start_vm(mounted.path))
        self.submit_held(mounted, pmem)
        for _ in range(8):
            pmem.submit()
        mounted.release()
        pmem.wait(9)
        self.assertDefect(mounted.begun, stock=9, project=2)

    def test_one_kick_serves_one_request(self) -> None:
        mounted = self.mount()
        pmem = self.bring_up(self.start_vm(mounted.path), driver.EVENT_IDX)
        for _ in range(3):
            pmem.submit(kick=False)
        pmem.kick()
        answers: list[tuple[int, int]] = []

        def answered() -> int:
            answers.extend(pmem.completed())
            return len(answers)

        # Linux kicks for each request, so its guests do not hang.
        self.assertDefectSeen(answered, stock=1, project=3)

    def test_two_guests_write_to_one_image(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        vm.qtest.write_bytes(self.memaddr(vm), b'B')
        refused = ''
        try:
            other = self.start_vm(mounted.path, name='other')
            other.qtest.write_bytes(self.memaddr(other), b'C')
        except RuntimeError as exc:
            refused = str(exc)
        self.assertDefect('is in use by another process or host' in refused,
                          stock=False, project=True)
        self.assertDefect(vm.qtest.read_bytes(self.memaddr(vm), 1),
                          stock=b'C', project=b'B')

    def test_nothing_is_counted(self) -> None:
        vm = self.start_vm(self.mount().path)
        try:
            seen = vm.pmem('syncs')
        except qmp_client.ExecuteError as exc:
            seen = str(exc)
        self.assertDefect(
            seen, stock="Property 'virtio-pmem-pci.syncs' not found",
            project=0)


class OldVersionTestCase(DefectTestCase):
    """Defects that not every version of QEMU's device has."""

    scenarios = SCENARIOS

    def test_ring_is_smaller_than_what_some_drivers_need(self) -> None:
        # A flush takes two entries, so a driver that flushes from more than
        # 64 threads at once breaks a device with 128. 10.0.13 gives every
        # queue 1024.
        pmem = self.bring_up(self.start_vm(self.mount().path))
        self.assertDefect(
            pmem.max_size,
            stock={'7.2': 128, '10.0': 1024, '10.2': 128}[self.version],
            project=1024)

    def test_device_is_freed_under_a_flush_when_the_guest_ejects_it(
        self
    ) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path, machine=base.I440FX)
        pmem = self.bring_up(vm)
        self.submit_held(mounted, pmem)
        eject = self.background(pmem.eject)
        # 10.0 does not crash, but all of QEMU waits for the flush.
        waits = self.version == '10.0'
        self.assertDefectSeen(eject.done, stock=not waits, project=True)
        mounted.release()
        mounted.wait(lambda: len(mounted.ended) == 1)
        self.assertDefectSeen(
            vm.process.poll, stock=None if waits else -signal.SIGSEGV,
            project=None)

    def _status(self, vm: emulator.Emulator, pmem: driver.PmemDriver) -> int:
        """Whether the device is broken, or how QEMU ended."""
        try:
            return pmem.status & driver.NEEDS_RESET
        except emulator.QTestError:
            return vm.wait_exit()

    def test_split_ring_that_grows_ends_qemu(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        pmem.start(driver.EVENT_IDX, size=16)
        self.assertEqual(0, pmem.flush())
        self.submit_held(mounted, pmem)
        # QEMU has not mapped what follows the ring's last entry.
        pmem.write(driver.QUEUE_SIZE, 2, 1024)
        mounted.release()
        mounted.wait(lambda: len(mounted.ended) == 2)
        self.assertDefectSeen(
            lambda: self._status(vm, pmem),
            stock={'7.2': -signal.SIGABRT, '10.0': 0,
                   '10.2': 0}[self.version],
            project=driver.NEEDS_RESET)

    def test_packed_ring_that_shrinks_ends_qemu(self) -> None:
        vm = self.start_vm(self.mount().path, device='packed=on')
        pmem = driver.PackedDriver(vm.qtest)
        pmem.map()
        pmem.start(size=16)
        self.assertEqual([0] * 3, [pmem.flush() for _ in range(3)])
        # 10.0 maps the ring again, and continues at its sixth entry.
        pmem.write(driver.QUEUE_SIZE, 2, 2)
        pmem.submit(kick=False)
        try:
            pmem.kick()
        except emulator.QTestError:
            pass
        self.assertDefect(
            self._status(vm, pmem),
            stock={'7.2': 0, '10.0': -signal.SIGABRT,
                   '10.2': -signal.SIGABRT}[self.version],
            project=driver.NEEDS_RESET)

    def test_ring_whose_layout_changes_ends_qemu(self) -> None:
        vm = self.start_vm(self.mount().path, device='packed=on')
        pmem = self.bring_up(vm)
        pmem.reset()
        pmem.write(driver.DEVICE_STATUS, 1, driver.ACKNOWLEDGE | driver.DRIVER)
        # Until FEATURES_OK, features take effect as they are written. So QEMU
        # maps the ring as a packed one, and then uses it as a split one.
        pmem.accept(driver.RING_PACKED)
        pmem.enable_queue()
        pmem.accept()
        pmem.write(driver.DEVICE_STATUS, 1, driver.ACKNOWLEDGE | driver.DRIVER
                   | driver.FEATURES_OK)
        pmem.write(driver.DEVICE_STATUS, 1, driver.ACKNOWLEDGE | driver.DRIVER
                   | driver.FEATURES_OK | driver.DRIVER_OK)
        try:
            pmem.submit()
        except emulator.QTestError:
            pass
        self.assertDefect(self._status(vm, pmem), stock=-signal.SIGABRT,
                          project=driver.NEEDS_RESET)
