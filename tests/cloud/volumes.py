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


"""What tests of volumes share: Cinder's volumes, and servers with them.

They run with a file backend and with one of block devices, and with
``FAKEDAX_VOLUMES`` in the environment, by which the lab has Cinder.
"""

import os
import pathlib
import time
from typing import Any

import testtools

from lab.deploy import config
from lab.deploy import host
from lab.deploy import loops
from lab.deploy import servers
from lab.machine import agent
from lab import wait
from tests.cloud import moving

#: For testscenarios.
BACKENDS = [(name, {'backend': name}) for name in config.BACKENDS]

_SECONDS = 120

on_demand = testtools.skipUnless(
    'FAKEDAX_VOLUMES' in os.environ,
    'takes too long for CI; set FAKEDAX_VOLUMES in the environment to have '
    'the lab with Cinder')


@on_demand
class VolumeTestCase(moving.MigrationTestCase):

    #: Of config.BACKENDS.
    backend = config.BACKENDS[0]

    def setUp(self) -> None:
        super().setUp()
        self.cinder = servers.block_storage(self.cloud)

    def name(self) -> str:
        return f'{self.id().rpartition(".")[2]}-{time.monotonic_ns()}'

    def volume(self, gib: int = 1, backend: str = '',
               **arguments: Any) -> Any:
        """Make a volume, deleted after the test."""
        made = servers.volume(self.cloud, self.name(),
                              backend or self.backend, gib, **arguments)
        self.addCleanup(self.delete_volume, made.id)
        return made

    def boot_volume(self, **properties: str) -> Any:
        """Make a volume of the test guest.

        :param properties: as of servers.image()
        """
        return self.volume(image_id=self.image(**properties).id)

    def volume_type(self, backend: str = '', **extra_specs: str) -> Any:
        """Make a volume type, deleted after the test."""
        made = self.cinder.create_type(name=self.name(), extra_specs={
            'volume_backend_name': backend or self.backend} | extra_specs)
        self.addCleanup(self.cinder.delete_type, made)
        return made

    def delete_volume(self, volume_id: str) -> None:
        found = self.cinder.find_volume(volume_id)
        if not found:
            return
        servers.wait_volume(self.cloud, volume_id, 'available', 'error')
        self.cinder.delete_volume(volume_id)
        wait.until(f'volume {volume_id} to be deleted',
                   lambda: self.cinder.find_volume(volume_id) is None,
                   _SECONDS, interval=0.3)

    def volume_snapshot(self, volume: Any, status: str = 'available') -> Any:
        """Make a snapshot, deleted after the test, and expect a status."""
        made = self.cinder.create_snapshot(
            volume_id=volume.id, name=self.name(), is_forced=True)
        self.addCleanup(self.delete_snapshot, made.id)
        self.wait_snapshot(made.id, status)
        return made

    def wait_snapshot(self, snapshot_id: str,
                      status: str = 'available') -> None:
        """Wait until a snapshot is made, or cannot be."""
        def ended() -> str | None:
            found = str(self.cinder.get_snapshot(snapshot_id).status)
            return None if found == 'creating' else found

        self.assertEqual(status, wait.until(
            f'snapshot {snapshot_id} to be made', ended, _SECONDS,
            interval=0.3))

    def delete_snapshot(self, snapshot_id: str) -> None:
        self.cinder.delete_snapshot(snapshot_id)
        wait.until(f'snapshot {snapshot_id} to be deleted',
                   lambda: self.cinder.find_snapshot(snapshot_id) is None,
                   _SECONDS, interval=0.3)

    def boot(self, flavor: Any, *volumes: Any, status: str = 'ACTIVE',
             **arguments: Any) -> servers.Server:
        """Create a server that boots from the first of the volumes."""
        arguments.setdefault('block_device_mapping',
                             servers.mappings(*volumes))
        return self.create(flavor, None, status, **arguments)

    def attach(self, server: servers.Server, volume: Any) -> None:
        """Attach a volume, and wait until it is."""
        # Also a volume that was made after the server is deleted after it.
        self.addCleanup(self.delete, server.id)
        self.cloud.compute.create_volume_attachment(server.show(), volume)
        servers.wait_volume(self.cloud, volume.id, 'in-use')
        self.assertEqual('Success', self.ended(server, 'attach_volume'))

    def detach(self, server: servers.Server, volume: Any) -> None:
        """Detach a volume, and wait until another server can have it."""
        self.cloud.compute.delete_volume_attachment(server.show(), volume)
        servers.wait_volume(self.cloud, volume.id)

    def ended(self, server: servers.Server, action: str) -> str:
        """The result of the last event of an action, once it has ended."""
        return str(self.end(server, action)['result'])

    def end(self, server: servers.Server, action: str) -> Any:
        """The last event of an action, once it has ended."""
        return wait.until(
            f'{action} of server {server.id} to end',
            lambda: next((event for event in self.events(server, action)[:1]
                          if event['result']), None),
            _SECONDS, interval=0.3)

    def assert_refused(self, server: servers.Server, action: str,
                       reason: str) -> None:
        """Assert that an action has failed, and that its event says why."""
        event = self.end(server, action)
        self.assertEqual('Error', event['result'], event)
        self.assertIn(reason, event['details'])

    def on(self, node: host.Host, volume: Any) -> pathlib.Path:
        """A volume as a host has it, if it is connected there."""
        name = f'volume-{volume.id}'
        if self.backend == 'block':
            return loops.link(node, name)
        return node.path(host.VOLUMES / 'file' / name)

    def make_file_system(self, server: servers.Server, device: str,
                         place: str) -> None:
        """Make a file system on a disk of the guest, and mount it."""
        self.wait_disk(server, device)
        self.run_in(server, f'mke2fs -F -b 4096 /dev/{device}')
        self.mount(server, device, place)

    def mount(self, server: servers.Server, device: str, place: str) -> None:
        """Mount a file system, with DAX if it is on pmem."""
        option = '-o dax=always' if device.startswith('pmem') else ''
        self.wait_disk(server, device)
        self.run_in(server, f'mkdir -p {place} && mount -t ext4 {option} '
                            f'/dev/{device} {place}')

    def wait_disk(self, server: servers.Server, device: str) -> None:
        """Wait until the guest has found a disk that it was given."""
        self.run_in(server, f'until test -b /dev/{device}; do '
                            'usleep 100000; done')

    def disks(self, server: servers.Server) -> list[str]:
        """The guest's disks on pmem."""
        return sorted(self.run_in(
            server, "ls /sys/block | grep '^pmem' || true").split())

    def run_in(self, server: servers.Server, command: str) -> str:
        with server.agent() as guest:
            try:
                return str(guest.run(command, check=True).stdout)
            except agent.CommandError:
                self.addDetail('dmesg', testtools.content.text_content(
                    guest.run('dmesg | tail -n 40').stdout))
                raise
