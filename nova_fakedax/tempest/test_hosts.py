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

"""What the hosts report to placement, and what the scheduler makes of it."""

from tempest import config
from tempest.lib import decorators

from nova_fakedax.tempest import base

CONF = config.CONF


class HostTest(base.FakeDaxTest):

    @decorators.idempotent_id('9b325773-bea9-4c9e-9718-5f28f2a36f48')
    def test_as_many_hosts_report_the_trait_as_must(self) -> None:
        self.assertGreaterEqual(len(self.hosts), CONF.fakedax.hosts)

    @decorators.idempotent_id('6ab417e2-4d64-4c82-b030-64a7df13447d')
    def test_hosts_that_migrate_such_servers_also_run_them(self) -> None:
        self.assertEqual(set(), self.migration_hosts - self.hosts)

    @decorators.idempotent_id('3a88b733-4d3d-4262-9bc8-d2e965a5d776')
    def test_server_lands_on_such_a_host_without_asking_for_the_trait(
            self) -> None:
        server = self.server(self.flavor({'fakedax:disks': 'root'}),
                             self.empty_image(fakedax_guest='true'))
        shown = self.os_admin.servers_client.show_server(
            server['id'])['server']
        self.assertIn(
            shown['OS-EXT-SRV-ATTR:hypervisor_hostname'], self.hosts)
