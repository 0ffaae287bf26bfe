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

"""The plan for what ``lab/bench density`` has measured.

Its rows with the part ``how-many``: alike guests on one host with a fixed
budget of memory, more and more of them, until one is killed, gets less than
half of the reads that one alone gets, or the host stalls.

Besides what the bench writes, a row may say ``programs_mib``, ``qemu_mib``,
``idle_mib``, ``busy``, ``busy_s``, ``swap_mib``, ``swap_left``, ``swap_ms``,
``miss_cpu_ms`` and ``merged_mib``. One without ``cpus`` has no limit of them.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import math
import statistics
import typing as ty

from nova_fakedax.planner import guest
from nova_fakedax.planner import host
from nova_fakedax.planner import lru

PART = 'how-many'

#: How far off the plan may be, as a share of what was measured.
TOLERANCE = 0.15

#: MiB that the kernel and the programs of the bench's guest need: with so much
#: less than its RAM as cache, the shares of misses follow that were measured
#: in guests of 192, 256 and 288 MiB (doc/source/admin/plan.rst).
_PROGRAMS_MIB = 90.0

#: MiB of QEMU's own, without KVM.
_QEMU_MIB = 82.0

#: MiB of these two that a guest does not use while it only reads its data.
#: Swap can take nearly all of a guest that rests.
_IDLE_MIB = 145.0

#: Guests of the variant "mixed" that are busy, and for how many seconds.
_BUSY, _BUSY_SECONDS = 3, 7.0

#: MiB of swap, and what of a page of the bench stays in memory in zram.
_SWAP_MIB, _ZRAM_LEFT = 6144.0, 0.33

#: Of a CPU for each page that is read from the storage or from swap, as seen
#: without KVM.
_MISS_CPU_MS = 0.35

#: The share of the bench's file data that is the same in all guests.
_SAME = 0.25

#: The first words of a mode, and its disk.
_DISKS = {'blk-writeback': guest.Disk.WRITEBACK,
          'blk-none': guest.Disk.NONE,
          'pmem': guest.Disk.FAKE_DAX}

#: Modes in which the host reads ahead for a miss. In others the device turns
#: that off, as most of what a guest misses had been evicted.
_READ_AHEAD = ('pmem-stock',)

#: What is measured, by its key in a row, and the share of a lone guest's reads
#: that each may have lost. That the host stalls is not planned: it does where
#: readahead has guests wait for the storage, too.
_MEASURED = {'guests': 0.5, 'guests_95': 0.05}


@dataclasses.dataclass(frozen=True)
class _Processors:
    """The CPUs that a guest of the bench takes.

    :ivar rest: at rest
    :ivar read: for each read that it makes a second
    """

    rest: float
    read: float


#: As seen without KVM; with it they are less.
_USUAL = _Processors(0.025, 0.0005)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A number of guests that was planned, and that was measured.

    :ivar key: of what was measured, in the row
    :ivar at_least: whether the bench had no more guests to try
    """

    row: Mapping[str, ty.Any]
    key: str
    planned: int
    measured: float
    at_least: bool

    @property
    def difference(self) -> float:
        """Of the plan to what was measured, as a share of the latter."""
        if self.at_least and self.planned >= self.measured:
            return 0.0
        if not self.measured:
            return math.inf if self.planned else 0.0
        return self.planned / self.measured - 1

    @property
    def close(self) -> bool:
        return abs(self.difference) <= TOLERANCE


def compare(rows: Iterable[Mapping[str, ty.Any]]) -> list[Comparison]:
    """Plan each row of the part, and compare.

    :param rows: also say how fast the processors were, where there are enough
    :raises ValueError: a row cannot be planned; says which and why
    """
    numbered = [(number, row) for number, row in enumerate(rows)
                if row.get('part') == PART]
    found: list[Comparison] = []
    seen: list[tuple[float, float]] = []
    # First all that tells of the processors.
    for number, row in numbered:
        with _named(number):
            seen += _seen(row)
    processors = _fitted(seen)
    for number, row in numbered:
        with _named(number):
            found += _compare(row, processors)
    return found


@contextlib.contextmanager
def _named(number: int) -> Iterator[None]:
    """Have what is wrong with a row name it."""
    try:
        yield
    except KeyError as exc:
        raise ValueError(f'row {number} has no {exc}') from exc
    except (TypeError, ValueError) as exc:
        raise ValueError(f'row {number}: {exc}') from exc


def _seen(row: Mapping[str, ty.Any]) -> Iterable[tuple[float, float]]:
    """The reads a second of a guest, and the CPUs that it takes.

    Of fleets whose guests cache all that they read, so that the reads alone
    take the processors.
    """
    if (_disk(row['mode']) is guest.Disk.FAKE_DAX or _swap(row)
            or row['ram_mib'] < _PROGRAMS_MIB + row['hot_mib']):
        return
    for point in row.get('points', ()):
        number = point['guests']
        # One alone has the caches of the processors to itself.
        if number > 1 and not point['stopped_by'] and point.get('cpus'):
            # The rate asked for: what was measured differs by chance.
            yield (row['reads_per_s'] * _spells(row, number).share,
                   point['cpus'] / number)


def _fitted(seen: Sequence[tuple[float, float]]) -> _Processors:
    """What is usual, if a line through what was seen tells nothing."""
    if len({rate for rate, _cpus in seen}) > 1:
        read, rest = statistics.linear_regression(*zip(*seen, strict=True))
        if read > 0 and rest > 0:
            return _Processors(rest, read)
    return _USUAL


def _compare(row: Mapping[str, ty.Any],
             processors: _Processors) -> Iterable[Comparison]:
    where = host.Host(row['budget_mib'], host.Storage(
        row['miss_ms'] / 1000, row.get('storage_reads_per_s', math.inf),
        row.get('storage_mib_per_s', math.inf)), row.get('cpus', math.inf),
        row.get('miss_cpu_ms', _MISS_CPU_MS) / 1000)

    def guests(number: int) -> host.Guests:
        return [(_load(row, number, processors), number)]

    # The bench compares with a guest alone, which may lose something, too.
    alone = host.judge(where, guests(1), host.Limits(lost=1))
    kept = 1 - alone.services[0].lost if alone.services else 1.0
    for key, lost in _MEASURED.items():
        yield Comparison(
            row, key, host.most(
                where, guests, host.Limits(lost=1 - kept * (1 - lost))),
            row[key], at_least=row['stopped_by'] == 'none'
            and row[key] == row['guests'])


def _load(row: Mapping[str, ty.Any], number: int,
          processors: _Processors) -> guest.Load:
    """One of so many guests of a row."""
    mode = row['mode']
    disk = _disk(mode)
    programs = min(row['ram_mib'], row.get('programs_mib', _PROGRAMS_MIB))
    qemu = row.get('qemu_mib', _QEMU_MIB)
    swap = _swap(row)
    spells = _spells(row, number)
    load = guest.load(guest.Guest(
        f"{mode}, {row['ram_mib']} MiB", row['ram_mib'], programs,
        (lru.Stratum(row['hot_mib'], row['reads_per_s']),),
        touched=max(0.0, row['unreclaimable_mib'] - qemu - programs),
        qemu=qemu, idle=row.get(
            'idle_mib', min(_IDLE_MIB, qemu + programs)),
        cpus=processors.rest + (
            processors.read * spells.share * row['reads_per_s']),
        spells=spells, work=0.0), disk,
        row['read_ahead_kib'] if mode in _READ_AHEAD else lru.PAGE_KIB, swap)
    # What was measured of one guest.
    held = row['unreclaimable_mib'] - sum(
        stratum.mib for stratum in load.strata if stratum.swap)
    # Of what Linux has merged there is one copy for all.
    held -= _merged(row) * (1 - 1 / number)
    return dataclasses.replace(load, held=max(0.0, held))


def _spells(row: Mapping[str, ty.Any], number: int) -> lru.Spells:
    if row['variant'] != 'mixed':
        return lru.ALWAYS
    return lru.Spells(min(1.0, row.get('busy', _BUSY) / number),
                      row.get('busy_s', _BUSY_SECONDS))


def _swap(row: Mapping[str, ty.Any]) -> lru.Swap | None:
    mib = row.get('swap_mib', _SWAP_MIB)
    if row['mode'].endswith('-swap'):
        return lru.Swap(mib)
    if row['mode'].endswith('-zram'):
        # It costs time of the CPU, little against a read of the storage.
        return lru.Swap(mib, row.get('swap_left', _ZRAM_LEFT),
                        row.get('swap_ms', 0.0) / 1000)
    return None


def _merged(row: Mapping[str, ty.Any]) -> float:
    """MiB of a guest's memory of which others have the same."""
    if not row['mode'].endswith('-ksm'):
        return 0.0
    merged: float = row.get('merged_mib', _SAME * row['hot_mib'])
    return merged


def _disk(mode: str) -> guest.Disk:
    for beginning, disk in _DISKS.items():
        if mode.startswith(beginning):
            return disk
    raise ValueError(f"mode is '{mode}'; allowed: what begins with "
                     f"{', '.join(_DISKS)}")
