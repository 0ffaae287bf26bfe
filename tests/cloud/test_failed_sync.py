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

"""A server with a disk that cannot be synced."""

import errno
import pathlib
import re
import shutil
import subprocess
import tempfile

from lab.deploy import host
from lab.deploy import supervision
from lab.machine import agent
from lab import paths
from lab import wait
from tests.cloud import base
from tests.cloud import moving
from tests.device import backing

_DISK = 'disk.eph0'
_KEEP = '/run/eph/keep'
_MOUNT = 'mkdir -p /run/eph && mount -o dax=always /dev/pmem1 /run/eph'


class FailedSyncTest(moving.MigrationTestCase):

    #: The disk of an instance is under a mount that nova-compute does not
    #: expect.
    alone = True

    def setUp(self) -> None:
        super().setUp()
        self.server = self.create(
            self.flavor(base.ROOT | {'fakedax:disks': 'root,ephemeral'},
                        ephemeral=1), self.image())
        self.act(self.server, 'SHUTOFF', 'stop_server')
        self.mounted = self.interpose()
        self.act(self.server, 'ACTIVE', 'start_server')

    def test_started_again_it_reads_what_is_on_storage(self) -> None:
        """Not what the page cache has, marked clean by the failed sync."""
        self.run_in_guest(_MOUNT)
        self.run_in_guest(f'probe write {_KEEP} 4 7 && sync')
        self.mounted.fail_writes(errno.EIO)
        self.assertRaisesRegex(
            agent.CommandError, 'Input/output error',
            self.run_in_guest, f'probe write {_KEEP} 4 8')
        # The guest sees what it has stored.
        self.run_in_guest(f'probe verify {_KEEP} 4 8')
        self.mounted.fail_writes(0)
        self.act(self.server, 'SHUTOFF', 'stop_server')
        self.assertFalse(self.is_on_storage())
        self.act(self.server, 'ACTIVE', 'start_server')
        self.run_in_guest(_MOUNT)
        self.run_in_guest(f'probe verify {_KEEP} 4 7')
        self.run_in_guest('probe fsync /run/eph/after 3')

    def test_it_stays_and_the_log_of_nova_compute_tells_why(self) -> None:
        source = self.server.host
        log = supervision.log_of(f'nova-compute{source.number}')
        before = log.stat().st_size
        # The guest has not mounted that disk, and does not flush it.
        self.mounted.fail_always(errno.EIO)
        self.addCleanup(self.mounted.fail_always, 0)
        self.assertEqual(source.name, self.migrate(self.server, 'failed'))
        reason = re.compile(
            "Live Migration failure: .*'memua-fakedax-eph0' could not be "
            r'synced \(Input/output error\)')
        # The thread that migrates logs it after the other has rolled back.
        wait.until(
            'nova-compute to log why',
            lambda: reason.search(log.read_text()[before:]), 60,
            interval=0.5, state=lambda: log.read_text()[before:])
        self.run_in_guest('probe fsync /root/after 3')
        self.assertRaisesRegex(
            agent.CommandError, 'Input/output error', self.run_in_guest,
            'dd if=/dev/zero of=/dev/pmem1 bs=4k count=1 conv=fsync')

    def interpose(self) -> backing.BackingFile:
        """Cover a disk of the stopped server with a file that can fail."""
        directory = pathlib.Path(tempfile.mkdtemp(prefix='interposed-'))
        self.addCleanup(shutil.rmtree, directory)
        node = self.server.host
        path = host.INSTANCES / self.server.id / _DISK
        mounted = backing.BackingFile(
            path, directory / 'mount', within=node.pid())
        self.addCleanup(mounted.close)
        node.run(['mount', '--bind', mounted.path, path], check=True)
        self.addCleanup(node.run, ['umount', '--lazy', path], check=True)
        self.addCleanup(self.stop)
        return mounted

    def stop(self) -> None:
        """Stop the server, so that QEMU closes its disks."""
        if self.server.show().status == 'ACTIVE':
            self.act(self.server, 'SHUTOFF', 'stop_server')

    def run_in_guest(self, command: str) -> None:
        with self.server.agent() as connected:
            connected.run(command, check=True)

    def is_on_storage(self) -> bool:
        """Whether the host's page cache has what is on storage."""
        return not subprocess.run([
            'cmp', '--silent', self.server.host.path(self.mounted.path),
            paths.STATE / 'brick' / self.server.id / _DISK]).returncode
