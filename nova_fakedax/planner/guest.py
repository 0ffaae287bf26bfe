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
    :ivar cpus: host CPUs that it uses, in the mean over time
    :ivar spells: when it is busy
    :ivar work: the share of its busy time in which it has something to do
        besides waiting for its disk. With 1 it loses each second that it
        waits. With 0 it catches up, and loses only what it has no time for.
    :raises ValueError: its programs do not fit into its RAM
    """

    name: str
    ram: float
    programs: float
    hot: tuple[lru.Stratum, ...] = ()
    touched: float = math.inf
    qemu: float = QEMU_MIB
    cpus: float = 0.0
    spells: lru.Spells = lru.ALWAYS
    work: float = 1.0

    def __post_init__(self) -> None:
        if self.programs > self.ram:
            raise ValueError(
                f'guest {self.name}: its programs take {self.programs:g} MiB; '
                f'allowed: at most its RAM, {self.ram:g} MiB')

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
        return Load(guest, guest.qemu + guest.programs, guest.hot,
                    unit_kib=max(read_ahead_kib, lru.PAGE_KIB))
    cache = guest.ram - guest.programs
    hot = sum(stratum.mib for stratum in guest.hot)
    filled = min(cache, max(hot, guest.touched))
    # Its cache belongs to it alone, so its clock runs only while it is busy.
    readers = lru.Readers(1, guest.hot)
    time = lru.characteristic_time([readers], cache)
    missed = tuple(
        lru.Stratum(stratum.mib, stratum.reads * lru.misses(
            stratum, readers, time), time) for stratum in guest.hot)
    held = guest.qemu + guest.programs + filled
    swapped: tuple[lru.Stratum, ...] = ()
    if swap:
        held, swapped = _with_swap(guest, readers, time, filled, swap)
    if disk is Disk.NONE:
        return Load(guest, held, swapped,
                    uncached=sum(stratum.reads for stratum in missed))
    return Load(guest, held, swapped + tuple(
        stratum for stratum in missed if stratum.reads))


def _with_swap(
    guest: Guest, readers: lru.Readers, time: float, filled: float,
    swap: lru.Swap,
) -> tuple[float, tuple[lru.Stratum, ...]]:
    """What is held, and the guest's cache as memory that can be swapped.

    Programs are in use, and QEMU is, too.
    """
    hot = tuple(
        lru.Stratum(stratum.mib * share, stratum.reads * share, swap=swap)
        for stratum in guest.hot
        if (share := lru.cached(stratum, readers, time)))
    idle = filled - sum(stratum.mib for stratum in hot)
    return guest.qemu + guest.programs, (
        *hot, *([lru.Stratum(idle, 0.0, swap=swap)] if idle > 0 else []))
