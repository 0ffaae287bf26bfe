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

"""Moving a guest between two QEMUs, each with a page cache of its own."""

import errno
import mmap
import pathlib
import subprocess

from lab.machine import emulators
import testscenarios

from qemu.qmp import qmp_client
from tests.device import backing
from tests.device import base
from tests.device import emulator

load_tests = testscenarios.load_tests_apply_scenarios

BOTH_WAYS = [
    (f'{source}-to-{destination}', {
        'version': source, 'destination_version': destination})
    for source in base.VERSIONS for destination in base.VERSIONS
]


class MigrationTestCase(base.DeviceTestCase):

    scenarios = BOTH_WAYS

    destination_version: str

    def setUp(self) -> None:
        super().setUp()
        self.here, self.there = self.mount('here'), self.mount('there')
        self.source = self.start_vm(self.image_of(self.here), name='source')
        self.pmem = self.bring_up(self.source)
        self.address = self.memaddr(self.source)

    def image_of(self, mounted: backing.BackingFile) -> pathlib.Path:
        """What a QEMU of a host opens."""
        return mounted.path

    def expect_guest(self, name: str = 'destination',
                     **kwargs: str) -> emulator.Emulator:
        return self.incoming(
            self.image_of(self.there), name,
            binary=emulators.project(self.destination_version), **kwargs)

    def move(self, **kwargs: str) -> emulator.Emulator:
        """Migrate the guest, and its driver with it."""
        destination = self.expect_guest(**kwargs)
        info = self.migrate(self.source, 'destination')
        self.assertEqual('completed', info['status'], destination.log())
        self.wait_status(destination, 'running')
        self.pmem.qtest = destination.qtest
        return destination

    def assertStays(self, destination: emulator.Emulator,
                    message: str) -> None:
        """The destination refuses, and the guest continues at the source."""
        self.assertNotEqual(0, destination.wait_exit())
        self.assertIn(message, destination.log())
        self.wait_status(self.source, 'running')
        self.assertEqual(0, self.pmem.flush())


class StateTestCase(MigrationTestCase):

    def test_guest_goes_on_where_it_was(self) -> None:
        # Leave the start of the ring.
        for _ in range(3):
            self.assertEqual(0, self.pmem.flush())
        destination = self.move()
        self.assertEqual(15, self.pmem.status)
        self.assertEqual(self.address, self.memaddr(destination))
        self.assertEqual([0] * 3, [self.pmem.flush() for _ in range(3)])
        # Each emulator counts for itself: counters do not move.
        self.assertEqual(3, destination.pmem('requests'))
        self.assertEqual(3, len(self.there.ended))

    def test_flush_in_flight_is_answered_before_the_guest_leaves(
        self
    ) -> None:
        heads = [self.submit_held(self.here, self.pmem)]
        heads += [self.pmem.submit() for _ in range(3)]
        destination = self.expect_guest()
        moves = self.background(self.migrate, self.source, 'destination')
        self.assertPending(moves, 1)
        self.here.release()
        self.assertEqual('completed', moves.result(20)['status'])
        self.wait_status(destination, 'running')
        self.pmem.qtest = destination.qtest
        self.assertEqual([(head, 0) for head in heads], self.pmem.wait(4))
        self.assertEqual(0, self.pmem.flush())

    def test_there_and_back_with_a_flush_in_flight_each_time(self) -> None:
        places = [(self.here, self.version),
                  (self.there, self.destination_version)]
        vm = self.source
        for turn in range(4):
            mounted, _ = places[turn % 2]
            other, version = places[(turn + 1) % 2]
            fill = bytes([ord('B') + turn])
            vm.qtest.write_bytes(self.address, fill * base.PAGE)
            head = self.submit_held(mounted, self.pmem)
            name = f'turn{turn}'
            following = self.incoming(
                other.path, name, binary=emulators.project(version))
            moves = self.background(self.migrate, vm, name)
            self.assertPending(moves, 0.2)
            mounted.release()
            self.assertEqual('completed', moves.result(20)['status'])
            self.wait_status(following, 'running')
            vm.close()
            vm = following
            self.pmem.qtest = vm.qtest
            self.assertEqual([(head, 0)], self.pmem.wait(1))
            self.assertEqual(
                fill * base.PAGE,
                vm.qtest.read_bytes(self.address, base.PAGE))
            self.assertEqual(0, vm.pmem('cache-left'))
            self.assertEqual(0, self.pmem.flush())

    def test_fail_stop_moves_with_the_guest(self) -> None:
        self.here.fail(errno.EIO)
        self.assertEqual(-1, self.pmem.flush())
        destination = self.move()
        self.assertEqual(errno.EIO, destination.pmem('last-error'))
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual(0, self.there.begun)

    def test_other_size_or_address_is_refused(self) -> None:
        for name, message, device, size in (
            ('address', 'virtio-pmem: memaddr', 'memaddr=0x104000000',
             base.SIZE),
            ('size', 'virtio-pmem: size of memdev',
             f'memaddr={self.address:#x}', base.SIZE // 2),
        ):
            destination = self.incoming(
                self.there.path, name, device=device, size=size,
                binary=emulators.project(self.destination_version))
            self.migrate(self.source, name)
            self.assertStays(destination, message)

    def test_cancelled_migration_leaves_the_guest_as_it_was(self) -> None:
        self.expect_guest()
        self.source.qmp.cmd('migrate-set-parameters', **{'max-bandwidth': 1})
        self.source.qmp.cmd('migrate', uri=self.uri('destination'))
        self.source.qmp.cmd('migrate_cancel')
        self.assertEqual('cancelled', self.source.wait_migrated()['status'])
        self.wait_status(self.source, 'running')
        self.assertEqual(0, self.pmem.flush())


class LastSyncTestCase(MigrationTestCase):
    """A guest whose last sync failed must not leave its host."""

    def test_migration_fails_and_the_guest_runs_on(self) -> None:
        destination = self.expect_guest()
        self.here.fail(errno.EIO)
        info = self.migrate(self.source, 'destination')
        self.assertEqual('failed', info['status'])
        self.wait_status(self.source, 'running')
        self.assertIn('the guest must not leave this host',
                      self.source.log())
        self.assertEqual(errno.EIO, self.source.pmem('last-error'))
        # QEMU 7.2 leaves the destination waiting.
        destination.close()
        # A second try fails too, although its sync would succeed.
        again = self.expect_guest('again')
        self.assertEqual(
            'failed', self.migrate(self.source, 'again')['status'])
        self.wait_status(self.source, 'running')
        again.close()
        # The guest learns of it at its next flush. Then it may leave.
        self.assertEqual(-1, self.pmem.flush())
        third = self.expect_guest('third')
        self.assertEqual(
            'completed', self.migrate(self.source, 'third')['status'])
        self.wait_status(third, 'running')
        self.assertEqual(errno.EIO, third.pmem('last-error'))

    def test_error_of_an_earlier_stop_counts(self) -> None:
        self.here.fail(errno.ENOSPC)
        self.source.qmp.cmd('stop')
        self.source.qmp.cmd('cont')
        self.expect_guest()
        self.assertEqual(
            'failed', self.migrate(self.source, 'destination')['status'])
        self.wait_status(self.source, 'running')
        self.assertEqual(errno.ENOSPC, self.source.pmem('last-error'))

    def test_private_mapping_does_not_migrate(self) -> None:
        private = self.start_vm(self.here.path, name='private',
                                memdev='share=off')
        self.expect_guest()
        # The command fails before anything is sent.
        self.assertRaisesRegex(
            qmp_client.ExecuteError, r'is not shared \(share=on\)',
            self.migrate, private, 'destination')
        self.wait_status(private, 'running')


class PageCacheTestCase(MigrationTestCase):
    """The destination drops its cached pages, or refuses the guest."""

    def test_stale_pages_are_dropped_and_counted(self) -> None:
        self.there.path.read_bytes()
        offsets = range(0, base.SIZE, base.MIB)
        for offset in offsets:
            self.source.qtest.write_bytes(self.address + offset, b'B')
        cached = self.cached()
        self.assertGreater(cached, base.SIZE // 2)
        destination = self.move()
        self.assertEqual(cached, destination.pmem('cache-dropped'))
        self.assertEqual(0, destination.pmem('cache-left'))
        for offset in offsets:
            self.assertEqual(b'B', destination.qtest.read_bytes(
                self.address + offset, 1))

    def cached(self) -> int:
        """The bytes of the image in the destination's page cache."""
        return int(subprocess.run(
            ['fincore', '--bytes', '--noheadings', '--output', 'RES',
             self.there.path], check=True, capture_output=True).stdout)

    def test_page_that_cannot_be_dropped_is_refused(self) -> None:
        # Another process has it mapped, and has read it.
        with (self.there.path.open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            self.assertEqual(ord('A'), mapped[0])
            destination = self.expect_guest()
            self.migrate(self.source, 'destination')
            self.assertStays(destination,
                             "remain in this host's page cache")
        self.assertNamesBackendOnce(destination, "in this host's page cache")
        self.assertRegex(
            destination.log(),
            "memory backend 'mem0': [1-9][0-9]* bytes remain")
        # The next destination is not refused.
        following = self.expect_guest('following')
        self.assertEqual(
            'completed', self.migrate(self.source, 'following')['status'])
        self.wait_status(following, 'running')

    def test_page_that_was_changed_here_is_refused(self) -> None:
        with (self.there.path.open('r+b') as file,
              mmap.mmap(file.fileno(), 0) as mapped):
            destination = self.expect_guest()
            mapped[base.PAGE] = ord('Z')
            self.migrate(self.source, 'destination')
            self.assertStays(destination, 'were changed here and are not on')
        self.assertNamesBackendOnce(destination, 'were changed here')

    def test_image_that_cannot_be_read_is_refused(self) -> None:
        destination = self.expect_guest()
        self.there.fail_reads(errno.EIO)
        self.migrate(self.source, 'destination')
        self.assertStays(destination, 'at offset 0x0: Input/output error')
        self.assertNamesBackendOnce(destination, 'cannot read memory backend')

    def test_coherent_storage_needs_no_drop(self) -> None:
        with (self.there.path.open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            self.assertEqual(ord('A'), mapped[0])
            destination = self.move(device='drop-cache=off')
            self.assertEqual(0, destination.pmem('cache-dropped'))
            self.assertEqual(0, self.pmem.flush())

    def test_without_a_return_path_the_source_may_believe_it_went_well(
        self
    ) -> None:
        # This is a limitation of QEMU, not of the device: whoever manages
        # both must check that the destination runs before ending the source.
        with (self.there.path.open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            self.assertEqual(ord('A'), mapped[0])
            destination = self.expect_guest()
            info = self.migrate(
                self.source, 'destination', return_path=False)
            self.assertNotEqual(0, destination.wait_exit())
        # The migration fails if the destination exits before all is sent.
        self.assertIn(info['status'], ('completed', 'failed'))
        if info['status'] == 'completed':
            self.wait_status(self.source, 'postmigrate')
            self.source.qmp.cmd('cont')
        self.wait_status(self.source, 'running')
        self.assertEqual(0, self.pmem.flush())


class SaveTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def save(self, vm: emulator.Emulator) -> pathlib.Path:
        saved = self.directory / 'saved'
        vm.qmp.cmd('stop')
        vm.qmp.cmd('migrate', uri=f'exec:cat >{saved}')
        self.assertEqual('completed', vm.wait_migrated()['status'])
        return saved

    def test_saved_guest_comes_back_on_the_same_host(self) -> None:
        mounted = self.mount()
        vm = self.start_vm(mounted.path)
        pmem = self.bring_up(vm)
        vm.qtest.write_bytes(self.memaddr(vm), b'B' * base.PAGE)
        saved = self.save(vm)
        vm.qmp.cmd('quit')
        vm.wait_exit()
        restored = self.start_vm(
            mounted.path, '-incoming', f'exec:cat {saved}', name='restored')
        self.wait_status(restored, 'paused')
        restored.qmp.cmd('cont')
        pmem.qtest = restored.qtest
        self.assertEqual(0, pmem.flush())
        self.assertEqual(b'B', restored.qtest.read_bytes(
            self.memaddr(restored), 1))

    def test_image_that_was_changed_meanwhile(self) -> None:
        self.make_image()
        vm = self.start_vm(self.image)
        saved = self.save(vm)
        vm.qmp.cmd('quit')
        vm.wait_exit()
        with self.image.open('r+b') as file:
            file.write(b'Z')
        restored = self.start_vm(self.image, '-incoming', 'defer',
                                 name='restored')
        restored.qmp.cmd('migrate-incoming', uri=f'exec:cat {saved}')
        self.assertNotEqual(0, restored.wait_exit())
        self.assertNamesBackendOnce(
            restored, "the file is not the guest's image: at offset 0x0")

    def test_incoming_guest_that_is_never_started_can_quit(self) -> None:
        vm = self.incoming(self.mount().path, 'waiting')
        vm.qmp.cmd('quit')
        # It waits for nothing; it would wait twice as long for a lock.
        self.assertEqual(0, vm.wait_exit(5))
