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

"""What cannot work is refused, and the server runs on."""

from lab.deploy import servers
from lab import wait
from tests.cloud import base

_FSYNC = 'probe fsync /root/after 3'


class RefusalTest(base.CloudTestCase):

    def assert_goes_on(self, server: servers.Server, kept: dict) -> None:
        """Assert that the guest runs on where it was, and can flush."""
        shown = self.cloud.compute.get_server(server.id)
        self.assertEqual('ACTIVE', shown.status)
        self.assertEqual(kept['host'], shown.compute_host)
        with server.agent(timeout=10) as agent:
            self.assertEqual(kept['boot'], self._boot(agent))
            agent.run(_FSYNC, check=True)

    def _boot(self, agent) -> str:
        return agent.run('cat /proc/sys/kernel/random/boot_id',
                         check=True).stdout

    def _kept(self, server: servers.Server) -> dict:
        with server.agent() as agent:
            return {'host': server.show().compute_host,
                    'boot': self._boot(agent)}

    def assert_refused(self, server: servers.Server, action: str,
                       reason: str) -> None:
        event = self._ended(server, action)
        self.assertEqual('Error', event['result'])
        self.assertIn(reason, event['details'])

    def _ended(self, server: servers.Server, action: str) -> dict:
        def ended() -> dict | None:
            shown = server.show()
            if shown.task_state is not None or shown.status == 'RESIZE':
                return None
            event = self.event(server, action)
            return event if event['result'] else None

        return wait.until(f'{action} of server {server.id} to end', ended, 60,
                          interval=0.3, state=server.show)

    def test_resize_to_a_root_disk_that_the_image_does_not_know(self) -> None:
        """Twice, as the server must be able to take the second."""
        server = self.create(self.flavor({}), self.image(fakedax_guest=''))
        kept = self._kept(server)
        for _again in range(2):
            self.cloud.compute.resize_server(
                server.id, self.flavor(ram=320).id)
            self.assert_refused(server, 'resize', 'fakedax_guest')
            self.assert_goes_on(server, kept)

    def test_rebuild_to_an_unfit_image_keeps_the_disk(self) -> None:
        server = self.create(self.flavor(), self.image())
        kept = self._kept(server)
        self.cloud.compute.rebuild_server(
            server.id, image=self.image(fakedax_guest='').id)
        self.assert_refused(server, 'rebuild', 'fakedax_guest')
        self.assert_goes_on(server, kept)
