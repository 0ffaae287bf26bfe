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

"""What an operator asks of a compute host by nova-fakedax."""

import json
import os
import signal
import subprocess
from typing import Any

from prometheus_client import parser
import requests

from lab.deploy import config
from lab.deploy import host
from lab import paths
from tests.cloud import base


#: Where the exporter serves.
PORT = 29978


class CommandTest(base.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.server = self.create(self.flavor(), self.image())

    def program(self, node: host.Host) -> list[Any]:
        return [paths.STATE / 'venv/bin/nova-fakedax',
                '--config-file', node.state / 'nova.conf',
                '--config-dir', node.drop_in]

    def ask(self, command: str, *arguments: str, status: int = 0,
            node: host.Host | None = None) -> Any:
        """Run a command on the server's host; what it prints as JSON."""
        node = node or self.server.host
        done = node.run(
            [*self.program(node), command, '-f', 'json', *arguments],
            capture_output=True, text=True)
        self.assertEqual(status, done.returncode, done.stderr)
        return json.loads(done.stdout) if not status else done.stderr

    def scrape(self) -> dict[str, float]:
        """What Prometheus gets of the server, by metric."""
        node = self.server.host
        with subprocess.Popen(
                ['nsenter', '--target', str(node.pid()), '--mount', '--uts',
                 '--', *self.program(node), 'exporter', '--port', str(PORT)],
                stdout=subprocess.PIPE, text=True) as exporter:
            assert exporter.stdout is not None
            try:
                place = exporter.stdout.readline().removeprefix('serving ')
                text = requests.get(place.strip(), timeout=60).text
            finally:
                exporter.send_signal(signal.SIGINT)
        self.assertEqual(0, exporter.returncode)
        return {sample.name: sample.value
                for family in parser.text_string_to_metric_families(text)
                for sample in family.samples
                if sample.labels.get('uuid') == self.server.id}

    def row(self, command: str) -> dict[str, str]:
        row: dict[str, str]
        [row] = self.ask(command, self.server.id)
        self.assertEqual((self.server.id, 'root'),
                         (row['Server'], row['Disk']))
        return row

    def test_each_command(self) -> None:
        self.assertEqual(['yes'] * 3, [
            row['Answer'] for row in self.ask('check')])
        with self.server.agent() as agent:
            agent.run('probe write /root/f 32 1 && probe fsync /root/g 3',
                      check=True)
            agent.run('dd if=/dev/zero of=/root/h bs=1M count=4 conv=notrunc',
                      check=True)
        self.flushed_and_evicted()
        with self.server.agent() as agent:
            agent.run('probe verify /root/f 32 1', check=True)
        self.planned_for_this_cloud()
        other, = (node for node in host.HOSTS if node != self.server.host)
        self.assertIn(f"no server '{self.server.id}'", self.ask(
            'status', self.server.id, status=1, node=other))

    def flushed_and_evicted(self) -> None:
        """The server's image is flushed and then evicted."""
        before = self.row('status')
        self.assertEqual(('yes', '0'), (before['Locked'], before['Errors']))
        self.assertGreater(int(before['Flushes']), 0)
        for figure in 'Cached MiB', 'Mapped MiB', 'p99 ms':
            self.assertGreater(float(before[figure]), 0, figure)
        exported = self.scrape()
        self.assertGreaterEqual(
            exported['fakedax_flushes_total'], int(before['Flushes']))
        self.assertGreater(exported['fakedax_image_cached_bytes'], 0)
        self.assertEqual(1, exported['fakedax_image_locked'])
        self.assertEqual('flushed', self.row('flush')['Result'])
        evicted = self.row('evict')
        # The guest goes on, and keeps some of it in use.
        self.assertGreater(float(evicted['Given back MiB']), 32, evicted)

    def planned_for_this_cloud(self) -> None:
        """The plan takes hosts and flavors from the API of the cloud."""
        done = subprocess.run(
            [paths.STATE / 'venv/bin/nova-fakedax', 'plan', '--cloud',
             'admin', '-f', 'json', '--guest',
             'name=*,programs=64,hot=64@10'],
            env=os.environ | {
                'OS_CLIENT_CONFIG_FILE': str(config.ETC / 'clouds.yaml')},
            capture_output=True, text=True)
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertIn(f'- {len(host.HOSTS)} hosts with ', done.stderr)
        rows = json.loads(done.stdout)
        name = self.server.show().flavor.original_name
        guests = {row['Disks']: row['Guests'] for row in rows
                  if row['Flavor'] == name}
        self.assertGreater(
            guests['fake DAX'], guests['virtio-blk, writeback'], rows)
