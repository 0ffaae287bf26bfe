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

"""A guest with our driver, and a disk whose syncs and registers we control."""

import pathlib
import re
import shutil
import tempfile
import time

from lab import guest
from lab.machine import agent
from lab.machine import emulators
from lab.machine import qemu
from lab import wait
from tests.device import backing
from tests.device import emulator
from tests.paravirt import disk

MIB = 1 << 20
SIZE = 64 * MIB

#: Where a split queue keeps its index and its entries (virtio 1.3, 2.7.6).
INDEX = 2
RING = 4

#: The guest's disk that is under test, and QEMU's name of the device.
PMEM = '/dev/pmem0'
#: Its name after the driver was bound again, if somebody had it open.
ANY_PMEM = '/dev/pmem[0-9]*'
NAME = '/machine/peripheral/data'


class Flushing:
    """Run a guest with its root on another disk, in a ``with`` block.

    :param stock: whether the device is QEMU's own, which forgets errors
    :param with_driver: whether the driver is that of guest-image-elements
    :param command_line: what to add to the kernel's command line
    :ivar backing: the backing file of the disk
    :ivar machine: the machine that the guest runs in
    :ivar qtest: writes to the guest's memory and ports from outside
    """

    def __init__(self, kernel_package: str, stock: bool = False,
                 processors: int = 1, memory_mib: int = 256,
                 command_line: str = '', with_driver: bool = True) -> None:
        self._guest = guest.build(kernel_package=kernel_package,
                                  with_driver=with_driver)
        self._stock = stock
        self._processors = processors
        self._memory_mib = memory_mib
        self._command_line = command_line

    def __enter__(self) -> 'Flushing':
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix='flushing-'))
        image, root = self._directory / 'image', self._directory / 'root'
        with image.open('wb') as file:
            file.truncate(SIZE)
        disk.copy(self._guest.disk, root)
        self.backing = backing.BackingFile(image, self._directory / 'host')
        qtest = self._directory / 'qtest'
        self.machine = qemu.Machine(
            *qemu.direct_kernel(
                self._guest.kernel, self._guest.initrd,
                f'{guest.COMMAND_LINE} agent=ttyS1 {self._command_line}'),
            # This machine ejects slots through ports, without the guest's
            # help.
            '-machine', 'pc', '-smp', str(self._processors),
            *qemu.virtio_blk(root), *qemu.pmem(self.backing.path, 'data'),
            '-qtest', f'unix:{qtest},server=on,wait=off',
            # Linux's virtio_console does not survive every suspend (6.12.117:
            # control_work_handler() uses a queue that is gone).
            '-qtest-log', 'none', agent_serial=True,
            memory_mib=self._memory_mib,
            emulator=(emulators.stock('10.0') if self._stock
                      else emulators.project()))
        try:
            self.machine.__enter__()
        except Exception:
            self._clean()
            raise
        self.qtest = emulator.QTest(qtest)
        self.machine.agent.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        # While its sync is held, QEMU cannot be killed.
        self.backing.release()
        self.qtest.close()
        self.machine.__exit__()
        self._clean()

    def _clean(self) -> None:
        self.backing.close()
        shutil.rmtree(self._directory)

    def run(self, command: str, timeout: float = 120) -> str:
        """Run a command that must succeed, and return what it prints."""
        return self.machine.agent.run(
            command, check=True, timeout=timeout).stdout.strip()

    def version(self) -> str:
        return self.run('cat /sys/module/virtio_pmem/version '
                        '/sys/module/nd_virtio/version | uniq')

    def flush(self, name: str) -> int:
        """Read a file of the driver in sysfs: flushes, requests or failed."""
        return int(self.run(
            f'cat /sys/bus/virtio/drivers/virtio_pmem/virtio*/flush/{name}'))

    def sync(self, count: int = 1) -> str:
        """Write to the disk and sync it; return '' or what went wrong."""
        done = self.machine.agent.run(
            f'probe fdatasync {PMEM} {count}', timeout=300)
        return '' if not done.status else done.stderr

    def start_syncs(self, tasks: int) -> None:
        """Have tasks sync once each, in the background."""
        self.run('rm -rf /run/syncs; mkdir /run/syncs; cd /run/syncs; '
                 f'for task in $(seq {tasks}); do {{ dd if=/dev/zero of={PMEM}'
                 ' bs=4k count=1 seek=$((task + 8)) conv=notrunc,fsync; '
                 f'echo $? > $task; }} >/dev/null 2>&1 & done')

    def ended(self, tasks: int, timeout: float = 60) -> list[int]:
        """Wait until those tasks have ended; return their statuses."""
        def found() -> list[str]:
            return self.run('cat /run/syncs/* 2>/dev/null; true').split()

        wait.until(f'{tasks} syncs to end', lambda: len(found()) == tasks,
                   timeout, state=lambda: (found(), self.log()[-2000:]))
        return [int(status) for status in found()]

    def wait(self, command: str, timeout: float = 60) -> None:
        """Wait until a command of the guest succeeds."""
        wait.until(command, lambda: not self.machine.agent.run(command).status,
                   timeout, state=lambda: self.log()[-2000:])

    def log(self) -> str:
        """The kernel's log."""
        return self.run('dmesg')

    def device(self) -> str:
        """The virtio device's name in the guest."""
        return self.run('basename /sys/bus/virtio/drivers/virtio_pmem/'
                        'virtio*')

    def bind_again(self) -> None:
        """Unbind the driver from the device, and bind it again."""
        name = self.device()
        for file in 'unbind', 'bind':
            self.run(f'echo {name} > /sys/bus/virtio/drivers/virtio_pmem/'
                     f'{file}', timeout=300)
        self.wait(f'ls {ANY_PMEM}')

    def break_queue(self) -> None:
        """Have the device find more requests than the queue has room for."""
        index = self.queue()['vring-avail'] + INDEX
        before = self.qtest.read(index, 2)
        self.qtest.write(index, 2, before + 3000 & 0xffff)
        self.kick()

    def load_again(self) -> None:
        """Unload both modules, and load them again."""
        # libnvdimm uses the module as long as there is a disk.
        self.run(f'echo {self.device()} > '
                 '/sys/bus/virtio/drivers/virtio_pmem/unbind && '
                 'rmmod virtio_pmem && rmmod nd_virtio && '
                 'insmod /lib/driver/nd_virtio.ko && '
                 'insmod /lib/driver/virtio_pmem.ko', timeout=300)
        self.wait(f'ls {ANY_PMEM}')

    def suspend(self, timeout: float = 120) -> None:
        """Suspend the guest to RAM.

        :raises CommandError: a driver or a task refuses
        """
        # The agent must have answered before it is frozen.
        self.run('rm -f /run/suspended; { sleep 1; echo mem > '
                 '/sys/power/state; echo $? > /run/suspended; } '
                 '> /run/suspend 2>&1 &')
        deadline = time.monotonic() + timeout
        while self.machine.qmp('query-status')['status'] != 'suspended':
            if time.monotonic() > deadline:
                raise TimeoutError('no suspend: ' + self.machine.console())
            # The agent is frozen with all other tasks.
            if self._refused():
                raise agent.CommandError(self.run('cat /run/suspend'))
            time.sleep(0.2)

    def _refused(self) -> bool:
        try:
            return self.machine.agent.run(
                'grep -v "^0" /run/suspended', timeout=1).status == 0
        except agent.AgentTimeoutError:
            return False

    def resume(self) -> None:
        self.machine.qmp('system_wakeup')
        self.machine.agent.wait_ready()

    def queue(self) -> dict[str, int]:
        """Where the flush queue is in the guest's memory, and its state."""
        queue: dict[str, int] = self.machine.qmp(
            'x-query-virtio-queue-status',
            path=f'{NAME}/virtio-backend', queue=0)
        return queue

    def _function(self) -> str:
        """The directory of the PCI device in the guest's sysfs."""
        return self.run('dirname $(readlink -f /sys/bus/virtio/devices/'
                        + self.device() + ')')

    def _bar(self, number: int) -> int:
        """Where a region of the PCI device is in the guest's memory."""
        lines = self.run(f'cat {self._function()}/resource').splitlines()
        return int(lines[number].split()[0], 16)

    def kick(self) -> None:
        """Notify the device of its queue.

        For the address see virtio_pci_realize() in QEMU's
        hw/virtio/virtio-pci.c.
        """
        self.qtest.write(self._bar(4) + 0x3000, 2, 0)

    def pull(self) -> None:
        """Remove the device, and have the guest see that it is gone."""
        function = self._function()
        self._eject(function)
        self.run(f'echo 1 > {function}/remove', timeout=300)

    def _eject(self, function: str) -> None:
        """Eject through ports; see QEMU's docs/specs/acpi_pci_hotplug.rst."""
        slot = re.findall(r'0000:00:(\w\w)', function)[0]
        self.qtest.out(0xAE10, 4, 0)
        self.qtest.out(0xAE08, 4, 1 << int(slot, 16))
