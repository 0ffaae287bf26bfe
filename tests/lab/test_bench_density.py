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

"""lab/bench density: what it concludes from fleets, and its images."""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import itertools
import pathlib
import tempfile
import time
from typing import Any
from unittest import mock

import click
import fixtures
from oslotest import base

from lab.benchmarks.density import command
from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import how_many
from lab.benchmarks.density import modes
from lab.benchmarks.density import one_guest
from lab.benchmarks.density import openstack
from lab.benchmarks.density import report
from lab.benchmarks import results
from lab import errors
from nova_fakedax.planner import density


STORAGE = {'miss_ms': 0.2, 'read_ahead_kib': 4, 'storage_reads_per_s': 10000,
           'storage_mib_per_s': 500}


def point(guests: int, rate: float = 100, stopped_by: str = ''
          ) -> how_many.Point:
    return how_many.Point(guests, 170, rate, rate, 1, 2, 0, stopped_by)


class ConclusionTestCase(base.BaseTestCase):

    def fit(self, *points: how_many.Point) -> tuple[float, float]:
        found = how_many.sample(points, 16)
        return found['guests'], found['guests_95']

    def test_the_largest_before_the_first_that_is_too_large(self):
        self.assertEqual((4, 4), self.fit(
            point(1), point(3), point(5, stopped_by='killed'), point(4)))
        self.assertEqual((3, 3), self.fit(
            point(1), point(3), point(5, stopped_by='killed'),
            point(4, stopped_by='stall')))
        # One that does well after a smaller one did not is chance.
        self.assertEqual((1, 1), self.fit(
            point(1), point(3, stopped_by='rate'), point(5)))

    def test_lost_work_is_against_a_lone_guest(self):
        self.assertEqual((5, 3), self.fit(
            point(1, 90), point(3, 86), point(5, 80),
            point(6, 40, 'rate')))

    def test_none_was_too_large(self):
        self.assertEqual((16, 16), self.fit(point(1), point(15), point(16)))

    def test_not_even_one(self):
        self.assertEqual((0, 0), self.fit(point(1, 0, 'killed')))

    def test_row_has_the_reason_of_most_rounds_and_all_points(self):
        row = how_many.row('pmem', 'cut', 2048, 16, [
            [point(1), point(2, stopped_by='stall')],
            [point(1), point(3), point(4, stopped_by='rate')],
            [point(1), point(3), point(4, stopped_by='rate')]])
        self.assertEqual((3, [1, 3], 'rate', 96),
                         (row['guests'], row['guests_spread'],
                          row['stopped_by'], row['ram_mib']))
        self.assertEqual(8, len(row['points']))

    def test_row_is_one_that_the_planner_checks(self):
        row = how_many.row('pmem', 'cut', 2048, 16, [
            [point(1), point(9), point(11, stopped_by='rate'), point(10)]])
        row |= STORAGE
        found = {each.key: each.measured for each in density.compare([row])}
        self.assertEqual({'guests': 10, 'guests_95': 10}, found)


class FakeFleet:
    """A host that so many guests fit into; more of them are killed."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.guests: list[fleet.Guest] = []
        self.group = FakeGroup(self)
        self.dead = 0
        self.sizes: list[int] = []

    def add(self, images: Sequence[pathlib.Path],
            ram_mib: int) -> list[errors.LabError]:
        for image in images:
            self.guests.append(fleet.Guest(image, None, None))
        self.sizes.append(len(self.guests))
        self.dead = max(0, len(self.guests) - self.fits)
        del self.guests[self.fits:]
        return [errors.LabError('dead')] * self.dead

    def take_away(self, one: fleet.Guest) -> None:
        self.guests.remove(one)
        self.sizes.append(len(self.guests))

    def killed(self) -> list[fleet.Guest]:
        return []


class FakeGroup:

    def __init__(self, host: FakeFleet) -> None:
        self._host = host

    def killed(self) -> int:
        return self._host.dead


class SearchTestCase(base.BaseTestCase):

    def search(self, fits: int, most: int = 9, all_well_below: int = 99,
               slow_from: int = 99, plan: int = 6,
               mode: str = 'pmem') -> list[how_many.Point]:
        host = FakeFleet(fits)

        class Search(how_many._Search):

            def _read(self, machine: object) -> None:
                pass

            def _measure(self) -> str:
                guests = len(host.guests)
                why = 'rate' if guests >= all_well_below else ''
                self.points.append(point(
                    guests, 90 if guests >= slow_from else 100, why))
                return why

        class Images:

            def image(self, mode: modes.Mode, number: int) -> pathlib.Path:
                return pathlib.Path(str(number))

        running = Search(host, modes.MODES[mode],
                         how_many.VARIANTS['same'], Images(), most,
                         lambda lone: plan)
        running.run()
        names = [each.image for each in host.guests]
        self.assertEqual(len(names), len(set(names)))
        return running.points

    def sizes(self, *args: int, **options: Any) -> list[int]:
        return [each.guests for each in self.search(*args, **options)]

    def test_every_limit_is_found_whatever_the_plan(self):
        for limit, plan in itertools.product(range(1, 9), (0, 6, 40)):
            self.assertEqual(limit, how_many.sample(
                self.search(limit, plan=plan), 9)['guests'], (limit, plan))
            self.assertEqual(limit, how_many.sample(
                self.search(99, all_well_below=limit + 1, plan=plan),
                9)['guests'], (limit, plan))

    def test_the_most_with_little_lost_is_found_as_well(self):
        for slow in range(2, 8):
            found = how_many.sample(
                self.search(7, slow_from=slow), 9)
            self.assertEqual((7, slow - 1),
                             (found['guests'], found['guests_95']))

    def test_from_four_fifths_of_the_plan_up_one_at_a_time(self):
        self.assertEqual([1, 4, 5, 6, 7], self.sizes(6))

    def test_from_four_fifths_of_the_plan_down(self):
        self.assertEqual([1, 4, 3, 2], self.sizes(99, all_well_below=3))

    def test_those_in_between_that_lose_some_work(self):
        self.assertEqual([1, 5, 6, 7, 4, 3, 2],
                         self.sizes(6, slow_from=3, plan=7))

    def test_a_large_fleet_shrinks_in_larger_steps(self):
        self.assertEqual([1, 24, 21, 19, 17, 15, 16], self.sizes(
            99, most=48, all_well_below=17, plan=30))

    def test_both_limits_of_a_large_fleet_are_found(self):
        for fits, slow in itertools.product(range(18, 40), range(12, 41, 4)):
            found = how_many.sample(self.search(
                fits, most=48, slow_from=slow, plan=30, mode='pmem-zram'), 48)
            self.assertEqual((fits, min(fits, slow - 1)),
                             (found['guests'], found['guests_95']))

    def test_it_ends_at_the_most(self):
        self.assertEqual([1, 4, 5, 6, 7, 8], self.sizes(99, most=8))
        self.assertEqual([1, 8], self.sizes(99, most=8, plan=30))

    def test_it_begins_with_what_the_planner_says_of_a_lone_one(self):
        plans = []

        class Search:
            """Takes the place of the search."""

            points: list[how_many.Point] = []

            def __init__(self, *args: Any) -> None:
                self._plan = args[-1]

            def run(self) -> None:
                plans.append(self._plan(point(1)))

        self.useFixture(fixtures.MockPatchObject(how_many, '_Search', Search))
        self.useFixture(fixtures.MockPatchObject(fleet, 'Fleet'))
        for budget in (2048, 4096):
            how_many.search('pmem', 'cut', None, budget, 48, STORAGE)
        # A guest holds 170 MiB, and the host caches some of its 200 MiB.
        self.assertTrue(6 <= plans[0] <= 12, plans)
        self.assertTrue(1.8 < plans[1] / plans[0] < 2.2, plans)

    def test_one_that_cannot_begin_again_is_not_judged_by_its_past(self):
        host = FakeFleet(9)
        host.guests = [fleet.Guest(pathlib.Path(str(number)), None, None)
                       for number in range(4)]

        class Search(how_many._Search):

            def _read(self, machine: object) -> None:
                raise errors.LabError('no answer')

            def _measure(self) -> str:
                raise AssertionError('measured')

        search = Search(host, modes.MODES['pmem'],
                        how_many.VARIANTS['same'], None, 9, None)
        search._resize(3)
        self.assertEqual([(3, 'boot')], [
            (each.guests, each.stopped_by) for each in search.points])

    def test_one_that_does_not_begin_to_work_ends_the_search_only(self):
        host = FakeFleet(9)
        host.guests = [fleet.Guest(pathlib.Path('0'), None, None)]

        class Search(how_many._Search):

            def _start(self, machine: object) -> None:
                raise errors.LabError('no answer')

        search = Search(host, modes.MODES['pmem'],
                        how_many.VARIANTS['mixed'], None, 9, None)
        self.assertEqual('rate', search._measure())
        self.assertEqual([(1, 'rate')], [
            (each.guests, each.stopped_by) for each in search.points])

    def watched(self, *stopped_by: str, rate: float = 100
                ) -> how_many.Point:
        """What is noted of a fleet that is too large for these reasons."""
        host = FakeFleet(9)
        host.guests = [fleet.Guest(pathlib.Path('0'), None, None)]
        host.balance = lambda: True
        self.useFixture(fixtures.MockPatchObject(how_many, '_SETTLE', 0))
        reasons = iter(stopped_by)

        class Search(how_many._Search):

            def _start(self, machine: object) -> None:
                pass

            def _watch(self, guests: int, busy: object) -> how_many.Point:
                return point(guests, rate, stopped_by=next(reasons))

        search = Search(host, modes.MODES['pmem'],
                        how_many.VARIANTS['same'], None, 9, None)
        search._measure()
        self.assertEqual([], [*reasons])
        return search.points[-1]

    def test_a_host_may_take_a_while_to_settle(self):
        self.assertEqual('', self.watched('').stopped_by)
        self.assertEqual('', self.watched('stall', '').stopped_by)
        self.assertEqual('rate', self.watched(
            'stall', 'stall', 'rate').stopped_by)

    def test_a_guest_that_was_killed_does_not_come_back(self):
        self.assertEqual('killed', self.watched('killed').stopped_by)

    def test_one_whose_guest_does_nothing_is_watched_once(self):
        self.assertEqual('rate', self.watched('rate', rate=0).stopped_by)

    def test_a_host_whose_guests_take_all_again_is_full(self):
        host = FakeFleet(9)
        host.guests = [fleet.Guest(pathlib.Path('0'), None, None)]
        host.balance = lambda: False
        search = how_many._Search(
            host, modes.MODES['blk-none-zram'], how_many.VARIANTS['same'],
            None, 9, None)
        search._start = lambda machine: None
        self.assertEqual('stall', search._measure())
        self.assertEqual([(1, 'stall')], [
            (each.guests, each.stopped_by) for each in search.points])

    def test_guests_rest_while_another_boots(self):
        host = FakeFleet(9)
        done: list[str] = []
        machine = mock.Mock()
        machine.agent.run.side_effect = lambda command, **_options: (
            done.append('stop' if command == fleet._STOP_WORK else 'other'))
        host.add = lambda images, ram_mib: done.append('boot') or []
        search = how_many._Search(
            host, modes.MODES['pmem'], how_many.VARIANTS['same'], mock.Mock(),
            9, None)
        search._measure = lambda: ''
        search._working = [machine]
        search._grow_to(2)
        self.assertEqual(['stop', 'boot'], done)

    def test_one_that_does_not_answer_keeps_none_from_resting(self):
        good, bad = mock.Mock(), mock.Mock()
        bad.agent.run.side_effect = errors.LabError('no answer')
        fleet.rest([bad, good])
        good.agent.run.assert_called_once_with(fleet._STOP_WORK, timeout=30)

    def test_a_lone_one_that_does_not_boot_is_an_error(self):
        fleet_ = FakeFleet(0)
        fleet_.group.killed = lambda: 0
        search = how_many._Search(
            fleet_, modes.MODES['pmem'], how_many.VARIANTS['same'],
            mock.Mock(**{'image.side_effect': lambda mode, number: number}),
            9, None)
        self.assertRaises(errors.LabError, search.run)

    def test_it_says_what_it_has_seen(self):
        self.assertEqual(
            '1 guests: 100 reads/s, p99 1.0 ms; 2 guests: not all worked, '
            'boot', how_many.sentence([point(2, 0, 'boot'), point(1)]))


class ForEachTestCase(base.BaseTestCase):

    def test_none_is_begun_after_one_has_failed(self):
        begun = []

        def call(item: int) -> None:
            begun.append(item)
            if item == 3:
                time.sleep(0.2)
                raise errors.LabError('full')
            time.sleep(0.5)

        failed = fleet.for_each(call, range(100))
        self.assertEqual(['full'], [str(error) for error in failed])
        self.assertEqual([*range(fleet._AT_ONCE)], sorted(begun))

    def test_nothing_to_do(self):
        self.assertEqual([], fleet.for_each(self.fail, []))


class SideBySideTestCase(base.BaseTestCase):

    def test_what_is_of_the_whole_machine_is_alone(self):
        groups = one_guest.side_by_side([*modes.MODES])
        self.assertEqual(sorted(modes.MODES), sorted(sum(groups, [])))
        for group in groups:
            if any(modes.MODES[name].ksm for name in group):
                self.assertEqual(1, len(group))


class TakeAllTestCase(base.BaseTestCase):
    """Fleets that are measured side by side have swap one after the other."""

    def setUp(self):
        super().setUp()
        self.swaps: list[str] = []
        self.most = 0

        @contextlib.contextmanager
        def swap(kind: str):
            self.swaps.append(kind)
            self.most = max(self.most, len(self.swaps))
            time.sleep(0.05)
            yield mock.Mock(**{'memory_bytes.return_value': 2 << 20})
            self.swaps.remove(kind)

        self.useFixture(fixtures.MockPatchObject(fleet.host, 'swap', swap))
        self.useFixture(fixtures.MockPatchObject(
            fleet.host, 'swapped_out_bytes', side_effect=itertools.count(
                0, 3 << 20)))

    def take_all(self, _number: int) -> results.Sample:
        found = fleet.Fleet(modes.MODES['blk-none-zram'], None,
                            late_swap=True)
        found.group = mock.Mock(**{'usage.return_value': 5 << 20})
        found._swap = fleet.host.Swap()
        return found.take_all()

    def test_what_is_compressed_counts_as_left(self):
        self.assertEqual({'left_mib': 7, 'written_mib': 3}, self.take_all(0))

    def test_one_at_a_time(self):
        with futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(self.take_all, range(4)))
        self.assertEqual(1, self.most)
        self.assertEqual([3] * 4, [one['written_mib'] for one in found])


class ImageTestCase(base.BaseTestCase):

    def test_a_quarter_of_the_pages_is_the_same_in_all_guests(self):
        with tempfile.TemporaryDirectory() as directory:
            made = []
            with disks._source(1) as source:
                content = source.read_bytes()
            for number in (1, 2):
                image = pathlib.Path(directory) / str(number)
                # The data does not begin where the image does.
                image.write_bytes(bytes(8192) + content)
                disks._make_private(image, number)
                made.append(image.read_bytes())
        pages = [(made[0][at:at + 4096], made[1][at:at + 4096])
                 for at in range(8192, len(made[0]), 4096)]
        self.assertEqual(256, len(pages))
        self.assertEqual(64, sum(one == other for one, other in pages))


class ResumeTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MockPatchObject(
            results, 'DIRECTORY', pathlib.Path(directory)))
        self.useFixture(fixtures.MockPatchObject(
            command, '_emulator', lambda: '10.0-abc'))
        self.useFixture(fixtures.MockPatchObject(
            command.host, 'storage', lambda image: {}))
        self.measured: list[str] = []

    def run_of(self, rounds: int = 2, fails_at: str = '') -> command._Run:
        run = command._Run(['pmem-fpr'], rounds, 1, 2048, 8, quick=False)

        def measure(unit: str, **row: str) -> list[results.Row]:
            if unit == fails_at:
                raise errors.LabError(unit)
            self.measured.append(unit)
            return [{'mode': 'pmem-fpr'} | row]

        run._one_guest = lambda stack: measure('one-guest', part='one-guest')
        run._fleets = lambda variant, made, storage: measure(
            variant, part='how-many', variant=variant)
        self.useFixture(fixtures.MockPatchObject(
            command.disks, 'Disks', mock.Mock()))
        return run

    def test_what_was_measured_is_kept(self):
        run = self.run_of(fails_at='same')
        run.part('one-guest')
        self.assertRaises(errors.LabError, run.part, 'how-many')
        self.assertEqual(['one-guest', 'cut', 'mixed'], self.measured)
        run = self.run_of()
        run.resume()
        run.part('one-guest')
        run.part('how-many')
        self.assertEqual(['one-guest', 'cut', 'mixed', 'same', 'least',
                          'large'],
                         self.measured)
        self.assertEqual(run.rows, results.load('density'))
        self.assertEqual(6, len(run.rows))

    def test_variants_with_as_much_data_share_images(self):
        self.run_of().part('how-many')
        self.assertEqual([256, 556], [
            call.args[0] for call in command.disks.Disks.call_args_list])

    def test_a_run_of_another_kind_is_refused_and_its_rows_stay(self):
        self.run_of().part('one-guest')
        before = results.load('density')
        error = self.assertRaises(
            click.UsageError, self.run_of(rounds=3).resume)
        self.assertIn('of_rounds was 2 in density.json and is 3', str(error))
        self.assertEqual(before, results.load('density'))

    def test_without_an_earlier_run_all_is_measured(self):
        run = self.run_of()
        run.resume()
        run.part('one-guest')
        self.assertEqual(['one-guest'], self.measured)


class ReportTestCase(base.BaseTestCase):

    def test_a_table_of_each_part(self):
        row = how_many.row('pmem', 'same', 2048, 16,
                           [[point(1), point(2, stopped_by='stall')]])
        headings, (cells,) = report.table([row], 'how-many')
        self.assertEqual(len(headings), len(cells))
        self.assertEqual(['same', 'pmem', '512', 'stall', '1 (1-1)',
                          '1 (1-1)'], cells)

    def test_a_line_for_each_figure_of_a_server(self):
        rows = [{'part': part, 'mode': mode, **{
            figure: number for number, figure in enumerate(figures)}}
            for part, figures in openstack._FIGURES.items()
            for mode in openstack._FLAVORS]
        headings, lines = report._openstack(rows)
        self.assertEqual(['part', 'figure', 'openstack-blk',
                          'openstack-pmem'], headings)
        # Each of them has a heading in the table of its part.
        self.assertEqual(
            [part for part, figures in openstack._FIGURES.items()
             for _figure in figures], [line[0] for line in lines])
        self.assertIn(['frozen', 'in s', '1.0', '1.0'], lines)
