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

"""A sync that fails: no flush succeeds after it."""

import errno

import testscenarios

from tests.device import base
from tests.device import driver

load_tests = testscenarios.load_tests_apply_scenarios


class FailStopTestCase(base.DeviceTestCase):

    scenarios = base.OURS

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()
        self.vm = self.start_vm(self.mounted.path)
        self.pmem = self.bring_up(self.vm)

    def test_later_flushes_fail_at_once(self) -> None:
        self.mounted.fail(errno.EIO)
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual([-1] * 3, [self.pmem.flush() for _ in range(3)])
        # Another sync would succeed without the lost pages.
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
