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

"""What of file data a least-recently-used cache holds.

The approximation of Che, Tung and Wang ("Hierarchical Web Caching Systems:
Modeling, Design and Experimental Results", IEEE JSAC 20(7), 2002; why it is
so exact: Fricker, Robert and Roberts, arXiv:1202.3974). A page leaves the
cache when nobody has read it for the *characteristic time*, which is the same
for all pages, and which follows from the cache being full. Guests that read
alike are one term of a sum, so it costs the same for ten as for 10^5.

Where all pages are read equally often the misses are what the cache cannot
hold, whatever it evicts; the approximation says so, too.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import typing as ty

#: KiB. What a guest reads at a time, and what a cache holds it in.
PAGE_KIB = 4

#: How exact the characteristic time is, or what is cached by it, as shares of
#: them; and the steps that it may take; some ten are usual.
_EXACT, _EXACT_CACHED, _STEPS = 1e-6, 1e-9, 200


@dataclasses.dataclass(frozen=True)
class Swap:
    """Where a host puts memory that is not file data.

    :ivar mib: how much it takes
    :ivar left: MiB that 1 MiB in it leaves in memory: 0 for a disk, a third
        for zram that compresses 3 to 1
    :ivar seconds: that a read from it takes; None: as one from the storage,
        where it is
    """

    mib: float
    left: float = 0.0
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Pages of one guest that are read equally often, each at random.

    Several of them are a guest's working-set curve.

    :ivar reads: of a page, a second, of all the pages together, while the
        guest is busy
    :ivar quiet: seconds after a read of a page in which nobody reads it again,
        as the reader has it in a cache of its own
    :ivar swap: where they go; None: they are file data, which is dropped
    """

    mib: float
    reads: float
    quiet: float = 0.0
    swap: Swap | None = None

    @property
    def left(self) -> float:
        """MiB that stay in memory of 1 MiB that is not cached."""
        return self.swap.left if self.swap else 0.0


@dataclasses.dataclass(frozen=True)
class Spells:
    """When a guest is busy: by turns, and idle between them.

    :ivar share: of the time
    :ivar seconds: of one spell
    """

    share: float = 1.0
    seconds: float = 60.0

    @property
    def period(self) -> float:
        """The seconds from one spell to the next."""
        return self.seconds / self.share

    def busy(self, moment: float) -> float:
        """The busy seconds before a moment; a spell begins at 0."""
        whole, rest = divmod(moment, self.period)
        return whole * self.seconds + min(rest, self.seconds)


#: A guest that is always busy.
ALWAYS = Spells()


@dataclasses.dataclass(frozen=True)
class Readers:
    """Guests that read alike.

    :ivar count: how many they are
    :ivar unit_kib: what a miss brings into the cache, all of it read as often
        as the page that was missed
    """

    count: int
    strata: Sequence[Stratum]
    unit_kib: float = PAGE_KIB
    spells: Spells = ALWAYS


def characteristic_time(readers: Sequence[Readers], mib: float) -> float:
    """The time after which a cache drops what nobody reads.

    :param mib: the cache's, without what is left in memory of swapped pages
    :returns: infinite, if all that is ever read fits
    """
    # What is never read is cached only where there is space left.
    parts = [(of.count * stratum.mib * (1 - stratum.left),
              _Pattern.of(stratum, of), of.spells)
             for of in readers for stratum in of.strata if stratum.reads]
    if sum(size for size, _pattern, _spells in parts) <= mib:
        return math.inf
    # Newton's method. What is cached grows ever more slowly with the time, so
    # no step from below goes too far. A page enters the cache when it is
    # missed, which is how fast it grows.
    time = 0.0
    for _step in range(_STEPS):
        lacking, grows = mib, 0.0
        for size, pattern, spells in parts:
            lacking -= size * _cached(pattern, time, spells)
            grows += (size * pattern.reads * spells.share
                      * _missed(pattern, time, spells))
        if lacking <= max(_EXACT * grows * time, _EXACT_CACHED * mib):
            break
        time += lacking / grows
    return time


def misses(stratum: Stratum, readers: Readers, time: float) -> float:
    """The share of a stratum's reads that a cache does not serve."""
    return stratum.reads and _missed(
        _Pattern.of(stratum, readers), time, readers.spells)


def cached(stratum: Stratum, readers: Readers, time: float) -> float:
    """The share of a stratum that a cache holds, in the mean over time."""
    return stratum.reads and _cached(
        _Pattern.of(stratum, readers), time, readers.spells)


def swapped(readers: Sequence[Readers], time: float, mib: float) -> float:
    """The MiB that are in swap, for the cache of ``characteristic_time()``.

    What is never read goes there first, and stays where there is space for it.
    """
    gone = idle = 0.0
    for of in readers:
        for stratum in of.strata:
            size = of.count * stratum.mib
            if stratum.swap and not stratum.reads:
                idle += size
                leaves = stratum.left
                continue
            there = size * cached(stratum, of, time)
            mib -= there * (1 - stratum.left)
            if stratum.swap:
                gone += size - there
    if idle and leaves < 1:
        idle -= min(idle, max(0.0, mib) / (1 - leaves))
    return gone + idle


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """How one unit of a stratum is read while its guest is busy.

    After a read there is none for ``quiet`` seconds, and then the next one
    comes at any moment with the same chance. So one cache passes its misses on
    to the next.

    :ivar reads: a second, in the mean
    """

    reads: float
    quiet: float

    @classmethod
    def of(cls, stratum: Stratum, readers: Readers) -> ty.Self:
        unit = min(readers.unit_kib, stratum.mib * 1024)
        return cls(stratum.reads * unit / (stratum.mib * 1024), stratum.quiet)

    @property
    def waiting(self) -> float:
        """The share of the time in which the unit can be read."""
        return max(1e-9, 1 - self.reads * self.quiet)

    def missed(self, start: float, end: float) -> float:
        """The chance that a read is the first for a time.

        :param start: seconds
        :param end: the mean is of all times from start to this
        """
        start, end = min(start, end), max(start, end)
        rate = self.reads / self.waiting
        late = _mean_of_exp(rate * max(0.0, start - self.quiet),
                            rate * max(0.0, end - self.quiet))
        early = self._before_quiet_ends(start, end)
        return early + (1 - early) * late

    def unread(self, start: float, end: float) -> float:
        """The chance that there was no read for a time, as ``missed()``."""
        start, end = min(start, end), max(start, end)
        rate = self.reads / self.waiting
        late = self.waiting * _mean_of_exp(
            rate * max(0.0, start - self.quiet),
            rate * max(0.0, end - self.quiet))
        early = self._before_quiet_ends(start, end)
        return (early * (1 - self.reads * (start + min(end, self.quiet)) / 2)
                if early else 0.0) + (1 - early) * late

    def _before_quiet_ends(self, start: float, end: float) -> float:
        if start >= self.quiet:
            return 0.0
        if end <= self.quiet:
            return 1.0
        return (self.quiet - start) / (end - start)


def _missed(pattern: _Pattern, time: float, spells: Spells) -> float:
    """Of the reads of a guest, those of what was not read for a time."""
    if spells.share >= 1:
        return pattern.missed(time, time)
    return sum(share * pattern.missed(before, after)
               for share, before, after in _in_spells(time, spells))


def _cached(pattern: _Pattern, time: float, spells: Spells) -> float:
    """Of the pages of a guest, busy or not, those read within a time."""
    if spells.share >= 1:
        return 1 - pattern.unread(time, time)
    return 1 - sum(
        part * share * pattern.unread(before, after)
        for part, pieces in (
            (spells.share, _in_spells(time, spells)),
            (1 - spells.share, _between_spells(time, spells)))
        for share, before, after in pieces)


#: Pieces of time, each with its share of all of them. What was busy of the
#: time before a moment goes from the one value to the other, in a straight
#: line.
_Pieces = Sequence[tuple[float, float, float]]


@functools.lru_cache(maxsize=64)
def _in_spells(time: float, spells: Spells) -> _Pieces:
    return _pieces(time, spells, 0.0, spells.seconds)


@functools.lru_cache(maxsize=64)
def _between_spells(time: float, spells: Spells) -> _Pieces:
    return _pieces(time, spells, spells.seconds, spells.period)


def _pieces(
    time: float, spells: Spells, start: float, end: float,
) -> _Pieces:
    """What was busy of ``time`` seconds, at moments from start to end."""
    if math.isinf(time):
        return [(1.0, math.inf, math.inf)]
    rest = time % spells.period
    moments = sorted({min(max(moment, start), end) for moment in (
        start, rest, rest + spells.seconds,
        rest + spells.seconds - spells.period, end)})
    busy = [spells.busy(moment) - spells.busy(moment - time)
            for moment in moments]
    return [((until - since) / (end - start), before, after)
            for since, until, before, after in zip(
                moments, moments[1:], busy, busy[1:])]


def _mean_of_exp(start: float, end: float) -> float:
    """The mean of exp(-x) over x from ``start`` to ``end``."""
    if start == end or abs(end - start) < 1e-6:
        return math.exp(-start)
    return (math.exp(-start) - math.exp(-end)) / (end - start)
