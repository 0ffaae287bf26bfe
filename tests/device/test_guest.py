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

"""A real guest on the device: the unmodified Linux driver, ext4 and DAX."""

import contextlib
import errno
import re
import socket
import time

from lab import guest
from lab.machine import agent
from lab.machine import emulators
from lab.machine import qemu
from lab import wait
from tests.device import base
from tests.device import test_lock

SIZE_MIB = 512
NAME = '/machine/peripheral/root'


class GuestTestCase(base.DeviceTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.guest = self.make_guest_image(SIZE_MIB * base.MIB)
        self.mounted = self.mount()

    def boot(self) -> qemu.Machine:
        machine = qemu.Machine(
            *qemu.direct_kernel(self.guest.kernel, self.guest.initrd,
                                guest.COMMAND_LINE),
            *qemu.pmem(self.mounted.path), emulator=emulators.project())
        machine.__enter__()
        self.addCleanup(machine.__exit__)
        self.addCleanup(self.mounted.release)
        machine.agent.wait_ready()
        self.assertRegex(machine.console(),
                         '(?m)^GUEST root-device=/dev/pmem0p2\r?$')
        return machine

    def pmem(self, machine: qemu.Machine, name: str) -> int:
        value: int = machine.qmp('qom-get', path=NAME, property=name)
        return value

    def fsync(self, machine: qemu.Machine, count: int,
              timeout: float = 60) -> dict[str, int]:
        """Write and fsync a file ``count`` times; return probe's report."""
        done = machine.agent.run(f'probe fsync /root/f {count}',
                                 timeout=timeout)
        return {key: int(value) for key, value in
                re.findall(r'(\w+)=(\d+)', done.stdout)}

    def test_fsync(self) -> None:
        machine = self.boot()
        before = self.pmem(machine, 'requests')
        seen = self.fsync(machine, 30)
        self.assertEqual((30, 0), (seen['fsyncs'], seen['errors']))
        self.assertGreaterEqual(self.pmem(machine, 'requests') - before, 30)
        self.assertEqual(0, self.pmem(machine, 'last-error'))
        self.assertTrue(all(self.mounted.datasync))
        machine.qmp('stop')
        machine.qmp('cont')
        self.assertEqual(0, self.fsync(machine, 1)['errors'])

    def test_other_tasks_go_on_while_a_sync_is_slow(self) -> None:
        machine = self.boot()
        begun = self.mounted.begun
        self.mounted.hold()
        machine.agent.run('probe fsync /root/f 1 > /root/out 2>&1 &',
                          check=True)
        self.mounted.wait(lambda: self.mounted.begun > begun)
        for _ in range(5):
            self.assertEqual('me\n', machine.agent.run('echo me').stdout)
        self.assertEqual('running', machine.qmp('query-status')['status'])
        self.mounted.release()
        machine.agent.run('sync', check=True)
        self.assertEqual(0, self.fsync(machine, 1)['errors'])

    def test_error_stays_and_the_file_system_knows(self) -> None:
        machine = self.boot()
        self.mounted.fail(errno.EIO)
        self.assertLess(0, self.fsync(machine, 1)['errors'])
        self.assertRaises(
            agent.CommandError, machine.agent.run,
            'dd if=/dev/zero of=/root/g bs=4k count=1 conv=fsync',
            check=True)
        self.assertEqual(errno.EIO, self.pmem(machine, 'last-error'))

    def registers(self, machine: qemu.Machine) -> str:
        said: str = machine.qmp(
            'human-monitor-command',
            **{'command-line': 'info registers -a'})
        return said

    def wait_status(self, machine: qemu.Machine, status: str) -> None:
        wait.until(
            f'the guest to be {status}',
            lambda: machine.qmp('query-status')['status'] == status, 20,
            interval=0.02,
            state=lambda: (machine.qmp('query-status'), machine.errors()))

    def test_guest_that_is_held_back_runs_no_instruction(self) -> None:
        """Another process has the image, so the guest must not store to it."""
        machine = self.boot()
        machine.agent.run('while :; do :; done >/dev/null 2>&1 &', check=True)
        machine.qmp('migrate', uri='exec:cat >/dev/null')
        self.wait_status(machine, 'postmigrate')
        before = self.registers(machine)
        with self.image.open('r+b') as file:
            test_lock.lock(file)
            for _again in range(20):
                machine.qmp('cont')
                self.wait_status(machine, 'io-error')
                self.assertEqual(before, self.registers(machine))
        self.wait_status(machine, 'running')
        time.sleep(0.1)
        machine.qmp('stop')
        # A guest that runs does change its registers.
        self.assertNotEqual(before, self.registers(machine))
        machine.qmp('cont')
        self.assertEqual(0, self.fsync(machine, 3)['errors'])

    def test_guest_whose_migration_fails_runs_no_instruction(self) -> None:
        """QEMU resumes it in a thread other than the monitor's."""
        machine = self.boot()
        machine.agent.run('while :; do :; done >/dev/null 2>&1 &', check=True)
        for again in range(5):
            path = f'{self.directory}/{again}.mig'
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                machine.qmp('migrate-set-capabilities', capabilities=[
                    {'capability': 'return-path', 'state': True}])
                machine.qmp('migrate', uri=f'unix:{path}')
                connection, _ = listener.accept()
            with self.image.open('r+b') as file:
                third = self.background(test_lock.lock, file)
                with connection:
                    connection.settimeout(0.05)
                    deadline = time.monotonic() + 60
                    while not third.done():
                        self.assertLess(time.monotonic(), deadline)
                        with contextlib.suppress(TimeoutError):
                            connection.recv(1 << 20)
                    before = self.registers(machine)
                self.wait_status(machine, 'io-error')
                self.assertEqual(before, self.registers(machine))
            self.wait_status(machine, 'running')
        self.assertEqual(0, self.fsync(machine, 3)['errors'])

    def test_reboot_with_a_flush_in_flight(self) -> None:
        machine = self.boot()
        begun = self.mounted.begun
        self.mounted.hold()
        machine.agent.run('probe fsync /root/f 1 > /dev/null 2>&1 &',
                          check=True)
        self.mounted.wait(lambda: self.mounted.begun > begun)
        machine.qmp('system_reset')
        requests = self.pmem(machine, 'requests')
        # The new guest's driver flushes, so its ring is in use.
        wait.until('the new guest to flush',
                   lambda: self.pmem(machine, 'requests') != requests, 60,
                   state=machine.console)
        self.mounted.release()
        machine.wait_console('(?s)GUEST-READY.*GUEST-READY')
        machine.agent.wait_ready()
        self.assertEqual(0, self.fsync(machine, 3)['errors'])
        self.assertNotIn('is not a head', machine.console())
