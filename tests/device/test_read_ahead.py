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

"""Whether the host reads ahead of a guest's page faults."""

import random
import time

import testscenarios

from lab.machine import cgroup
from lab.machine import pagecache
from lab import wait
from tests.device import base
from tests.device import emulator

load_tests = testscenarios.load_tests_apply_scenarios

SIZE = 64 * base.MIB
#: Of the image at a time, with what the device itself reads.
MEMORY = 16 * base.MIB
HOT = 32 * base.MIB


class ReadAheadBase(base.DeviceTestCase):
    """A guest whose image does not fit into what the host may cache."""

    def setUp(self) -> None:
        super().setUp()
        self.put_image_on_disk()
        pagecache.evict(self.make_image(SIZE))
        self.random = random.Random(1)
        self.group = self.enterContext(cgroup.MemoryGroup(MEMORY))

    def start(self, device: str = '',
              name: str = 'qemu') -> emulator.Emulator:
        vm = self.start_vm(self.image, device=device, size=SIZE, name=name)
        self.group.add(vm.process.pid)
        return vm

    def read(self, vm: emulator.Emulator, offset: int) -> None:
        vm.qtest.read(self.memaddr(vm) + offset, 1)

    def thrash(self, vm: emulator.Emulator, reads: int = 200) -> None:
        """Read at random what does not fit."""
        base_address = self.memaddr(vm)
        vm.qtest.commands([
            f'readb {base_address + self.random.randrange(HOT):#x}'
            for _ in range(reads)])

    def wait_for(self, vm: emulator.Emulator, reads_ahead: bool) -> None:
        def seen() -> bool:
            # A trial lasts for 16 faults, however long these take: look more
            # often than that.
            self.thrash(vm, 8)
            return bool(vm.pmem('reads-ahead')) == reads_ahead

        wait.until(f'reads-ahead to be {reads_ahead}', seen, 60, interval=0)

    def random_access(self, vm: emulator.Emulator) -> bool:
        return 'rr' in vm.mapping_flags(self.image)

    def faults(self, vm: emulator.Emulator) -> int:
        """Major faults so far: field 12 of proc_pid_stat(5)."""
        with open(f'/proc/{vm.process.pid}/stat') as file:
            return int(file.read().rpartition(')')[2].split()[9])


class ReadAheadTestCase(ReadAheadBase):

    scenarios = base.EACH_VERSION

    def test_not_of_a_guest_that_waits_for_what_was_evicted(self) -> None:
        vm = self.start()
        self.assertIs(True, vm.pmem('reads-ahead'))
        self.assertFalse(self.random_access(vm))
        self.wait_for(vm, False)
        self.assertTrue(self.random_access(vm))
        # Then it reads one page for each that the guest waits for.
        before = vm.io('read_bytes'), self.faults(vm)
        self.thrash(vm)
        pages = (vm.io('read_bytes') - before[0]) // base.PAGE
        faults = self.faults(vm) - before[1]
        # The file system may read what it knows of the file, too.
        self.assertGreater(faults, 50)
        self.assertLess(pages, faults * 1.1)

    def test_again_when_the_guest_reads_what_is_new(self) -> None:
        vm = self.start()
        self.wait_for(vm, False)
        address = self.memaddr(vm)
        for offset in range(HOT, SIZE, base.PAGE):
            vm.qtest.read(address + offset, 1)
            if offset % base.MIB == 0 and vm.pmem('reads-ahead'):
                break
            # As fast as a disk that has seeks: the device looks once a second.
            time.sleep(0.001)
        self.assertIs(True, vm.pmem('reads-ahead'))
        self.assertFalse(self.random_access(vm))

    def test_always_of_a_guest_that_reads_all_of_it_once(self) -> None:
        vm = self.start()
        address = self.memaddr(vm)
        for offset in range(0, SIZE, 8 * base.PAGE):
            vm.qtest.read(address + offset, 1)
            self.assertIs(True, vm.pmem('reads-ahead'))
            time.sleep(0.001)

    def test_off_and_on_are_for_good(self) -> None:
        vm = self.start('read-ahead=off')
        self.assertTrue(self.random_access(vm))
        self.assertIs(False, vm.pmem('reads-ahead'))
        self.read(vm, 0)
        self.assertEqual(base.PAGE, pagecache.cached_bytes(self.image))
        vm.close()
        vm = self.start('read-ahead=on', 'second')
        end = time.monotonic() + 4
        while time.monotonic() < end:
            self.thrash(vm)
        self.assertIs(True, vm.pmem('reads-ahead'))
        self.assertFalse(self.random_access(vm))


class TrialTestCase(ReadAheadBase):
    """On one version only: it takes half a minute."""

    scenarios = [base.EACH_VERSION[0]]

    def test_is_tried_again_after_a_while(self) -> None:
        vm = self.start()
        self.wait_for(vm, False)
        self.wait_for(vm, True)
        # The guest still waits for what was evicted.
        self.wait_for(vm, False)
