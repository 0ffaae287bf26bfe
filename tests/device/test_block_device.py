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

"""A block device as the backing of a device, such as a volume has.

Loop devices, whose files are read and written past the page cache: what the
host caches is the block device. Two of them over two mounts of one file are
the block devices of two hosts.
"""

import contextlib
import errno
import mmap
import os
import pathlib
import signal
import socket
import time
import typing as ty

from lab.machine import emulators
from lab.machine import loop
from lab.machine import pagecache
import testscenarios

from tests.device import backing
from tests.device import base
from tests.device import emulator
from tests.device import test_lock
from tests.device import test_migration

load_tests = testscenarios.load_tests_apply_scenarios


class BlockDeviceTestCase(base.DeviceTestCase):
    """One host, and storage below its block device that the test controls."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.mounted = self.mount()
        self.node = self.attach(self.mounted.path)
        self.vm = self.start_vm(self.node)
        self.pmem = self.bring_up(self.vm)
        self.address = self.memaddr(self.vm)

    def store(self, offset: int = 0) -> None:
        self.vm.qtest.write_bytes(self.address + offset, b'B' * base.PAGE)

    def assertFailedOnce(self, begun: int) -> None:
        """No flush succeeds, and no other sync is tried."""
        self.mounted.wait(lambda: self.mounted.begun >= begun)
        self.assertEqual([-1] * 3, [self.pmem.flush() for _ in range(3)])
        self.assertEqual(begun, self.mounted.begun)
        self.assertEqual(errno.EIO, self.vm.pmem('last-error'))
        self.assertEqual(1, self.vm.pmem('errors'))
        self.assertIn("cannot sync memory backend 'mem0': Input/output error",
                      self.vm.log())


class FlushTestCase(BlockDeviceTestCase):

    def test_answer_waits_for_the_sync_of_what_is_below(self) -> None:
        self.store()
        head = self.submit_held(self.mounted, self.pmem)
        # The device has its data by then, and has been told to keep them.
        self.assertEqual(b'B' * base.PAGE,
                         self.image.read_bytes()[:base.PAGE])
        self.assertNoAnswer(self.pmem)
        self.mounted.release()
        self.assertEqual([(head, 0)], self.pmem.wait(1))

    def test_stop_makes_durable_what_nobody_flushed(self) -> None:
        self.store(base.MIB)
        begun = self.mounted.begun
        self.vm.qmp.cmd('stop')
        self.mounted.wait(lambda: len(self.mounted.ended) > begun)
        self.assertEqual(b'B' * base.PAGE, self.image.read_bytes()[
            base.MIB:base.MIB + base.PAGE])

    def test_much_is_written_before_a_flush_asks_for_it(self) -> None:
        self.vm.close()
        vm = self.start_vm(
            self.node, name='early', device='early-writeback=65536')
        pmem = self.bring_up(vm)
        self.assertEqual(0, pmem.flush())
        vm.qtest.write_bytes(self.memaddr(vm), b'C' * base.MIB)
        deadline = time.monotonic() + 20
        while self.image.read_bytes()[:base.MIB] != b'C' * base.MIB:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        self.assertGreater(vm.pmem('writebacks'), 0)
        self.assertEqual(1, vm.pmem('syncs'))


class FailStopTestCase(BlockDeviceTestCase):

    def test_sync_that_fails_below(self) -> None:
        self.store()
        begun = self.mounted.begun
        # Whatever the reason was: a block device has no other.
        self.mounted.fail(errno.ENOSPC)
        self.assertEqual(-1, self.pmem.flush())
        self.assertFailedOnce(begun + 1)

    def test_write_that_fails_below(self) -> None:
        self.mounted.fail_writes(errno.EIO)
        begun = self.mounted.begun
        self.store()
        self.assertEqual(-1, self.pmem.flush())
        self.mounted.fail_writes(0)
        # Linux would now sync with success, and has lost the page.
        self.assertFailedOnce(begun)
        self.assertEqual(b'A', self.image.read_bytes()[:1])

    def test_pages_that_were_not_written_are_not_seen_again(self) -> None:
        self.mounted.fail_writes(errno.EIO)
        self.store()
        self.assertEqual(-1, self.pmem.flush())
        self.mounted.fail_writes(0)
        self.vm.close()
        with self.node.open('rb') as file:
            self.assertEqual(b'B', file.read(1))
        following = self.start_vm(self.node, name='following')
        self.assertEqual(b'A', following.qtest.read_bytes(self.address, 1))
        self.assertEqual(0, self.bring_up(following).flush())

    def test_page_that_cannot_be_read(self) -> None:
        self.mounted.fail_reads(errno.EIO)
        self.assertEndsAt(base.SIZE // 2)

    def assertEndsAt(self, offset: int) -> None:
        """An access to a page ends QEMU, which says why."""
        self.assertRaises(emulator.QTestError, self.store, offset)
        self.assertEqual(-signal.SIGBUS, self.vm.wait_exit())
        self.assertIn(f"memory backend 'mem0': no page at offset {offset:#x}: "
                      'the file was truncated, its file system is full, or '
                      'its storage cannot be read', self.vm.log())

    def test_storage_that_is_gone(self) -> None:
        """Errors, and no flush that hangs."""
        self.store()
        begun = self.mounted.begun
        self.mounted.disconnect()
        self.assertEqual(-1, self.pmem.flush())
        self.assertFailedOnce(begun)
        self.assertTrue(self.vm.answers())
        # What is in the page cache can still be read.
        self.assertEqual(b'B', self.vm.qtest.read_bytes(self.address, 1))
        self.vm.qmp.cmd('stop')
        self.vm.qmp.cmd('cont')
        self.assertEndsAt(base.SIZE // 2)


class OneHostTestCase(base.DeviceTestCase):
    """One host, and a block device of a file."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        # A file in RAM may have no direct I/O, and its directory no nodes.
        self.put_image_on_disk()
        self.node = self.attach(self.make_image())
        self.other = self.image.with_name('node')
        status = self.node.stat()
        os.mknod(self.other, status.st_mode, status.st_rdev)


class StartTestCase(OneHostTestCase):

    def test_smaller_device_is_refused(self) -> None:
        self.assertRaisesRegex(
            RuntimeError, 'does not match|too small|larger',
            self.start_vm, self.node, size=2 * base.SIZE)

    def test_second_emulator_is_refused(self) -> None:
        self.start_vm(self.node)
        self.assertRaisesRegex(
            RuntimeError, test_lock.IN_USE, self.start_vm, self.node,
            name='second')

    def test_lock_is_one_of_the_node(self) -> None:
        """Not of the device: whoever attaches a volume lets one have it."""
        self.start_vm(self.node)
        self.start_vm(self.other, name='second')


class NodeTestCase(OneHostTestCase):
    """A device is not its node: libvirt makes one for each QEMU."""

    def setUp(self) -> None:
        super().setUp()
        self.vm = self.start_vm(self.node, name='source')
        self.pmem = self.bring_up(self.vm)
        self.address = self.memaddr(self.vm)
        self.vm.qtest.write_bytes(self.address, b'B' * base.PAGE)

    def save(self, vm: emulator.Emulator) -> dict[str, ty.Any]:
        vm.qmp.cmd('migrate', uri='exec:cat >/dev/null')
        return vm.wait_migrated()

    def touch(self) -> None:
        """As udev does when the device has changed, or its rules."""
        os.utime(self.node, (0, 0))

    def assertGoesOn(self) -> None:
        self.wait_status(self.vm, 'running')
        self.assertNotIn('cannot run', self.vm.log())
        self.assertTrue(self.vm.pmem('locked'))
        self.assertEqual(0, self.pmem.flush())

    def test_saved_guest_runs_on_after_the_node_was_touched(self) -> None:
        self.assertEqual('completed', self.save(self.vm)['status'])
        self.touch()
        self.vm.qmp.cmd('cont')
        self.assertGoesOn()

    def test_guest_whose_migration_was_cancelled_runs_on(self) -> None:
        with self._given_up():
            self.touch()
            self.vm.qmp.cmd('migrate_cancel')
        # migration_cancel() of QEMU cuts the return path before it notes that
        # it cancels; migration_completion(), which waits for an answer there,
        # may note a failure first.
        self.assertIn(self.vm.wait_migrated()['status'],
                      ('cancelled', 'failed'))
        self.assertGoesOn()

    def test_guest_whose_migration_failed_runs_on(self) -> None:
        with self._given_up():
            self.touch()
        self.assertEqual('failed', self.vm.wait_migrated()['status'])
        self.assertGoesOn()

    @contextlib.contextmanager
    def _given_up(self) -> ty.Iterator[None]:
        """Read the guest's stream until the source has given the image up.

        Nobody answers, so the migration goes on. It fails at the end.
        """
        path = f'{self.directory}/reader.mig'
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            self.vm.qmp.cmd('migrate-set-capabilities', capabilities=[
                {'capability': 'return-path', 'state': True}])
            self.vm.qmp.cmd('migrate', uri=f'unix:{path}')
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(0.1)
                deadline = time.monotonic() + 20
                while self._held():
                    self.assertLess(time.monotonic(), deadline)
                    with contextlib.suppress(TimeoutError):
                        connection.recv(1 << 20)
                yield

    def _held(self) -> bool:
        """Whether anybody holds the lock of the node."""
        with self.node.open('r+b') as file:
            return test_lock.is_locked(file)

    def test_guest_does_not_run_on_what_was_written_by_another_node(
        self
    ) -> None:
        self.assertEqual('completed', self.save(self.vm)['status'])
        with self.other.open('r+b') as file:
            file.write(b'Z')
        self.vm.qmp.cmd('cont')
        self.wait_status(self.vm, 'io-error')
        self.assertIn("the guest cannot run: cannot reacquire the block "
                      "device: memory backend 'mem0': the file is not the "
                      "guest's image: at offset 0x0", self.vm.log())
        # Nor does it keep the device from another.
        self.assertFalse(self._held())

    def test_page_cache_is_the_same_for_every_node(self) -> None:
        destination = self.incoming(
            self.other, 'destination', binary=self.binary())
        info = self.migrate(self.vm, 'destination')
        self.assertEqual('completed', info['status'], destination.log())
        self.wait_status(destination, 'running')
        self.pmem.qtest = destination.qtest
        self.assertEqual(b'B', destination.qtest.read_bytes(self.address, 1))
        self.assertEqual(0, self.pmem.flush())

    def test_node_that_was_removed(self) -> None:
        vm = self.start_vm(self.other, name='other')
        self.other.unlink()
        self.assertEqual('completed', self.save(vm)['status'], vm.log())

    def test_device_that_was_truncated_does_not_move(self) -> None:
        os.truncate(self.image, base.SIZE // 2)
        loop.resize(self.node)
        self.assertEqual('failed', self.save(self.vm)['status'])
        self.assertIn("the block device of memory backend 'mem0' was "
                      'unplugged or truncated, it has 8388608 bytes',
                      self.vm.log())
        self.assertGoesOn()


class MoveTestCase(test_migration.MigrationTestCase):
    """Two hosts, each with a block device of one file."""

    def setUp(self) -> None:
        self._nodes: dict[backing.BackingFile, pathlib.Path] = {}
        super().setUp()

    def image_of(self, mounted: backing.BackingFile) -> pathlib.Path:
        if mounted not in self._nodes:
            self._nodes[mounted] = self.attach(mounted.path)
        return self._nodes[mounted]

    def test_stale_pages_are_dropped_and_counted(self) -> None:
        node = self.image_of(self.there)
        destination = self.expect_guest()
        # What looks for file systems on a new device reads it, for example.
        node.read_bytes()
        self.assertEqual(base.SIZE, pagecache.cached_bytes(node))
        offsets = range(0, base.SIZE, base.MIB)
        for offset in offsets:
            self.source.qtest.write_bytes(
                self.address + offset, b'B' * base.PAGE)
        info = self.migrate(self.source, 'destination')
        self.assertEqual('completed', info['status'], destination.log())
        self.wait_status(destination, 'running')
        self.assertGreaterEqual(
            destination.pmem('cache-dropped'), base.SIZE)
        self.assertEqual(0, destination.pmem('cache-left'))
        for offset in offsets:
            self.assertEqual(b'B' * base.PAGE, destination.qtest.read_bytes(
                self.address + offset, base.PAGE))
        self.pmem.qtest = destination.qtest
        self.assertEqual(0, self.pmem.flush())

    def test_page_that_cannot_be_dropped_is_refused(self) -> None:
        with (self.image_of(self.there).open('rb') as file,
              mmap.mmap(file.fileno(), base.SIZE,
                        prot=mmap.PROT_READ) as mapped):
            self.assertEqual(ord('A'), mapped[0])
            destination = self.expect_guest()
            self.migrate(self.source, 'destination')
            self.assertStays(destination, "remain in this host's page cache")

    def test_page_that_was_changed_here_is_refused(self) -> None:
        with (self.image_of(self.there).open('r+b') as file,
              mmap.mmap(file.fileno(), base.SIZE) as mapped):
            destination = self.expect_guest()
            mapped[base.PAGE] = ord('Z')
            self.migrate(self.source, 'destination')
            self.assertStays(destination, 'were changed here and are not on')

    def test_there_and_back_with_a_flush_in_flight_each_time(self) -> None:
        hosts = [(self.here, self.version),
                 (self.there, self.destination_version)]
        vm = self.source
        for turn in range(4):
            mounted, _ = hosts[turn % 2]
            other, version = hosts[(turn + 1) % 2]
            # It has seen what the guest had before.
            self.image_of(other).read_bytes()
            fill = bytes([ord('B') + turn]) * base.PAGE
            vm.qtest.write_bytes(self.address, fill)
            head = self.submit_held(mounted, self.pmem)
            following = self.incoming(
                self.image_of(other), f'turn{turn}',
                binary=emulators.project(version))
            moves = self.background(self.migrate, vm, following.name)
            self.assertPending(moves, 0.2)
            mounted.release()
            self.assertEqual('completed', moves.result(20)['status'])
            self.wait_status(following, 'running')
            vm.close()
            vm = following
            self.pmem.qtest = vm.qtest
            self.assertEqual([(head, 0)], self.pmem.wait(1))
            self.assertEqual(
                fill, vm.qtest.read_bytes(self.address, base.PAGE))
            self.assertEqual(0, self.pmem.flush())

    def test_guest_whose_last_sync_fails_stays(self) -> None:
        self.expect_guest()
        self.source.qtest.write_bytes(self.address, b'B')
        self.here.fail(errno.EIO)
        self.assertEqual(
            'failed', self.migrate(self.source, 'destination')['status'])
        self.wait_status(self.source, 'running')
        self.assertIn('the guest must not leave this host',
                      self.source.log())
        self.assertEqual(-1, self.pmem.flush())

    def test_other_volume_of_the_same_size_is_refused(self) -> None:
        other = self.directory / 'other'
        other.write_bytes(b'Z' * base.SIZE)
        mounted = backing.BackingFile(other, self.directory / 'wrong')
        self.addCleanup(mounted.close)
        destination = self.incoming(
            self.attach(mounted.path), 'destination',
            binary=emulators.project(self.destination_version))
        self.migrate(self.source, 'destination')
        self.assertStays(
            destination, "the file is not the guest's image: at offset 0x0")

    def test_larger_device_is_the_same_volume(self) -> None:
        """Storage may round the size of a volume up."""
        larger = self.directory / 'larger'
        larger.write_bytes(b'A' * base.SIZE + bytes(base.MIB))
        mounted = backing.BackingFile(larger, self.directory / 'round')
        self.addCleanup(mounted.close)
        destination = self.incoming(
            self.attach(mounted.path), 'destination',
            binary=emulators.project(self.destination_version))
        info = self.migrate(self.source, 'destination')
        self.assertEqual('completed', info['status'], destination.log())
        self.wait_status(destination, 'running')
