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

"""Migrations through libvirt that fail at the last moment.

A guest with a root disk and two ephemeral disks, as the driver makes them,
migrates between two hosts. One of its disks fails: either its last sync at the
source, or a read at the destination. ``FAKEDAX_FAULTS`` in the environment
sets how many migrations fail at each end; the default is 3, one for each disk.
"""

from concurrent import futures
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import statistics
import struct
import subprocess
import tempfile
import threading
import time
import typing as ty

import libvirt
import libvirt_qemu
from oslotest import base
import testtools

from lab import guest
from lab.machine import agent
from lab.machine import emulators
from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import layout
from tests.device import backing
from tests.device import test_lock
from tests.libvirt import guests
from tests.libvirt import hosts

FAULTS = int(os.environ.get('FAKEDAX_FAULTS', '3'))

NAME = 'instance-00000001'
#: The size of each file in MiB.
DISKS = {'disk': 256, 'disk.eph0': 32, 'disk.eph1': 32}
#: A file on each disk that the guest can sync.
PLACES = {'disk': '/root', 'disk.eph0': '/run/eph0', 'disk.eph1': '/run/eph1'}

#: Within how many seconds the guest must run again.
AT_ONCE = 1.0
_PATIENCE_SECONDS = 60

SYNC_FAILED = ("virtio-pmem: memory backend 'mem{alias}' could not be synced "
               '(Input/output error), the guest must not leave this host')


@dataclasses.dataclass(frozen=True)
class Event:
    """A QMP event: its name, and its time by QEMU's clock."""

    name: str
    time: float
    data: ty.Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a migration failed.

    :ivar said: what ``virsh migrate`` printed
    :ivar stopped_at: when the source sent STOP, by its clock
    :ivar resumed_at: when it sent RESUME
    """

    said: str
    stopped_at: float
    resumed_at: float


class Seconds:
    """Durations, in seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._took: list[float] = []

    def add(self, seconds: float) -> None:
        """Add a duration, which must not exceed the limit.

        :raises AssertionError: it does
        """
        self._took.append(seconds)
        if seconds > AT_ONCE:
            raise AssertionError(f'{self._what}: {seconds:.3f} s')

    def __str__(self) -> str:
        return (f'{len(self._took)} times {self._what}: '
                f'{1000 * statistics.median(self._took):.0f} ms in the '
                f'median, {1000 * max(self._took):.0f} ms at most')


def root_and_two_ephemeral_disks(directory: pathlib.Path) -> str:
    """The domain that the driver makes for a flavor with these disks.

    :param directory: has the disks, under the names that Nova gives them
    """
    built = guest.build()
    made = guests.guest(NAME, *(directory / name for name in DISKS))
    made.os_kernel = str(built.kernel)
    made.os_initrd = str(built.initrd)
    made.os_cmdline = guest.COMMAND_LINE
    domain.convert(made, str(directory), lambda _path: True,
                   emulators.project())
    xml: str = made.to_xml()
    return xml


class LastSyncTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        # Short: the path of a UNIX socket has at most 107 bytes.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='libvirt-'))
        self.addCleanup(shutil.rmtree, self.directory)
        self.images = self.directory / 'instance'
        self._make_images()
        self.source, self.destination = (
            hosts.Host(number, self.directory) for number in (1, 2))
        #: The disks of each host, by their files' names.
        self.here, self.there = (
            {name: self._mount(node, name) for name in DISKS}
            for node in (self.source, self.destination))
        self._threads = futures.ThreadPoolExecutor()
        self.addCleanup(self._threads.shutdown)
        hosts.Events.run()
        self._up(self.source, self.here)
        self._up(self.destination, self.there)
        connection = self._enter(self.source.libvirt())
        self.domain = connection.defineXML(
            root_and_two_ephemeral_disks(self.images))
        self._listen(connection)
        self.agent = agent.Agent(
            agent.DomainTransport(self.domain),
            lambda: self.source.console.read_text(errors='replace'))

    def _enter(self, context: contextlib.AbstractContextManager[ty.Any]
               ) -> ty.Any:
        entered = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return entered

    def _make_images(self) -> None:
        self.images.mkdir()
        for name, mib in DISKS.items():
            image = self.images / name
            if name == 'disk':
                guest.build().copy_disk(image)
            else:
                image.touch()
            os.truncate(image, mib << 20)
            if name != 'disk':
                subprocess.run(['mkfs.ext4', '-q', '-b', '4096', image],
                               check=True)
            layout.allocate(str(image), mib << 20)

    def _mount(self, node: hosts.Host, name: str) -> backing.BackingFile:
        mounted = backing.BackingFile(
            self.images / name, self.directory / f'{node.name}-{name}')
        self.addCleanup(mounted.close)
        return mounted

    def _up(self, node: hosts.Host,
            disks: dict[str, backing.BackingFile]) -> None:
        self._enter(node.up({
            self.images / name: mounted.path
            for name, mounted in disks.items()}))
        self.addCleanup(self._tell_logs, node)
        for mounted in disks.values():
            # While its sync is held, QEMU cannot be killed.
            self.addCleanup(mounted.release)

    def _tell_logs(self, node: hosts.Host) -> None:
        for log in (node.state / 'libvirtd.log', node.console,
                    node.state / f'log/qemu/{NAME}.log'):
            if log.exists():
                self.addDetail(
                    f'{node.name} {log.name}',
                    testtools.content.text_content(
                        log.read_text(errors='replace')[-8000:]))

    def _listen(self, connection: libvirt.virConnect) -> None:
        self._events: list[Event] = []
        self._told = threading.Condition()
        registered = libvirt_qemu.qemuMonitorEventRegister(
            connection, self.domain, None, self._tell_event, None)
        self.addCleanup(libvirt_qemu.qemuMonitorEventDeregister, connection,
                        registered)

    def _tell_event(
            self, _connection: ty.Any, _domain: ty.Any, name: str,
            seconds: int, micros: int, details: str | None, _opaque: ty.Any
    ) -> None:
        with self._told:
            self._events.append(Event(
                name, seconds + micros / 1e6, json.loads(details or 'null')))
            self._told.notify_all()

    def wait_event(self, name: str, since: int) -> Event:
        """Wait for an event after the first ``since`` ones; return it."""
        def found() -> Event | None:
            return next((event for event in self._events[since:]
                         if event.name == name), None)

        with self._told:
            event = self._told.wait_for(found, _PATIENCE_SECONDS)
        if event is None:
            raise TimeoutError(
                f'no {name} in {_PATIENCE_SECONDS} s: {self._events[since:]}')
        return event

    def boot(self) -> None:
        """Start the guest, and have it mount its disks."""
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.create()
        self.agent.wait_ready()
        self.agent.run(
            'for number in 1 2; do at=/run/eph$((number - 1)); mkdir -p $at '
            '&& mount -o dax=always /dev/pmem$number $at || exit; done',
            check=True)
        self.assert_syncs(())

    def sync_in_guest(self, name: str) -> int:
        """Write to a disk and sync it; return the number of errors."""
        done = self.agent.run(f'probe fsync {PLACES[name]}/f 1')
        if 'Read-only file system' in done.stderr:
            return 1
        match = re.search(r'fsyncs=1 errors=(\d)', done.stdout)
        self.assertIsNotNone(match, done)
        assert match is not None
        return int(match[1])

    def migrate(self) -> str:
        """Try to migrate, and return what virsh says when that fails.

        The flags are those that Nova uses.
        """
        done = self.source.virsh(
            'migrate', NAME, '--live', '--p2p', '--undefinesource',
            '--persistent', self.destination.uri,
            f'unix://{self.directory}/migration')
        self.assertNotEqual(0, done.returncode, done.stdout)
        return done.stdout.strip()

    def fail_to_migrate(self, release: ty.Callable[[], None] | None = None
                        ) -> Outcome:
        """Try to migrate, and check what all failures have in common.

        :param release: called when QEMU waits, at the switchover, for a sync
            that is held
        """
        since = len(self._events)
        migration = self._threads.submit(self.migrate)
        if release:
            self._wait_switchover(migration)
            release()
        said = migration.result(_PATIENCE_SECONDS)
        outcome = Outcome(said, self.wait_event('STOP', since).time,
                          self.wait_event('RESUME', since).time)
        self.assertEqual('running (unpaused)', self.source.virsh(
            'domstate', NAME, '--reason').stdout.strip())
        self.assertEqual([], self.destination.domains())
        for name in DISKS:
            self.wait_locks(name)
            self.assertTrue(self.device(name, 'locked'))
        self.assertNotIn('cannot run', self.source.log(NAME))
        self.agent.wait_ready(5)
        return outcome

    def _wait_switchover(self, migration: futures.Future[str]) -> None:
        """Wait until QEMU's main loop no longer answers."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not migration.done():
            asked = self._threads.submit(self.domain.jobStats)
            if not futures.wait([asked], 0.5).done:
                return
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)

    def qmp(self, command: str, **arguments: str) -> ty.Any:
        """Run a QMP command in the source's QEMU."""
        answer = self.source.virsh(
            'qemu-monitor-command', NAME,
            json.dumps({'execute': command, 'arguments': arguments})).stdout
        return json.loads(answer)['return']

    def device(self, name: str, asked: str) -> ty.Any:
        """A property of a disk's device."""
        return self.qmp('qom-get', path=f'/machine/peripheral/{alias(name)}',
                        property=asked)

    def assert_syncs(self, failing: ty.Collection[str]) -> None:
        """Assert that a sync in the guest fails on these disks only."""
        for name in DISKS:
            self.assertEqual(
                int(name in failing), self.sync_in_guest(name), name)

    def wait_locks(self, name: str) -> None:
        """Wait until a QEMU has locked a disk and none claims it."""
        deadline = time.monotonic() + 5
        with (self.images / name).open('r+b') as file:
            while (seen := [_locked(file, byte) for byte in (
                    test_lock.LOCK_BYTE, test_lock.LOCK_BYTE + 1)]
                   ) != [True, False]:
                self.assertLess(time.monotonic(), deadline, seen)
                time.sleep(0.02)


def alias(name: str) -> str:
    """libvirt's alias of the device of a disk."""
    disk_id = disk.DiskId.from_path(name)
    assert disk_id is not None
    return disk_id.alias


def _locked(file: ty.IO[bytes], byte: int) -> bool:
    flock = fcntl.fcntl(file, fcntl.F_OFD_GETLK, struct.pack(
        'hhqqi4x', fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = struct.unpack('hhqqi4x', flock)[0]
    return kind != fcntl.F_UNLCK


class FaultsTestCase(LastSyncTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.held_up = Seconds('from STOP to RESUME, as the destination fails')
        self.after_failure = Seconds('from the sync that failed to RESUME')
        self.said: set[str] = set()

    def test_guest_goes_on_at_the_source_and_virsh_shows_why(self) -> None:
        for turn in range(FAULTS):
            name = list(DISKS)[turn % len(DISKS)]
            self.boot()
            busy = turn % 2 == 1
            if busy:
                self.keep_flushing(name)
            fault = (self.other_content, self.unreadable)[turn // 2 % 2]
            self.fail_at_the_destination(fault(name))
            # This comes last: no flush succeeds again without a new QEMU.
            self.fail_at_the_source(name, busy)
        print('\n'.join([str(self.held_up), str(self.after_failure),
                         *sorted(self.said)]))

    def keep_flushing(self, name: str) -> None:
        """Have the guest write to a disk and flush it all the time."""
        failing = self.here[name]
        begun = failing.begun
        self.agent.run(
            f'probe fsync {PLACES[name]}/busy 1000000 >/dev/null 2>&1 &',
            check=True)
        failing.wait(lambda: failing.begun > begun + 2)

    def fail_at_the_destination(
            self, fault: contextlib.AbstractContextManager[str]) -> None:
        with fault as reason:
            outcome = self.fail_to_migrate()
        self.said.add(outcome.said)
        self.held_up.add(outcome.resumed_at - outcome.stopped_at)
        self.assertIn(reason, outcome.said)
        self.assertIn(reason, self.destination.log(NAME))
        self.assertEqual([0] * len(DISKS), [
            self.device(each, 'errors') for each in DISKS])
        self.assert_syncs(())

    @contextlib.contextmanager
    def other_content(self, name: str) -> ty.Iterator[str]:
        """The destination has another file in place of the disk."""
        other = self.directory / 'other'
        subprocess.run(['cp', '--sparse=always', self.images / name, other],
                       check=True)
        with other.open('r+b') as file:
            file.write(b'other')
        self.destination.run(
            ['mount', '--bind', other, self.images / name], check=True)
        yield "the file is not the guest's image: at offset 0x0"
        self.destination.run(['umount', self.images / name], check=True)

    @contextlib.contextmanager
    def unreadable(self, name: str) -> ty.Iterator[str]:
        """The destination's storage fails when QEMU reads the content."""
        self.there[name].fail_reads(errno.EIO)
        yield 'cannot read memory backend'
        self.there[name].fail_reads(0)

    def fail_at_the_source(self, name: str, busy: bool) -> None:
        failing = self.here[name]
        failing.hold()
        if busy:
            failing.wait(lambda: failing.begun > len(failing.ended))
        ended = len(failing.ended)

        def release() -> None:
            # The vCPUs have stopped. The sync that QEMU waits for succeeds: it
            # is that of a flush in flight, or of the stop. The next one fails,
            # which no guest has asked for: that of the stop, or of the save.
            failing.fail(0, errno.EIO)
            failing.release()

        outcome = self.fail_to_migrate(release)
        self.said.add(outcome.said)
        self.assertEqual([0, errno.EIO], failing.ended[ended:ended + 2])
        # If the sync was tried again, its success did not hide the error.
        self.assertEqual(1, failing.ended[ended:].count(errno.EIO))
        self.after_failure.add(
            outcome.resumed_at - failing.ended_at[ended + 1])
        for seen in (outcome.said, self.source.log(NAME),
                     self.qmp('query-migrate')['error-desc']):
            self.assertIn(SYNC_FAILED.format(alias=alias(name)), seen)
        self.assertEqual(
            [(int(each == name), errno.EIO * (each == name))
             for each in DISKS],
            [(self.device(each, 'errors'), self.device(each, 'last-error'))
             for each in DISKS])
        self.assert_syncs((name,))
