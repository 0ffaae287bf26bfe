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

"""A guest of a flavor, and how its host sees it with each kind of disk."""

import dataclasses
import enum
import math

from nova_fakedax.planner import lru

#: MiB of anonymous memory of QEMU itself: QEMU 10.0.13 had 82 without KVM, of
#: which 32 were the buffer of translated code, which it does not have with
#: KVM. KubeVirt counts 30, 8 for each vCPU, and 1/512 of the guest's memory
#: for page tables (GetMemoryOverhead).
QEMU_MIB = 50.0


class Disk(enum.Enum):
    """A kind of disk, and who caches it.

    Nova gives each guest a balloon with free page reporting. By it the guest
    gives back what its programs free, and not its page cache.
    """

    WRITEBACK = 'virtio-blk, writeback'
    NONE = 'virtio-blk, none'
    FAKE_DAX = 'fake DAX'


@dataclasses.dataclass(frozen=True)
class Guest:
    """What a guest asks for, and what it uses.

    :ivar ram: MiB of the flavor
    :ivar programs: MiB that its kernel and its programs allocate
    :ivar hot: the file data that it reads again and again
    :ivar touched: MiB of file data that it has read or written since it was
        started, the hot data included; infinite: more than its RAM takes
    :ivar qemu: MiB of QEMU's own
    :ivar idle: MiB of QEMU and the programs that nobody uses; only swap takes
        them
    :ivar cpus: host CPUs that it uses, in the mean over time
    :ivar spells: when it is busy
    :ivar work: the share of its busy time in which it has something to do
        besides waiting for its disk. With 1 it loses each second that it
        waits. With 0 it catches up, and loses only what it has no time for.
    :raises ValueError: its programs do not fit into its RAM, or more is idle
        than there is
    """

    name: str
    ram: float
    programs: float
    hot: tuple[lru.Stratum, ...] = ()
    touched: float = math.inf
    qemu: float = QEMU_MIB
    idle: float = 0.0
    cpus: float = 0.0
    spells: lru.Spells = lru.ALWAYS
    work: float = 1.0

    def __post_init__(self) -> None:
        if self.programs > self.ram:
            raise ValueError(
                f'guest {self.name}: its programs take {self.programs:g} MiB; '
                f'allowed: at most its RAM, {self.ram:g} MiB')
        if self.idle > self.qemu + self.programs:
            raise ValueError(
                f'guest {self.name}: {self.idle:g} MiB are idle; allowed: at '
                f'most what QEMU and programs take, '
                f'{self.qemu + self.programs:g} MiB')

    @property
    def reads(self) -> float:
        """That it wants a second while it is busy."""
        return sum(stratum.reads for stratum in self.hot)


@dataclasses.dataclass(frozen=True)
class Load:
    """A guest as its host sees it, with a kind of disk.

    :ivar held: MiB that the host cannot take back
    :ivar strata: what it reads through the host's memory
    :ivar uncached: its reads, a second, that always go to the storage
    :ivar unit_kib: what a miss reads from the storage
    """

    guest: Guest
    held: float
    strata: tuple[lru.Stratum, ...] = ()
    uncached: float = 0.0
    unit_kib: float = lru.PAGE_KIB

    @property
    def left(self) -> float:
        """MiB that it takes besides when all that can be is in swap."""
        return sum(stratum.mib * stratum.left for stratum in self.strata)


def load(
    guest: Guest, disk: Disk, read_ahead_kib: float = lru.PAGE_KIB,
    swap: lru.Swap | None = None,
) -> Load:
    """Say how its host sees a guest with a kind of disk.

    :param read_ahead_kib: what the host reads from the storage where a page
        is missing that QEMU has mapped. Reads at random through QEMU's system
        calls are not read ahead.
    :param swap: where the host puts memory of guests, if it does
    """
    if disk is Disk.FAKE_DAX:
        cache, strata, uncached = _Cache(), guest.hot, 0.0
    else:
        cache = _cache(guest)
        strata = tuple(stratum for stratum in cache.missed if stratum.reads)
        uncached = 0.0
        if disk is Disk.NONE:
            uncached = sum(stratum.reads for stratum in strata)
            strata = ()
    held = guest.qemu + guest.programs + cache.mib
    if swap:
        swapped = [dataclasses.replace(stratum, swap=swap) for stratum in (
            *cache.hot, lru.Stratum(cache.cold + guest.idle, 0.0))
            if stratum.mib > 0]
        held -= sum(stratum.mib for stratum in swapped)
        strata += tuple(swapped)
    return Load(guest, held, strata, uncached, max(
        read_ahead_kib if disk is Disk.FAKE_DAX else 0.0, lru.PAGE_KIB))


@dataclasses.dataclass(frozen=True)
class _Cache:
    """A guest's page cache.

    :ivar mib: how much it is
    :ivar hot: what of it is read again and again
    :ivar missed: what the guest reads from its disk
    """

    mib: float = 0.0
    hot: tuple[lru.Stratum, ...] = ()
    missed: tuple[lru.Stratum, ...] = ()

    @property
    def cold(self) -> float:
        return self.mib - sum(stratum.mib for stratum in self.hot)


def _cache(guest: Guest) -> _Cache:
    space = guest.ram - guest.programs
    # It belongs to the guest alone, so its clock runs only while that is busy.
    readers = lru.Readers(1, guest.hot)
    time = lru.characteristic_time([readers], space)
    hot, missed = [], []
    for stratum in guest.hot:
        there = lru.cached(stratum, readers, time)
        reads = stratum.reads * lru.misses(stratum, readers, time)
        hot.append(lru.Stratum(stratum.mib * there, stratum.reads - reads))
        missed.append(lru.Stratum(stratum.mib, reads, quiet=time))
    return _Cache(
        min(space, max(sum(stratum.mib for stratum in guest.hot),
                       guest.touched)), tuple(hot), tuple(missed))
