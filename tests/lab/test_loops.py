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


"""Block devices of hosts, and Cinder's driver of them, without a cloud."""

import os
import pathlib
import subprocess
import tempfile
from unittest import mock

from cinder import exception
from oslotest import base

from lab.deploy import host
from lab.deploy import loopdriver
from lab.deploy import loops

_SIZE = 1 << 20


class _Node(host.Host):
    """A host without namespaces of its own."""

    def run(self, args, **kwargs):
        return subprocess.run(args, **kwargs)

    def path(self, path):
        return pathlib.Path(path)


class LoopTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.state = pathlib.Path(directory.name).resolve()
        self.files = self.state / host.VOLUMES.name / 'block'
        self.files.mkdir(parents=True)
        self.nodes = (_Node(1), _Node(2))
        for patch in (
            mock.patch.object(loops, 'FILES', self.files),
            mock.patch.object(loops, '_LINKS', self.state / 'devices'),
            mock.patch.object(loopdriver, '_FILES', self.files),
            mock.patch.object(host, 'HOSTS', self.nodes),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        # A test that fails must not leave any.
        self.addCleanup(loops.detach_all)

    def file(self, name='volume-a'):
        path = self.files / name
        path.write_bytes(os.urandom(_SIZE))
        return path


class LoopsTest(LoopTestCase):

    def test_a_host_writes_to_the_file_by_its_device(self):
        path = self.file()
        device = loops.attach(self.nodes[0], path.name)
        self.assertEqual(path.read_bytes(), device.read_bytes())
        with device.open('r+b', buffering=0) as file:
            file.write(b'x' * 4096)
            os.fsync(file.fileno())
        self.assertEqual(b'x' * 4096, path.read_bytes()[:4096])

    def test_each_host_has_one_of_its_own(self):
        path = self.file()
        first, again, second = (
            loops.attach(self.nodes[number], path.name)
            for number in (0, 0, 1))
        self.assertEqual(first, again)
        self.assertNotEqual(first.resolve(), second.resolve())
        loops.detach(self.nodes[0], path.name)
        self.assertEqual([second.resolve()], loops.devices())
        self.assertFalse(first.is_symlink())
        loops.detach(self.nodes[0], path.name)

    def test_devices_are_made_again_under_the_same_name(self):
        path, gone = self.file(), self.file('volume-b')
        device = loops.attach(self.nodes[0], path.name)
        missing = loops.attach(self.nodes[0], gone.name)
        loops.detach_all()
        self.assertEqual([], loops.devices())
        gone.unlink()
        # Another device takes the number.
        other = loops.attach(self.nodes[1], self.file('volume-c').name)
        loops.restore(self.nodes[0])
        self.assertNotEqual(other.resolve(), device.resolve())
        self.assertEqual(path.read_bytes(), device.read_bytes())
        self.assertFalse(missing.is_symlink())

    def test_a_host_lets_go_of_its_own_only(self):
        path = self.file()
        loops.attach(self.nodes[0], path.name)
        kept = loops.attach(self.nodes[1], path.name).resolve()
        loops.release(self.nodes[0])
        self.assertEqual([kept], loops.devices())

    def test_a_stale_link_harms_no_other_device(self):
        path, other = self.file(), self.file('volume-b')
        device = loops.attach(self.nodes[1], other.name).resolve()
        stale = loops.link(self.nodes[0], path.name)
        stale.parent.mkdir(parents=True)
        stale.symlink_to(device)
        loops.detach(self.nodes[0], path.name)
        self.assertEqual([device], loops.devices())

    def test_devices_of_others_are_not_the_labs(self):
        foreign = self.state / 'foreign'
        foreign.write_bytes(bytes(_SIZE))
        device = subprocess.run(
            ['losetup', '--find', '--show', foreign], check=True,
            capture_output=True, text=True).stdout.strip()
        self.addCleanup(subprocess.run, ['losetup', '--detach', device],
                        check=True)
        self.assertEqual([], loops.devices())
        loops.detach_all()
        self.assertEqual(bytes(_SIZE), pathlib.Path(device).read_bytes())

    def test_a_device_of_a_host_that_is_gone_is_found(self):
        path = self.file()
        # The namespace ends with the command.
        subprocess.run(
            ['unshare', '--mount', 'sh', '-ec',
             f'mount --bind {self.state} /mnt;'
             f'losetup --find /mnt/{path.relative_to(self.state)}'],
            check=True)
        self.assertEqual(1, len(loops.devices()))
        loops.detach_all()
        self.assertEqual([], loops.devices())

    def test_no_file(self):
        error = self.assertRaises(
            loops.LoopError, loops.attach, self.nodes[0], 'volume-none')
        self.assertIn('volume-none', str(error))


class DriverTest(LoopTestCase):

    def setUp(self):
        super().setUp()
        self.driver = loopdriver.LoopDriver(
            configuration=mock.Mock(volume_backend_name='block'))
        self.volume = self.disk('volume-a')

    def disk(self, name, gib=1, *hosts):
        volume = mock.Mock(size=gib, volume_size=gib, volume_attachment=[
            mock.Mock(connector={'host': each}) for each in hosts])
        volume.name = name
        return volume

    def path(self, volume):
        return pathlib.Path(self.driver.local_path(volume))

    def test_a_volume_is_connected_to_two_hosts_during_a_move(self):
        self.driver.create_volume(self.volume)
        paths = []
        for node in self.nodes:
            # As cinder.volume.manager.VolumeManager._connection_create().
            self.assertIsNone(self.driver.create_export(
                None, self.volume, {'host': node.name}))
            info = self.driver.initialize_connection(
                self.volume, {'host': node.name})
            self.assertEqual('local', info['driver_volume_type'])
            paths.append(pathlib.Path(info['data']['device_path']))
        self.assertEqual(2, len({each.resolve() for each in paths}))
        self.assertIs(False, self.driver.terminate_connection(
            self.volume, {'host': self.nodes[0].name}))
        self.assertEqual([paths[1].resolve()], loops.devices())
        # As for a force detach.
        self.driver.terminate_connection(self.volume, None)
        self.assertEqual([], loops.devices())
        self.driver.remove_export(None, self.volume)
        self.driver.delete_volume(self.volume)
        self.assertFalse(self.path(self.volume).exists())

    def test_its_service_starts_with_a_volume_that_is_connected(self):
        self.driver.create_volume(self.volume)
        self.driver.initialize_connection(
            self.volume, {'host': self.nodes[0].name})
        self.driver.ensure_export(None, self.volume)
        self.assertEqual(1, len(loops.devices()))

    def test_a_device_stays_for_a_second_server_of_the_host(self):
        name = self.nodes[0].name
        volume = self.disk('volume-a', 1, name, name)
        self.driver.create_volume(volume)
        self.driver.initialize_connection(volume, {'host': name})
        self.assertIs(True, self.driver.terminate_connection(
            volume, {'host': name}))
        self.assertEqual(1, len(loops.devices()))

    def test_a_copy_is_as_large_as_its_volume_and_sparse(self):
        self.driver.create_volume(self.volume)
        with self.path(self.volume).open('r+b') as file:
            file.write(b'content')
        snapshot = self.disk('snapshot-a')
        snapshot.volume = self.volume
        self.driver.create_snapshot(snapshot)
        copies = [self.disk('volume-b', 2), self.disk('volume-c', 2)]
        self.driver.create_volume_from_snapshot(copies[0], snapshot)
        self.driver.delete_snapshot(snapshot)
        self.driver.create_cloned_volume(copies[1], self.volume)
        for copy in copies:
            with self.path(copy).open('rb') as file:
                self.assertEqual(b'content', file.read(7))
            status = self.path(copy).stat()
            self.assertEqual(2 << 30, status.st_size)
            self.assertLess(status.st_blocks * 512, 1 << 20)
        self.assertFalse(self.path(snapshot).exists())

    def test_it_grows_unless_it_is_attached(self):
        self.driver.create_volume(self.volume)
        self.driver.extend_volume(self.volume, 3)
        self.assertEqual(3 << 30, self.path(self.volume).stat().st_size)
        attached = self.disk('volume-a', 3, self.nodes[0].name)
        self.assertRaises(exception.ExtendVolumeError,
                          self.driver.extend_volume, attached, 4)

    def test_a_host_that_the_lab_does_not_have(self):
        self.driver.create_volume(self.volume)
        self.assertRaises(
            exception.InvalidInput, self.driver.initialize_connection,
            self.volume, {'host': 'elsewhere'})

    def test_what_the_scheduler_learns(self):
        self.driver.create_volume(self.volume)
        stats = self.driver.get_volume_stats(refresh=True)
        self.assertEqual(('block', 1.0), (
            stats['volume_backend_name'], stats['provisioned_capacity_gb']))
        self.assertGreater(stats['total_capacity_gb'],
                           stats['free_capacity_gb'])
