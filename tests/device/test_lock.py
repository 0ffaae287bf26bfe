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

"""Only one QEMU at a time has an image.

tests/device/test_defects.py shows what QEMU's own device does.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import pathlib
import socket
import struct
import time
import typing as ty

from lab.machine import emulators
from lab import wait
import testscenarios

from qemu.qmp import qmp_client
from tests.device import base
from tests.device import driver
from tests.device import emulator
from tests.device import test_migration

load_tests = testscenarios.load_tests_apply_scenarios

#: VIRTIO_PMEM_LOCK_OWNER of qemu-device/virtio-pmem-image.c.inc
LOCK_BYTE = 300
IN_USE = "memory backend 'mem[0-9]' is in use by another process or host"


def _flock(file: ty.IO[bytes], command: int, kind: int) -> int:
    """Call fcntl(2) for the lock's byte and return the type it reports."""
    flock = struct.pack('hhqqi4x', kind, os.SEEK_SET, LOCK_BYTE, 1, 0)
    left: int = struct.unpack(
        'hhqqi4x', fcntl.fcntl(file.fileno(), command, flock))[0]
    return left


def lock(file: ty.IO[bytes]) -> None:
    """Wait until the image is free; take it until the file is closed."""
    _flock(file, fcntl.F_OFD_SETLKW, fcntl.F_WRLCK)


def is_locked(file: ty.IO[bytes]) -> bool:
    """Whether anybody else holds the lock of the image."""
    return _flock(file, fcntl.F_OFD_GETLK, fcntl.F_WRLCK) != fcntl.F_UNLCK


class LockMixin:
    """A third process that looks at the image's lock, or takes it."""

    image: pathlib.Path

    def held(self) -> bool:
        """Whether anybody holds the lock of the image."""
        with self.image.open('r+b') as file:
            return is_locked(file)

    def wait_free(self) -> None:
        """Wait until nobody holds it: FUSE learns late of a process's end."""
        wait.until('the lock to be free', lambda: not self.held(), 5,
                   interval=0.01)

    def take(self) -> ty.IO[bytes]:
        """Wait until the image is free; take it until the file is closed."""
        file = self.image.open('r+b')
        lock(file)
        return file


class LockTestCase(LockMixin, base.DeviceTestCase):

    scenarios = base.EACH_VERSION
    _refused = 0

    def assertRefused(self, path: str | os.PathLike[str],
                      message: str = IN_USE, **kwargs: ty.Any) -> None:
        self._refused += 1
        # Each needs its own name, because QEMU leaves its sockets behind.
        self.assertRaisesRegex(
            RuntimeError, message, self.start_vm, path,
            name=f'refused{self._refused}', **kwargs)

    def _plug(self, vm: emulator.Emulator,
              path: str | os.PathLike[str]) -> None:
        vm.qmp.cmd('object-add', **{
            'qom-type': 'memory-backend-file', 'id': 'mem1', 'share': True,
            'mem-path': os.fspath(path), 'size': base.SIZE})
        try:
            vm.qmp.cmd('device_add', driver='virtio-pmem-pci', id='pmem1',
                       memdev='mem1', addr='0x11')
        except qmp_client.ExecuteError:
            # This would fail if the device had left a lock behind.
            vm.qmp.cmd('object-del', id='mem1')
            raise


class StartTestCase(LockTestCase):

    def test_second_emulator_is_refused_until_the_first_has_ended(
        self
    ) -> None:
        self.make_image()
        first = self.start_vm(self.image)
        self.assertRefused(self.image)
        self.assertEqual(0, self.bring_up(first).flush())
        first.qmp.cmd('quit')
        self.assertEqual(0, first.wait_exit())
        self.assertFalse(self.held())
        second = self.start_vm(self.image, name='second')
        self.assertEqual(0, self.bring_up(second).flush())

    def test_killed_emulator_leaves_no_lock(self) -> None:
        self.make_image()
        self.start_vm(self.image).close()
        self.start_vm(self.image, name='second')

    def test_other_names_are_the_same_image(self) -> None:
        self.make_image()
        hard, symbolic = self.directory / 'hard', self.directory / 'symbolic'
        hard.hardlink_to(self.image)
        symbolic.symlink_to(self.image)
        self.start_vm(self.image)
        self.assertRefused(hard)
        self.assertRefused(symbolic)

    def test_other_host_is_refused(self) -> None:
        here, there = self.mount('here'), self.mount('there')
        first = self.start_vm(here.path)
        self.assertRefused(there.path)
        # FUSE learns of its end a little later. The next QEMU waits for that.
        first.close()
        self.start_vm(there.path, name='second')

    def test_plugged_device_is_refused_until_the_first_has_ended(
        self
    ) -> None:
        self.make_image()
        other = self.directory / 'other'
        other.write_bytes(bytes(base.SIZE))
        first = self.start_vm(self.image)
        second = self.start_vm(other, name='second', machine=base.I440FX)
        self.assertRaisesRegex(
            qmp_client.ExecuteError, IN_USE, self._plug, second, self.image)
        self.assertEqual(0, self.bring_up(second).flush())
        first.close()
        self._plug(second, self.image)
        self.assertTrue(self.held())

    def test_second_device_of_the_same_emulator_is_refused(self) -> None:
        self.make_image()
        vm = self.start_vm(self.image, machine=base.I440FX)
        self.assertRaisesRegex(
            qmp_client.ExecuteError, IN_USE, self._plug, vm, self.image)
        self.assertEqual(0, self.bring_up(vm).flush())

    def test_lock_can_be_turned_off(self) -> None:
        self.make_image()
        self.start_vm(self.image)
        self.assertRefused(self.image, device='lock=on')
        unlocked = self.start_vm(self.image, name='off', device='lock=off')
        self.assertEqual('off', unlocked.pmem('lock'))
        self.assertNotIn('virtio-pmem', unlocked.log())

    def test_guest_without_a_lock_keeps_nobody_out(self) -> None:
        self.make_image()
        self.start_vm(self.image, device='lock=off')
        self.assertFalse(self.held())
        self.start_vm(self.image, name='second')

    def test_stop_and_reset_keep_it(self) -> None:
        self.make_image()
        vm = self.start_vm(self.image)
        for command in ('stop', 'system_reset', 'cont'):
            vm.qmp.cmd(command)
            vm.qmp.cmd('query-status')
            self.assertTrue(self.held(), command)
        self.bring_up(vm).reset()
        self.assertTrue(self.held())

    def test_private_mapping_needs_none(self) -> None:
        self.make_image()
        for name in ('one', 'two'):
            self.start_vm(self.image, name=name, memdev='share=off',
                          device='lock=on')
        self.assertFalse(self.held())
        self.start_vm(self.image, name='shared')

    def test_readers_share_it_and_keep_writers_out(self) -> None:
        self.make_image()
        reader = 'share=on,readonly=on'
        readers = [self.start_vm(self.image, name=name, memdev=reader)
                   for name in ('one', 'two')]
        self.assertRefused(self.image)
        for vm in readers:
            vm.close()
        self.start_vm(self.image, name='writer')
        self.assertRefused(self.image, memdev=reader)


class EjectTestCase(LockTestCase):

    def test_eject_releases_the_lock(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path, machine=base.I440FX)
        pmem = self.bring_up(vm)
        self.submit_held(mounted, pmem)
        pmem.eject()
        # The lock is free at once, while the ejected device still syncs.
        self.assertFalse(self.held())
        with self.take():
            mounted.release()
            mounted.wait(lambda: len(mounted.ended) == 1)
        self.assertEqual('running', vm.qmp.cmd('query-status')['status'])
        self._plug(vm, mounted.path)
        self.assertTrue(self.held())


class NoLocksTestCase(LockTestCase):
    """The file system has no locks, or locking fails."""

    LACKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

    def test_guest_starts_with_a_warning(self) -> None:
        mounted = self.mount()
        for error in self.LACKS:
            mounted.fail_locks(error)
            vm = self.start_vm(mounted.path, name=errno.errorcode[error])
            # The warning comes once, although the lock is taken again.
            vm.qmp.cmd('migrate', uri='exec:cat >/dev/null')
            self.assertEqual('completed', vm.wait_migrated()['status'])
            vm.qmp.cmd('cont')
            self.assertEqual(0, self.bring_up(vm).flush())
            self.assertEqual(1, vm.log().count(
                f"warning: virtio-pmem: memory backend 'mem0' cannot be "
                f'locked ({os.strerror(error)}), nothing keeps others'),
                vm.log())
            self.assertFalse(vm.pmem('locked'))
            vm.close()

    def test_guest_that_needs_the_lock_does_not_start(self) -> None:
        mounted = self.mount()
        for error in self.LACKS:
            mounted.fail_locks(error)
            self.assertRefused(
                mounted.path, "cannot lock memory backend 'mem0': "
                + os.strerror(error), device='lock=on')

    def test_any_other_error_refuses_the_guest(self) -> None:
        mounted = self.mount()
        mounted.fail_locks(errno.EIO)
        self.assertRefused(
            mounted.path,
            "cannot lock memory backend 'mem0': Input/output error")

    def test_destination_without_locks_is_refused(self) -> None:
        """The source has locked the image, so the lock must move with it."""
        here, there = self.mount('here'), self.mount('there')
        source = self.start_vm(here.path)
        pmem = self.bring_up(source)
        there.fail_locks(errno.ENOLCK)
        destination = self.incoming(there.path, 'destination')
        self.assertEqual(
            'failed', self.migrate(source, 'destination')['status'])
        # The destination may tell the source before it writes to its log.
        self.wait_log(destination,
                      'is locked at the source, and cannot be locked here')
        self.wait_status(source, 'running')
        self.assertEqual(0, pmem.flush())
        # With lock=off, the operator has accepted that.
        self.incoming(there.path, 'unlocked', device='lock=off')
        self.assertEqual(
            'completed', self.migrate(source, 'unlocked')['status'])

    def test_lock_is_no_weaker_when_it_is_taken_again(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        vm.qmp.cmd('migrate', uri='exec:cat >/dev/null')
        self.assertEqual('completed', vm.wait_migrated()['status'])
        mounted.fail_locks(errno.ENOLCK)
        vm.qmp.cmd('cont')
        self.wait_status(vm, 'io-error')
        self.assertRegex(vm.log(), "cannot run: cannot lock memory backend "
                                   "'mem0': No locks available")
        # The device tries again, whatever the error is.
        mounted.fail_locks(0)
        self.wait_status(vm, 'running')
        self.assertTrue(vm.pmem('locked'))
        self.assertEqual(0, pmem.flush())

    def test_security_policy_is_not_taken_for_another_user(self) -> None:
        mounted = self.mount()
        mounted.fail_locks(errno.EACCES)
        self.assertRefused(
            mounted.path, "cannot lock memory backend 'mem0': Permission "
            "denied(.|\n)*AppArmor")


class MovingTestCase(LockMixin, test_migration.MigrationTestCase):

    def assertHasIt(self, vm: emulator.Emulator,
                    other: emulator.Emulator) -> None:
        """Assert that one emulator holds the lock, and the other does not."""
        self.assertIsNone(other.process.poll())
        self.assertTrue(self.held())
        vm.close()
        self.wait_free()
        self.assertIsNone(other.process.poll())


class HandOverTestCase(MovingTestCase):

    def test_destination_takes_over_the_lock(self) -> None:
        destination = self.move()
        self.assertEqual(0, self.pmem.flush())
        self.assertHasIt(destination, self.source)

    def test_source_has_it_until_it_has_synced(self) -> None:
        self.submit_held(self.here, self.pmem)
        destination = self.expect_guest()
        moves = self.background(self.migrate, self.source, 'destination')
        self.assertPending(moves)
        self.assertTrue(self.held())
        self.here.release()
        self.assertEqual('completed', moves.result(20)['status'])
        self.wait_status(destination, 'running')

    def test_destination_has_it_before_the_guest_runs(self) -> None:
        destination = self.incoming(
            self.there.path, 'destination', '-S',
            binary=emulators.project(self.destination_version))
        info = self.migrate(self.source, 'destination')
        self.assertEqual('completed', info['status'])
        self.wait_status(destination, 'paused')
        self.source.close()
        self.assertTrue(self.held())
        destination.qmp.cmd('cont')
        self.pmem.qtest = destination.qtest
        self.assertEqual(0, self.pmem.flush())

    def test_guest_that_waits_in_vain_does_not_have_it(self) -> None:
        destination = self.incoming(
            self.there.path, 'destination', '-S',
            binary=emulators.project(self.destination_version))
        self.assertHasIt(self.source, destination)

    def test_source_whose_last_sync_fails_never_gives_it_up(self) -> None:
        self.expect_guest()
        third = self.background(self.take)
        self.here.fail(errno.EIO)
        self.assertEqual(
            'failed', self.migrate(self.source, 'destination')['status'])
        self.wait_status(self.source, 'running')
        self.assertPending(third)
        self.source.close()
        third.result(10).close()

    def test_source_has_it_again_after_a_failure(self) -> None:
        with (self.there.path.open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            self.assertEqual(ord('A'), mapped[0])
            destination = self.expect_guest()
            self.migrate(self.source, 'destination')
            self.assertStays(destination, 'remain in this host')
        self.assertTrue(self.held())
        self.source.close()
        self.wait_free()

    def test_guest_comes_back_from_a_destination_that_was_killed(
        self
    ) -> None:
        destination = self.move()
        destination.close()
        self.source.qmp.cmd('cont')
        self.wait_status(self.source, 'running')
        self.assertTrue(self.held())
        self.pmem.qtest = self.source.qtest
        self.assertEqual(0, self.pmem.flush())

    def test_destination_refuses_an_image_that_another_has(self) -> None:
        self.source.close()
        self.wait_free()
        self.source = self.start_vm(
            self.here.path, name='unlocked', device='lock=off')
        self.pmem = self.bring_up(self.source)
        with self.take():
            destination = self.expect_guest()
            self.there.path.read_bytes()
            self.migrate(self.source, 'destination')
            self.assertStays(destination,
                             'is in use by another process or host')
        self.assertNamesBackendOnce(destination, 'is in use by another')
        # The next destination is not refused.
        following = self.expect_guest('following')
        self.assertEqual(
            'completed', self.migrate(self.source, 'following')['status'])
        self.wait_status(following, 'running')


class StayingTestCase(MovingTestCase):
    """A destination that failed and does not exit by itself."""

    # QEMU 7.2 has no such option.
    scenarios = [way for way in test_migration.BOTH_WAYS
                 if way[1]['destination_version'] != '7.2']

    def test_destination_that_failed_later_and_stays_gives_it_up(
        self
    ) -> None:
        destination = self.start_vm(
            self.there.path, '-incoming', 'defer', name='destination',
            binary=emulators.project(self.destination_version),
            device='memaddr=0x104000000')
        destination.qmp.cmd('migrate-incoming', **{
            'uri': self.uri('destination'), 'exit-on-error': False})
        self.migrate(self.source, 'destination')
        self.wait_status(self.source, 'running')
        self.assertEqual(0, self.pmem.flush())
        self.assertEqual(
            'failed', destination.qmp.cmd('query-migrate')['status'])
        self.assertIn('virtio-pmem: memaddr', destination.log())
        self.assertHasIt(self.source, destination)


class RunAgainTestCase(LockTestCase):
    """A saved guest may run on, if nobody else has its image."""

    def setUp(self) -> None:
        super().setUp()
        self.make_image()
        self.vm = self.start_vm(self.image)
        self.pmem: driver.PmemDriver = self.bring_up(self.vm)
        self.vm.qtest.write_bytes(self.memaddr(self.vm), b'B' * base.PAGE)

    def _save(self) -> None:
        self.vm.qmp.cmd('migrate', uri='exec:cat >/dev/null')
        self.assertEqual('completed', self.vm.wait_migrated()['status'])
        self.assertFalse(self.held())

    def assertHeldBack(self, message: str = IN_USE) -> None:
        """The VM stops, QEMU logs why, and the image keeps its content."""
        self.wait_status(self.vm, 'io-error')
        self.assertRegex(self.vm.log(),
                         f'virtio-pmem: the guest cannot run: {message}')
        self.assertEqual(b'B' * base.PAGE,
                         self.image.read_bytes()[:base.PAGE])

    def test_saved_guest_runs_on(self) -> None:
        self._save()
        self.vm.qmp.cmd('cont')
        self.assertTrue(self.held())
        self.assertEqual(0, self.pmem.flush())

    def test_saved_guest_can_quit_while_another_has_it(self) -> None:
        self._save()
        with self.take():
            self.vm.qmp.cmd('quit')
            self.assertEqual(0, self.vm.wait_exit())

    def test_saved_guest_waits_for_another_that_ends(self) -> None:
        self._save()
        with self.take():
            # The monitor does not wait.
            self.vm.qmp.cmd('cont')
            self.assertHeldBack()
        self.wait_status(self.vm, 'running')
        self.assertTrue(self.held())
        self.assertEqual(0, self.pmem.flush())

    def test_saved_guest_does_not_write_to_what_another_has(self) -> None:
        self._save()
        second = self.start_vm(self.image, name='second')
        self.vm.qmp.cmd('cont')
        self.assertHeldBack()
        self.assertEqual(0, self.bring_up(second).flush())
        # It gives up after a while.
        self.wait_log(self.vm, f'gave up after 10 s: {IN_USE}')
        # It stays stopped when the other exits, until somebody resumes it.
        second.close()
        self.vm.qmp.cmd('cont')
        self.wait_status(self.vm, 'running')
        self.assertEqual(0, self.pmem.flush())

    def test_saved_guest_does_not_run_on_what_another_has_written(
        self
    ) -> None:
        self._save()
        second = self.start_vm(self.image, name='second')
        pmem = self.bring_up(second)
        second.qtest.write_bytes(self.memaddr(second) + base.MIB, b'C')
        self.assertEqual(0, pmem.flush())
        second.close()
        self.vm.qmp.cmd('cont')
        self.assertHeldBack('.*was written to by another')
        # It does not hold the lock either.
        self.assertFalse(self.held())

    def test_paused_guest_has_it_again_after_a_failure(self) -> None:
        """Nobody can start a guest on the image before this one is resumed."""
        self.vm.qmp.cmd('stop')
        with self._taken_from():
            self.assertFalse(self.vm.pmem('locked'))
        self.wait_locked(self.vm)
        self.assertIn(self.vm.qmp.cmd('query-status')['status'],
                      ('paused', 'postmigrate'))
        self.assertRaisesRegex(RuntimeError, IN_USE, self.start_vm,
                               self.image, name='second')
        self.vm.qmp.cmd('cont')
        self.assertEqual(0, self.pmem.flush())

    def test_guest_whose_failed_destination_keeps_it(self) -> None:
        """QEMU runs the guest again by itself, in another thread."""
        with self._taken_from():
            self.assertHeldBack()
            self.vm.qmp.cmd('query-status')
        self.wait_status(self.vm, 'running')
        self.assertEqual(0, self.pmem.flush())

    def wait_locked(self, vm: emulator.Emulator) -> None:
        wait.until('the lock', lambda: vm.pmem('locked'), 20, interval=0.02,
                   state=vm.log)

    @contextlib.contextmanager
    def _taken_from(self) -> ty.Iterator[None]:
        """Make a migration fail after another process took the image."""
        path = f'{self.directory}/taker.mig'
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            self.vm.qmp.cmd('migrate-set-capabilities', capabilities=[
                {'capability': 'return-path', 'state': True}])
            self.vm.qmp.cmd('migrate', uri=f'unix:{path}')
            connection, _ = listener.accept()
            with connection:
                third = self.background(self.take)
                connection.settimeout(0.1)
                deadline = time.monotonic() + 20
                while not third.done():
                    self.assertLess(time.monotonic(), deadline)
                    # The whole stream may arrive before the lock is free.
                    with contextlib.suppress(TimeoutError):
                        connection.recv(1 << 20)
        with third.result():
            self.assertEqual('failed', self.vm.wait_migrated()['status'])
            yield
