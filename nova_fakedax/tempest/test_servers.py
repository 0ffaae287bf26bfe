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

"""What a server with its root on fake DAX goes through."""

from tempest.common import compute
from tempest import config
from tempest.lib import decorators
import testtools

from nova_fakedax.tempest import base

CONF = config.CONF


class DataTest(base.FakeDaxTest):
    """What becomes of a server's data on its host."""

    @decorators.idempotent_id('51495fc0-3d70-4307-a803-6f17451a4b06')
    def test_root_is_on_pmem_and_the_guest_caches_none_of_it(self) -> None:
        _server_id, asked = self.boot()
        self.assert_on_fake_dax(asked.report())

    @decorators.idempotent_id('3fc22ea6-63bc-4c2f-9f26-c1f045100619')
    def test_acknowledged_fsync_survives_a_hard_reboot(self) -> None:
        server_id, asked = self.boot()
        asked.report()
        before = asked.report()
        self.servers_client.reboot_server(server_id, type='HARD')
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assertNotEqual(before.boot, after.boot)
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)

    @decorators.idempotent_id('53bea292-661d-499d-bf12-871443c2ad84')
    def test_rebuild_gives_a_new_root_on_pmem(self) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        self.servers_client.rebuild_server(server_id, self.image_ref())
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assert_on_fake_dax(after)
        self.assertNotEqual(before.sum, after.sum)

    @decorators.idempotent_id('863f6a9a-9ff6-4ad3-86ab-9f847ae556cb')
    @testtools.skipUnless(CONF.compute_feature_enabled.rescue,
                          'Rescue is not available.')
    def test_rescue_boots_the_ordinary_way_and_unrescue_comes_back(
            self) -> None:
        """In rescue the guest caches what it reads, which is seen here."""
        server_id, asked = self.boot()
        before = asked.report()
        self.servers_client.rescue_server(server_id)
        self.wait(server_id, 'RESCUE')
        rescue = asked.report()
        self.assertNotRegex(rescue.device, '^/dev/pmem')
        self.assertGreater(rescue.cached_kib, rescue.data_kib // 2, rescue)

        self.servers_client.unrescue_server(server_id)
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)


class ImageTest(base.FakeDaxTest):
    """What becomes of it where the image file is copied, or replaced."""

    @decorators.attr(type='slow')
    @decorators.idempotent_id('70f5f67b-845d-4211-9959-1f165d741721')
    @testtools.skipUnless(CONF.compute_feature_enabled.snapshot,
                          'Snapshot is not available.')
    def test_server_from_a_snapshot_has_the_data(self) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        server = self.servers_client.show_server(server_id)['server']
        image = self.create_server_snapshot(server)
        _copy_id, copy = self.boot(image=image['id'])
        after = copy.report()
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)
        self.assertEqual(before.boot, asked.report().boot)

    @decorators.idempotent_id('f3c6c4c5-8fdd-48e9-8105-3ef6d873c9b4')
    @testtools.skipUnless(CONF.compute_feature_enabled.resize,
                          'Resize is not available.')
    def test_resize_makes_the_root_larger_and_keeps_the_data(self) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        self.servers_client.resize_server(
            server_id, self.flavor(more_disk=1))
        self.wait(server_id, 'VERIFY_RESIZE')
        self.servers_client.confirm_resize_server(server_id)
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)
        self.assertGreater(after.root_kib, before.root_kib + (1 << 19))

    @decorators.attr(type='slow')
    @decorators.idempotent_id('498076da-f582-4ccb-8061-3090d4e4da6b')
    @testtools.skipUnless(CONF.compute_feature_enabled.shelve,
                          'Shelve is not available.')
    def test_unshelved_server_has_the_data(self) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        compute.shelve_server(self.servers_client, server_id,
                              force_shelve_offload=True)
        self.servers_client.unshelve_server(server_id)
        self.wait(server_id, 'ACTIVE')
        after = asked.report()
        self.assert_on_fake_dax(after)
        self.assert_kept(before, after)


@testtools.skipUnless(CONF.compute_feature_enabled.suspend,
                      'Suspend is not available.')
class SuspendTest(base.FakeDaxTest):
    """The device's state is saved only by a QEMU with this project's device.

    Hosts with it report the trait CUSTOM_FAKEDAX_MIGRATION.
    """

    @decorators.idempotent_id('1ede4c7c-29ce-4586-9fa9-c9a1bac62c99')
    def test_resumed_guest_goes_on(self) -> None:
        if self.migration_hosts != self.hosts:
            raise self.skipException('not all hosts can suspend the guest')
        server_id, asked = self.boot()
        before = asked.report()
        self.servers_client.suspend_server(server_id)
        self.wait(server_id, 'SUSPENDED')
        self.servers_client.resume_server(server_id)
        self.wait(server_id, 'ACTIVE')
        self.assert_goes_on(before, asked)

    @decorators.idempotent_id('ea4cd195-81ba-44a2-a63e-954e7ce5f801')
    def test_suspend_is_refused_where_the_state_is_not_saved(self) -> None:
        if self.migration_hosts:
            raise self.skipException('some hosts can suspend the guest')
        server_id, asked = self.boot()
        before = asked.report()
        self.servers_client.suspend_server(server_id)
        self.wait(server_id, 'ACTIVE')
        self.assert_refused(server_id, 'suspend', 'Fake DAX: suspend')
        self.assert_goes_on(before, asked)
