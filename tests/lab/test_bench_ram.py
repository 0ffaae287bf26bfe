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

"""lab/bench ram: the search for the smallest RAM, and rows."""

from oslotest import base

from lab.benchmarks import ram
from lab import errors


class SmallestTestCase(base.BaseTestCase):

    def search(self, limit: int, guess: int,
               least: int = 16) -> tuple[int, list[int]]:
        """What is found where all from the limit on holds, and the trials."""
        tried = []

        def holds(size: int) -> bool:
            tried.append(size)
            return size >= limit

        return ram.smallest(holds, guess, least), tried

    def test_from_any_guess(self):
        for limit in (1, 16, 17, 96, 100, 608, 4096):
            for guess in (0, 16, 90, 96, 112, 700, 5000):
                found, tried = self.search(limit, guess)
                self.assertEqual(-(-limit // 16) * 16, found)
                self.assertEqual(len(tried), len(set(tried)))

    def test_a_right_guess_takes_two_trials(self):
        self.assertEqual((96, [96, 80]), self.search(90, 96))

    def test_nothing_below_what_is_known_to_be_small_enough_is_tried(self):
        self.assertEqual((96, [96]), self.search(1, 96, 96))
        self.assertEqual((112, [96, 112]), self.search(112, 50, 96))

    def test_what_never_holds(self):
        self.assertRaisesRegex(errors.LabError, '4096 MiB', self.search,
                               5000, 64)


class RowTestCase(base.BaseTestCase):

    def test_ratio_to_virtio_blk_is_of_the_same_round(self):
        samples = {'blk-writeback': [{'unreclaimable_mib': 700.0},
                                     {'unreclaimable_mib': 800.0}],
                   'pmem': [{'unreclaimable_mib': 210.0},
                            {'unreclaimable_mib': 200.0}]}
        row = ram._row('pmem', 32, 1024, samples)
        self.assertEqual(
            {'mode': 'pmem', 'disk_gib': 32, 'ram_mib': 1024, 'rounds': 2,
             'unreclaimable_mib': 205.0,
             'unreclaimable_mib_spread': [200.0, 210.0],
             'against_blk_writeback': {
                 'median': 0.275, 'least': 0.25, 'most': 0.3}}, row)
        self.assertNotIn('against_blk_writeback',
                         ram._row('blk-writeback', 32, 1024, samples))
        # What was not measured has no cell.
        *_, smallest_hot, ratio = next(iter(ram._cells([row])))
        self.assertEqual(('-', '0.28 (0.25-0.30)'), (smallest_hot, ratio))
