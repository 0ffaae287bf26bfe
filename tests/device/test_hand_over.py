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

"""What the source hands over when a guest moves, and keeps if it cannot."""

import errno
import mmap
import os
import pathlib
import subprocess
import time

from lab.machine import emulators
from lab import wait
import testscenarios

from qemu.qmp import qmp_client
from tests.device import backing
from tests.device import base
from tests.device import emulator
from tests.device import test_lock
from tests.device import test_migration

load_tests = testscenarios.load_tests_apply_scenarios


def second_disk(path: str | os.PathLike[str]) -> list[str]:
    return ['-object', 'memory-backend-file,id=mem1,share=on,'
            f'mem-path={os.fspath(path)},size={base.SIZE}',
            '-device', 'virtio-pmem-pci,memdev=mem1,id=pmem1,addr=0x11']


class TwoDisksTestCase(base.DeviceTestCase):
    """Either all disks of a guest are handed over, or none."""

    scenarios = test_migration.BOTH_WAYS

    destination_version: str

    def setUp(self) -> None:
        super().setUp()
        self.here, self.there = self.mount('here'), self.mount('there')
        self.second = self.directory / 'second'
        self.second.write_bytes(b'A' * base.SIZE)
        self.second_here, self.second_there = (
            self._mount_second(name) for name in ('here2', 'there2'))
        self.source = self.start_vm(
            self.here.path, *second_disk(self.second_here.path),
            name='source')
        self.pmem = self.bring_up(self.source)

    def _mount_second(self, name: str) -> backing.BackingFile:
        mounted = backing.BackingFile(self.second, self.directory / name)
        self._backings.append(mounted)
        self.addCleanup(mounted.close)
        return mounted

    def expect_guest(self, name: str = 'destination') -> emulator.Emulator:
        return self.incoming(
            self.there.path, name, *second_disk(self.second_there.path),
            binary=emulators.project(self.destination_version))

    def test_both_move(self) -> None:
        destination = self.expect_guest()
        self.assertEqual(
            'completed', self.migrate(self.source, 'destination')['status'])
        self.wait_status(destination, 'running')
        for name in ('pmem0', 'pmem1'):
            self.assertTrue(destination.qmp.cmd(
                'qom-get', path=f'/machine/peripheral/{name}',
                property='locked'))
        self.pmem.qtest = destination.qtest
        self.assertEqual(0, self.pmem.flush())

    def assertGoesOn(self, reason: str) -> None:
        """Assert that the source resumes at once, and keeps both disks."""
        began = time.monotonic()
        info = self.migrate(self.source, 'destination')
        self.assertEqual('failed', info['status'])
        self.assertIn(reason, info.get('error-desc', ''))
        self.wait_status(self.source, 'running')
        # The source never gave up its images.
        self.assertNotIn('cannot run', self.source.log())
        self.assertLess(time.monotonic() - began, 10)
        for path in (self.image, self.second):
            self.assertRaisesRegex(
                RuntimeError, test_lock.IN_USE, self.start_vm, path,
                name=path.name)

    def test_second_disk_that_cannot_be_synced(self) -> None:
        self.expect_guest()
        self.second_here.fail(errno.EIO)
        self.assertGoesOn('could not be synced (Input/output error)')
        self.assertEqual(0, self.pmem.flush())

    def test_first_disk_that_cannot_be_synced(self) -> None:
        self.expect_guest()
        self.here.fail(errno.EIO)
        self.assertGoesOn('could not be synced (Input/output error)')

    def test_healthy_disk_is_synced_at_the_next_stop(self) -> None:
        """The failed save had begun a sync of it."""
        disks = (self.here, self.second_here)
        for number, failing in enumerate(disks):
            destination = self.expect_guest(name=f'destination{number}')
            failing.fail(errno.EIO)
            self.assertEqual('failed', self.migrate(
                self.source, destination.name)['status'])
            self.wait_status(self.source, 'running')
            destination.close()
            for mounted in disks:
                mounted.hold()
                stop = self.background(self.source.qmp.cmd, 'stop')
                self.assertPending(stop)
                mounted.release()
                stop.result(20)
                self.source.qmp.cmd('cont')

    def test_second_disk_whose_file_was_removed(self) -> None:
        source = self.start_vm(
            self.directory / 'new', *second_disk(self.directory / 'new2'),
            name='new')
        (self.directory / 'new2').unlink()
        self.start_vm(
            self.directory / 'new3', '-incoming',
            f'unix:{self.uri("destination")[5:]}', name='destination',
            binary=emulators.project(self.destination_version))
        info = self.migrate(source, 'destination')
        self.assertEqual('failed', info['status'])
        self.assertIn('has no name', info['error-desc'])
        self.wait_status(source, 'running')

    def test_second_disk_that_the_destination_cannot_take(self) -> None:
        """By then the source has handed over the first, and takes it back."""
        with (self.second_there.path.open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            self.assertEqual(ord('A'), mapped[0])
            destination = self.expect_guest()
            self.migrate(self.source, 'destination')
            self.assertNotEqual(0, destination.wait_exit())
        self.wait_status(self.source, 'running')
        self.assertEqual(0, self.pmem.flush())

    def test_disk_that_the_source_does_not_have(self) -> None:
        alone = self.start_vm(self.directory / 'alone', name='alone')
        destination = self.incoming(
            self.directory / 'alone', 'destination',
            *second_disk(self.second_there.path), device='lock=off',
            binary=emulators.project(self.destination_version))
        info = self.migrate(alone, 'destination')
        self.assertEqual('failed', info['status'])
        self.assertNotEqual(0, destination.wait_exit())
        self.assertIn("'mem1': the migration stream has no state of this "
                      'device', destination.log())
        self.wait_status(alone, 'running')


class ClaimTestCase(test_lock.MovingTestCase):
    """Nobody else gets the image while it moves to the destination."""

    def test_third_cannot_start_while_a_destination_waits(self) -> None:
        self.source.close()
        self.wait_free()
        self.expect_guest()
        # Not even if the source has exited: it may have saved the guest.
        self.assertRaisesRegex(
            RuntimeError, test_lock.IN_USE, self.start_vm, self.here.path,
            name='third')

    def test_second_destination_is_refused(self) -> None:
        self.expect_guest()
        self.assertRaisesRegex(
            RuntimeError, test_lock.IN_USE, self.expect_guest, 'second')

    def test_claim_ends_with_the_move(self) -> None:
        destination = self.move()
        self.source.close()
        following = self.incoming(self.here.path, 'following')
        self.assertEqual(
            'completed', self.migrate(destination, 'following')['status'])
        self.wait_status(following, 'running')

    def test_claim_ends_with_its_emulator(self) -> None:
        self.expect_guest('killed').close()
        self.move()


class OtherContentTestCase(base.DeviceTestCase):
    """A migration onto something other than the guest's image."""

    scenarios = base.EACH_VERSION

    def assertRefused(self, source: emulator.Emulator, path: pathlib.Path,
                      reason: str) -> None:
        destination = self.incoming(path, 'destination', binary=self.binary())
        self.assertEqual(
            'failed', self.migrate(source, 'destination')['status'])
        # The destination may tell the source before it writes to its log.
        wait.until(repr(reason),
                   lambda: reason in source.log() + destination.log(), 20,
                   state=lambda: source.log() + destination.log())
        self.wait_status(source, 'running')
        self.assertEqual(0, self.bring_up(source).flush())

    def test_file_that_was_removed(self) -> None:
        self.make_image()
        source = self.start_vm(self.image)
        self.image.unlink()
        self.assertRefused(source, self.image, 'has no name: it was removed')

    def test_file_that_was_replaced(self) -> None:
        self.make_image()
        source = self.start_vm(self.image)
        other = self.directory / 'other'
        other.write_bytes(self.image.read_bytes())
        other.rename(self.image)
        self.assertRefused(source, self.image, 'has no name: it was removed')

    def test_file_that_was_truncated(self) -> None:
        self.make_image()
        source = self.start_vm(self.image)
        other = self.directory / 'other'
        other.write_bytes(self.image.read_bytes())
        os.truncate(self.image, base.SIZE // 2)
        self.assertRefused(source, other, 'was truncated to 8388608 bytes')

    def test_file_of_the_same_size(self) -> None:
        """The first pages are equal, as in two images of one system."""
        self.make_image()
        source = self.start_vm(self.image)
        other = self.directory / 'other'
        other.write_bytes(b'A' * base.PAGE + b'B' * (base.SIZE - base.PAGE))
        self.image.read_bytes()
        self.assertRefused(source, other, "the file is not the guest's image")

    def test_memory_without_a_name_does_not_migrate(self) -> None:
        self.make_image()
        source = self.start_vm(
            self.image, '-object',
            'memory-backend-memfd,id=mem1,size=16M,share=on', '-device',
            'virtio-pmem-pci,memdev=mem1,id=pmem1,addr=0x11')
        self.assertRaisesRegex(
            qmp_client.ExecuteError, 'has no name', source.qmp.cmd,
            'migrate', uri='exec:cat >/dev/null')
        self.assertEqual(
            'running', source.qmp.cmd('query-status')['status'])


class ConvergeTestCase(base.DeviceTestCase):
    """Dirty pages are written before the guest is stopped, not after."""

    scenarios = test_migration.BOTH_WAYS

    destination_version: str

    def test_storage_is_slow(self) -> None:
        here, there = self.mount('here'), self.mount('there')
        source = self.start_vm(here.path, name='source',
                               device='early-writeback=0')
        self.bring_up(source)
        address = self.memaddr(source)
        destination = self.incoming(
            there.path, 'destination',
            binary=emulators.project(self.destination_version))
        for offset in range(0, base.SIZE, base.MIB):
            source.qtest.write_bytes(address + offset, b'B' * base.MIB)
        # Each write is 128 KiB, so all of them take 6.4 s.
        here.delay_writes(0.05)
        source.qmp.cmd('migrate-set-parameters', **{'downtime-limit': 300})
        info = self.migrate(source, 'destination')
        self.assertEqual('completed', info['status'], destination.log())
        self.assertGreater(info['total-time'], 4500)
        self.assertLess(info['downtime'], 1900)
        self.wait_status(destination, 'running')
        self.assertEqual(b'B' * base.SIZE, self.image.read_bytes())

    def test_four_disks_are_synced_side_by_side(self) -> None:
        mounts = []
        options = []
        for number in range(1, 5):
            image = self.directory / f'image{number}'
            image.write_bytes(bytes(base.SIZE))
            mounted = backing.BackingFile(
                image, self.directory / f'mount{number}')
            self._backings.append(mounted)
            self.addCleanup(mounted.close)
            mounts.append(mounted)
            options += [
                '-object', f'memory-backend-file,id=mem{number},share=on,'
                f'mem-path={mounted.path},size={base.SIZE}',
                '-device', f'virtio-pmem-pci,memdev=mem{number},'
                f'id=pmem{number},addr={0x10 + number:#x}']
        vm = self.start_vm(self.mount().path, *options)
        for mounted in mounts:
            mounted.hold()
        stop = self.background(vm.qmp.cmd, 'stop')
        for mounted in mounts:
            # No sync waits for another.
            mounted.wait(lambda mounted=mounted: mounted.begun == 1)
        self.assertPending(stop)
        for mounted in mounts:
            mounted.release()
        stop.result(20)
        self.assertEqual([[0]] * 4, [mounted.ended for mounted in mounts])


class SameHostTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def test_page_cache_is_the_same_and_stays(self) -> None:
        self.make_image()
        source = self.start_vm(self.image, name='source')
        pmem = self.bring_up(source)
        source.qtest.write_bytes(self.memaddr(source), b'B' * base.PAGE)
        destination = self.incoming(
            self.image, 'destination', binary=self.binary())
        self.assertEqual(
            'completed', self.migrate(source, 'destination')['status'])
        self.wait_status(destination, 'running')
        pmem.qtest = destination.qtest
        self.assertEqual(b'B', destination.qtest.read_bytes(
            self.memaddr(destination), 1))
        self.assertEqual(0, pmem.flush())


class ReadersTestCase(base.DeviceTestCase):
    """A read-only image, which many guests may use at once."""

    scenarios = base.EACH_VERSION

    def test_it_moves_to_where_another_reads_it(self) -> None:
        here, there = self.mount('here'), self.mount('there')
        reader = 'share=on,readonly=on'
        source = self.start_vm(here.path, name='source', memdev=reader)
        other = self.start_vm(there.path, name='other', memdev=reader)
        self.assertEqual(b'A', other.qtest.read_bytes(self.memaddr(other), 1))
        destination = self.incoming(there.path, 'destination', memdev=reader,
                                    binary=self.binary())
        self.assertEqual(
            'completed', self.migrate(source, 'destination')['status'])
        self.wait_status(destination, 'running')
        self.assertEqual(b'A', destination.qtest.read_bytes(
            self.memaddr(destination), 1))


class SnapshotTestCase(base.DeviceTestCase):
    """A snapshot of the VM would contain its RAM but not its image."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.make_image()
        disk = self.directory / 'state.qcow2'
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', disk, '64M'],
            check=True)
        self.vm = self.start_vm(
            self.image, '-drive', f'file={disk},if=none,id=state')

    def assertGoesOn(self) -> None:
        self.wait_status(self.vm, 'running')
        self.assertTrue(self.vm.pmem('locked'))
        self.assertEqual(0, self.bring_up(self.vm).flush())

    def test_savevm(self) -> None:
        said = self.vm.qmp.cmd(
            'human-monitor-command', **{'command-line': 'savevm one'})
        self.assertIn('Error', said)
        self.assertIn('cannot save a snapshot of the VM: it would not '
                      "contain memory backend 'mem0'", said + self.vm.log())
        self.assertGoesOn()

    def test_savevm_of_a_paused_guest(self) -> None:
        self.vm.qmp.cmd('stop')
        self.assertIn('Error', self.vm.qmp.cmd(
            'human-monitor-command', **{'command-line': 'savevm one'}))
        self.vm.qmp.cmd('cont')
        self.assertGoesOn()


class StartTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def test_memory_without_a_file_is_refused(self) -> None:
        self.make_image()
        self.assertRaisesRegex(
            RuntimeError, "'mem1' has no file to flush",
            self.start_vm, self.image,
            '-object', 'memory-backend-ram,id=mem1,size=16M',
            '-device', 'virtio-pmem-pci,memdev=mem1,addr=0x11')

    def test_image_that_would_be_discarded_is_refused(self) -> None:
        self.make_image()
        self.assertRaisesRegex(
            RuntimeError, "'mem0' has discard-data=on", self.start_vm,
            self.image, memdev='share=on,discard-data=on')
        self.assertEqual(b'A' * base.PAGE,
                         self.image.read_bytes()[:base.PAGE])

    def test_size_that_linux_cannot_use_is_logged(self) -> None:
        self.make_image(base.SIZE + base.PAGE)
        vm = self.start_vm(self.image, size=base.SIZE + base.PAGE)
        self.assertIn('size of memory backend \'mem0\' is 16781312 bytes, '
                      'which is not a multiple of 2 MiB', vm.log())

    def test_pages_that_were_not_written_are_not_seen_again(self) -> None:
        """A sync that fails leaves them in the page cache, marked clean."""
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        address = self.memaddr(vm)
        pmem = self.bring_up(vm)
        mounted.fail_writes(errno.EIO)
        vm.qtest.write_bytes(address, b'B' * base.PAGE)
        self.assertEqual(-1, pmem.flush())
        self.assertEqual(b'B', vm.qtest.read_bytes(address, 1))
        mounted.fail_writes(0)
        vm.close()
        self.assertEqual(b'A', self.image.read_bytes()[:1])
        with mounted.path.open('rb') as file:
            self.assertEqual(b'B', file.read(1))
        following = self.start_vm(mounted.path, name='following')
        self.assertEqual(b'A', following.qtest.read_bytes(address, 1))

    def test_locked_memory_leaves_the_image_to_the_host(self) -> None:
        """-overcommit mem-lock=on locks RAM, not the image."""
        here, there = self.mount('here'), self.mount('there')
        source = self.start_vm(here.path, name='source')
        destination = self.incoming(
            there.path, 'destination', '-overcommit', 'mem-lock=on',
            binary=self.binary())
        self.assertEqual(
            'completed', self.migrate(source, 'destination')['status'],
            destination.log())
        self.wait_status(destination, 'running')
