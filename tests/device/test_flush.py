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

"""When the device answers flush requests, and after which sync."""

import struct
import subprocess
import time

import testscenarios

from qemu.qmp import qmp_client
from tests.device import base
from tests.device import driver

load_tests = testscenarios.load_tests_apply_scenarios

COUNTERS = ('requests', 'merged', 'syncs', 'errors', 'last-error',
            'cache-dropped', 'cache-left', 'writebacks')


class FlushTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()

    def test_data_is_on_storage_when_a_flush_is_answered(self) -> None:
        vm = self.start_vm(self.mounted.path)
        pmem = self.bring_up(vm)
        address = self.memaddr(vm)
        for page, fill in ((0, b'B'), (4095, b'C')):
            vm.qtest.write_bytes(address + page * base.PAGE, fill * base.PAGE)
        # A shared mapping's dirty page has not reached the file below.
        self.assertEqual(b'A', self.image.read_bytes()[:1])
        self.assertEqual(0, pmem.flush())
        data = self.image.read_bytes()
        self.assertEqual(
            b'B' * base.PAGE + b'A' * (base.SIZE - 2 * base.PAGE)
            + b'C' * base.PAGE, data)

    def test_requests_share_a_sync_that_starts_after_them(self) -> None:
        vm = self.start_vm(self.mounted.path)
        pmem = self.bring_up(vm)
        first = self.submit_held(self.mounted, pmem)
        later = [pmem.submit() for _ in range(8)]
        self.assertNoAnswer(pmem)
        # One sync runs, and no other has begun.
        self.assertEqual(1, self.mounted.begun)
        self.mounted.release()
        self.assertEqual([(head, 0) for head in [first, *later]],
                         pmem.wait(9))
        self.assertEqual([0, 0], self.mounted.ended)
        self.assertEqual((9, 7, 2, 0), tuple(
            vm.pmem(name) for name in COUNTERS[:4]))

    def test_request_does_not_share_a_sync_that_runs_already(self) -> None:
        pmem = self.bring_up(self.start_vm(self.mounted.path))
        first = self.submit_held(self.mounted, pmem)
        second = pmem.submit()
        self.mounted.release_one()
        self.assertEqual([(first, 0)], pmem.wait(1))
        self.assertNoAnswer(pmem)
        self.mounted.release()
        self.assertEqual([(second, 0)], pmem.wait(1))
        self.assertEqual(2, self.mounted.begun)

    def test_nothing_waits_for_a_sync_but_its_requests(self) -> None:
        vm = self.start_vm(self.mounted.path)
        pmem = self.bring_up(vm)
        self.submit_held(self.mounted, pmem)
        # The sync does not end before it is released, so whatever waited for
        # it would hang.
        self.assertEqual('running', vm.qmp.cmd('query-status')['status'])
        self.assertEqual(1, vm.pmem('requests'))
        self.assertEqual(driver.VENDOR_DEVICE, pmem.config(0))
        vm.qtest.write_bytes(self.memaddr(vm), b'B')
        unknown = pmem.submit(kind=7)
        self.assertEqual([(unknown, -1)], pmem.wait(1))
        self.assertEqual([], self.mounted.ended)

    def test_all_of_a_full_ring_is_served_by_one_kick(self) -> None:
        vm = self.start_vm(self.mounted.path)
        pmem = self.bring_up(vm, driver.INDIRECT_DESC, driver.EVENT_IDX)
        for _ in range(1024):
            pmem.submit_indirect(kick=False)
        self.mounted.hold()
        pmem.kick()
        self.mounted.wait(lambda: self.mounted.begun == 1)
        self.mounted.release()
        answers = pmem.wait(1024)
        self.assertEqual([(head, 0) for head in range(1024)], answers)
        self.assertEqual(1, self.mounted.begun)
        self.assertEqual(1023, vm.pmem('merged'))
        self.assertEqual(0, pmem.flush())

    def test_rings_wrap_around(self) -> None:
        pmem = self.bring_up(self.start_vm(self.mounted.path))
        pmem.start(size=8)
        self.assertEqual([0] * 20, [pmem.flush() for _ in range(20)])

    def test_packed_ring(self) -> None:
        vm = self.start_vm(self.mounted.path, device='packed=on')
        pmem = driver.PackedDriver(vm.qtest)
        pmem.map()
        pmem.start(size=16)
        self.assertEqual([0] * 20, [pmem.flush() for _ in range(20)])
        heads = [self.submit_held(self.mounted, pmem)]
        heads += [pmem.submit() for _ in range(7)]
        self.assertNoAnswer(pmem)
        self.mounted.release()
        self.assertEqual([(head, 0) for head in heads], pmem.wait(8))
        self.assertEqual(22, self.mounted.begun)

    def test_unknown_type_is_answered_and_nothing_is_synced(self) -> None:
        vm = self.start_vm(self.mounted.path)
        pmem = self.bring_up(vm)
        for kind in (1, 7, 0xFFFFFFFF):
            head = pmem.submit(kind=kind)
            self.assertEqual([(head, -1)], pmem.wait(1))
        self.assertEqual(0, self.mounted.begun)
        self.assertEqual(0, vm.pmem('requests'))
        self.assertEqual(0, pmem.flush())

    def test_interrupt_follows_the_answer(self) -> None:
        vm = self.start_vm(self.mounted.path)
        pmem = self.bring_up(vm)

        def isr() -> int:
            return vm.qtest.read(pmem.structures[driver.ISR], 1)

        self.assertEqual(0, isr())
        pmem.flush()
        self.assertEqual(1, isr())
        # VIRTQ_AVAIL_F_NO_INTERRUPT
        vm.qtest.write(pmem.avail, 2, 1)
        pmem.flush()
        self.assertEqual(0, isr())

    def test_configuration_space(self) -> None:
        vm = self.start_vm(self.mounted.path, device='memaddr=0x104000000')
        pmem = self.bring_up(vm)
        start, size = struct.unpack('<QQ', vm.qtest.read_bytes(
            pmem.structures[driver.DEVICE], 16))
        self.assertEqual((0x104000000, base.SIZE), (start, size))
        self.assertEqual(self.memaddr(vm), start)


class PropertiesTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def test_counters_are_in_the_help(self) -> None:
        # From this, others learn what the device supports.
        text = subprocess.run(
            [self.binary(), '-device', 'virtio-pmem-pci,help'], check=True,
            capture_output=True, text=True).stdout
        for name in (*COUNTERS, 'sync-latency', 'drop-cache',
                     'early-writeback', 'huge-pages', 'memdev', 'memaddr'):
            self.assertRegex(text, f'(?m)^ *{name}=<')

    def test_counters_of_both_devices_are_the_same(self) -> None:
        vm = self.start_vm(self.mount().path)
        pmem = self.bring_up(vm)
        pmem.flush()
        for name in (*COUNTERS, 'sync-latency'):
            inner = vm.qmp.cmd(
                'qom-get', property=name,
                path='/machine/peripheral/pmem0/virtio-backend')
            self.assertEqual(inner, vm.pmem(name), name)
        self.assertEqual(1, vm.pmem('syncs'))

    def test_counters_cannot_be_set(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        for name in (*COUNTERS, 'sync-latency'):
            self.assertRaisesRegex(
                qmp_client.ExecuteError, 'is not writable',
                vm.qmp.cmd, 'qom-set', property=name, value=1,
                path='/machine/peripheral/pmem0')
        self.assertRaisesRegex(
            RuntimeError, 'is not writable', self.start_vm,
            mounted.path, name='other', device='syncs=1')

    def test_latency_histogram(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        pmem.flush()
        before = vm.pmem('sync-latency')
        self.assertEqual(32, len(before))
        self.assertEqual(1, sum(before))
        started = time.monotonic()
        self.submit_held(mounted, pmem)
        held = time.monotonic()
        time.sleep(0.3)
        released = time.monotonic()
        mounted.release()
        pmem.wait(1)
        ended = time.monotonic()
        grown = [after - old for after, old in
                 zip(vm.pmem('sync-latency'), before)]
        self.assertEqual(1, sum(grown))
        # The bucket matches how long the sync took, in microseconds.
        shortest, longest = released - held, ended - started
        self.assertIn(grown.index(1), range(
            int(shortest * 1e6).bit_length() - 1,
            int(longest * 1e6).bit_length()))

    def test_backend_is_needed_and_not_shared(self) -> None:
        mounted = self.mount()
        self.assertRaisesRegex(
            RuntimeError, 'needs a memory backend, set memdev',
            self.start_vm, mounted.path, '-device', 'virtio-pmem-pci')
        self.assertRaisesRegex(
            RuntimeError, "memory backend 'mem0' is used by another device",
            self.start_vm, mounted.path, '-device',
            'virtio-pmem-pci,memdev=mem0')


class MalformedTestCase(base.DeviceTestCase):
    """A malformed request breaks the device, and nothing else."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()
        self.vm = self.start_vm(self.mounted.path)
        self.pmem = self.bring_up(self.vm, driver.INDIRECT_DESC)

    def assertBreaks(self, name: str, head: int = 0) -> None:
        """Assert that a chain breaks the device and a reset repairs it."""
        pmem = self.pmem
        pmem.offer(head)
        pmem.kick()
        self.assertEqual(driver.NEEDS_RESET, pmem.status
                         & driver.NEEDS_RESET, f'{name}: not broken')
        pmem.kick()
        self.assertNoAnswer(pmem, 0.02)
        self.assertEqual(0, self.mounted.begun, name)
        pmem.start(driver.INDIRECT_DESC)
        self.assertEqual(0, pmem.flush(), name)
        self.mounted.begun = 0
        pmem.start(driver.INDIRECT_DESC)

    def test_chains(self) -> None:
        request, response = driver.BUFFERS, driver.BUFFERS + 8
        read, write, more = 0, driver.WRITE, driver.NEXT
        register = self.pmem.structures[driver.COMMON]
        outside = 1 << 40
        for name, chain in {
            'no response': [(request, 4, read)],
            'no request': [(response, 4, write)],
            'request too short': [(request, 3, more), (response, 4, write)],
            'response too short': [(request, 4, more), (response, 3, write)],
            'empty request': [(request, 0, more), (response, 4, write)],
            'empty response': [(request, 4, more), (response, 0, write)],
            'response outside RAM': [
                (request, 4, more), (outside, 4, write)],
            'response in registers': [
                (request, 4, more), (register, 4, write)],
            'response before request': [
                (response, 4, write | more), (request, 4, read)],
            'length of 4 GiB': [
                (request, 0xFFFFFFFF, more), (response, 4, write)],
            'table too short': [(driver.TABLES, 15, driver.INDIRECT)],
            'empty table': [(driver.TABLES, 0, driver.INDIRECT)],
            'table outside RAM': [(outside, 32, driver.INDIRECT)],
            'table with a next': [
                (driver.TABLES, 32, driver.INDIRECT | more),
                (response, 4, write)],
        }.items():
            self.pmem.prepare(0)
            for index, (address, length, flags) in enumerate(chain):
                self.pmem.describe(index, address, length, flags, index + 1)
            self.assertBreaks(name)

    def test_request_outside_ram(self) -> None:
        # The machine decides what a read outside RAM returns. It may return
        # 0, which is the type of a flush.
        self.pmem.prepare(0)
        self.pmem.describe(0, 1 << 40, 4, driver.NEXT, 1)
        self.pmem.describe(1, driver.BUFFERS + 8, 4, driver.WRITE)
        self.pmem.offer(0)
        self.pmem.kick()
        ((head, answer),) = self.pmem.wait(1)
        self.assertEqual(0, head)
        self.assertIn(answer, (0, -1))
        self.pmem.start()
        self.assertEqual(0, self.pmem.flush())

    def test_loop(self) -> None:
        self.pmem.describe(0, driver.BUFFERS, 4, driver.NEXT, 1)
        self.pmem.describe(1, driver.BUFFERS, 4, driver.NEXT, 0)
        self.assertBreaks('loop')

    def test_table_in_a_table(self) -> None:
        self.pmem.qtest.write_bytes(driver.TABLES, struct.pack(
            '<QIHH', driver.TABLES + 64, 32, driver.INDIRECT, 0) * 2)
        self.pmem.describe(0, driver.TABLES, 32, driver.INDIRECT)
        self.assertBreaks('table in a table')

    def test_head_outside_the_table(self) -> None:
        self.assertBreaks('head', 1024)
        self.assertBreaks('head', 0xFFFF)

    def test_more_heads_than_the_ring_has(self) -> None:
        self.pmem._avail += 2000
        self.assertBreaks('index')

    def test_queue_whose_size_changes_while_a_flush_is_in_flight(
        self
    ) -> None:
        pmem = self.pmem
        pmem.start(size=16)
        self.submit_held(self.mounted, pmem)
        pmem.write(driver.QUEUE_SIZE, 2, 1024)
        self.mounted.release()
        self.mounted.wait(lambda: len(self.mounted.ended) == 1)
        self.assertNoAnswer(pmem)
        self.assertEqual(driver.NEEDS_RESET,
                         pmem.status & driver.NEEDS_RESET)
        pmem.start()
        self.assertEqual(0, pmem.flush())

    def test_packed_ring(self) -> None:
        # The emulator of setUp() runs too, but writes nothing.
        vm = self.start_vm(self.mounted.path, name='packed',
                           device='packed=on,lock=off')
        pmem = driver.PackedDriver(vm.qtest)
        pmem.map()
        pmem.start(size=16)
        # A correct request is in the ring behind the malformed one.
        slot, flags = pmem._put(driver.BUFFERS, 4, 0, 0)
        pmem.submit(kick=False)
        pmem._expose(slot, flags)
        pmem.kick()
        self.assertEqual(driver.NEEDS_RESET,
                         pmem.status & driver.NEEDS_RESET)
        self.assertTrue(vm.answers())
        pmem.start()
        self.assertEqual(0, pmem.flush())

    def test_same_head_again_and_again(self) -> None:
        pmem = self.pmem
        self.submit_held(self.mounted, pmem)
        for _ in range(1023):
            pmem.offer(0)
        pmem.kick()
        self.assertEqual(0, pmem.status & driver.NEEDS_RESET)
        pmem.offer(0)
        pmem.kick()
        self.assertEqual(driver.NEEDS_RESET,
                         pmem.status & driver.NEEDS_RESET)
        self.mounted.release()
        self.mounted.wait(lambda: len(self.mounted.ended) >= 1)
        pmem.start()
        self.assertEqual(0, pmem.flush())

    def test_good_requests_before_it_are_not_leaked(self) -> None:
        pmem = self.pmem
        self.submit_held(self.mounted, pmem)
        pmem.submit()
        pmem.describe(100, driver.BUFFERS, 4, 0)
        pmem.offer(100)
        pmem.kick()
        self.assertEqual(driver.NEEDS_RESET,
                         pmem.status & driver.NEEDS_RESET)
        self.mounted.release()
        self.mounted.wait(lambda: len(self.mounted.ended) >= 1)
        # A broken device writes nothing.
        self.assertNoAnswer(pmem)
        pmem.start(driver.INDIRECT_DESC)
        for _ in range(1024):
            pmem.submit_indirect(kick=False)
        pmem.kick()
        self.assertEqual(1024, len(pmem.wait(1024)))

    def test_answer_may_be_in_pieces(self) -> None:
        pmem = self.pmem
        pmem.describe(0, pmem.prepare(0), 2, driver.NEXT, 1)
        pmem.describe(1, driver.BUFFERS + 2, 2, driver.NEXT, 2)
        pmem.describe(2, driver.BUFFERS + 8, 1, driver.NEXT | driver.WRITE, 3)
        pmem.describe(3, driver.BUFFERS + 9, 3, driver.WRITE)
        pmem.offer(0)
        pmem.kick()
        self.assertEqual([(0, 0)], pmem.wait(1))
