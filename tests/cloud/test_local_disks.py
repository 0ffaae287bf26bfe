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

"""Servers whose disks are on their host: there is no shared storage."""

from collections.abc import Iterator
import contextlib
import os
import shutil

import testtools

from lab.deploy import host
from lab.deploy import servers
from tests.cloud import base
from tests.cloud import test_resize

#: ssh(1) that ends in the middle of a disk's copy.
_CUT = """#!/bin/bash
case "$*" in
*rsync*--server*/disk*)
    # Unlike head(1), dd(1) passes on at once what it reads.
    exec {ssh} "$@" < <(
        dd bs=64K count=5M iflag=count_bytes status=none; kill -KILL $$)
    ;;
esac
exec {ssh} "$@"
"""


on_demand = testtools.skipUnless(
    'FAKEDAX_LOCAL_DISKS' in os.environ,
    'takes too long for CI; set FAKEDAX_LOCAL_DISKS in the environment to run '
    'it')


@contextlib.contextmanager
def cut(node: host.Host) -> Iterator[None]:
    """A block in which each copy of a disk by a host ends too early."""
    ssh = node.programs / 'ssh'
    whole = ssh.rename(f'{ssh}.whole')
    ssh.write_text(_CUT.format(ssh=whole))
    ssh.chmod(0o700)
    try:
        yield
    finally:
        whole.rename(ssh)


class LocalDisksTest(base.CloudTestCase):

    alone = True

    def setUp(self) -> None:
        super().setUp()
        # The computes start with the mounts, and again without them.
        self.addCleanup(base.configure, {}, *host.HOSTS)
        for node in host.HOSTS:
            self._separate(node)
        base.configure({'libvirt': {'remote_filesystem_transport': 'rsync'}},
                       *host.HOSTS)
        self.server = self.create(self.flavor(), self.image())
        self.source = self.server.host
        [self.other] = [node for node in host.HOSTS if node != self.source]
        self.write()

    def _separate(self, node: host.Host) -> None:
        """Give a host an instances path of its own."""
        own = node.state / 'instances'
        own.mkdir()
        self.addCleanup(shutil.rmtree, own)
        node.run(['mount', '--bind', own, host.INSTANCES], check=True)
        # Lazy: nova-compute has a file open there.
        self.addCleanup(
            node.run, ['umount', '--lazy', host.INSTANCES], check=True)

    def write(self) -> None:
        with self.server.agent() as agent:
            agent.run(f'probe write {test_resize.KEEP} 4 7', check=True)

    def move(self, *flavor: str) -> None:
        """Migrate it, or resize it to a flavor; it is not confirmed."""
        action = 'resize_server' if flavor else 'migrate_server'
        self.act(self.server, 'VERIFY_RESIZE', action, *flavor)
        self.server = servers.Server(self.cloud, self.server.id)

    def finish(self, action: str) -> None:
        self.server = self.finish_resize(self.server, action)

    def assert_files(self, *wanted: list[str]) -> None:
        """Assert which directories it has on both hosts, without its id."""
        for node, names in zip((self.source, self.other), wanted,
                               strict=True):
            self.assertEqual(names, sorted(
                path.name.removeprefix(self.server.id) for path in
                node.path(host.INSTANCES).glob(f'{self.server.id}*')))

    def assert_kept(self, gib: int) -> None:
        """Assert that its root is on fake DAX, allocated, with its data."""
        self.assert_root_is_pmem(self.server)
        with self.server.agent() as agent:
            size = agent.run('cat /sys/block/pmem0/size', check=True).stdout
            self.assertEqual(gib << 30, int(size) * 512)
            agent.run(f'probe verify {test_resize.KEEP} 4 7', check=True)
            agent.run('probe fsync /root/after 3', check=True)
        status = self.server.file('disk').stat()
        self.assertGreaterEqual(status.st_blocks * 512, status.st_size)

    def test_it_moves_there_and_grows_on_the_way_back(self) -> None:
        self.fails_to_move()
        self.move()
        self.assertEqual(self.other, self.server.host)
        self.assert_kept(1)
        self.assert_files(['_resize'], [''])
        self.finish('confirm_server_resize')
        self.assert_files([], [''])
        self.write()
        self.move(self.flavor(disk=2).id)
        self.assertEqual(self.source, self.server.host)
        self.assert_kept(2)
        self.finish('confirm_server_resize')
        self.assert_files([''], [])
        self.delete(self.server.id)
        self.assert_nothing_left(self.server.id)

    def fails_to_move(self) -> None:
        """Cut the connection: the server stays whole; the user reads why."""
        with cut(self.source):
            self.act(self.server, 'ERROR', 'migrate_server')
        self.assertIn('rsync', self.fault(self.server))
        self.assert_files([''], [])
        self.cloud.compute.reset_server_state(self.server.id, 'active')
        self.act(self.server, 'ACTIVE', 'reboot_server', 'HARD')
        self.assertEqual(self.source, self.server.host)
        self.assert_kept(1)

    @on_demand
    def test_it_goes_back_if_the_resize_is_reverted(self) -> None:
        self.move(self.flavor(disk=2).id)
        with self.server.agent() as agent:
            agent.run(f'probe write {test_resize.KEEP} 4 8', check=True)
        self.finish('revert_server_resize')
        self.assertEqual(self.source, self.server.host)
        self.assert_kept(1)
        self.assert_files([''], [])

    @on_demand
    def test_the_disk_comes_off_fake_dax_and_goes_back_on(self) -> None:
        for flavor, device in (({}, 'vda'), (base.ROOT, 'pmem0')):
            self.move(self.flavor(flavor).id)
            self.finish('confirm_server_resize')
            self.assertTrue(self.mounts(self.server)['/'][0].startswith(
                f'/dev/{device}'))
            with self.server.agent() as agent:
                agent.run(f'probe verify {test_resize.KEEP} 4 7', check=True)
                agent.run(f'probe write {test_resize.KEEP} 4 7 && sync',
                          check=True)
        self.assert_kept(1)
