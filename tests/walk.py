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

"""A random walk through what can be done with a server.

The model says what may follow what, and which content the root disk has then.
The server is whatever has the steps: one of the lab, or of Nova in one
process. ``FAKEDAX_WALK`` in the environment says how many steps, and which
seed if a colon and a number follow: ``500:7``.
"""

from collections.abc import Collection
from collections.abc import Mapping
import dataclasses
import os
import random
import typing as ty

_ANYWHERE = {'hard_reboot': 'ACTIVE', 'shelve': 'SHELVED_OFFLOADED'}

_AT_REST = {
    'rebuild': None, 'resize': 'VERIFY_RESIZE', 'migrate': 'VERIFY_RESIZE',
    'snapshot': None, 'refused_rebuild': None,
}

#: The steps from each status, and the status after it: None for no other.
STEPS: Mapping[str, Mapping[str, str | None]] = {
    'ACTIVE': _ANYWHERE | _AT_REST | {
        'stop': 'SHUTOFF', 'soft_reboot': None, 'pause': 'PAUSED',
        'suspend': 'SUSPENDED', 'rescue': 'RESCUE', 'live_migrate': None},
    'SHUTOFF': _ANYWHERE | _AT_REST | {'start': 'ACTIVE'},
    'PAUSED': _ANYWHERE | {
        'unpause': 'ACTIVE', 'snapshot': None, 'live_migrate': None},
    'SUSPENDED': _ANYWHERE | {'resume': 'ACTIVE'},
    'RESCUE': {'unrescue': 'ACTIVE'},
    'SHELVED_OFFLOADED': {'unshelve': 'ACTIVE'},
    # To the status before the resize.
    'VERIFY_RESIZE': {'confirm': None, 'revert': None},
}


@dataclasses.dataclass
class Model:
    """What a server should be.

    :ivar content: the number that was stored last on its root disk; 0 if that
        is as its image has it
    :ivar without: steps that cannot be taken
    """

    status: str = 'ACTIVE'
    content: int = 0
    without: Collection[str] = ()
    _before_resize: tuple[str, int] = ('', 0)

    def choices(self) -> list[str]:
        return sorted(set(STEPS[self.status]) - set(self.without))

    def take(self, step: str) -> None:
        after = STEPS[self.status][step]
        if after == 'VERIFY_RESIZE':
            self._before_resize = (self.status, self.content)
        if step in ('confirm', 'revert'):
            after = self._before_resize[0]
        if step == 'revert':
            self.content = self._before_resize[1]
        if step == 'rebuild':
            self.content = 0
        self.status = after or self.status


class Server(ty.Protocol):
    """A server on its walk."""

    def do(self, step: str) -> None:
        """Do a step, and wait until the server has no task any more."""

    def store(self, number: int) -> bool:
        """Store a number on the root disk; whether that can be done now."""

    def check(self, model: Model) -> None:
        """Compare the server with its model."""


def length(default: int) -> tuple[int, int]:
    """How many steps to go, and the seed."""
    count, _colon, seed = os.environ.get(
        'FAKEDAX_WALK', str(default)).partition(':')
    return int(count), int(seed or 1)


def walk(server: Server, count: int, seed: int,
         without: Collection[str] = ()) -> None:
    """Take random steps; an error says which led to it.

    :param without: steps that the server cannot take
    """
    source = random.Random(seed)
    model = Model(without=without)
    taken: list[str] = []
    for number in range(1, count + 1):
        step = source.choice(model.choices())
        taken.append(step)
        try:
            server.do(step)
            model.take(step)
            server.check(model)
            if server.store(number):
                model.content = number
                server.check(model)
        except Exception as exc:
            raise AssertionError(
                f'step {number} of seed {seed}: {" ".join(taken)}: '
                f'{exc}') from exc
