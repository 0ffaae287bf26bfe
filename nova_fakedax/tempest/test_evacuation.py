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

"""Evacuation of a server that still runs.

A module of its own, with a name that comes early: it waits until no other test
runs, and others wait for it.
"""

from typing import Any

from tempest import config
from tempest.lib import decorators

from nova_fakedax.tempest import base

CONF = config.CONF


@decorators.serial
class EvacuateTest(base.TwoHostsTest):
    """No guest is started twice: its image has one writer."""

    @classmethod
    def skip_checks(cls) -> None:
        super().skip_checks()
        if not CONF.fakedax.force_down:
            raise cls.skipException('[fakedax]force_down is off')
        if not CONF.fakedax.shared_storage:
            raise cls.skipException('[fakedax]shared_storage is off')

    def force_down(self, host: str, down: bool) -> None:
        client: Any = self.os_admin.services_client
        service, = client.list_services(
            host=host, binary='nova-compute')['services']
        client.update_service(service_id=service['id'], forced_down=down)

    @decorators.idempotent_id('d2e39b8e-283c-41d6-b43f-e77841624543')
    def test_server_that_still_runs_is_not_evacuated(self) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        host = self.get_host_for_server(server_id)
        self.addCleanup(self.force_down, host, False)
        self.force_down(host, True)
        self.os_admin.servers_client.evacuate_server(server_id)
        self.assert_refused(
            server_id, 'evacuate',
            f'the server cannot be evacuated from host {host}')
        self.force_down(host, False)
        self.assertEqual(host, self.get_host_for_server(server_id))
        self.assert_goes_on(before, asked)
