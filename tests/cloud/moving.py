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

"""What tests of live migration share: moves, and a guest that keeps watch."""

import time
import typing as ty

from lab.deploy import servers
from tests.cloud import base

CHURN_MIB = 16
#: Syncs until the writer has looked at all of its file, 512 blocks for each.
ROUND = CHURN_MIB * 256 // 512

_LOG = '/dev/churn'
_ROUND_SECONDS = 120


class Churn:
    """A writer and verifier that runs in a guest until it is stopped.

    Its log is in the guest's RAM, which moves with the guest, and is copied
    out of it as it grows.
    """

    def __init__(self, server: servers.Server) -> None:
        self._server = server
        #: Words of the lines seen so far, as ``probe churn`` explains them.
        self.lines: list[list[str]] = []
        self._offset = 0
        with server.agent() as agent:
            agent.run(f'touch {_LOG} && probe write /root/churn {CHURN_MIB} 1',
                      check=True)
            agent.run(f'probe churn /root/churn {CHURN_MIB} {_LOG} '
                      '>/dev/null 2>/root/churn.error &', check=True)

    def read(self) -> int:
        """Copy what is new; return how many lines there are."""
        with self._server.agent() as agent:
            text = agent.run(f'tail -c +{self._offset + 1} {_LOG}',
                             check=True).stdout
        whole = text[:text.rfind('\n') + 1]
        self._offset += len(whole)
        self.lines += [line.split() for line in whole.splitlines()]
        return len(self.lines)

    def wait_round(self) -> None:
        """Wait until all of the file has been looked at once more.

        :raises AssertionError: the writer is too slow, or hangs
        """
        deadline = time.monotonic() + _ROUND_SECONDS
        wanted = self.read() + ROUND
        while self.read() < wanted:
            if time.monotonic() > deadline:
                raise AssertionError(
                    f'{wanted - len(self.lines)} of {ROUND} syncs are missing '
                    f'after {_ROUND_SECONDS} s: {self.lines[-3:]}')
            time.sleep(0.2)

    def bad(self) -> list[list[str]]:
        """The lines of blocks that were not what was written last."""
        return [line for line in self.lines if line[0] != 'ack']


class MigrationTestCase(base.CloudTestCase):

    def migrate(self, server: servers.Server, status: str = 'completed',
                **arguments: ty.Any) -> str:
        """Migrate and wait; return the name of the host it is on."""
        self.assertEqual(status, server.live_migrate(**arguments))
        self.wait(server.id, 'ACTIVE')
        return server.host.name
