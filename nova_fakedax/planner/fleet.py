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

"""Guests of several flavors, placed on many hosts.

As Nova places them by default: each on the host with the most memory left of
those that take it.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import heapq

from nova_fakedax.planner import guest
from nova_fakedax.planner import host

#: Guests more than a host has, for which it is judged at first.
_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class Share:
    """A flavor's guests in a mix.

    :ivar weight: how many there are for so many of the others
    """

    load: guest.Load
    weight: float


@dataclasses.dataclass(frozen=True)
class Placed:
    """The guests of a host.

    :ivar counts: how many of each share
    :ivar services: what the guests of each share get, by its number, of those
        that have guests here
    """

    where: host.Host
    counts: tuple[int, ...]
    held: float
    storage_reads: float
    services: Mapping[int, host.Service]


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Hosts with as many guests as fit.

    :ivar limit: why most of the hosts did not take one more
    """

    placed: Sequence[Placed]
    limit: host.Limit

    def count(self, number: int) -> int:
        """How many guests of a share fit."""
        return sum(placed.counts[number] for placed in self.placed)

    def services(self, number: int) -> Iterator[tuple[host.Service, int]]:
        """What guests of a share get, and how many of them get it."""
        for placed in self.placed:
            if number in placed.services:
                yield placed.services[number], placed.counts[number]


def fill(
    hosts: Sequence[host.Host], mix: Sequence[Share], limits: host.Limits,
) -> Fleet:
    """Place guests of a mix on hosts until one of them finds no host.

    More guests never do better than fewer. So a host that has refused a guest
    takes no other of its flavor later; and a host that could have more guests
    than it gets is not judged again.
    """
    @functools.lru_cache(maxsize=1 << 16)
    def judge(where: host.Host, counts: tuple[int, ...]) -> host.Outcome:
        return host.judge(where, [
            (share.load, count) for share, count in zip(mix, counts)
            if count], limits)

    weights = [share.weight for share in mix]
    fillings = [_Filling(where, judge, weights) for where in hosts]
    # For each share the hosts that have not refused it, by the memory that
    # they had left when they were last looked at.
    takers = [[(-filling.left, number)
               for number, filling in enumerate(fillings)] for _share in mix]
    for heap in takers:
        heapq.heapify(heap)
    refused: list[collections.Counter[host.Limit]] = [
        collections.Counter() for _share in mix]
    for wanted in _in_turn(weights):
        heap = takers[wanted]
        while heap:
            known, number = heap[0]
            filling = fillings[number]
            if -known != filling.left:
                heapq.heapreplace(heap, (-filling.left, number))
                continue
            limit = filling.add(wanted, mix[wanted].load)
            if limit is None:
                break
            refused[wanted][limit] += 1
            heapq.heappop(heap)
        else:
            [(limit, _times)] = refused[wanted].most_common(1)
            return Fleet([filling.placed() for filling in fillings], limit)
    raise AssertionError


class _Filling:
    """A host that gets guests.

    :ivar left: MiB that are not held
    """

    def __init__(
        self, where: host.Host,
        judge: Callable[[host.Host, tuple[int, ...]], host.Outcome],
        weights: Sequence[float],
    ) -> None:
        self._host, self._judge, self._weights = where, judge, weights
        self._counts = self._proven = (0,) * len(weights)
        self._ahead = _AHEAD
        self.left = where.memory

    def add(self, number: int, load: guest.Load) -> host.Limit | None:
        """Take one more guest of a share, or say why not."""
        more = (*self._counts[:number], self._counts[number] + 1,
                *self._counts[number + 1:])
        while more[number] > self._proven[number]:
            tried = self._beyond(more)
            limit = self._judge(self._host, tried).limit
            if limit is None:
                self._proven = tried
            elif tried == more:
                return limit
            else:
                self._ahead //= 2
        self._counts = more
        self.left -= load.held + load.left
        return None

    def _beyond(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Counts that are not less: the same for many others."""
        steps = [max(1, round(self._ahead * weight / sum(self._weights)))
                 for weight in self._weights]
        return tuple(-(-count // step) * step
                     for count, step in zip(counts, steps))

    def placed(self) -> Placed:
        outcome = self._judge(self._host, self._counts)
        there = [number for number, count in enumerate(self._counts) if count]
        return Placed(self._host, self._counts, outcome.held,
                      outcome.storage_reads,
                      dict(zip(there, outcome.services)))


def _in_turn(weights: Sequence[float]) -> Iterator[int]:
    """Number after number, each as often as its weight says, evenly spread.

    Smooth weighted round-robin, as nginx has it.
    """
    credits = [0.0] * len(weights)
    while True:
        credits = [credit + weight
                   for credit, weight in zip(credits, weights)]
        chosen = max(range(len(weights)), key=credits.__getitem__)
        credits[chosen] -= sum(weights)
        yield chosen
