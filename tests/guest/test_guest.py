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

"""The test guest boots everywhere it must, and the agent reaches it.

These tests use real QEMU under TCG, no OpenStack, and take about two minutes.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time

from oslotest import base
import testtools

from lab import guest
from lab.guest import disk
from lab.guest import grub
from lab.machine import agent
from lab.machine import qemu
from lab import wait

MIB = 1024 * 1024


def facts(console: str) -> dict[str, str]:
    """What the guest reported of itself at its last boot."""
    return dict(re.findall(r'^GUEST ([\w-]+)=(.*?)\r?$', console,
                           re.MULTILINE))


def words(text: str) -> dict[str, int]:
    """The words key=number in the output of ``probe``."""
    return {key: int(value)
            for key, value in re.findall(r'(\w+)=(\d+)', text)}


class GuestTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.guest = guest.build()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='guest-test-'))
        self.addCleanup(shutil.rmtree, self.directory)

    def disk(self, size_mib: int | None = None) -> pathlib.Path:
        """Make a disk for the test, grown as Nova grows it for a flavor."""
        path = self.directory / 'disk'
        self.guest.copy_disk(path)
        if size_mib:
            os.truncate(path, size_mib * MIB)
        return path

    def direct_kernel(self) -> list[str]:
        return qemu.direct_kernel(self.guest.kernel, self.guest.initrd,
                                  guest.COMMAND_LINE)

    def boot(self, machine: qemu.Machine) -> dict[str, str]:
        started = time.monotonic()
        console = machine.wait_console('^GUEST-READY')
        self.addDetail('boot', testtools.content.text_content(
            f'ready in {time.monotonic() - started:.1f} s\n{console}'))
        return facts(console)

    def assertOnPmem(self, seen: dict[str, str]) -> None:
        self.assertEqual('/dev/pmem0p2', seen['root-device'])
        self.assertIn('dax=always', seen['root-options'].split(','))
        self.assertEqual('1', seen['root-disk-dax'])
        self.assertEqual('yes', seen['root-file-dax'])

    def assertOnBlk(self, seen: dict[str, str]) -> None:
        self.assertEqual('/dev/vda2', seen['root-device'])
        self.assertNotIn('dax', seen['root-options'])
        self.assertEqual('0', seen['root-disk-dax'])
        self.assertEqual('no', seen['root-file-dax'])


class BootTestCase(GuestTestCase):
    """Every way to boot, twice, on a disk that is larger than the image."""

    def _boots_twice(self, *options: str) -> dict[str, str]:
        with qemu.Machine(*options) as machine:
            first = self.boot(machine)
            self.assertEqual('1', first['boots'])
            machine.agent.wait_ready()
            machine.agent.run('probe write /root/data 8 1', check=True)
            machine.qmp('system_powerdown')
            machine.wait_exit(5)
            self.assertNotIn('WARNING', machine.console())
        with qemu.Machine(*options) as machine:
            second = self.boot(machine)
            self.assertEqual('2', second['boots'])
            machine.agent.wait_ready()
            machine.agent.run('probe verify /root/data 8 1', check=True)
            # The kernel reports an unclean file system when it mounts it.
            self.assertNotIn('recovery', machine.agent.run('dmesg').stdout)
            self.assertNotIn('WARNING', machine.console())
        for key in ('kernel', 'root-device', 'root-options', 'root-mib'):
            self.assertEqual(first[key], second[key])
        self.assertGreater(int(first['root-mib']), 1000)
        return second

    def test_pmem_by_kernel_and_initrd(self) -> None:
        image = self.disk(1024)
        self.assertOnPmem(self._boots_twice(
            *self.direct_kernel(), *qemu.pmem(image)))

    def test_pmem_by_firmware_from_the_boot_view(self) -> None:
        image = self.disk(1024)
        self.assertOnPmem(self._boots_twice(
            *qemu.boot_view(image), *qemu.pmem(image)))

    def test_virtio_blk_by_kernel_and_initrd(self) -> None:
        image = self.disk(1024)
        self.assertOnBlk(self._boots_twice(
            *self.direct_kernel(), *qemu.virtio_blk(image)))

    def test_virtio_blk_by_firmware(self) -> None:
        image = self.disk(1024)
        self.assertOnBlk(self._boots_twice(*qemu.virtio_blk(image)))

    def test_disk_no_larger_than_the_image(self) -> None:
        image = self.disk()
        with qemu.Machine(*qemu.boot_view(image),
                          *qemu.pmem(image)) as machine:
            seen = self.boot(machine)
        self.assertOnPmem(seen)
        self.assertLess(int(seen['root-mib']), guest.image.SIZE_MIB)


class EphemeralTestCase(GuestTestCase):

    def _blank(self) -> pathlib.Path:
        path = self.directory / 'ephemeral'
        with path.open('wb') as f:
            f.truncate(64 * MIB)
        return path

    def test_root_and_ephemeral_on_pmem(self) -> None:
        image, ephemeral = self.disk(), self._blank()
        subprocess.run(['/sbin/mkfs.ext4', '-q', '-F', '-b', '4096',
                        '-L', 'ephemeral0', ephemeral], check=True)
        with qemu.Machine(*self.direct_kernel(), *qemu.pmem(image),
                          *qemu.pmem(ephemeral, 'eph0')) as machine:
            self.assertOnPmem(self.boot(machine))
            machine.agent.wait_ready()
            machine.agent.run('mount -o dax=always /dev/pmem1 /mnt &&'
                              ' echo hello > /mnt/file && sync &&'
                              ' probe dax /mnt/file', check=True)

    def test_only_ephemeral_on_pmem(self) -> None:
        image, ephemeral = self.disk(), self._blank()
        # This is how Nova formats them by default.
        subprocess.run(['/sbin/mkfs.vfat', '-n', 'ephemeral0', ephemeral],
                       check=True, stdout=subprocess.DEVNULL)
        with qemu.Machine(*qemu.virtio_blk(image),
                          *qemu.pmem(ephemeral, 'eph0')) as machine:
            self.assertOnBlk(self.boot(machine))
            machine.agent.wait_ready()
            machine.agent.run('mount /dev/pmem0 /mnt &&'
                              ' echo hello > /mnt/file &&'
                              ' grep "/mnt vfat" /proc/mounts', check=True)


class FailureTestCase(GuestTestCase):
    """The console reports what cannot work."""

    def test_pmem_that_the_guest_refuses(self) -> None:
        image = self.disk(1025)
        with qemu.Machine(*qemu.boot_view(image),
                          *qemu.pmem(image)) as machine:
            console = machine.wait_console('^GUEST-FAILED')
        self.assertRegex(console, r'GUEST-WARNING 1 virtio-pmem device\(s\), '
                                  r'0 pmem disk\(s\)')
        self.assertIn('no disk with a partition named fakedax-root', console)
        self.assertNotIn('GUEST-READY', console)

    def test_partition_that_cannot_be_mapped_with_dax(self) -> None:
        # The start is one sector past a multiple of 4 KiB.
        image, source = self.directory / 'odd', self.disk()
        shutil.copy(source, image)
        os.truncate(image, 136 * MIB)
        start = 70 * 2048 + 1
        subprocess.run(
            ['/sbin/sfdisk', '-q', '--wipe=never', image], check=True,
            input=f'label: gpt\nstart={start}, size={61 * 2048}, '
                  f'name={disk.ROOT_NAME}\n', text=True)
        subprocess.run(
            ['dd', f'if={source}', f'of={image}', 'bs=1M', 'skip=2',
             'count=61', f'seek={start * 512}', 'oflag=seek_bytes',
             'conv=notrunc', 'status=none'], check=True)
        with qemu.Machine(*self.direct_kernel(),
                          *qemu.pmem(image)) as machine:
            seen = self.boot(machine)
            console = machine.console()
        self.assertRegex(console, 'GUEST-WARNING /dev/pmem0p1 refuses '
                                  'dax=always: .*DAX')
        self.assertEqual('/dev/pmem0p1', seen['root-device'])
        self.assertNotIn('dax', seen['root-options'])
        self.assertEqual('no', seen['root-file-dax'])


class RunningTestCase(GuestTestCase):
    """Each of these tests has a running guest on pmem."""

    def setUp(self) -> None:
        super().setUp()
        self.image = self.disk(512)
        self.machine = qemu.Machine(*self.direct_kernel(),
                                    *qemu.pmem(self.image))
        self.machine.__enter__()
        self.addCleanup(self.machine.__exit__)
        self.agent = self.machine.agent
        self.agent.wait_ready()

    def test_agent(self) -> None:
        result = self.agent.run('cat; echo oops >&2; exit 3', input='täxt')
        self.assertEqual(agent.Result(3, 'täxt', 'oops\n'), result)
        result = self.agent.run(['echo', 'a b', '$HOME'])
        self.assertEqual(agent.Result(0, 'a b $HOME\n', ''), result)
        result = self.agent.run('kill -KILL $$')
        self.assertEqual(-signal.SIGKILL, result.status)
        self.assertRaisesRegex(
            agent.CommandError, 'status 3 in the guest: no',
            self.agent.run, 'echo no; exit 3', check=True)
        self.assertRaisesRegex(
            agent.AgentError, 'nonesuch', self.agent.run, ['nonesuch'])
        self.assertRaisesRegex(
            agent.AgentTimeoutError,
            r'(?s)did not end within 5 s.*GUEST-READY',
            self.agent.run, 'sleep 60', timeout=5)
        self.assertIn('MemTotal', self.agent.run('cat /proc/meminfo').stdout)

    def test_agent_reads_files(self) -> None:
        # The file is read in more than one piece, and is not text.
        self.agent.run('dd if=/dev/urandom of=/root/f bs=1k count=2500',
                       check=True)
        data = self.agent.read_file('/root/f')
        self.assertEqual(2500 * 1024, len(data))
        (self.directory / 'f').write_bytes(data)
        expected = subprocess.run(['sha256sum'], input=data, check=True,
                                  capture_output=True).stdout.split()[0]
        seen = self.agent.run('sha256sum /root/f', check=True).stdout
        self.assertEqual(expected.decode(), seen.split()[0])
        self.assertRaisesRegex(agent.AgentError, 'nonesuch',
                               self.agent.read_file, '/nonesuch')

    def test_agent_of_a_stopped_guest(self) -> None:
        self.machine.qmp('stop')
        self.assertRaisesRegex(
            agent.AgentTimeoutError,
            r'(?s)waited 3 s for the guest agent.*GUEST-READY',
            self.agent.wait_ready, 3)
        # Late answers must not be taken for answers to the new command.
        self.machine.qmp('cont')
        self.agent.wait_ready()
        self.assertEqual('me\n', self.agent.run('echo me').stdout)

    def test_fsync_reaches_the_host(self) -> None:
        log = self.directory / 'strace'
        tracer = subprocess.Popen(
            ['strace', '-f', '-qq', '-y', '-e', 'trace=fsync,fdatasync',
             '-o', log, '-p', str(self.machine.pid)])
        try:
            # strace does not tell when it has attached, but the kernel does.
            status = pathlib.Path(f'/proc/{self.machine.pid}/status')
            wait.until('strace to attach', lambda: (
                f'TracerPid:\t{tracer.pid}\n' in status.read_text()), 10)
            seen = words(self.agent.run('probe fsync /root/f 30',
                                        check=True).stdout)
        finally:
            tracer.terminate()
            tracer.wait()
        self.assertEqual(30, seen['fsyncs'])
        self.assertEqual(0, seen['errors'])
        synced = re.findall(
            rf'f(?:data)?sync\(\d+<{re.escape(str(self.image))}>',
            log.read_text())
        self.assertGreaterEqual(len(synced), 30)

    def test_probe_tells_generations_and_damage_apart(self) -> None:
        run = self.agent.run
        run('probe write /root/f 4 1', check=True)
        run('probe verify /root/f 4 1', check=True)
        # Give block 5 generation 2, and change a byte of block 9.
        run('probe write /root/g 4 2', check=True)
        run('dd if=/root/g of=/root/f bs=4k skip=5 seek=5 count=1'
            ' conv=notrunc', check=True)
        run(f'printf x | dd of=/root/f bs=1 seek={9 * 4096 + 999}'
            ' conv=notrunc', check=True)
        result = run('probe verify /root/f 4 1')
        self.assertEqual(1, result.status)
        self.assertEqual(
            {'blocks': 1024, 'good': 1022, 'other_generation': 1,
             'corrupt': 1, 'first_bad': 5}, words(result.stdout))
        result = run('probe verify /root/f 5 1')
        self.assertEqual(1, result.status)
        self.assertIn('has 4194304 bytes, not 5242880', result.stderr)
        result = run('probe fsync /root/f none')
        self.assertEqual(2, result.status)
        self.assertIn('COUNT none: must be a whole number', result.stderr)

    def test_reads_do_not_fill_the_guest_page_cache(self) -> None:
        def cached_mib() -> int:
            meminfo = self.agent.run('cat /proc/meminfo', check=True).stdout
            kib, = re.findall(r'^Cached: +(\d+) kB', meminfo, re.MULTILINE)
            return int(kib) // 1024

        self.agent.run('probe write /root/f 200 1', check=True)
        before = cached_mib()
        self.agent.run('cat /root/f > /dev/null', check=True)
        self.assertLess(cached_mib() - before, 5)

    def test_agent_shuts_down(self) -> None:
        # libvirt does this when there is an agent. The agent does not answer.
        started = time.monotonic()
        self.assertRaises(
            agent.AgentTimeoutError, self.machine.agent_transport.call,
            'guest-shutdown', {'mode': 'powerdown'}, 10)
        self.machine.wait_exit(5)
        self.assertLess(time.monotonic() - started, 5)
        self.assertIn('GUEST-STOPPING poweroff', self.machine.console())
        self.assertNotIn('WARNING', self.machine.console())

    def test_power_button_while_files_are_written(self) -> None:
        self.agent.run('dd if=/dev/zero of=/root/f bs=1M count=2000'
                       ' > /dev/null 2>&1 &', check=True)
        started = time.monotonic()
        self.machine.qmp('system_powerdown')
        self.machine.wait_exit(10)
        self.addDetail('took', testtools.content.text_content(
            f'{time.monotonic() - started:.2f} s'))
        self.assertNotIn('WARNING', self.machine.console())
        # e2fsck would find a journal that was not closed.
        fsck = subprocess.run(
            ['/sbin/dumpe2fs', '-h', f'{self.image}?offset={2 * MIB}'],
            capture_output=True, text=True, check=True)
        self.assertNotIn('needs_recovery', fsck.stdout)
        self.assertRegex(fsck.stdout, r'Filesystem state: +clean')


class BuildTestCase(GuestTestCase):

    def test_a_second_build_returns_the_first(self) -> None:
        self.assertEqual(self.guest, guest.build())

    def test_sizes(self) -> None:
        for size in (0, -2, 30, 65):
            self.assertRaisesRegex(
                guest.GuestBuildError, f'size {size} MiB: must be a multiple '
                'of 2 MiB and at least 32 MiB', guest.build, size)

    def test_unknown_kernel(self) -> None:
        self.assertRaisesRegex(
            guest.GuestBuildError, 'nonesuch',
            guest.build, kernel_package='nonesuch')

    def test_tree_that_does_not_fit(self) -> None:
        root = self.directory / 'root'
        root.mkdir()
        (root / 'large').write_bytes(os.urandom(40 * MIB))
        self.assertRaisesRegex(
            guest.GuestBuildError, 'mkfs.ext4', disk.create,
            self.directory / 'small', 32, root)

    def test_grub_leaves_the_partition_table_alone(self) -> None:
        def table() -> bytes:
            return subprocess.run(
                ['/sbin/sfdisk', '--verify', '--json', image], check=True,
                capture_output=True).stdout

        image = self.disk()
        before = table()
        grub.install(image, 2048, 2048, 2)
        self.assertEqual(before, table())
        self.assertRaisesRegex(
            guest.GuestBuildError, 'GRUB has .* its partition 512',
            grub.install, image, 2048, 1, 2)


class MachineTestCase(base.BaseTestCase):

    def test_emulator_that_does_not_start(self) -> None:
        machine = qemu.Machine('-device', 'nonesuch')
        self.assertRaisesRegex(qemu.MachineError, 'nonesuch',
                               machine.__enter__)

    def test_nothing_is_left(self) -> None:
        with qemu.Machine() as machine:
            pid, directory = machine.pid, machine._directory
            self.assertEqual('running', machine.qmp('query-status')['status'])
        self.assertFalse(directory.exists())
        self.assertRaises(ProcessLookupError, os.kill, pid, 0)
