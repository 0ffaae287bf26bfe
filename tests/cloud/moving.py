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

"""What tests of live migration share: a guest that checks its disk."""

import contextlib
import mmap
import os
import pathlib
import typing as ty

from lab.deploy import servers
from lab import wait
from tests.cloud import base

CHURN_MIB = 16
#: Syncs until the writer has checked its whole file, 512 blocks a sync.
ROUND = CHURN_MIB * 256 // 512

_ROUND_SECONDS = 120


class Churn:
    """A writer and verifier that runs in a guest until it is stopped.

    Its log is in the guest's RAM, which migrates with the guest. read() copies
    the new lines out of the guest.

    :param file: the one that it writes
    """

    def __init__(self, server: servers.Server,
                 file: str = '/root/churn') -> None:
        self._server = server
        self.file = file
        self._log = f'/dev/churn{file.replace("/", "-")}'
        #: The lines read so far, in words; ``probe churn`` explains them.
        self.lines: list[list[str]] = []
        self._offset = 0
        with server.agent() as agent:
            agent.run(f'touch {self._log} && '
                      f'probe write {file} {CHURN_MIB} 1', check=True)
            agent.run(f'probe churn {file} {CHURN_MIB} {self._log} '
                      f'>/dev/null 2>{file}.error &', check=True)

    def read(self) -> int:
        """Copy the new lines; return how many there are in all."""
        with self._server.agent() as agent:
            text = agent.run(f'tail -c +{self._offset + 1} {self._log}',
                             check=True).stdout
        whole = text[:text.rfind('\n') + 1]
        self._offset += len(whole)
        self.lines += [line.split() for line in whole.splitlines()]
        return len(self.lines)

    def wait_round(self) -> None:
        """Wait until the writer has checked its whole file once more.

        :raises WaitError: the writer is too slow, or hangs
        """
        wanted = self.read() + ROUND
        wait.until(
            f'{ROUND} more syncs of the guest',
            lambda: self.read() >= wanted, _ROUND_SECONDS, interval=0.2,
            state=lambda: f'{wanted - len(self.lines)} are missing: '
                          f'{self.lines[-3:]}')

    def bad(self) -> list[list[str]]:
        """The lines about blocks that do not hold what was written last."""
        return [line for line in self.lines if line[0] != 'ack']

    def lost(self, server: servers.Server | None = None,
             acknowledged: int | None = None) -> list[str]:
        """The blocks that are torn, or older than what was acknowledged.

        :param server: one that has the file now, if it is another one
        :param acknowledged: by so many of the lines, all by default
        """
        with (server or self._server).agent() as agent:
            found = agent.run(f'probe generations {self.file} {CHURN_MIB}',
                              check=True).stdout.split()
        wanted = [1] * len(found)
        for _ack, block, generation, _looked_at in self.lines[:acknowledged]:
            wanted[int(block)] = int(generation)
        return [f'block {block}: {has}, not {should}' for block, (has, should)
                in enumerate(zip(found, wanted, strict=True))
                if has == '-' or int(has) < should]


class MigrationTestCase(base.CloudTestCase):

    def migrate(self, server: servers.Server, status: str = 'completed',
                **arguments: ty.Any) -> str:
        """Migrate, wait, and return the name of the host it is on then."""
        self.assertEqual(status, server.live_migrate(**arguments))
        self.wait(server.id, 'ACTIVE')
        return server.host.name

    @contextlib.contextmanager
    def kept(self, path: pathlib.Path) -> ty.Iterator[None]:
        """A block in which the pages of a file or a device stay cached."""
        with path.open('rb') as file:
            size = file.seek(0, os.SEEK_END)
            with mmap.mmap(file.fileno(), size,
                           prot=mmap.PROT_READ) as mapped:
                for offset in range(0, size, mmap.PAGESIZE):
                    mapped[offset]
                yield

    def wait_power_off(self, server: servers.Server) -> None:
        wait.until(f'Nova to see that server {server.id} is off',
                   lambda: server.show().status == 'SHUTOFF', 120,
                   interval=0.5)
