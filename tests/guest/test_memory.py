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

"""Whose memory is what: the figures of QEMU's process on the host."""

import pathlib
import re

from lab.machine import emulators
from lab.machine import qemu
from lab import wait
from tests.guest import test_guest

FILE_MIB = 300
#: Of what is counted.
ERROR = 0.05


def resident_mib(machine: qemu.Machine, kind: str) -> float:
    """A figure of /proc/PID/status (proc_pid_status(5)), in MiB."""
    status = pathlib.Path(f'/proc/{machine.pid}/status').read_text()
    found = re.search(rf'^{kind}:\s+(\d+) kB$', status, re.MULTILINE)
    assert found, status
    return int(found[1]) / 1024


class MemoryTestCase(test_guest.GuestTestCase):

    def machine(self, *options: str, memory_mib: int = 512) -> qemu.Machine:
        return qemu.Machine(
            *self.direct_kernel(), *qemu.pmem(self.disk(1024)), *options,
            memory_mib=memory_mib, emulator=emulators.project())

    def test_image_is_the_files_memory_and_not_the_guests(self) -> None:
        with self.machine() as machine:
            machine.agent.wait_ready()
            kinds = ('RssAnon', 'RssFile', 'VmRSS')
            before = {kind: resident_mib(machine, kind) for kind in kinds}
            machine.agent.run(f'probe write /root/data {FILE_MIB} 1',
                              check=True)
            machine.agent.run(f'probe verify /root/data {FILE_MIB} 1',
                              check=True)
            anon, file, total = (
                resident_mib(machine, kind) - before[kind] for kind in kinds)
        self.assertLess(anon, ERROR * FILE_MIB)
        self.assertGreater(file, (1 - ERROR) * FILE_MIB)
        # What libvirt and ceilometer show as the resident memory.
        self.assertGreater(total, (1 - ERROR) * FILE_MIB)

    def test_free_page_reporting_works_with_pmem(self) -> None:
        used_mib = 200
        # As Nova has it wherever it asks for memory statistics.
        with self.machine('-device', 'virtio-balloon-pci,'
                                     'free-page-reporting=on') as machine:
            machine.agent.wait_ready()
            before = resident_mib(machine, 'RssAnon')
            machine.agent.run(
                f'dd if=/dev/zero of=/run/used bs=1M count={used_mib}',
                check=True)
            self.assertGreater(resident_mib(machine, 'RssAnon') - before,
                               0.8 * used_mib)
            machine.agent.run('rm /run/used', check=True)
            wait.until(
                'the host to get back the memory that the guest has freed',
                lambda: resident_mib(machine, 'RssAnon') - before
                < 0.2 * used_mib, 60)
            self.assertOnPmem(test_guest.facts(machine.console()))
