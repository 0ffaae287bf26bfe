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
"""A real guest moves to and fro while it writes and flushes.

Two mounts of one image act as two hosts. When a move begins, a sync is in
flight at the source; it does not end before the switchover waits for it.

``FAKEDAX_MOVES`` in the environment sets the number of moves, 10 by default.
"""

from concurrent import futures
import os
import time
import typing as ty

from lab import guest
from lab.machine import emulators
from lab.machine import qemu
from lab import wait
from tests.device import backing
from tests.device import base

MOVES = int(os.environ.get('FAKEDAX_MOVES', '10'))

SIZE_MIB = 512
CHURN_MIB = 16
#: Syncs until the writer has checked its whole file, 512 blocks per sync.
ROUND = CHURN_MIB * 256 // 512

_LOG_PORT = ('/dev/$(basename $(dirname '
             '$(grep -lx churn /sys/class/virtio-ports/*/name)))')


class Failed(Exception):
    """A migration did not complete."""


class MovesTestCase(base.DeviceTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.guest = self.make_guest_image(SIZE_MIB * base.MIB)
        self.log = self.directory / 'churn'
        self.log.touch()
        self.places = [self.mount('here'), self.mount('there')]
        self.downtimes: list[int] = []

    def start(self, place: backing.BackingFile, *options: str,
              properties: str = '') -> qemu.Machine:
        """Start a QEMU with the test guest on one of the mounts."""
        machine = qemu.Machine(
            *qemu.direct_kernel(self.guest.kernel, self.guest.initrd,
                                guest.COMMAND_LINE),
            *qemu.pmem(place.path, properties=properties),
            '-chardev', f'file,id=churn,append=on,path={self.log}',
            '-device', 'virtserialport,chardev=churn,name=churn',
            *options, emulator=emulators.project())
        machine.__enter__()
        self.addCleanup(machine.__exit__)
        # While its sync is held, QEMU cannot be killed.
        self.addCleanup(place.release)
        return machine

    def begin(self, flushers: int) -> qemu.Machine:
        """Boot, and start a writer and more flushers, which run forever."""
        machine = self.start(self.places[0])
        machine.agent.wait_ready()
        machine.agent.run(f'probe write /root/churn {CHURN_MIB} 1 && sync',
                          check=True)
        machine.agent.run(
            f'probe churn /root/churn {CHURN_MIB} {_LOG_PORT} '
            f'>/dev/null 2>/root/churn.error &', check=True)
        machine.agent.run(f'probe fsync /root/many 10000 {flushers} '
                          '>/dev/null 2>/root/many.error &', check=True)
        self.wait_acknowledged(0)
        return machine

    def lines(self, kind: str) -> list[list[int]]:
        """The numbers in the complete lines of a kind in the writer's log."""
        return [[int(word) for word in words] for name, *words in
                (line.split() for line in
                 self.log.read_text().split('\n')[:-1]) if name == kind]

    def wait_acknowledged(self, before: int) -> None:
        """Wait until the writer has made more than ``before`` syncs."""
        wait.until(f'more than {before} syncs of the writer',
                   lambda: len(self.lines('ack')) > before, 60,
                   state=lambda: len(self.lines('ack')))

    def move(self, source: qemu.Machine, turn: int,
             **kwargs: ty.Any) -> qemu.Machine:
        """Migrate, with a sync in flight at the switchover.

        :raises Failed: with the errors of the destination
        """
        here = self.places[turn % 2]
        there = self.places[(turn + 1) % 2]
        uri = f'unix:{self.directory}/{turn}.migration'
        destination = self.start(there, '-incoming', uri, **kwargs)
        here.hold()
        here.wait(lambda: here.begun > len(here.ended))
        source.qmp('migrate-set-capabilities', capabilities=[
            {'capability': 'return-path', 'state': True}])
        source.qmp('migrate', uri=uri)
        info = self._wait_migrated(source, here)
        if info['status'] != 'completed':
            raise Failed(destination.errors())
        # The switchover waited for the sync that was in flight.
        self.assertGreater(info['downtime'], 400)
        self.downtimes.append(info['downtime'])
        source.__exit__()
        return destination

    def _wait_migrated(self, source: qemu.Machine,
                       here: backing.BackingFile) -> dict[str, ty.Any]:
        """Wait for the migration; release the sync once QEMU waits for it."""
        deadline = time.monotonic() + 120
        while True:
            asked = self.background(source.qmp, 'query-migrate')
            # QEMU's main loop waits at the switchover, and nowhere else.
            if not futures.wait([asked], 0.5).done:
                here.release()
            info: dict[str, ty.Any] = asked.result(60)
            if info.get('status') in ('completed', 'failed', 'cancelled'):
                here.release()
                return info
            self.assertLess(time.monotonic(), deadline, info)
            time.sleep(0.05)

    def generations(self) -> list[str]:
        """What a new guest finds of the writer's file on storage."""
        with qemu.Machine(
                *qemu.direct_kernel(self.guest.kernel, self.guest.initrd,
                                    guest.COMMAND_LINE),
                *qemu.pmem(self.image),
                emulator=emulators.project()) as machine:
            machine.agent.wait_ready()
            return machine.agent.run(
                f'probe generations /root/churn {CHURN_MIB}',
                check=True).stdout.split()

    def test_no_hang_no_wrong_byte_no_lost_write(self) -> None:
        machine = self.begin(64)
        for turn in range(MOVES):
            acknowledged = len(self.lines('ack'))
            machine = self.move(machine, turn)
            self.wait_acknowledged(acknowledged + ROUND)
        # Nothing has failed, and none of the 65 tasks hangs: one that did
        # could not be killed.
        machine.agent.wait_ready()
        self.assertEqual('', machine.agent.run(
            'cat /root/churn.error /root/many.error').stdout)
        acknowledged = len(self.lines('ack'))
        machine.agent.run('killall -9 probe; while pidof probe >/dev/null;'
                          ' do sleep 0.1; done', check=True, timeout=60)
        # What is not on storage is lost: QEMU's exit does not write the
        # mount's page cache.
        machine.__exit__()
        self.assertEqual([], self.lines('bad'))
        latest: dict[int, int] = {}
        for block, generation, _looked_at in self.lines('ack'):
            latest[block] = generation
        found = self.generations()
        self.assertNotIn('-', found)
        self.assertEqual([], [
            (block, generation, found[block])
            for block, generation in latest.items()
            if int(found[block]) < generation])
        looked_at = self.lines('ack')[-1][2]
        print(f'{MOVES} moves: {acknowledged} acknowledged writes, '
              f'{looked_at} blocks looked at, downtime '
              f'{sorted(self.downtimes)[len(self.downtimes) // 2]} ms in the '
              f'median, {max(self.downtimes)} ms at most, a sync in flight '
              'at each')

    def test_without_the_drop_the_guest_reads_stale_blocks(self) -> None:
        """What the test above finds when the protection is off."""
        machine = self.begin(1)
        for turn in range(2):
            acknowledged = len(self.lines('ack'))
            try:
                machine = self.move(machine, turn, properties='drop-cache=off')
            except Failed as failed:
                # One of the pages that the device compares was stale.
                self.assertIn("is different from the source's", str(failed))
                return
            # The writer may have made the first of these syncs at the source.
            # One sync alone would then leave nothing stale there.
            self.wait_acknowledged(acknowledged + ROUND)
        self.wait_acknowledged(len(self.lines('ack')) + ROUND)
        self.assertNotEqual([], self.lines('bad'))
