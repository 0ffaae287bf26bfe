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
server, 8 times by default.
"""

import mmap
import os
import pathlib
import statistics

import libvirt

from lab.benchmarks import results
from lab.deploy import host
from lab.machine import emulators
from lab.machine import pagecache
from lab import paths
from tests.cloud import moving

MOVES = int(os.environ.get('FAKEDAX_STORM', '8'))


class StormTest(moving.MigrationTestCase):

    alone = True

    def test_no_stale_no_lost_no_torn_block(self) -> None:
        server = self.create(self.flavor(), self.image())
        churn = moving.Churn(server)
        downtimes = []
        for _turn in range(MOVES):
            before = server.host
            self.assertNotEqual(before.name, self.migrate(server))
            downtimes.append(server.migration_statistics()['downtime'])
            # The source keeps nothing of the image in its page cache.
            self.assertEqual(0, pagecache.cached_bytes(
                before.path(host.INSTANCES / server.id / 'disk')))
            churn.wait_round()
            self.assertEqual([], churn.bad())
        # The operator sees it among the events of the last migration.
        said = {event['event']: event['details']
                for event in self.events(server, 'live-migration')}
        self.assertRegex(
            said['fakedax_incoming'],
            r'ua-fakedax-root came in: \d+ bytes of .* dropped .*, 0 left')
        # Pull the plug: what was acknowledged is on storage.
        server.host.power_off()
        self.wait_power_off(server)
        self.act(server, 'ACTIVE', 'start_server')
        self.assertEqual([], churn.lost())
        looked_at = int(churn.lines[-1][3])
        results.save('storm', [{
            'moves': MOVES, 'verified_mib': looked_at * 4096 >> 20,
            'acknowledged': len(churn.lines),
            'downtime_p50_ms': statistics.median(downtimes),
            'downtime_max_ms': max(downtimes)}])

    def test_without_the_drop_the_guest_reads_stale_blocks(self) -> None:
        """With the protection off, the test above would fail."""
        script = paths.STATE / 'qemu-that-keeps-its-cache'
        self.addCleanup(pathlib.Path.unlink, script)
        script.write_text(f'#!/bin/sh\nexec {emulators.project()} "$@"'
                          ' -global virtio-pmem.drop-cache=off\n')
        script.chmod(0o755)
        self.configure({'fakedax': {'emulator': str(script)}})
        server = self.create(self.flavor(), self.image())
        churn = moving.Churn(server)
        for _turn in range(4):
            source = server.host
            # Otherwise the source drops its pages after the guest has left.
            with self.kept(server.file('disk')):
                status = server.live_migrate()
            if status == 'failed':
                # One of the pages that the device compares was stale.
                [other] = [node for node in host.HOSTS if node != source]
                log = other.qemu_log(server.show().instance_name)
                self.assertIn("is different from the source's",
                              log.read_text())
                return
            self.assertEqual('completed', status)
            churn.wait_round()
            if churn.bad():
                break
        self.assertNotEqual([], churn.bad())


class RefusalTest(moving.MigrationTestCase):

    def test_stale_pages_at_the_destination(self) -> None:
        """The device refuses; the guest runs on and can migrate later."""
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

    def test_a_second_host_cannot_start_it(self) -> None:
        """The image is locked on all hosts, whatever Nova believes."""
        server = self.create(self.flavor(), self.image())
        with server.domain() as domain:
            definition = domain.XMLDesc(0)
        [other] = [node for node in host.HOSTS if node != server.host]
        with other.libvirt() as connection:
            error = self.assertRaises(
                libvirt.libvirtError, connection.createXML, definition, 0)
        self.assertIn('is in use by another process or host', str(error))
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
