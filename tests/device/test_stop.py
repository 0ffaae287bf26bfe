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

"""Stop, reset, eject and quit while a flush is in flight."""

import errno
import time

import testscenarios

from qemu.qmp import qmp_client
from tests.device import base
from tests.device import driver

load_tests = testscenarios.load_tests_apply_scenarios

#: How long the slow sync takes, in seconds.
SLOW = 30


class StopTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()
        self.vm = self.start_vm(self.mounted.path)
        self.pmem = self.bring_up(self.vm)

    def test_stop_drains_then_syncs(self) -> None:
        heads = [self.submit_held(self.mounted, self.pmem)]
        self.vm.qtest.write_bytes(self.memaddr(self.vm), b'B')
        heads += [self.pmem.submit() for _ in range(3)]
        stop = self.background(self.vm.qmp.cmd, 'stop')
        self.assertPending(stop)
        self.mounted.release()
        stop.result(20)
        # All are answered by the time the guest has stopped. One sync was for
        # the first, one for the three and for what nobody has flushed.
        self.assertEqual([(head, 0) for head in heads],
                         self.pmem.completed())
        # The test learns of it a little later than QEMU.
        self.mounted.wait(lambda: len(self.mounted.ended) == 2)
        self.assertEqual([0, 0], self.mounted.ended)
        self.assertEqual([True] * 2, self.mounted.datasync)
        self.assertEqual(b'B', self.image.read_bytes()[:1])

    def test_stop_makes_durable_what_nobody_flushed(self) -> None:
        self.vm.qtest.write_bytes(self.memaddr(self.vm), b'B' * base.PAGE)
        self.vm.qmp.cmd('stop')
        self.assertEqual(b'B' * base.PAGE,
                         self.image.read_bytes()[:base.PAGE])
        self.vm.qmp.cmd('cont')
        self.assertEqual(0, self.pmem.flush())

    def test_stop_whose_sync_fails_stops_and_tells(self) -> None:
        self.mounted.fail(errno.EIO)
        self.vm.qmp.cmd('stop')
        self.assertEqual('paused', self.vm.qmp.cmd('query-status')['status'])
        self.assertEqual(errno.EIO, self.vm.pmem('last-error'))
        self.assertIn('cannot sync', self.vm.log())
        self.vm.qmp.cmd('cont')
        self.assertEqual(-1, self.pmem.flush())

    def test_quit_waits_for_the_sync_and_loses_nothing(self) -> None:
        self.vm.qtest.write_bytes(self.memaddr(self.vm), b'B' * base.PAGE)
        self.submit_held(self.mounted, self.pmem)
        # The answer may be lost with the process.
        quits = self.background(self.vm.qmp.cmd, 'quit')
        self.assertPending(quits)
        self.assertIsNone(self.vm.process.poll())
        self.mounted.release()
        self.assertEqual(0, self.vm.wait_exit(10))
        self.assertEqual(b'B' * base.PAGE,
                         self.image.read_bytes()[:base.PAGE])
        # One sync for the flush, one for the stop that precedes the exit.
        self.assertEqual([0, 0], self.mounted.ended)


class ResetTestCase(base.DeviceTestCase):
    """A flush in flight at a reset or an eject is never answered."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()

    def _bring_up(self, **kwargs: str) -> None:
        self.vm = self.start_vm(self.mounted.path, **kwargs)
        self.pmem = self.bring_up(self.vm)

    def _finish_and_flush(self, pmem: driver.PmemDriver) -> None:
        """Assert that the new driver sees only answers to its own flushes."""
        head = pmem.submit()
        self.assertNoAnswer(pmem)
        self.mounted.release()
        self.assertEqual([(head, 0)], pmem.wait(1))
        # It needed another sync than the one that was running.
        self.assertEqual(2, self.mounted.begun)
        self.assertNoAnswer(pmem)
        self.assertEqual(0, pmem.flush())

    def test_driver_reset(self) -> None:
        self._bring_up()
        self.submit_held(self.mounted, self.pmem)
        self.pmem.submit()
        self.pmem.start()
        self._finish_and_flush(self.pmem)

    def test_queue_reset(self) -> None:
        self._bring_up()
        self.pmem.start(driver.RING_RESET)
        self.submit_held(self.mounted, self.pmem)
        self.pmem.submit()
        self.pmem.write(driver.QUEUE_SELECT, 2, 0)
        self.pmem.write(driver.QUEUE_RESET, 2, 1)
        self.assertEqual(0, self.pmem.read(driver.QUEUE_RESET, 2))
        self.pmem.enable_queue()
        self._finish_and_flush(self.pmem)

    def test_system_reset(self) -> None:
        self._bring_up()
        self.submit_held(self.mounted, self.pmem)
        self.pmem.submit()
        # The sync does not end before it is released, so whatever waited for
        # it would hang.
        self.vm.qmp.cmd('system_reset')
        self.vm.qmp.cmd('query-status')
        self.assertEqual([], self.mounted.ended)
        self._finish_and_flush(self.bring_up(self.vm))

    def test_eject_is_done_at_once(self) -> None:
        self._bring_up(machine=base.I440FX)
        self.submit_held(self.mounted, self.pmem)
        self.pmem.submit()
        self.pmem.eject()
        self.assertEqual([], self.vm.qmp.cmd('query-memory-devices'))
        if self.version == '7.2':
            # 7.2 leaves the memory mapped, so the backend stays in use.
            self.assertRaisesRegex(
                qmp_client.ExecuteError, "is in use",
                self.vm.qmp.cmd, 'object-del', id='mem0')
            self.assertRaisesRegex(
                qmp_client.ExecuteError, 'used by another device',
                self.vm.qmp.cmd, 'device_add', driver='virtio-pmem-pci',
                memdev='mem0', addr='0x10')
        else:
            # The sync holds a reference to the backend, so this is safe.
            self.vm.qmp.cmd('object-del', id='mem0')
        self.mounted.release()
        self.mounted.wait(lambda: len(self.mounted.ended) == 1)
        time.sleep(0.2)
        self.assertEqual('running', self.vm.qmp.cmd('query-status')['status'])
        self.vm.qmp.cmd('quit')
        self.assertEqual(0, self.vm.wait_exit())

    def test_device_is_plugged_again_after_an_eject(self) -> None:
        self._bring_up(machine=base.I440FX)
        self.mounted.fail(errno.EIO)
        self.assertEqual(-1, self.pmem.flush())
        self.pmem.eject()
        self.vm.qmp.cmd('object-add', **{
            'qom-type': 'memory-backend-file', 'id': 'mem1', 'share': True,
            'mem-path': str(self.mounted.path), 'size': base.SIZE})
        self.vm.qmp.cmd('device_add', driver='virtio-pmem-pci', id='pmem0',
                        memdev='mem1', addr='0x10')
        # This is a new device, so the old error does not apply to it.
        self.assertEqual(0, self.bring_up(self.vm).flush())
        self.assertEqual(0, self.vm.pmem('last-error'))

    def test_unplug_is_refused_as_by_qemus_device(self) -> None:
        self._bring_up(machine=base.I440FX)
        self.assertRaisesRegex(
            qmp_client.ExecuteError, 'unplug',
            self.vm.qmp.cmd, 'device_del', id='pmem0')
        self.assertEqual(0, self.pmem.flush())

    def test_quit_after_eject(self) -> None:
        self._bring_up(machine=base.I440FX)
        self.submit_held(self.mounted, self.pmem)
        self.pmem.eject()
        self.vm.qmp.cmd('quit')
        time.sleep(0.3)
        self.mounted.release()
        self.assertEqual(0, self.vm.wait_exit(10))


class SlowSyncTestCase(base.DeviceTestCase):

    def test_sync_of_half_a_minute(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        head = self.submit_held(mounted, pmem)
        started = time.monotonic()
        answers = 0
        while time.monotonic() - started < SLOW:
            vm.qmp.cmd('query-status')
            vm.qtest.write_bytes(self.memaddr(vm), b'C')
            answers += 1
            time.sleep(0.05)
        # Neither QEMU's main loop nor the guest's memory waited for the sync.
        # On a busy machine an answer may be late, but not all of them.
        self.assertEqual([], mounted.ended)
        self.assertGreater(answers, SLOW)
        stop = self.background(vm.qmp.cmd, 'stop')
        self.assertPending(stop, 1)
        mounted.release()
        stop.result(10)
        self.assertEqual([(head, 0)], pmem.completed())
        self.assertEqual(b'C', self.image.read_bytes()[:1])
        self.assertEqual(1, sum(vm.pmem('sync-latency')[24:26]))
        vm.qmp.cmd('quit')
        self.assertEqual(0, vm.wait_exit(10))
