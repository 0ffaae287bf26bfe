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

"""What guests find on one host, and whether that is good enough.

A host has memory that guests hold, and caches in the rest: one cache, shared
by all. What it misses comes from its storage. A guest has one read under way
at a time.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import enum
import math

from nova_fakedax.planner import guest
from nova_fakedax.planner import lru


#: Seconds of a miss from which a longer one is looked for, if it takes none.
_QUICK = 1e-6


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where a host's misses are read from.

    :ivar seconds: that one miss takes while nothing else is read, its
        read-ahead included
    :ivar reads: that it does a second, at most
    :ivar mib: that it reads a second, at most
    """

    seconds: float
    reads: float = math.inf
    mib: float = math.inf


@dataclasses.dataclass(frozen=True)
class Host:
    """A host, as far as guests can have it.

    :ivar memory: MiB for guests, what the host needs itself already taken off
    :ivar cpus: that guests can use
    :ivar miss_cpu: seconds of a CPU for each page that is read from the
        storage or from swap, making room for it included
    """

    memory: float
    storage: Storage
    cpus: float = math.inf
    miss_cpu: float = 0.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """How bad it may get for guests.

    :ivar lost: the share of the reads that it wants that a guest may lose
    :ivar missed: the share of a guest's reads that come from the storage, and
        that a host with enough memory would have cached
    """

    lost: float = 0.05
    missed: float = 1.0


class Limit(enum.Enum):
    """Why one more guest does not fit."""

    MEMORY = 'memory'
    SWAP = 'swap'
    MISSES = 'misses'
    STORAGE = 'storage'
    WAITING = 'waiting for misses'
    CPU = 'CPU'


@dataclasses.dataclass(frozen=True)
class Service:
    """What guests of one load get.

    :ivar misses: reads of the storage for each read of a guest
    :ivar waits: seconds for each read of a guest, in the mean
    :ivar lost: the share of the reads that a guest wants, but does not get
    """

    misses: float
    waits: float
    lost: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What guests find on a host.

    :ivar held: MiB that the host cannot take back
    :ivar services: of each load
    :ivar storage_reads: that the storage does for them, a second
    :ivar limit: what is not good enough; None: they fit
    """

    held: float
    services: tuple[Service, ...] = ()
    storage_reads: float = 0.0
    limit: Limit | None = None


#: Loads of guests, and how many guests have each.
Guests = Sequence[tuple[guest.Load, int]]


def judge(host: Host, guests: Guests, limits: Limits) -> Outcome:
    """Say what guests find on a host."""
    readers = [lru.Readers(count, load.strata, load.unit_kib,
                           load.guest.spells) for load, count in guests]
    held = sum((load.held + load.left) * count for load, count in guests)
    if held > host.memory:
        return Outcome(held, limit=Limit.MEMORY)
    cpus = sum(load.guest.cpus * count for load, count in guests)
    if cpus > host.cpus:
        return Outcome(held, limit=Limit.CPU)
    time = lru.characteristic_time(readers, host.memory - held)
    swaps = {stratum.swap for load, _count in guests
             for stratum in load.strata if stratum.swap}
    if swaps and lru.swapped(readers, time, host.memory - held) > min(
            swap.mib for swap in swaps):
        return Outcome(held, limit=Limit.SWAP)
    demands = [_demand(load, count, of, time)
               for (load, count), of in zip(guests, readers)]
    seconds = _seconds_of_a_miss(host.storage, demands)
    services = tuple(demand.service(seconds) for demand in demands)
    reads = sum(demand.storage_reads(seconds) for demand in demands)
    cpus += host.miss_cpu * sum(demand.pages(seconds) for demand in demands)
    return Outcome(held, services, reads, Limit.CPU if cpus > host.cpus
                   else _too_bad(host, limits, demands, services, seconds))


def most(
    host: Host, guests: Callable[[int], Guests], limits: Limits,
) -> int:
    """How many guests fit on a host, if they are as ``guests`` says.

    :param guests: the loads of so many guests. More of them must not do
        better than fewer.
    """
    def fit(number: int) -> bool:
        return judge(host, guests(number), limits).limit is None

    if not fit(1):
        return 0
    fits, too_many = 1, 2
    while fit(too_many):
        fits, too_many = too_many, too_many * 2
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if fit(middle):
            fits = middle
        else:
            too_many = middle
    return fits


@dataclasses.dataclass(frozen=True)
class _Demand:
    """What guests of one load ask of the storage.

    :ivar busy: how many of them are busy at a time, in the mean
    :ivar misses: reads of the storage for each read of theirs
    :ivar uncached: those of them that no memory of the host could serve
    :ivar swapped: seconds for each read of theirs, from swap that is not on
        the storage
    :ivar from_swap: reads of such swap for each read of theirs
    """

    load: guest.Load
    busy: float
    misses: float
    uncached: float
    swapped: float
    from_swap: float

    def rate(self, seconds: float) -> float:
        """Reads of one guest a second, where a miss takes so long.

        It works, and it waits; the time it has left it does neither.
        """
        wanted = self.load.guest.reads
        if not wanted:
            return 0.0
        return 1 / max(1 / wanted, self.load.guest.work / wanted
                       + self.waits(seconds))

    def waits(self, seconds: float) -> float:
        """Seconds for each read."""
        return self.misses * seconds + self.swapped

    def storage_reads(self, seconds: float) -> float:
        return self.busy * self.rate(seconds) * self.misses

    def pages(self, seconds: float) -> float:
        """That all of them have read a second, swap included."""
        return self.busy * self.rate(seconds) * (self.misses + self.from_swap)

    def service(self, seconds: float) -> Service:
        wanted = self.load.guest.reads
        return Service(
            self.misses, self.waits(seconds),
            max(0.0, 1 - self.rate(seconds) / wanted) if wanted else 0.0)


def _demand(
    load: guest.Load, count: int, readers: lru.Readers, time: float,
) -> _Demand:
    from_storage = from_swap = swapped = 0.0
    for stratum in load.strata:
        missed = stratum.reads * lru.misses(stratum, readers, time)
        if stratum.swap and stratum.swap.seconds is not None:
            from_swap += missed
            swapped += missed * stratum.swap.seconds
        else:
            from_storage += missed
    wanted = load.guest.reads or 1.0
    return _Demand(load, count * load.guest.spells.share,
                   (from_storage + load.uncached) / wanted,
                   load.uncached / wanted, swapped / wanted,
                   from_swap / wanted)


def _seconds_of_a_miss(
    storage: Storage, demands: Sequence[_Demand],
) -> float:
    """What a miss takes when all guests read.

    As long as alone, while the storage can do what is asked of it; then so
    long that those who wait ask for no more than it can do.
    """
    def use(seconds: float) -> float:
        reads = [demand.storage_reads(seconds) for demand in demands]
        mib = sum(one * demand.load.unit_kib / 1024
                  for one, demand in zip(reads, demands))
        return max(sum(reads) / storage.reads, mib / storage.mib)

    quick = slow = storage.seconds
    if use(quick) <= 1:
        return quick
    while use(slow) > 1:
        slow = 2 * slow or _QUICK
    for _halving in range(30):
        middle = (quick + slow) / 2
        quick, slow = ((middle, slow) if use(middle) > 1 else (quick, middle))
    return slow


def _too_bad(
    host: Host, limits: Limits, demands: Sequence[_Demand],
    services: Sequence[Service], seconds: float,
) -> Limit | None:
    if max((demand.misses - demand.uncached for demand in demands),
           default=0.0) > limits.missed:
        return Limit.MISSES
    if max((service.lost for service in services), default=0.0) > limits.lost:
        return (Limit.STORAGE if seconds > host.storage.seconds
                else Limit.WAITING)
    return None
