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

"""Live migration, there and back, or why it is refused."""

from typing import Any

from tempest import config
from tempest.lib import decorators
from tempest.lib import exceptions
import testtools

from nova_fakedax.tempest import base

CONF = config.CONF


@testtools.skipUnless(CONF.compute_feature_enabled.live_migration,
                      'Live migration is not available.')
class LiveMigrationTest(base.TwoHostsTest):

    def migrate(self, server_id: str, block_migration: Any = 'auto',
                host: str | None = None) -> None:
        self.os_admin.servers_client.live_migrate_server(
            server_id, host=host, block_migration=block_migration)
        self.wait(server_id, 'ACTIVE')

    def need_migration_hosts(self) -> None:
        if len(self.migration_hosts) < 2:
            raise self.skipException(
                f'fewer than two hosts report the trait '
                f'{base.MIGRATION_TRAIT}')

    def assert_migration_refused(self, reason: str, **how: Any) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        host = self.get_host_for_server(server_id)
        try:
            self.migrate(server_id, **how)
        except exceptions.BadRequest as exc:
            self.assertIn(reason, str(exc))
        else:
            self.assert_refused(server_id, 'live-migration', reason)
        self.assertEqual(host, self.get_host_for_server(server_id))
        self.assert_goes_on(before, asked)

    @decorators.attr(type='multinode')
    @decorators.idempotent_id('54b5e15d-b502-4c45-853d-80736c04a69a')
    @testtools.skipUnless(CONF.fakedax.shared_storage,
                          'the hosts do not share their instances path')
    def test_guest_goes_there_and_back_and_there_again(self) -> None:
        """At the third move the host has old pages of the image cached."""
        self.need_migration_hosts()
        server_id, asked = self.boot()
        report = asked.report()
        here = self.get_host_for_server(server_id)
        self.migrate(server_id)
        there = self.get_host_for_server(server_id)
        self.assertNotEqual(here, there)
        report = self.assert_goes_on(report, asked)
        for target in here, there:
            self.migrate(server_id, host=target)
            self.assertEqual(target, self.get_host_for_server(server_id))
            report = self.assert_goes_on(report, asked)

    @decorators.attr(type='multinode')
    @decorators.idempotent_id('5ce5ae56-e5fd-423f-adb3-ef8c31680c71')
    @testtools.skipIf(CONF.fakedax.shared_storage,
                      'the hosts share their instances path')
    def test_refused_without_shared_storage(self) -> None:
        self.need_migration_hosts()
        self.assert_migration_refused('shared storage')

    @decorators.attr(type='multinode')
    @decorators.idempotent_id('73a6a231-5ea6-4f73-937f-396e084c7218')
    def test_block_migration_is_refused(self) -> None:
        self.need_migration_hosts()
        self.assert_migration_refused(
            'block migration', block_migration=True)

    @decorators.attr(type='multinode')
    @decorators.idempotent_id('1285fe9a-0ec3-4a3f-aabc-2aa0ec62b916')
    def test_refused_where_the_state_is_not_migrated(self) -> None:
        if self.migration_hosts:
            raise self.skipException('some hosts can migrate the guest')
        self.assert_migration_refused('No valid host')
