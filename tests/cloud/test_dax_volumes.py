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


"""Volumes on fake DAX, from a file backend and from one of block devices.

``FAKEDAX_STORM`` in the environment says how often the storm moves its server,
4 times by default.
"""

import os
import pathlib
from typing import Any

import testscenarios

from lab.benchmarks import results
from lab.deploy import host
from lab.deploy import loops
from lab.deploy import servers
from lab.machine import emulators
from lab.machine import pagecache
from lab import paths
from tests.cloud import base
from tests.cloud import moving
from tests.cloud import test_recovery
from tests.cloud import volumes

ALL = {'fakedax:volumes': 'all', 'trait:CUSTOM_FAKEDAX': 'required'}
BOOT = ALL | {'fakedax:volumes': 'boot'}

MOVES = int(os.environ.get('FAKEDAX_STORM', '4'))

#: MiB: three volumes of 1 GiB take 48 of it for their memmap.
RAM = 320

ROOT_KEEP = '/root/keep'
DATA = '/run/data'
DATA_KEEP = f'{DATA}/keep'


class DaxVolumeTestCase(volumes.VolumeTestCase):

    def begin(self) -> servers.Server:
        """A server with its root and a data volume on fake DAX."""
        self.root, self.data = self.boot_volume(), self.volume()
        server = self.boot(self.flavor(ALL, ram=RAM), self.root, self.data)
        self.assert_root_is_pmem(server)
        self.make_file_system(server, 'pmem1', DATA)
        return server

    def write(self, server: servers.Server) -> None:
        for path in ROOT_KEEP, DATA_KEEP:
            self.run_in(server, f'probe write {path} 4 7')

    def assert_kept(self, server: servers.Server) -> None:
        """Assert that both volumes are as written, and can be flushed."""
        self.assert_root_is_pmem(server)
        for path in ROOT_KEEP, DATA_KEEP:
            self.run_in(server, f'probe verify {path} 4 7 && '
                                f'probe fsync {path}.after 3')

    def restart(self, server: servers.Server) -> None:
        """Start the server, which is stopped, and mount its data volume."""
        self.act(server, 'ACTIVE', 'start_server')
        self.mount(server, 'pmem1', DATA)


class LifeTest(testscenarios.WithScenarios, DaxVolumeTestCase):

    scenarios = volumes.BACKENDS

    def test_root_data_and_live_volume_through_all_that_is_right(
            self) -> None:
        server = self.begin()
        self.write(server)
        live = self.volume()
        self.attach(server, live)
        self.make_file_system(server, 'pmem2', '/run/live')
        self.assertEqual(['pmem0', 'pmem1', 'pmem2'], self.disks(server))
        self.run_in(server, 'probe write /run/live/keep 4 7')
        self.refuses_to_detach(server, live)

        self.assertEqual('completed', server.live_migrate())
        self.wait(server.id, 'ACTIVE')
        self.assert_kept(server)
        self.run_in(server, 'probe verify /run/live/keep 4 7 && '
                            'probe fsync /run/live/after 3')

        # Pull the plug: every write was acknowledged.
        server.emulator().kill()
        self.wait_power_off(server)
        self.restart(server)
        self.assert_kept(server)
        self.mount(server, 'pmem2', '/run/live')
        self.run_in(server, 'probe verify /run/live/keep 4 7')
        self.act(server, 'ACTIVE', 'reboot_server', 'HARD')
        self.mount(server, 'pmem1', DATA)
        self.assert_kept(server)

        self.act(server, 'SHUTOFF', 'stop_server')
        self.detach(server, live)
        self.restart(server)
        self.assertEqual(['pmem0', 'pmem1'], self.disks(server))
        self.assert_kept(server)
        self.reads_what_was_stored(live, server)
        self.delete(server.id)
        self.assert_nothing_left(server.id)
        for volume in self.root, self.data, live:
            self.delete_volume(volume.id)
            for node in host.HOSTS:
                self.assertFalse(self.on(node, volume).exists(), node.name)

    def refuses_to_detach(self, server: servers.Server,
                          volume: Any) -> None:
        self.cloud.compute.delete_volume_attachment(server.show(), volume)
        self.assert_refused(server, 'detach_volume',
                            'QEMU cannot unplug virtio-pmem')
        servers.wait_volume(self.cloud, volume.id, 'in-use')
        self.run_in(server, 'probe fsync /run/live/after 3')

    def reads_what_was_stored(self, volume: Any,
                              server: servers.Server) -> None:
        """The content is at byte 0: an ordinary server has the same."""
        other = self.create(
            self.flavor({}), self.image(fakedax_guest=''),
            availability_zone=f'nova:{server.host.name}')
        self.attach(other, volume)
        self.mount(other, 'vdb', '/run/live')
        self.run_in(other, 'probe verify /run/live/keep 4 7')
        self.delete(other.id)

    def test_only_the_boot_volume(self) -> None:
        data = self.volume()
        server = self.boot(self.flavor(BOOT), self.boot_volume(), data)
        self.assert_root_is_pmem(server)
        self.assertEqual(['pmem0'], self.disks(server))
        # It is detached while the guest runs, as ever.
        self.detach(server, data)

    def test_a_volume_next_to_a_root_and_an_ephemeral_disk(self) -> None:
        server = self.create(
            self.flavor(base.ROOT | ALL | {
                'fakedax:disks': 'root,ephemeral'}, ephemeral=1, ram=RAM),
            self.image())
        volume = self.volume()
        self.attach(server, volume)
        self.make_file_system(server, 'pmem2', DATA)
        self.assertEqual(['pmem0', 'pmem1', 'pmem2'], self.disks(server))
        self.run_in(server, f'probe write {DATA_KEEP} 4 7')
        self.assert_root_is_pmem(server)
        self.act(server, 'SHUTOFF', 'stop_server')
        self.act(server, 'ACTIVE', 'start_server')
        self.mount(server, 'pmem2', DATA)
        self.run_in(server, f'probe verify {DATA_KEEP} 4 7')


class StormTest(testscenarios.WithScenarios, DaxVolumeTestCase):

    scenarios = volumes.BACKENDS

    alone = True

    def setUp(self) -> None:
        super().setUp()
        self.server = self.begin()
        self.churns = [moving.Churn(self.server, path)
                       for path in ('/root/churn', f'{DATA}/churn')]

    @property
    def other(self) -> host.Host:
        [found] = [node for node in host.HOSTS if node != self.server.host]
        return found

    def warm(self, node: host.Host) -> list[pathlib.Path]:
        """The volumes as a host has them that they will move to.

        Of the block backend each host has a device only while a volume is
        connected there; here it has one before.
        """
        found = [self.on(node, volume) for volume in (self.root, self.data)]
        if self.backend == 'block':
            for path in found:
                loops.attach(node, path.name)
                self.addCleanup(loops.detach, node, path.name)
        return found

    def wait_rounds(self) -> None:
        for churn in self.churns:
            churn.wait_round()

    def bad(self) -> list[list[str]]:
        return [line for churn in self.churns for line in churn.bad()]

    def test_no_stale_no_lost_no_torn_block(self) -> None:
        downtimes = []
        for _turn in range(MOVES):
            source, destination = self.server.host, self.other
            paths_there = self.warm(destination)
            # Open, so that the page cache of a block device stays.
            files = [path.open('rb') for path in paths_there]
            try:
                for file in files:
                    while file.read(1 << 20):
                        pass
                self.wait_rounds()
                self.assertEqual(
                    destination.name, self.migrate(self.server))
            finally:
                for file in files:
                    file.close()
            downtimes.append(
                self.server.migration_statistics()['downtime'])
            for volume in self.root, self.data:
                path = self.on(source, volume)
                if self.backend == 'block':
                    self.assertFalse(path.is_symlink(), path)
                else:
                    self.assertEqual(0, pagecache.cached_bytes(path))
            self.wait_rounds()
            self.assertEqual([], self.bad())
        self.server.emulator().kill()
        self.wait_power_off(self.server)
        self.restart(self.server)
        for churn in self.churns:
            self.assertEqual([], churn.lost())
        results.save(f'storm-{self.backend}-volumes', [{
            'moves': MOVES, 'downtime_max_ms': max(downtimes),
            'acknowledged': sum(len(churn.lines)
                                for churn in self.churns)}])

    def test_without_the_drop_the_guest_reads_stale_blocks(self) -> None:
        """With the protection off, the test above would fail."""
        self.act(self.server, 'SHUTOFF', 'stop_server')
        script = paths.STATE / 'qemu-that-keeps-its-cache'
        self.addCleanup(pathlib.Path.unlink, script)
        script.write_text(f'#!/bin/sh\nexec {emulators.project()} "$@"'
                          ' -global virtio-pmem.drop-cache=off\n')
        script.chmod(0o755)
        self.configure({'fakedax': {'emulator': str(script)}})
        self.restart(self.server)
        self.churns = [moving.Churn(self.server, churn.file)
                       for churn in self.churns]
        for _turn in range(4):
            destination = self.other
            [root, data] = self.warm(destination)
            with self.kept(root), self.kept(data):
                self.wait_rounds()
                status = self.server.live_migrate()
            if status == 'failed':
                # One of the pages that the device compares was stale.
                log = destination.qemu_log(
                    self.server.show().instance_name)
                self.assertIn("is different from the source's",
                              log.read_text())
                return
            self.assertEqual('completed', status)
            self.wait_rounds()
            if self.bad():
                break
        self.assertNotEqual([], self.bad())


class VerbTest(testscenarios.WithScenarios, DaxVolumeTestCase):
    """What else moves a server, or copies its volumes."""

    scenarios = volumes.BACKENDS

    def test_snapshot_of_a_guest_that_writes(self) -> None:
        server = self.begin()
        churns = [moving.Churn(server, path)
                  for path in ('/root/churn', f'{DATA}/churn')]
        for churn in churns:
            churn.wait_round()
        acknowledged = [len(churn.lines) for churn in churns]
        if self.backend == 'file':
            # Only with Nova's help, which would make it qcow2.
            self.volume_snapshot(self.root, 'error')
        else:
            self.copies(server, churns, acknowledged)
        # It runs on, and no flush hangs.
        for churn in churns:
            churn.wait_round()
            self.assertEqual([], churn.bad())

    def copies(self, server: servers.Server, churns: list[moving.Churn],
               acknowledged: list[int]) -> None:
        """Make a server of the server's snapshots."""
        image = self.begin_snapshot(server)
        for volume in self.root, self.data:
            for snapshot in self.cinder.snapshots(volume_id=volume.id):
                self.addCleanup(self.delete_snapshot, snapshot.id)
                self.wait_snapshot(snapshot.id)
        self.wait(server.id, 'ACTIVE')
        copy = self.create(self.flavor(ALL, ram=RAM), image)
        for attached in self.cloud.compute.volume_attachments(copy.show()):
            self.addCleanup(self.delete_volume, attached.volume_id)
        self.assert_root_is_pmem(copy)
        self.mount(copy, 'pmem1', DATA)
        for churn, count in zip(churns, acknowledged, strict=True):
            self.assertEqual([], churn.lost(copy, count))
        self.delete(copy.id)

    def test_shelve_and_cold_migration(self) -> None:
        server = self.begin()
        self.write(server)
        self.act(server, 'SHELVED_OFFLOADED', 'shelve_server')
        self.act(server, 'ACTIVE', 'unshelve_server')
        server = servers.Server(self.cloud, server.id)
        self.mount(server, 'pmem1', DATA)
        self.assert_kept(server)
        source = server.host
        self.act(server, 'VERIFY_RESIZE', 'migrate_server')
        server = servers.Server(self.cloud, server.id)
        self.mount(server, 'pmem1', DATA)
        self.assert_kept(server)
        server = self.finish_resize(server, 'revert_server_resize')
        self.assertEqual(source, server.host)
        self.mount(server, 'pmem1', DATA)
        self.assert_kept(server)

    def test_paused_server_moves_paused(self) -> None:
        server = self.begin()
        self.write(server)
        self.act(server, 'PAUSED', 'pause_server')
        self.cloud.compute.live_migrate_server(
            server.id, block_migration='auto')
        self.wait(server.id, 'PAUSED')
        vars(server).pop('host', None)
        self.act(server, 'ACTIVE', 'unpause_server')
        self.assert_kept(server)

    def test_suspend_and_reimage(self) -> None:
        server = self.begin()
        self.write(server)
        self.act(server, 'SUSPENDED', 'suspend_server')
        self.act(server, 'ACTIVE', 'resume_server')
        self.assert_kept(server)
        self.cloud.compute.rebuild_server(server.id, image=self.image().id)
        self.wait(server.id, 'ACTIVE')
        self.assert_root_is_pmem(server)
        with server.agent() as agent:
            self.assertNotEqual(0, agent.run(['test', '-e',
                                              ROOT_KEEP]).status)


class EvacuateTest(testscenarios.WithScenarios, DaxVolumeTestCase,
                   test_recovery.EvacuateTestCase):

    scenarios = volumes.BACKENDS

    def test_guest_of_a_host_that_died(self) -> None:
        server = DaxVolumeTestCase.begin(self)
        self.find_hosts(server)
        # It leaves pages at the destination that are stale later.
        for node in (self.destination, self.source):
            self.assertEqual(node.name, self.migrate(server))
        self.write(server)
        # The data volume's ext4 has no journal, and fsync does not write the
        # bitmap of inodes: after a power cut the file's would be free there.
        self.run_in(server, 'sync')
        emulator = self.emulator(server, self.source)
        self.fail_compute()
        emulator.kill()
        event = self.evacuate(server)
        self.assertEqual('Success', event['result'], event)
        server = servers.Server(self.cloud, server.id)
        self.assertEqual(self.destination, server.host)
        if server.show().status == 'SHUTOFF':
            self.act(server, 'ACTIVE', 'start_server')
        self.mount(server, 'pmem1', DATA)
        self.assert_kept(server)


class RefusalTest(DaxVolumeTestCase):

    def assert_build_fails(self, reason: str, *attached: Any) -> None:
        server = self.boot(self.flavor(ALL, ram=RAM), *attached,
                           status='ERROR')
        self.assertIn(reason, self.fault(server))
        self.delete(server.id)
        self.assert_nothing_left(server.id)

    def test_a_boot_volume_of_a_guest_that_does_not_know_fake_dax(
            self) -> None:
        self.assert_build_fails(
            'fakedax_guest', self.boot_volume(fakedax_guest=''))

    def test_a_flavor_for_roots_that_are_not_volumes(self) -> None:
        server = self.boot(self.flavor(base.ROOT), self.boot_volume(),
                           status='ERROR')
        self.assertIn('fakedax:volumes', self.fault(server))

    def test_volumes_that_cannot_be_mapped(self) -> None:
        """At a build and at an attachment to a running guest."""
        root = self.boot_volume()
        server = self.boot(self.flavor(ALL, ram=RAM), root)
        for volume, reason in (
                (self.encrypted(), '(LUKS)'),
                (self.volume(backend=self.volume_type(
                    'block', multiattach='<is> True').name),
                 'several servers can attach it'),
                (self.limited(), 'limits for the front end'),
                (self.with_a_snapshot(), "its format is 'qcow2'"),
                (self.volume(64), "the flavor's RAM is 320 MiB")):
            self.refused_volume(server, volume, reason)
        self.run_in(server, f'probe fsync {ROOT_KEEP} 3')
        self.assertEqual(['pmem0'], self.disks(server))

    def refused_volume(self, server: servers.Server, volume: Any,
                       reason: str) -> None:
        self.cloud.compute.create_volume_attachment(server.show(), volume)
        self.assert_refused(server, 'attach_volume', reason)
        servers.wait_volume(self.cloud, volume.id)

    def encrypted(self) -> Any:
        kind = self.volume_type()
        self.cinder.create_type_encryption(
            kind, provider='luks', cipher='aes-xts-plain64', key_size=256,
            control_location='front-end')
        return self.volume(backend=kind.name)

    def limited(self) -> Any:
        kind = self.volume_type()
        made = self.cinder.create_qos_spec(
            name=self.name(), consumer='front-end', read_iops_sec='100')
        self.addCleanup(self.cinder.delete_qos_spec, made, force=True)
        made.associate(self.cinder, kind.id)
        return self.volume(backend=kind.name)

    def with_a_snapshot(self) -> Any:
        """A file that Cinder makes qcow2 when it takes a snapshot."""
        volume = self.volume()
        self.volume_snapshot(volume)
        return volume
