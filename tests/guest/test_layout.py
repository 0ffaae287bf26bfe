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

"""The kernel finds the memmap and the content where the layout has them.

Real QEMU under TCG, no OpenStack: about a minute.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import os
import pathlib
import re

from oslo_utils import units
import testscenarios

from lab import guest
from lab.machine import loop
from lab.machine import qemu
from nova_fakedax import layout
from tests.guest import test_guest
from tests.paravirt import committing

load_tests = testscenarios.load_tests_apply_scenarios

#: What "ndctl create-namespace --force --reconfig=namespace1.0 --mode=fsdax
#: --map=dev" writes to sysfs for the second disk (setup_namespace() of its
#: ndctl/namespace.c). The kernel writes the info block when its driver takes
#: what was set up.
RECONFIGURE = """
set -e
cd /sys/bus/nd
echo namespace1.0 > drivers/nd_pmem/unbind
pfn=$(cat devices/region1/pfn_seed)
cat /proc/sys/kernel/random/uuid > devices/$pfn/uuid
echo pmem > devices/$pfn/mode
echo 2097152 > devices/$pfn/align
echo namespace1.0 > devices/$pfn/namespace
echo $pfn > drivers/nd_pmem/bind
"""

#: Packages of kernels other than the guest's own, or the word "6.12".
KERNELS = os.environ.get('FAKEDAX_GUEST_KERNELS', '6.12').split()


class LayoutTestCase(test_guest.GuestTestCase):

    def make(self, gib: int, memmap: bool) -> pathlib.Path:
        path = self.directory / 'disk'
        layout.make(str(path), str(self.guest.disk), gib * units.Gi, memmap)
        return path

    def ephemeral(self) -> tuple[pathlib.Path, bytes]:
        """A disk that nobody mounts, and its content."""
        path, source = (self.directory / name for name in ('eph0', 'source'))
        content = os.urandom(6 * units.Mi)
        source.write_bytes(content)
        layout.make(str(path), str(source), len(content), True)
        return path, content

    def memory_mib(self, machine: qemu.Machine) -> int:
        text = machine.agent.run('cat /proc/meminfo', check=True).stdout
        kib, = re.findall(r'^MemAvailable: +(\d+) kB', text, re.MULTILINE)
        return int(kib) // 1024

    def namespaces(self, machine: qemu.Machine) -> dict[str, tuple[str, int]]:
        """The devices with a memmap of their own: mode and content's size."""
        lines = machine.agent.run(
            'cd /sys/bus/nd/devices; for d in pfn*; do'
            ' test -z "$(cat $d/namespace)" ||'
            ' echo $(cat $d/namespace $d/mode $d/size); done',
            check=True).stdout.splitlines()
        return {name: (mode, int(size))
                for name, mode, size in (line.split() for line in lines)}


class KernelTest(LayoutTestCase):

    scenarios = [(name, {'package': name}) for name in KERNELS]

    def test_another_kernel_reads_the_block(self) -> None:
        self.guest = guest.build(kernel_package=committing.package('6.12')
                                 if self.package == '6.12' else self.package)
        with qemu.Machine(*self.direct_kernel(),
                          *qemu.pmem(self.make(8, True))) as machine:
            self.assertOnPmem(self.boot(machine))
            machine.agent.wait_ready()
            self.assertIn(
                self.package.removeprefix('linux-image-'),
                machine.agent.run('uname -r', check=True).stdout)
            self.assertEqual({'namespace0.0': ('pmem', 8 * units.Gi)},
                             self.namespaces(machine))
            machine.agent.run('probe write /root/f 8 1 && '
                              'probe verify /root/f 8 1', check=True)


class LayoutTest(LayoutTestCase):

    def test_the_content_is_a_disk_and_the_memmap_costs_no_ram(self) -> None:
        ephemeral, content = self.ephemeral()
        left = {}
        for gib in (1, 8):
            image = self.make(gib, True)
            with qemu.Machine(*self.direct_kernel(), *qemu.pmem(image),
                              *qemu.pmem(ephemeral, 'eph0')) as machine:
                self.assertOnPmem(self.boot(machine))
                machine.agent.wait_ready()
                left[gib] = self.memory_mib(machine)
                self.assertEqual(
                    {'namespace0.0': ('pmem', gib * units.Gi),
                     'namespace1.0': ('pmem', len(content))},
                    self.namespaces(machine))
                seen = machine.agent.run(
                    'sha256sum /dev/pmem1; echo hello > /dev/pmem1; sync;'
                    ' probe write /root/f 8 1 && probe verify /root/f 8 1',
                    check=True).stdout
                self.assertEqual(hashlib.sha256(content).hexdigest(),
                                 seen.split()[0])
            with ephemeral.open('r+b') as file:
                file.seek(layout.read(str(ephemeral)).offset)
                self.assertEqual(b'hello\n', file.read(6))
                file.seek(-6, os.SEEK_CUR)
                file.write(content[:6])
            # The block is as it was.
            layout.read(str(image))
            image.unlink()
        self.assertLess(abs(left[1] - left[8]), 5, left)
        # 16 MiB for each GiB, and some for the tables.
        with qemu.Machine(*self.direct_kernel(),
                          *qemu.pmem(self.make(1, False))) as machine:
            self.assertOnPmem(self.boot(machine))
            machine.agent.wait_ready()
            self.assertEqual({}, self.namespaces(machine))
            self.assertGreater(left[1] - self.memory_mib(machine), 10)

    def test_firmware_boots_from_the_view_of_the_content(self) -> None:
        image = self.make(1, True)
        with qemu.Machine(*qemu.boot_view(image),
                          *qemu.pmem(image)) as machine:
            self.assertOnPmem(self.boot(machine))

    def test_a_converted_and_grown_disk_boots_with_its_files(self) -> None:
        image = self.make(1, False)
        boots = 0
        for gib, memmap in ((1, False), (1, True), (2, True), (2, False)):
            layout.fit(str(image), gib * units.Gi, memmap)
            with qemu.Machine(*self.direct_kernel(),
                              *qemu.pmem(image)) as machine:
                seen = self.boot(machine)
                machine.agent.wait_ready()
                boots += 1
                self.assertOnPmem(seen)
                self.assertEqual(str(boots), seen['boots'])
                self.assertGreater(int(seen['root-mib']), gib * 1000)
                self.assertEqual(memmap, bool(self.namespaces(machine)))
                command = 'write' if boots == 1 else 'verify'
                machine.agent.run(f'probe {command} /root/f 8 1', check=True)
                machine.power_off()

    def test_the_old_root_of_a_rescued_guest(self) -> None:
        """As an ordinary disk that can be written, without the memmap."""
        image = self.make(1, True)
        found = layout.read(str(image))
        slice_of = f'offset={found.offset},size={found.size}'
        rescue = self.directory / 'rescue'
        rescue.write_bytes(self.guest.disk.read_bytes())
        second = [f'{option},{slice_of}' if option.startswith('driver=raw')
                  else option for option in qemu.virtio_blk(
                      image, name='old', boot_index=-1)]
        with qemu.Machine(*qemu.virtio_blk(rescue), *second) as machine:
            self.assertOnBlk(self.boot(machine))
            machine.agent.wait_ready()
            machine.agent.run(
                'mount /dev/vdb2 /mnt && echo rescued > /mnt/root/note &&'
                ' umount /mnt && sync', check=True)
        with qemu.Machine(*self.direct_kernel(),
                          *qemu.pmem(image)) as machine:
            self.assertOnPmem(self.boot(machine))
            machine.agent.wait_ready()
            self.assertEqual('rescued\n', machine.agent.run(
                'cat /root/note', check=True).stdout)


class VolumeTest(LayoutTestCase):
    """A disk that no host has laid out, such as a volume."""

    scenarios = [('file', {'block': False}), ('block-device', {'block': True})]

    block: bool

    def test_a_volume_that_its_user_has_given_a_memmap(self) -> None:
        volume = self.directory / 'volume'
        with volume.open('wb') as file:
            file.truncate(units.Gi)
        with self.opened(volume) as disk:
            options = [*self.direct_kernel(), *qemu.pmem(self.make(1, True)),
                       *qemu.pmem(disk, 'volume')]
            with qemu.Machine(*options) as machine:
                self.assertOnPmem(self.boot(machine))
                machine.agent.wait_ready()
                self.assertEqual({'namespace0.0': ('pmem', units.Gi)},
                                 self.namespaces(machine))
                machine.agent.run(RECONFIGURE, check=True)
                mode, size = self.namespaces(machine)['namespace1.0']
                self.assertEqual('pmem', mode)
                machine.agent.run('echo hello > /dev/pmem1 && sync',
                                  check=True)
                machine.power_off()
            # The next boot finds it by the info block alone.
            with qemu.Machine(*options) as machine:
                self.assertOnPmem(self.boot(machine))
                machine.agent.wait_ready()
                self.assertEqual(('pmem', size),
                                 self.namespaces(machine)['namespace1.0'])
                self.assertEqual('hello', machine.agent.run(
                    'head -c 5 /dev/pmem1', check=True).stdout)
                machine.power_off()
        found = layout.read(str(volume))
        self.assertEqual(layout.Layout(units.Gi - size, size), found)
        # 16 MiB of struct pages, and what is in front of them.
        self.assertEqual(18 * units.Mi, found.offset)
        with volume.open('rb') as file:
            file.seek(found.offset)
            self.assertEqual(b'hello\n', file.read(6))

    @contextlib.contextmanager
    def opened(self, volume: pathlib.Path) -> Iterator[pathlib.Path]:
        """What QEMU opens of a volume."""
        if not self.block:
            yield volume
            return
        with loop.device(volume, direct=False) as node:
            yield node
