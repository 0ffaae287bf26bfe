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

"""Live migration between the computes, each with a page cache of its own.

``FAKEDAX_STORM`` in the environment says how often the storm moves its
server, 20 times by default.
"""

import mmap
import os
import pathlib
import statistics
import time
import typing as ty

import libvirt
import openstack

from lab.benchmarks import results
from lab import emulators
from lab import host
from lab import lifecycle
from lab import pagecache
from lab import paths
from lab import servers
from tests.cloud import base

MOVES = int(os.environ.get('FAKEDAX_STORM', '20'))

CHURN_MIB = 16
#: Syncs until the writer has looked at all of its file, 512 blocks for each.
ROUND = CHURN_MIB * 256 // 512

_LOG = '/dev/churn'


class MigrationTestCase(base.CloudTestCase):

    def migrate(self, server: servers.Server, status: str = 'completed',
                **arguments: ty.Any) -> str:
        """Migrate and wait; return the name of the host it is on."""
        known = {each.id for each in self.migrations(server)}
        self.cloud.compute.live_migrate_server(
            server.id, block_migration='auto', **arguments)
        self.wait(server.id, 'ACTIVE')
        self.wait_migration(server, known, status)
        # Where it is now.
        vars(server).pop('host', None)
        return server.host.name

    def wait_migration(self, server: servers.Server, known: set[ty.Any],
                       status: str) -> None:
        """Wait for the end of the one that is not known; expect a status.

        The server is ACTIVE again some time before.
        """
        deadline = time.monotonic() + 60
        while True:
            [made] = [each for each in self.migrations(server)
                      if each.id not in known]
            if made.status in ('completed', 'failed', 'error', 'cancelled'):
                break
            self.assertLess(time.monotonic(), deadline, made.status)
            time.sleep(0.3)
        self.assertEqual(status, made.status)

    def migrations(self, server: servers.Server) -> list[ty.Any]:
        return [each for each in self.cloud.compute.migrations()
                if each.server_id == server.id]

    def begin_churn(self, server: servers.Server) -> None:
        """Have a writer and a verifier run in the guest for ever."""
        with server.agent() as agent:
            agent.run(f'touch {_LOG} && probe write /root/churn {CHURN_MIB} 1',
                      check=True)
            agent.run(f'probe churn /root/churn {CHURN_MIB} {_LOG} '
                      '>/dev/null 2>/root/churn.error &', check=True)

    def churned(self, server: servers.Server) -> list[list[str]]:
        """The writer's log, kept in the guest's RAM, which moves with it."""
        with server.agent() as agent:
            text = agent.run(f'cat {_LOG}', check=True).stdout
        return [line.split() for line in text.split('\n')[:-1]]

    def wait_churn(self, server: servers.Server, before: int) -> list[ty.Any]:
        """Wait until the writer has looked at all of its file once more."""
        deadline = time.monotonic() + 120
        while len(lines := self.churned(server)) < before + ROUND:
            self.assertLess(time.monotonic(), deadline, lines[-3:])
            time.sleep(0.2)
        return lines

    def downtime(self, server: servers.Server) -> int:
        """Of the last migration, in ms, as QEMU has it."""
        with server.domain() as domain:
            return domain.jobStats(
                libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
                | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED)['downtime']


class StormTest(MigrationTestCase):

    def test_no_stale_no_lost_no_torn_block(self) -> None:
        server = self.create(self.flavor(), self.image())
        self.begin_churn(server)
        downtimes = []
        for _turn in range(MOVES):
            before = server.host
            count = len(self.churned(server))
            self.assertNotEqual(before.name, self.migrate(server))
            downtimes.append(self.downtime(server))
            # The source keeps none of it.
            self.assertEqual(0, pagecache.cached_bytes(
                before.path(host.INSTANCES / server.id / 'disk')))
            lines = self.wait_churn(server, count)
        self.assertEqual([], [line for line in lines if line[0] != 'ack'])
        # Pull the plug: what was acknowledged is on storage.
        server.host.power_off()
        self.wait_power_off(server)
        self.act(server, 'ACTIVE', 'start_server')
        with server.agent() as agent:
            found = agent.run(f'probe generations /root/churn {CHURN_MIB}',
                              check=True).stdout.split()
        self.assertNotIn('-', found)
        for _ack, block, generation, _looked_at in lines:
            self.assertGreaterEqual(int(found[int(block)]), int(generation))
        results.save('storm', [{
            'moves': MOVES, 'verified_mib': int(lines[-1][3]) * 4096 >> 20,
            'acknowledged': len(lines),
            'downtime_p50_ms': statistics.median(downtimes),
            'downtime_max_ms': max(downtimes)}])

    def wait_power_off(self, server: servers.Server) -> None:
        deadline = time.monotonic() + 120
        while server.show().status != 'SHUTOFF':
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.5)

    def test_without_the_drop_the_guest_reads_stale_blocks(self) -> None:
        """What the test above finds when the protection is off."""
        script = paths.STATE / 'qemu-that-keeps-its-cache'
        self.addCleanup(pathlib.Path.unlink, script)
        script.write_text(f'#!/bin/sh\nexec {emulators.ours()} "$@"'
                          ' -global virtio-pmem.drop-cache=off\n')
        script.chmod(0o755)
        self.use_emulator(str(script))
        server = self.create(self.flavor(), self.image())
        self.begin_churn(server)
        bad: list[ty.Any] = []
        for _turn in range(4):
            # The source would drop its pages after the guest has left.
            with self.kept(server):
                self.migrate(server)
            lines = self.wait_churn(server, len(self.churned(server)))
            bad = [line for line in lines if line[0] == 'bad']
            if bad:
                break
        self.assertNotEqual([], bad)

    def kept(self, server: servers.Server) -> ty.Any:
        """Pages of the image that are mapped and so cannot be dropped."""
        path = server.file('disk')
        file = path.open('rb')
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.addCleanup(file.close)
        self.addCleanup(mapped.close)
        for offset in range(0, len(mapped), mmap.PAGESIZE):
            mapped[offset]
        return mapped

    def use_emulator(self, path: str) -> None:
        for node in host.HOSTS:
            node.configure({'fakedax': {'emulator': path}})
            self.addCleanup(lifecycle.restart, [f'nova-compute{node.number}'])
            self.addCleanup(node.configure)
        lifecycle.restart([f'nova-compute{node.number}'
                           for node in host.HOSTS])


class RefusalTest(MigrationTestCase):

    def test_stale_pages_at_the_destination(self) -> None:
        """The device refuses; the guest goes on, and may go later."""
        server = self.create(self.flavor(), self.image())
        source = server.host
        [other] = [node for node in host.HOSTS if node != source]
        path = other.path(host.INSTANCES / server.id / 'disk')
        with (path.open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            mapped.read(1)
            self.assertEqual(source.name, self.migrate(server, 'failed'))
        with server.agent() as agent:
            agent.run('probe fsync /root/after 3', check=True)
        self.assertEqual(other.name, self.migrate(server))

    def test_stock_qemu(self) -> None:
        for node in host.HOSTS:
            node.configure({'fakedax': {'emulator': ''}})
            self.addCleanup(lifecycle.restart, [f'nova-compute{node.number}'])
            self.addCleanup(node.configure)
        lifecycle.restart([f'nova-compute{node.number}'
                           for node in host.HOSTS])
        server = self.create(self.flavor(), self.image())
        source = server.host
        [other] = [node.name for node in host.HOSTS if node != source]
        for target in (None, other):
            error = self.assertRaises(
                openstack.exceptions.BadRequestException,
                self.cloud.compute.live_migrate_server,
                server.id, block_migration='auto', host=target)
            self.assertIn('No valid host', str(error))
            self.wait(server.id, 'ACTIVE')
            self.assertEqual(source.name, server.show().compute_host)
        with server.agent() as agent:
            agent.run('probe fsync /root/after 3', check=True)

    def test_paused_server_moves_paused(self) -> None:
        server = self.create(self.flavor(), self.image())
        with server.agent() as agent:
            agent.run('probe write /root/keep 4 1', check=True)
        source = server.host.name
        self.act(server, 'PAUSED', 'pause_server')
        self.cloud.compute.live_migrate_server(
            server.id, block_migration='auto')
        self.wait(server.id, 'PAUSED')
        vars(server).pop('host', None)
        self.assertNotEqual(source, server.host.name)
        self.act(server, 'ACTIVE', 'unpause_server')
        with server.agent() as agent:
            agent.run('probe verify /root/keep 4 1 && probe fsync /root/f 3',
                      check=True)
