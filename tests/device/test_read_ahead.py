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

import pathlib
import random
import re
import subprocess
import time

import testscenarios

from lab import guest
from lab.machine import cgroup
from lab.machine import pagecache
from lab.machine import qemu
from lab import wait
from tests.device import base
from tests.device import emulator
from tests.device import readahead

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

    def start(self, device: str = '', name: str = 'qemu',
              machine: str = base.Q35) -> emulator.Emulator:
        vm = self.start_vm(self.image, device=device, size=SIZE, name=name,
                           machine=machine)
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

    def random_access(self, vm: emulator.Emulator,
                      image: pathlib.Path | None = None) -> bool:
        return 'rr' in vm.mapping_flags(image or self.image)


class ReadAheadTestCase(ReadAheadBase):

    scenarios = base.EACH_VERSION

    def test_not_of_a_guest_that_waits_for_what_was_evicted(self) -> None:
        vm = self.start()
        self.assertIs(True, vm.pmem('reads-ahead'))
        self.assertFalse(self.random_access(vm))
        self.wait_for(vm, False)
        self.assertTrue(self.random_access(vm))
        # Then it reads one page for each that the guest waits for.
        before = vm.io('read_bytes'), readahead.major_faults(vm.process.pid)
        self.thrash(vm)
        pages = (vm.io('read_bytes') - before[0]) // base.PAGE
        faults = readahead.major_faults(vm.process.pid) - before[1]
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


class PlugTestCase(ReadAheadBase):

    scenarios = base.EACH_VERSION

    def plug(self, vm: emulator.Emulator, name: str,
             **properties: str) -> pathlib.Path:
        image = self.image.with_name(name)
        image.write_bytes(bytes(base.SIZE))
        vm.qmp.cmd('object-add', **{
            'qom-type': 'memory-backend-file', 'id': f'mem-{name}',
            'share': True, 'mem-path': str(image), 'size': base.SIZE})
        vm.qmp.cmd('device_add', driver='virtio-pmem-pci', id=name,
                   memdev=f'mem-{name}', addr='0x11', **properties)
        return image

    def eject(self, vm: emulator.Emulator) -> None:
        """Eject what :meth:`plug` has plugged in: see PmemDriver.eject()."""
        vm.qtest.out(0xAE10, 4, 0)
        vm.qtest.out(0xAE08, 4, 1 << 0x11)

    def reads_ahead(self, vm: emulator.Emulator, name: str) -> bool:
        value: bool = vm.qmp.cmd(
            'qom-get', path=f'/machine/peripheral/{name}',
            property='reads-ahead')
        return value

    def test_plugged_image_is_as_the_others(self) -> None:
        vm = self.start(machine=base.I440FX)
        self.wait_for(vm, False)
        image = self.plug(vm, 'second')
        self.assertFalse(self.reads_ahead(vm, 'second'))
        self.assertTrue(self.random_access(vm, image))
        self.eject(vm)
        image = self.plug(vm, 'third', **{'read-ahead': 'on'})
        self.assertTrue(self.reads_ahead(vm, 'third'))
        self.assertFalse(self.random_access(vm, image))
        self.eject(vm)
        self.thrash(vm)
        self.assertFalse(vm.pmem('reads-ahead'))


class UncountedTestCase(ReadAheadBase):
    """On overlayfs the kernel counts no pages."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        directory = self.image.parent
        for name in ('upper', 'work', 'lower', 'overlay'):
            (directory / name).mkdir()
        subprocess.run(
            ['mount', '-t', 'overlay', '-o',
             f'lowerdir={directory}/lower,upperdir={directory}/upper,'
             f'workdir={directory}/work', 'overlay', directory / 'overlay'],
            check=True)
        # Before the directory is removed, and after the emulator has ended.
        self.addCleanup(subprocess.run, ['umount', directory / 'overlay'],
                        check=True)
        self.image.rename(directory / 'upper' / 'image')
        self.image = directory / 'overlay' / 'image'

    def test_stays_on(self) -> None:
        vm = self.start()

        def waited() -> bool:
            self.thrash(vm, 8)
            return readahead.major_faults(vm.process.pid) > 1000

        # It decides by the second count, after 256 faults more.
        wait.until('1000 faults', waited, 120, interval=0)
        time.sleep(1.2)
        self.assertTrue(vm.pmem('reads-ahead'))
        self.assertFalse(self.random_access(vm))


class VCPUBase(ReadAheadBase):
    """A guest with a second disk, whose vCPU reads."""

    options: list[str]

    def setUp(self) -> None:
        super().setUp()
        built = guest.build()
        root = self.image.with_name('root')
        built.copy_disk(root)
        other = self.image.with_name('other')
        other.write_bytes(bytes(SIZE))
        # QEMU's main thread submits the reads of this one.
        other_disk = ['-blockdev', 'driver=file,node-name=other,aio=native,'
                                   f'cache.direct=on,filename={other}',
                      '-device', 'virtio-blk-pci,drive=other,serial=other']
        self.machine = qemu.Machine(
            *qemu.direct_kernel(built.kernel, built.initrd,
                                guest.COMMAND_LINE),
            *qemu.virtio_blk(root), *qemu.pmem(self.image, 'pmem0'),
            *other_disk,
            *('-trace', 'virtio_pmem_read_ahead'), *self.options,
            emulator=self.binary())
        self.machine.__enter__()
        self.addCleanup(self.machine.__exit__)
        self.machine.agent.wait_ready()
        self.group.add(self.machine.pid)

    def read_disk(self, device: str, *options: str) -> None:
        self.machine.agent.run(
            ['dd', f'if={device}', 'of=/dev/null', 'bs=64k', 'iflag=direct',
             *options], check=True, timeout=60)
        # The device looks once a second.
        time.sleep(1.2)

    def reads_ahead(self) -> bool:
        value: bool = self.machine.qmp(
            'qom-get', path='/machine/peripheral/pmem0',
            property='reads-ahead')
        return value

    def judged(self) -> list[tuple[int, int]]:
        """Pages that were read, and new ones, each time it decided."""
        return [(int(read), int(new)) for read, new in re.findall(
            r'pages read (\d+) new pages (\d+)', self.machine.errors())]

    def assert_counts(self) -> None:
        self.group.set_limit(2 * SIZE)
        half = SIZE // 2 >> 16
        self.read_disk('/dev/pmem0', f'count={half}')
        faults = readahead.major_faults(self.machine.pid)
        self.read_disk('/dev/pmem0', f'skip={half}')
        faults = readahead.major_faults(self.machine.pid) - faults
        # All of it was new. KVM hides faults from threads, so what counts is
        # pages.
        self.assertGreater(sum(read for read, _new in self.judged()),
                           4 * faults)
        self.assertTrue(self.reads_ahead())

        def off() -> bool:
            self.read_disk('/dev/pmem0')
            return not self.reads_ahead()

        self.group.set_limit(MEMORY)
        wait.until('reads-ahead to be off', off, 60)


class VCPUTestCase(VCPUBase):
    """What a vCPU reads counts, and nothing else."""

    scenarios = base.EACH_VERSION
    #: As libvirt's.
    options = ['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,'
                           'spawn=deny,resourcecontrol=deny']

    def test_counts(self) -> None:
        self.assert_counts()

    def test_others_do_not(self) -> None:
        (disk,) = self.machine.agent.run(
            'grep -lx other /sys/block/vd*/serial', check=True).stdout.split()
        disk = disk.replace('/sys/block', '/dev').replace('/serial', '')
        before = self.machine.counter('io', 'read_bytes')
        for _again in range(4):
            self.read_disk(disk)
        self.assertGreaterEqual(
            self.machine.counter('io', 'read_bytes') - before, 4 * SIZE)
        self.assertEqual([], self.judged())
        self.assertTrue(self.reads_ahead())


class UnreadableTestCase(VCPUBase):
    """Linux does not tell QEMU what its threads have read."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        # A process that changes its user cannot read these files of its own.
        self.options = (['-runas', 'nobody'] if self.version == '7.2'
                        else ['-run-with', 'user=nobody'])
        super().setUp()

    def test_counts_what_all_threads_read(self) -> None:
        io = pathlib.Path(f'/proc/{self.machine.pid}/task/{self.machine.pid}')
        self.assertEqual('root', (io / 'io').owner())
        self.assert_counts()


class TrialTestCase(ReadAheadBase):
    """On one version only: it takes half a minute."""

    scenarios = [base.EACH_VERSION[0]]

    def test_is_tried_again_after_a_while(self) -> None:
        vm = self.start()
        self.wait_for(vm, False)
        self.wait_for(vm, True)
        # The guest still waits for what was evicted.
        self.wait_for(vm, False)
