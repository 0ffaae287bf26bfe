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

"""How many guests fit into a host's memory."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import pathlib
import statistics
import time
from typing import Any

from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import host
from lab.benchmarks.density import modes
from lab.benchmarks.density import one_guest
from lab.benchmarks import results
from lab import errors
from lab.machine import qemu
from nova_fakedax.planner import density

HOT_MIB = 200
RATE = 100
#: What the guests' flavor has where all modes have the same.
RAM_MIB = 512
#: That ends it: the least rate of a guest against a lone one's, and the most
#: of the time in which some process waits for memory.
_LEAST_RATE = 0.5
_MOST_STALLED = 0.2
#: Of the work of lone guests, for the other number of guests.
_LITTLE_LOST = 0.95
#: Seconds until a guest that has begun has its share of the memory, and in
#: which it is watched then.
_SETTLE = 2
_WINDOW = 5
#: How often it is watched, before it counts as too large: a host that has just
#: got more guests may take a while.
_WINDOWS = 3
#: Of a mixed fleet, at a time.
_BUSY = 3
#: Seconds in which a guest has booted, and in which it has read its hot set:
#: more than ten times what both take on a host with enough memory.
_BEGIN_SECONDS = 45
#: Of the guests that are planned: a fleet that is too large takes longest.
_FIRST = 0.8
#: With which all kinds of disk boot, with some room.
_LEAST_MIB = 112
#: A hot set that is large next to what QEMU and a kernel take; so few reads
#: that the processors do not decide how many fit.
_LARGE_MIB, _LARGE_RATE = 500, 25
#: A fleet that is too large shrinks by such a part of its guests.
_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """Which guests.

    :ivar ram_mib: of a guest of a mode
    :ivar mixed: most are idle, and the few busy ones change
    :ivar hot_mib: what each reads
    :ivar rate: how often a second
    :ivar modes: that are compared
    """

    title: str
    ram_mib: Callable[[modes.Mode], int]
    mixed: bool = False
    hot_mib: int = HOT_MIB
    rate: int = RATE
    modes: tuple[str, ...] = modes.FLEETS


#: Those with as much data one after the other, for they share their images.
VARIANTS = {
    'cut': Variant('RAM cut to the hot set', lambda mode: mode.cut_mib),
    'mixed': Variant('the same RAM, most of them idle', lambda mode: RAM_MIB,
                     mixed=True, modes=modes.MIXED_FLEETS),
    'same': Variant('the same RAM', lambda mode: RAM_MIB,
                    modes=modes.SAME_FLEETS),
    'least': Variant('the least RAM, most reads missed',
                     lambda mode: min(mode.cut_mib, _LEAST_MIB),
                     modes=modes.SMALL_FLEETS),
    'large': Variant('a larger hot set, RAM cut to it',
                     lambda mode: mode.cut_mib + (
                         0 if mode.fake_dax else _LARGE_MIB - HOT_MIB),
                     hot_mib=_LARGE_MIB, rate=_LARGE_RATE,
                     modes=modes.LARGE_FLEETS),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A fleet of that size: what it did.

    :ivar anonymous_mib: the mean of their QEMUs; the host cannot take it back
        without swap
    :ivar rate: the mean of the guests that had to work, in reads a second
    :ivar cpus: processors that all of their QEMUs use
    :ivar stopped_by: why it is too large, or nothing. ``killed``; ``boot``:
        one does not boot, or read its hot set, in 45 s; ``rate``; ``stall``
    """

    guests: int
    anonymous_mib: float
    rate: float
    least_rate: float
    p99_ms: float
    longest_ms: float
    stalled: float | None
    stopped_by: str
    cpus: float = 0.0


def _runs(point: Point) -> bool:
    return not point.stopped_by


class _Search:
    """Adds guests to a host until it is full."""

    def __init__(self, found: fleet.Fleet, mode: modes.Mode, variant: Variant,
                 made: disks.Disks, most: int,
                 plan: Callable[[Point], int]) -> None:
        self._fleet = found
        self._mode = mode
        self._variant = variant
        self._disks = made
        self._most = most
        self._plan = plan
        self._turn = 0
        self._working: Sequence[qemu.Machine] = ()
        self.points: list[Point] = []

    def run(self) -> None:
        """A lone one; most of those that are planned; one more at a time.

        Until the host is full, which takes minutes to say so, so it is made
        too full by as little as can be. Then those in between that are not
        known to do well or badly.
        """
        self._grow_to(1)
        lone = self.points[0]
        if lone.stopped_by:
            return
        guests = min(max(2, int(_FIRST * self._plan(lone))), self._most)
        while guests <= self._most and self._grow_to(guests):
            guests += 1
        for well in (_runs, self._well):
            while (bad := self._least_bad(well)) - (
                    good := self._most_well(well)) > 1:
                self._resize(max((bad + good) // 2,
                                 bad - max(1, bad // _STEPS)))

    def _well(self, point: Point) -> bool:
        return _runs(point) and (
            point.rate >= _LITTLE_LOST * self._lone_rate)

    def _least_bad(self, well: Callable[[Point], bool]) -> int:
        return min((point.guests for point in self.points
                    if not well(point)), default=self._most + 1)

    def _most_well(self, well: Callable[[Point], bool]) -> int:
        return max((point.guests for point in self.points if well(point)
                    and point.guests < self._least_bad(well)), default=0)

    def _resize(self, guests: int) -> None:
        """A fleet of that size, after one that was too large.

        All read their set again, as they have lost some of it, or have never
        read it. One that cannot would be judged by what it did before.
        """
        for each in self._fleet.guests[guests:]:
            self._fleet.take_away(each)
        self._grow_to(guests, 0)

    def _grow_to(self, guests: int, first: int | None = None) -> bool:
        """Whether no guest is killed and all are quick enough then.

        :param first: of the guests that read their set; by default of those
            that are new
        :raises errors.LabError: not even a lone one boots
        """
        now, killed = len(self._fleet.guests), self._fleet.group.killed()
        # Next to guests that work, to boot and to read takes minutes.
        fleet.rest(self._working)
        failed = self._fleet.add(self._free_images(guests - now),
                                 self._variant.ram_mib(self._mode))
        if failed and guests == 1 and not self._fleet.group.killed():
            raise failed[0]
        failed += self._read_all(
            self._fleet.guests[now if first is None else first:])
        if failed or self._fleet.killed():
            self._give_up('killed' if self._fleet.group.killed() > killed
                          else 'boot', guests)
            return False
        return not self._measure()

    def _give_up(self, why: str, guests: int | None = None) -> str:
        """Note that a fleet of that size, or as it is, cannot be measured."""
        self.points.append(Point(guests or len(self._fleet.guests),
                                 0, 0, 0, 0, 0, None, why))
        self._bury()
        return why

    def _read_all(self, found: Sequence[fleet.Guest]
                  ) -> list[errors.LabError]:
        failed = fleet.for_each(lambda one: self._read(one.machine), found)
        if self._mode.ksm:
            host.wait_merged(20)
        return failed

    def _bury(self) -> None:
        for each in self._fleet.killed():
            self._fleet.take_away(each)

    def _free_images(self, count: int) -> list[pathlib.Path]:
        """Images that no guest of the fleet has."""
        used = {each.image for each in self._fleet.guests}
        made = (self._disks.image(self._mode, number)
                for number in itertools.count())
        return list(itertools.islice(
            (image for image in made if image not in used), count))

    def _read(self, machine: qemu.Machine) -> None:
        machine.agent.run(f'dd if={disks.DATA} of=/dev/null bs=1M '
                          f'count={self._variant.hot_mib}', check=True,
                          timeout=_BEGIN_SECONDS)

    def _measure(self) -> str:
        """Measure the fleet as it is; return why it is too large."""
        guests = len(self._fleet.guests)
        busy = self._working = self._next_busy()
        if fleet.for_each(self._start, busy):
            # One does not even begin to work.
            return self._give_up('rate')
        if not self._fleet.balance():
            return self._give_up('stall')
        time.sleep(_SETTLE)
        for _window in range(_WINDOWS):
            point = self._watch(guests, busy)
            # Where a guest did nothing at all, or does not answer, the host
            # is full; to ask all of them takes up to half a minute.
            if (point.stopped_by == 'killed' or not point.least_rate
                    or self._well(point)):
                break
        self.points.append(point)
        self._bury()
        return point.stopped_by

    def _watch(self, guests: int, busy: Sequence[qemu.Machine]) -> Point:
        """What a fleet does for some seconds."""
        before, cpu = self._fleet.group.stalled_seconds(), self._cpu()
        time.sleep(_WINDOW)
        after, cpu = self._fleet.group.stalled_seconds(), self._cpu() - cpu
        done = fleet.work(busy, _WINDOW, None if before is None
                          or after is None else after - before)
        why = (self._fleet.killed() and 'killed'
               or min(done.rates) < _LEAST_RATE * self._lone_rate and 'rate'
               or (done.stalled or 0) > _MOST_STALLED and 'stall' or '')
        return Point(
            guests, self._anonymous_mib(), statistics.mean(done.rates),
            min(done.rates), done.p99_ms, done.longest_ms, done.stalled, why,
            max(cpu, 0) / _WINDOW)

    def _cpu(self) -> float:
        """The seconds of processors that the QEMUs have had."""
        return sum(fleet.processor_seconds(each.machine)
                   for each in self._fleet.guests if each.machine.runs)

    @property
    def _lone_rate(self) -> float:
        return self.points[0].rate if self.points else self._variant.rate

    def _anonymous_mib(self) -> float:
        return statistics.mean([
            one_guest.anonymous_mib(each.machine.pid)
            for each in self._fleet.guests if each.machine.runs] or [0])

    def _next_busy(self) -> list[qemu.Machine]:
        machines = [each.machine for each in self._fleet.guests]
        if not self._variant.mixed:
            return machines
        busy = list(itertools.islice(itertools.cycle(machines), self._turn,
                                     self._turn + min(_BUSY, len(machines))))
        self._turn += _BUSY
        return busy

    def _start(self, machine: qemu.Machine) -> None:
        fleet.start_work(machine, disks.DATA, self._variant.hot_mib,
                         self._variant.rate)


def search(name: str, variant: str, made: disks.Disks, budget_mib: int,
           most: int, about: Mapping[str, Any]) -> list[Point]:
    """Fleets of growing size, the largest not always last.

    :param about: the storage, processors and readahead of this machine, as
        the planner reads them from a row
    """
    mode = modes.MODES[name]

    def plan(lone: Point) -> int:
        """Guests that lose little. Only where the search begins."""
        planned = density.compare([
            {**about, **row(name, variant, budget_mib, most, [[lone]])}])
        return next(each.planned for each in planned
                    if each.key == 'guests_95')

    with fleet.Fleet(mode, budget_mib, _BEGIN_SECONDS) as found:
        running = _Search(found, mode, VARIANTS[variant], made, most, plan)
        running.run()
    return running.points


def sample(points: list[Point], most: int) -> results.Sample:
    """How many fit: before the host is full, and with little work lost."""
    bad = min((point.guests for point in points if point.stopped_by),
              default=most + 1)
    lone = points[0].rate
    slow = min((point.guests for point in points
                if point.rate < _LITTLE_LOST * lone), default=most + 1)
    good = [point.guests for point in points if point.guests < bad]
    quick = [guests for guests in good if guests < slow]
    return {'guests': max(good, default=0), 'guests_95': max(quick, default=0)}


def row(name: str, variant: str, budget_mib: int, most: int,
        runs: list[list[Point]]) -> results.Row:
    """The row of all rounds, as ``nova-fakedax plan --check`` reads it."""
    mode = modes.MODES[name]
    samples = [sample(points, most) for points in runs]
    first_bad = [next((point.stopped_by for point in
                       sorted(points, key=lambda each: each.guests)
                       if point.stopped_by), 'none') for points in runs]
    return {'part': 'how-many', 'variant': variant, 'mode': name,
            'budget_mib': budget_mib,
            'ram_mib': VARIANTS[variant].ram_mib(mode),
            'unreclaimable_mib': round(statistics.median(
                points[0].anonymous_mib for points in runs), 1),
            'hot_mib': VARIANTS[variant].hot_mib,
            'reads_per_s': VARIANTS[variant].rate,
            'most': most, **({'swap_mib': host.SWAP_MIB} if mode.swap else {}),
            **results.summary(samples, ('guests', 'guests_95'), 1),
            'stopped_by': max(first_bad, key=first_bad.count),
            'rounds': len(runs),
            'points': [dataclasses.asdict(point) for points in runs
                       for point in points]}


def sentence(points: Sequence[Point]) -> str:
    """What a search has seen, for its user."""
    return '; '.join(
        f'{point.guests} guests: ' + (
            f'{point.rate:.0f} reads/s, p99 {point.p99_ms:.1f} ms'
            if point.rate else 'not all worked')
        + (f', {point.stopped_by}' if point.stopped_by else '')
        for point in sorted(points, key=lambda point: point.guests))
