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


"""Volumes that the guest has as fake persistent memory."""

from typing import Any

from tempest import config
from tempest.lib import decorators
import testtools

from nova_fakedax.tempest import base
from nova_fakedax.tempest import guest

CONF = config.CONF

ALL = {'fakedax:volumes': 'all', f'trait:{base.TRAIT}': 'required'}


@testtools.skipUnless(CONF.service_available.cinder,
                      'Cinder is not available.')
class VolumeTestCase(base.FakeDaxTest):

    def boot_volume(self, image: str = '') -> dict[str, Any]:
        made: dict[str, Any] = self.create_volume(
            imageRef=image or self.image_ref())
        return made

    def boot_from(self, volume: dict[str, Any],
                  ) -> tuple[str, guest.Guest]:
        """Boot a server from a volume; its id, and the guest."""
        return self.boot(**self.arguments(volume))

    def arguments(self, volume: dict[str, Any]) -> dict[str, Any]:
        """How to create a server that boots from a volume."""
        return {
            'flavor': self.flavor(ALL), 'image': '',
            'block_device_mapping_v2': [{
                'boot_index': 0, 'uuid': volume['id'],
                'source_type': 'volume', 'destination_type': 'volume'}]}


class BootTest(VolumeTestCase):

    @decorators.idempotent_id('fa44e324-043b-499e-9ff4-039e5a501f2b')
    def test_root_on_a_volume_is_on_pmem_and_keeps_its_data(self) -> None:
        volume = self.boot_volume()
        server_id, asked = self.boot_from(volume)
        self.assert_on_fake_dax(asked.report())
        before = asked.report()
        self.servers_client.reboot_server(server_id, type='HARD')
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assertNotEqual(before.boot, after.boot)
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)

    @decorators.idempotent_id('50f6ddbd-d041-45f2-9b71-eefee207c2ed')
    def test_refused_for_a_guest_that_does_not_know_fake_dax(self) -> None:
        volume = self.boot_volume(self.empty_image())
        server_id = self.server(wait_until=None,
                                **self.arguments(volume))['id']
        self.wait(server_id, 'ERROR')
        server = self.servers_client.show_server(server_id)['server']
        self.assertIn("property fakedax_guest is ''",
                      server['fault']['message'])


class AttachTest(VolumeTestCase):

    @decorators.idempotent_id('ef0bc74e-0cad-439e-9bb6-a57acfd017cc')
    def test_attached_to_a_running_guest_and_detached_when_it_is_off(
            self) -> None:
        server_id, asked = self.boot_from(self.boot_volume())
        before = asked.report()
        volume = self.create_volume()
        self.nova_volume_attach({'id': server_id}, volume)
        self.servers_client.detach_volume(server_id, volume['id'])
        self.assert_refused(server_id, 'detach_volume',
                            'QEMU cannot unplug virtio-pmem')
        self.assert_goes_on(before, asked)
        self.servers_client.stop_server(server_id)
        self.wait(server_id, 'SHUTOFF')
        self.nova_volume_detach({'id': server_id}, volume)
        self.servers_client.start_server(server_id)
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)


class MoveTest(VolumeTestCase, base.TwoHostsTest):

    @decorators.attr(type='multinode')
    @decorators.idempotent_id('9bba128e-1bc9-4530-9fa3-4a37e7a12c8e')
    @testtools.skipUnless(CONF.compute_feature_enabled.live_migration,
                          'Live migration is not available.')
    def test_guest_moves_with_its_volumes(self) -> None:
        """A volume needs no shared instances path."""
        if len(self.migration_hosts) < 2:
            raise self.skipException(
                f'fewer than two hosts report the trait '
                f'{base.MIGRATION_TRAIT}')
        server_id, asked = self.boot_from(self.boot_volume())
        self.nova_volume_attach({'id': server_id}, self.create_volume())
        before = asked.report()
        here = self.get_host_for_server(server_id)
        for _turn in range(2):
            self.os_admin.servers_client.live_migrate_server(
                server_id, host=None, block_migration='auto')
            self.wait(server_id, 'ACTIVE')
            there = self.get_host_for_server(server_id)
            self.assertNotEqual(here, there)
            here = there
            before = self.assert_goes_on(before, asked)
