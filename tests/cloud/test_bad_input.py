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

"""Bad input and lack: a clear error, and nothing left behind."""

import os
from typing import Any

from keystoneauth1 import exceptions as keystone_exceptions

from lab import host
from lab import lifecycle
from tests.cloud import base

_TRAIT = 'CUSTOM_FAKEDAX'


class FlavorTest(base.CloudTestCase):

    def assert_bad_request(self, key: str, value: str, allowed: str) -> None:
        flavor = self.flavor({})
        refusal = self.assertRaises(
            keystone_exceptions.BadRequest, self.cloud.compute.post,
            f'/flavors/{flavor.id}/os-extra_specs', microversion='2.86',
            json={'extra_specs': {key: value}}, raise_exc=True)
        self.assertIn(allowed, str(refusal))
        if value:
            self.assertIn(value, str(refusal))

    def test_unknown_key_is_refused_with_the_known_ones(self) -> None:
        self.assert_bad_request('fakedax:disk', 'root', 'fakedax:disks')

    def test_bad_values_are_refused_with_the_good_ones(self) -> None:
        for value in ('rot', 'root,root', ''):
            self.assert_bad_request(
                'fakedax:disks', value, "'root', 'ephemeral', "
                "'root,ephemeral'")


class BuildTest(base.CloudTestCase):

    def assert_build_fails(self, flavor: Any, image: Any, why: str) -> None:
        server = self.create(flavor, image, status='ERROR')
        self.assertIn(why, server.show().fault['message'])
        self.assert_nothing_left(server.id)

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

    def test_conflicting_extra_specs(self) -> None:
        for key, value in (('hw:locked_memory', 'true'),
                           ('hw:mem_encryption', 'true')):
            extra_specs = base.ROOT | {key: value}
            if key == 'hw:locked_memory':
                # Nova wants to know how large the locked pages are.
                extra_specs['hw:mem_page_size'] = 'small'
            if key == 'hw:mem_encryption':
                # Nova's API and placement refuse it before we can here.
                continue
            self.assert_build_fails(
                self.flavor(extra_specs), self.image(), key)

    def test_value_that_an_old_microversion_let_through(self) -> None:
        flavor = self.flavor({})
        self.cloud.compute.post(
            f'/flavors/{flavor.id}/os-extra_specs', microversion='2.1',
            json={'extra_specs': {'fakedax:disks': 'rot'}})
        self.assert_build_fails(flavor, self.image(), "'rot'")

    def test_disk_that_the_host_has_no_space_for(self) -> None:
        node = host.HOSTS[0]
        system = os.statvfs(node.path(host.INSTANCES))
        gib = (system.f_bavail * system.f_frsize >> 30) + 1024
        self.addCleanup(_configure, node, None)
        _configure(node, {'DEFAULT': {'disk_allocation_ratio': '1000',
                                      'initial_disk_allocation_ratio': '1000'}})
        server = self.create(
            self.flavor(disk=gib), self.image(), status='ERROR',
            host=node.name)
        self.assertIn('No space left on device',
                      server.show().fault['message'] +
                      server.show().fault.get('details', ''))
        self.assert_nothing_left(server.id)
        after = os.statvfs(node.path(host.INSTANCES))
        self.assertLess(
            (system.f_bavail - after.f_bavail) * system.f_frsize, 1 << 30)


class HostTest(base.CloudTestCase):

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
        self.addCleanup(_configure, node, None)
        log = _configure(node, {'libvirt': {'images_type': 'lvm',
                                            'images_volume_group': 'none'}})
        self.assertNotIn(_TRAIT, self.traits(node))
        warnings = [line for line in log.splitlines()
                    if 'This host cannot run' in line]
        self.assertEqual(1, len(warnings))
        self.assertIn("images_type is 'lvm'", warnings[0])

        flavor = self.flavor({'fakedax:disks': 'root'})
        server = self.create(flavor, self.image())
        self.assertEqual(host.HOSTS[1].name, server.host.name)
        refused = self.create(
            flavor, self.image(), status='ERROR', host=node.name)
        self.assertIn('No valid host', refused.show().fault['message'])

    def test_plain_libvirt_driver_never_gets_such_a_flavor(self) -> None:
        node = host.HOSTS[0]
        self.addCleanup(_configure, node, None)
        _configure(node, {'DEFAULT': {'compute_driver':
                                      'libvirt.LibvirtDriver'}})
        server = self.create(
            self.flavor({'fakedax:disks': 'root'}), self.image())
        self.assertEqual(host.HOSTS[1].name, server.host.name)


def _configure(node: host.Host, options: dict | None) -> str:
    """Give nova-compute options, and return what it logs from then on."""
    from lab import supervision
    log = supervision.log_of(f'nova-compute{node.number}')
    before = log.stat().st_size
    node.configure(options)
    lifecycle.restart([f'nova-compute{node.number}'])
    with log.open('rb') as file:
        file.seek(before)
        return file.read().decode(errors='replace')
