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

"""Bad input and full disks: a clear error, and nothing left behind."""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
from typing import Any

from lab.deploy import clients
from lab.deploy import host
from lab.deploy import servers
from lab.deploy import supervision
from lab import wait
from tests.cloud import base

KEY = 'fakedax:disks'
_TRAIT = 'CUSTOM_FAKEDAX'


class FlavorTest(base.CloudTestCase):

    def assert_bad_request(self, key: str, value: str, allowed: str) -> None:
        flavor = self.flavor({})
        response = self.cloud.compute.post(
            f'/flavors/{flavor.id}/os-extra_specs', microversion='2.86',
            json={'extra_specs': {key: value}})
        self.assertEqual(400, response.status_code)
        message = response.json()['badRequest']['message']
        self.assertIn(allowed, message)
        self.assertIn(f"'{key if key != KEY else value}'", message)

    def test_unknown_key_is_refused_with_the_known_ones(self) -> None:
        self.assert_bad_request('fakedax:disk', 'root', KEY)

    def test_bad_values_are_refused_with_the_good_ones(self) -> None:
        for value in ('rot', 'root,root', ''):
            self.assert_bad_request(
                KEY, value, "'root', 'ephemeral', 'root,ephemeral'")


class BuildTestCase(base.CloudTestCase):

    def assert_build_fails(self, flavor: Any, image: Any, why: str) -> None:
        server = self.create(flavor, image, status='ERROR')
        self.assertIn(why, self.fault(server))
        self.assert_nothing_left(server.id)


class BuildTest(BuildTestCase):

    def test_image_of_a_guest_that_does_not_know_fake_dax(self) -> None:
        self.assert_build_fails(
            self.flavor(), self.image(fakedax_guest=''), 'fakedax_guest')

    def test_ephemeral_disk_that_the_flavor_does_not_have(self) -> None:
        self.assert_build_fails(
            self.flavor({'fakedax:disks': 'ephemeral'}), self.image(),
            'ephemeral disk is 0 GiB')

    def test_root_disk_of_0_gib(self) -> None:
        self.assert_build_fails(
            self.flavor(disk=0), self.image(), 'disk is 0 GiB')

    def test_locked_memory(self) -> None:
        # Nova wants to know how large the locked pages are.
        self.assert_build_fails(
            self.flavor(base.ROOT | {'hw:locked_memory': 'true',
                                     'hw:mem_page_size': 'small'}),
            self.image(), 'hw:locked_memory')

    def test_value_that_an_old_microversion_let_through(self) -> None:
        flavor = self.flavor({})
        self.cloud.compute.post(
            f'/flavors/{flavor.id}/os-extra_specs', microversion='2.1',
            json={'extra_specs': {'fakedax:disks': 'rot'}})
        self.assert_build_fails(flavor, self.image(), "'rot'")


class FullDiskTest(BuildTestCase):

    # It fills the disk of all hosts.
    alone = True

    def test_disk_that_the_host_has_no_space_for(self) -> None:
        path = host.HOSTS[0].path(host.INSTANCES)
        before = os.statvfs(path)
        # As much as placement thinks there is, less what a few other servers
        # may have taken. The machine itself uses more than that.
        gib = (before.f_blocks * before.f_frsize >> 30) - 3
        self.assertGreater(gib << 30, before.f_bavail * before.f_frsize)
        with _logged(*host.HOSTS) as said:
            server = self.create(
                # In the guest's RAM the memmap would not have space.
                self.flavor(base.ROOT | {'fakedax:memmap': 'device'},
                            disk=gib), self.image(), status='ERROR')
        self.assertIn('No space left on device', said.text)
        self.assertFalse(self.was_started(server))
        self.assert_nothing_left(server.id)
        after = os.statvfs(path)
        self.assertLess(
            (before.f_bavail - after.f_bavail) * before.f_frsize, 1 << 30)
        # The same check notices a server that was started.
        self.assertTrue(self.was_started(
            self.create(self.flavor(), self.image())))

    def was_started(self, server: servers.Server) -> bool:
        """Whether QEMU was ever started for it, on any host."""
        name = server.show().instance_name
        return any(node.qemu_log(name).exists() for node in host.HOSTS)


class HostTest(base.CloudTestCase):

    alone = True

    def traits(self, node: host.Host) -> list[str]:
        provider = self.cloud.placement.get(
            f'/resource_providers?name={node.name}').json()[
                'resource_providers'][0]
        return self.cloud.placement.get(
            f'/resource_providers/{provider["uuid"]}/traits').json()['traits']

    def test_hosts_that_can_report_the_trait(self) -> None:
        for node in host.HOSTS:
            self.assertIn(_TRAIT, self.traits(node))

    def test_flavor_without_the_trait_lands_only_where_it_can_run(
            self) -> None:
        node = host.HOSTS[0]
        with _logged(node) as said:
            self.configure({'DEFAULT': {'force_raw_images': 'false'}}, node)
        self.wait_reported(lambda: _TRAIT not in self.traits(node))
        warnings = [line for line in said.text.splitlines()
                    if 'This host cannot run' in line]
        self.assertEqual(1, len(warnings))
        self.assertIn('force_raw_images is off', warnings[0])

        flavor = self.flavor({'fakedax:disks': 'root'})
        server = self.create(flavor, self.image())
        self.assertEqual(host.HOSTS[1].name, server.host.name)
        refused = self.create(
            flavor, self.image(), status='ERROR', host=node.name)
        self.assertIn('No valid host', self.fault(refused))

    def test_host_that_went_back_to_the_plain_driver_gets_none(
            self) -> None:
        """Placement keeps its trait, so the filter reads its statistics."""
        node = host.HOSTS[0]
        self.configure(
            {'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}}, node)
        self.wait_reported(lambda: 'fakedax_supported' not in
                           self.statistics(node))
        self.assertIn(_TRAIT, self.traits(node))
        server = self.create(
            self.flavor({'fakedax:disks': 'root'}), self.image())
        self.assertEqual(host.HOSTS[1].name, server.host.name)

    def statistics(self, node: host.Host) -> dict[str, str]:
        """The statistics of the host's compute node, for the scheduler."""
        with clients.database('nova') as database, \
                database.cursor() as cursor:
            cursor.execute(
                'SELECT stats FROM compute_nodes WHERE host = %s '
                'AND deleted = 0', (node.name,))
            row, = cursor.fetchall()
        return json.loads(row[0])

    def wait_reported(self, condition: Callable[[], bool]) -> None:
        """Wait for what nova-compute reports some seconds after its start."""
        wait.until('nova-compute to report what it can', condition, 60,
                   interval=0.5)


class _Said:
    text = ''


@contextlib.contextmanager
def _logged(*nodes: host.Host) -> Iterator[_Said]:
    """Collect what the nova-computes log during the ``with`` block."""
    logs = [supervision.log_of(f'nova-compute{node.number}')
            for node in nodes]
    before = [log.stat().st_size for log in logs]
    said = _Said()
    yield said
    for log, size in zip(logs, before):
        with log.open('rb') as file:
            file.seek(size)
            said.text += file.read().decode(errors='replace')
