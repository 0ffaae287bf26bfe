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

"""What the guest's driver does when the host or the device misbehaves."""

import errno
import os

from oslotest import base
import testscenarios

from lab import guest
from lab.guest import driver
from lab.machine import agent
from tests.paravirt import committing
from tests.paravirt import flushing

load_tests = testscenarios.load_tests_apply_scenarios

TASKS = 6

#: Nothing here depends on the kernel, so CI tests only that of the images.
KERNELS = os.environ.get('FAKEDAX_TEST_KERNELS', '6.12').split()


class FaultTestCase(base.BaseTestCase):

    scenarios = [(kernel, {'kernel': kernel}) for kernel in KERNELS]
    kernel = '6.12'

    def start(self, stock: bool = False) -> flushing.Flushing:
        try:
            package = committing.package(self.kernel)
        except guest.GuestBuildError as exc:
            self.skipTest(str(exc))
        running = flushing.Flushing(package, stock)
        running.__enter__()
        self.addCleanup(running.__exit__)
        self.addCleanup(lambda: self.assertHealthy(running))
        self.assertEqual(driver.VERSION, running.version())
        return running

    def assertHealthy(self, running: flushing.Flushing) -> None:
        log = running.log()
        for what in 'BUG:', 'WARNING:', 'Oops', 'Call Trace':
            if what == 'Call Trace' and 'blocked for more than' in log:
                continue
            self.assertNotIn(what, log)

    def hold(self, running: flushing.Flushing, tasks: int) -> None:
        """Make tasks wait for a sync that does not end."""
        begun = running.backing.begun
        running.backing.hold()
        running.start_syncs(tasks)
        running.backing.wait(lambda: running.backing.begun > begun)

    def assertFailed(self, running: flushing.Flushing, tasks: int) -> None:
        """Assert that all tasks got an error, as all later syncs do."""
        self.assertEqual([1] * tasks, running.ended(tasks))
        self.assertEqual(1, running.flush('failed'))
        requests = running.flush('requests')
        self.assertIn('Input/output error', running.sync())
        self.assertEqual(requests, running.flush('requests'))


class HostTestCase(FaultTestCase):

    def test_an_error_reaches_all_tasks_and_is_final(self) -> None:
        """The device forgets it; the driver does not until it is rebound."""
        running = self.start(stock=True)
        self.assertEqual('', running.sync(20))
        running.backing.fail_always(errno.EIO)
        self.hold(running, TASKS)
        running.backing.release()
        self.assertEqual([1] * TASKS, running.ended(TASKS))
        running.backing.fail_always(0)
        self.assertFailed(running, TASKS)
        self.assertIn('every flush fails from now on', running.log())
        running.bind_again()
        self.assertEqual('', running.sync(20))
        self.assertEqual(0, running.flush('failed'))
        running.load_again()
        self.assertEqual('', running.sync(20))

    def test_flushes_that_arrive_during_a_request_share_the_next(self) -> None:
        running = self.start()
        self.hold(running, TASKS)
        running.wait('test $(cat /sys/bus/virtio/drivers/virtio_pmem/virtio*'
                     f'/flush/flushes) -ge {TASKS}')
        requests, flushes = map(running.flush, ('requests', 'flushes'))
        running.backing.release()
        self.assertEqual([0] * TASKS, running.ended(TASKS))
        self.assertLessEqual(running.flush('requests') - requests, 1)
        self.assertLessEqual(TASKS, flushes)

    def test_a_host_that_does_not_answer(self) -> None:
        """The kernel reports tasks that hang; the driver refuses suspend."""
        running = self.start()
        begun = running.backing.begun
        running.backing.hold()
        # This task can be frozen while it waits, so the suspend gets as far as
        # the driver.
        running.run(f'probe durable {flushing.PMEM} /run/durable '
                    '>/dev/null 2>&1 &')
        running.backing.wait(lambda: running.backing.begun > begun)
        running.wait('grep -q out /run/durable')
        self.assertRaises(agent.CommandError, running.suspend)
        self.assertIn('has not flushed for', running.log())
        running.run('echo 5 > /proc/sys/kernel/hung_task_timeout_secs')
        running.start_syncs(1)
        # In 6.1 the task waits for its bio. The kernel does not report that,
        # however long it takes (submit_bio_wait()).
        if self.kernel != '6.1':
            running.machine.wait_console('blocked for more than')
        running.backing.release()
        self.assertEqual([0], running.ended(1))
        running.wait('grep -q 4096 /run/durable')
        self.assertEqual('', running.sync())

    def test_suspend_and_resume(self) -> None:
        running = self.start()
        self.assertEqual('', running.sync(5))
        running.run(f'probe hammer {flushing.PMEM} 4 4000 > /run/hammer '
                    '2>&1 &')
        for _ in range(2):
            before = running.flush('requests')
            running.suspend()
            running.resume()
            self.assertEqual('', running.sync(5))
            self.assertLess(before, running.flush('requests'))
        running.wait('grep -q ended=4 /run/hammer', timeout=300)
        self.assertIn(' errors=0 ', running.run('cat /run/hammer'))


class BrokenTestCase(FaultTestCase):

    def test_a_device_that_needs_a_reset(self) -> None:
        """The device needs one after a request that it cannot parse."""
        running = self.start()
        self.hold(running, TASKS)
        running.break_queue()
        self.assertFailed(running, TASKS)
        self.assertIn('the device has failed', running.log())
        running.backing.release()

    def test_a_device_that_answers_a_request_nobody_made(self) -> None:
        running = self.start()
        self.hold(running, 1)
        queue = running.queue()
        # Make a request that the driver does not know of: one more descriptor
        # with the content of the first one.
        last = queue['vring-num'] - 1
        running.qtest.write_bytes(
            queue['vring-desc'] + 16 * last,
            running.qtest.read_bytes(queue['vring-desc'], 16))
        index = queue['vring-avail'] + flushing.INDEX
        number = running.qtest.read(index, 2)
        entry = flushing.RING + 2 * (number % queue['vring-num'])
        running.qtest.write(queue['vring-avail'] + entry, 2, last)
        running.qtest.write(index, 2, number + 1 & 0xffff)
        running.kick()
        running.run('mv /run/syncs /run/first')
        running.start_syncs(TASKS)
        running.backing.release()
        self.assertFailed(running, TASKS)
        self.assertEqual('0', running.run('cat /run/first/1'))
        self.assertIn('is not a head', running.log())

    def test_a_device_that_is_pulled_out(self) -> None:
        running = self.start()
        self.hold(running, TASKS)
        running.pull()
        self.assertEqual([1] * TASKS, running.ended(TASKS))
        running.backing.release()
        running.run(f'test ! -e {flushing.PMEM}')

    def test_the_driver_is_unbound_during_a_sync(self) -> None:
        """It waits for the host, and serves the tasks that wait."""
        running = self.start()
        self.hold(running, TASKS)
        name = running.device()
        running.run(f'{{ echo {name} > /sys/bus/virtio/drivers/virtio_pmem/'
                    'unbind; echo done > /run/unbound; } >/dev/null 2>&1 &')
        self.assertEqual(1, running.machine.agent.run(
            'sleep 1; test -e /run/unbound').status)
        running.backing.release()
        self.assertEqual([0] * TASKS, running.ended(TASKS))
        running.wait('test -e /run/unbound')
        running.run(f'echo {name} > /sys/bus/virtio/drivers/virtio_pmem/bind')
        running.wait(f'test -b {flushing.PMEM}')
        self.assertEqual('', running.sync(5))
