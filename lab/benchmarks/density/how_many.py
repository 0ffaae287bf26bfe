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

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import time

from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import host
from lab.benchmarks.density import modes
from lab.benchmarks import results
from lab import errors
from lab.machine import qemu
from lab import progress

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
#: Seconds until a guest that has begun has its share of the memory, and then.
_SETTLE = 3
_WINDOW = 6
#: Of a mixed fleet, at a time.
_BUSY = 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """Which guests.

    :ivar cut: each has the RAM that its mode needs for the same work
    :ivar mixed: most are idle, and the few busy ones change
    """

    title: str
    cut: bool = False
    mixed: bool = False

    def ram_mib(self, mode: modes.Mode) -> int:
        return mode.cut_mib if self.cut else RAM_MIB


VARIANTS = {
    'same': Variant('the same RAM'),
    'cut': Variant('RAM cut to the work', cut=True),
    'mixed': Variant('the same RAM, most of them idle', mixed=True),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A fleet of that size: what it did.

    :ivar anonymous_mib: the mean of their QEMUs; the host cannot take it back
        without swap
    :ivar rate: the mean of the guests that had to work, in reads a second
    :ivar stopped_by: why it is too large (``killed``: also if one does not
        boot; ``rate``, ``stall``), or nothing
    """

    guests: int
    anonymous_mib: float
    rate: float
    least_rate: float
    p99_ms: float
    longest_ms: float
    stalled: float | None
    stopped_by: str


class _Search:
    """Adds guests to a host until it is full."""

    def __init__(self, found: fleet.Fleet, mode: modes.Mode, variant: Variant,
                 made: disks.Disks, most: int) -> None:
        self._fleet = found
        self._mode = mode
        self._variant = variant
        self._disks = made
        self._most = most
        self._turn = 0
        self.points: list[Point] = []

    def run(self) -> None:
        """A lone one, then steps of two; then the one between, if need be."""
        step = 1
        while step and self._grow(step):
            step = min(2, self._most - len(self._fleet.guests))
        full = min((point.guests for point in self.points
                    if point.stopped_by), default=0)
        if full > 1 and full - 1 not in {point.guests
                                         for point in self.points}:
            self._resize(full - 1)

    def _resize(self, guests: int) -> None:
        for each in self._fleet.guests[guests:]:
            self._fleet.take_away(each)
        missing = guests - len(self._fleet.guests)
        if missing:
            self._grow(missing)
        else:
            self._measure()

    def _grow(self, count: int) -> bool:
        """Whether all is well with so many more guests."""
        first = len(self._fleet.guests)
        booted = self._fleet.add(self._free_images(count),
                                 self._variant.ram_mib(self._mode))
        for each in self._fleet.guests[first:]:
            with contextlib.suppress(errors.LabError):
                self._begin(each.machine)
        if self._mode.ksm:
            host.wait_merged(20)
        if not booted or self._fleet.killed():
            self.points.append(
                Point(first + count, 0, 0, 0, 0, 0, None, 'killed'))
            self._bury()
            return False
        return not self._measure()

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

    def _begin(self, machine: qemu.Machine) -> None:
        machine.agent.run(f'dd if={disks.DATA} of=/dev/null bs=1M '
                          f'count={HOT_MIB}', check=True, timeout=300)
        if not self._variant.mixed:
            fleet.start_work(machine, disks.DATA, HOT_MIB, RATE)

    def _measure(self) -> str:
        """Measure the fleet as it is; return why it is too large."""
        guests = len(self._fleet.guests)
        busy = self._busy()
        self._fleet.balance()
        time.sleep(_SETTLE)
        before = self._fleet.group.stalled_seconds()
        time.sleep(_WINDOW)
        after = self._fleet.group.stalled_seconds()
        done = fleet.work(busy, _WINDOW, None if before is None
                          or after is None else after - before)
        if self._variant.mixed:
            for machine in busy:
                with contextlib.suppress(errors.LabError):
                    fleet.stop_work(machine)
        lone = self.points[0].rate if self.points else RATE
        why = (self._fleet.killed() and 'killed'
               or min(done.rates) < _LEAST_RATE * lone and 'rate'
               or (done.stalled or 0) > _MOST_STALLED and 'stall' or '')
        self.points.append(Point(
            guests, self._anonymous_mib(), statistics.mean(done.rates),
            min(done.rates), done.p99_ms, done.longest_ms, done.stalled, why))
        self._bury()
        return why

    def _anonymous_mib(self) -> float:
        return statistics.mean([
            each.machine.counter('smaps_rollup', 'Anonymous') / 1024
            for each in self._fleet.guests if each.machine.runs] or [0])

    def _busy(self) -> list[qemu.Machine]:
        machines = [each.machine for each in self._fleet.guests]
        if not self._variant.mixed:
            return machines
        busy = list(itertools.islice(itertools.cycle(machines), self._turn,
                                     self._turn + min(_BUSY, len(machines))))
        self._turn += _BUSY
        for machine in busy:
            fleet.start_work(machine, disks.DATA, HOT_MIB, RATE)
        return busy


def search(name: str, variant: str, made: disks.Disks, budget_mib: int,
           most: int) -> list[Point]:
    """Fleets of growing size, the largest not always last."""
    mode = modes.MODES[name]
    with fleet.Fleet(mode, budget_mib) as found:
        running = _Search(found, mode, VARIANTS[variant], made, most)
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
            'hot_mib': HOT_MIB, 'reads_per_s': RATE, 'most': most,
            **results.summary(samples, ('guests', 'guests_95'), 1),
            'stopped_by': max(first_bad, key=first_bad.count),
            'rounds': len(runs),
            'points': [dataclasses.asdict(point) for points in runs
                       for point in points]}


def say(name: str, variant: str, points: list[Point]) -> None:
    for point in points:
        progress.say(f'    {variant} {name}: {point}')
