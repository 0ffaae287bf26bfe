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

"""After a sync has failed, no flush succeeds."""

import errno
import time

import testscenarios

from tests.device import base
from tests.device import driver

load_tests = testscenarios.load_tests_apply_scenarios


class FailStopTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()
        self.vm = self.start_vm(self.mounted.path)
        self.pmem = self.bring_up(self.vm)

    def test_later_flushes_fail_at_once(self) -> None:
        self.mounted.fail(errno.EIO)
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual([-1] * 3, [self.pmem.flush() for _ in range(3)])
        # A second sync would succeed, although pages are lost.
        self.assertEqual(1, self.mounted.begun)
        self.assertEqual(
            (4, 1, 1, errno.EIO), tuple(self.vm.pmem(name) for name in (
                'requests', 'syncs', 'errors', 'last-error')))
        self.assertIn("cannot sync memory backend 'mem0': Input/output error",
                      self.vm.log())

    def test_requests_that_wait_fail_with_it(self) -> None:
        heads = [self.submit_held(self.mounted, self.pmem)]
        heads += [self.pmem.submit() for _ in range(3)]
        self.mounted.fail(errno.ENOSPC)
        self.mounted.release()
        self.assertEqual([(head, -1) for head in heads], self.pmem.wait(4))
        self.assertEqual([errno.ENOSPC], self.mounted.ended)
        self.assertEqual(errno.ENOSPC, self.vm.pmem('last-error'))

    def test_error_outlives_every_reset(self) -> None:
        self.mounted.fail(errno.EIO)
        self.assertEqual(-1, self.pmem.flush())
        self.pmem.start()
        self.assertEqual(-1, self.pmem.flush())
        self.vm.qmp.cmd('system_reset')
        self.vm.qmp.cmd('query-status')
        self.assertEqual(-1, self.bring_up(self.vm).flush())
        self.assertEqual(errno.EIO, self.vm.pmem('last-error'))

    def test_error_of_a_sync_that_a_reset_has_orphaned(self) -> None:
        self.submit_held(self.mounted, self.pmem)
        self.pmem.start()
        self.mounted.fail(errno.EIO)
        self.mounted.release()
        self.mounted.wait(lambda: len(self.mounted.ended) == 1)
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual(1, self.mounted.begun)

    def test_error_is_gone_with_the_device(self) -> None:
        self.mounted.fail(errno.EIO)
        self.assertEqual(-1, self.pmem.flush())
        self.vm.qmp.cmd('quit')
        self.vm.wait_exit()
        again = self.bring_up(self.start_vm(self.mounted.path, name='again'))
        self.assertEqual(0, again.flush())

    def test_unknown_type_is_told_apart_from_an_error(self) -> None:
        head = self.pmem.submit(kind=driver.FLUSH + 1)
        self.assertEqual([(head, -1)], self.pmem.wait(1))
        self.assertEqual(0, self.vm.pmem('last-error'))
        self.assertEqual(0, self.pmem.flush())


class PolicyTestCase(base.DeviceTestCase):
    """What an error does to the guest, and who is told of it."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()

    def start(self, device: str) -> None:
        self.vm = self.start_vm(self.mounted.path, device=device)
        self.pmem = self.bring_up(self.vm)

    def events(self) -> list[str]:
        """The events of QEMU since the last call, in order."""
        self.vm.qmp.cmd('query-status')
        told = [(event['event'], event.get('data', {}).get('action'))
                for event in self.vm.qmp.get_events()]
        self.vm.qmp.clear_events()
        return [' '.join(filter(None, event)) for event in told]

    def test_guest_goes_on_by_default(self) -> None:
        self.start('')
        self.mounted.fail(errno.ENOSPC)
        self.assertEqual(-1, self.pmem.flush())
        self.wait_status(self.vm, 'running')
        event, = self.vm.qmp.get_events()
        data = event['data']
        self.assertEqual('BLOCK_IO_ERROR', event['event'])
        self.assertEqual(('write', 'report', True, 'No space left on device'),
                         tuple(data[name] for name in (
                             'operation', 'action', 'nospace', 'reason')))
        # QEMU 7.2 has only one field for the name.
        self.assertIn('/pmem0/', data.get('qom-path', data['device']))
        self.vm.qmp.clear_events()
        # The event comes once, not for each flush that fails later.
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual([], self.events())

    def test_guest_is_stopped_before_it_hears_of_it(self) -> None:
        self.start('werror=stop')
        heads = [self.submit_held(self.mounted, self.pmem),
                 self.pmem.submit()]
        self.mounted.fail(errno.EIO)
        self.mounted.release()
        self.wait_status(self.vm, 'io-error')
        self.assertEqual(['BLOCK_IO_ERROR stop', 'STOP'], self.events())
        # The first request is answered together with the later ones, in
        # their order.
        self.assertEqual([(head, -1) for head in heads], self.pmem.wait(2))
        self.vm.qmp.cmd('cont')
        self.wait_status(self.vm, 'running')
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual(['RESUME'], self.events())

    def test_guest_is_told_whoever_resumes_it_meanwhile(self) -> None:
        self.start('werror=stop')
        head = self.submit_held(self.mounted, self.pmem)
        self.mounted.fail(errno.EIO)

        def resume() -> None:
            ends = time.monotonic() + 1
            while time.monotonic() < ends:
                self.vm.qmp.cmd('cont')

        resumed = self.background(resume)
        self.mounted.release()
        self.assertEqual([(head, -1)], self.pmem.wait(1))
        resumed.result(30)
        self.wait_status(self.vm, 'running')
        self.assertEqual(-1, self.pmem.flush())

    def test_stop_still_syncs_the_other_disks_and_this_one(self) -> None:
        other = self.mount('other')
        self.vm = self.start_vm(
            self.mounted.path, '-object',
            f'memory-backend-file,id=mem1,mem-path={other.path},'
            f'size={base.SIZE},share=on',
            '-device', 'virtio-pmem-pci,memdev=mem1,id=pmem1,addr=0x11,'
            'lock=off', device='werror=stop,lock=off')
        self.pmem = self.bring_up(self.vm)
        self.mounted.fail(errno.EIO)
        self.pmem.submit()
        self.wait_status(self.vm, 'io-error')
        # QEMU answers while the last syncs run.
        self.mounted.wait(lambda: self.mounted.begun == 2)
        other.wait(lambda: other.begun == 1)

    def test_error_while_the_guest_stops_is_reported(self) -> None:
        self.start('werror=stop')
        head = self.submit_held(self.mounted, self.pmem)
        self.mounted.fail(errno.EIO)
        stopped = self.background(self.vm.qmp.cmd, 'stop')
        self.assertPending(stopped)
        self.mounted.release()
        stopped.result(30)
        self.assertEqual([(head, -1)], self.pmem.wait(1))
        self.wait_status(self.vm, 'paused')
        self.assertIn('BLOCK_IO_ERROR report', self.events())

    def test_reset_while_stopped_discards_what_was_not_answered(self) -> None:
        self.start('werror=stop')
        self.mounted.fail(errno.EIO)
        self.pmem.submit()
        self.wait_status(self.vm, 'io-error')
        self.vm.qmp.cmd('system_reset')
        self.vm.qmp.cmd('cont')
        self.wait_status(self.vm, 'running')
        self.assertEqual(-1, self.bring_up(self.vm).flush())

    def test_stopped_guest_may_leave_and_is_told_there(self) -> None:
        there = self.mount('there')
        self.start('werror=stop')
        self.mounted.fail(errno.ENOSPC)
        head = self.pmem.submit()
        self.wait_status(self.vm, 'io-error')
        destination = self.incoming(there.path, 'destination')
        self.assertEqual(
            'completed', self.migrate(self.vm, 'destination')['status'])
        self.wait_status(destination, 'io-error')
        self.pmem.qtest = destination.qtest
        self.assertEqual([(head, -1)], self.pmem.wait(1))
        # The destination learns only that there was an error: errno values
        # differ between hosts.
        self.assertEqual(errno.EIO, destination.pmem('last-error'))
        destination.qmp.cmd('cont')
        self.wait_status(destination, 'running')
        self.assertEqual(-1, self.pmem.flush())

    def test_other_policies_are_refused(self) -> None:
        for policy in ('ignore', 'enospc'):
            error = self.assertRaises(RuntimeError, self.start,
                                      f'werror={policy}')
            self.assertIn(f'virtio-pmem does not support werror={policy}: '
                          'use report or stop', str(error))

    def test_durations_are_listed_for_people(self) -> None:
        self.start('')
        self.assertEqual(0, self.pmem.flush())
        shown = self.vm.qmp.cmd('human-monitor-command',
                                **{'command-line': 'info qtree'})
        counts = self.vm.pmem('sync-latency')
        self.assertIn('sync-latency = ' + ' '.join(map(str, counts)), shown)
