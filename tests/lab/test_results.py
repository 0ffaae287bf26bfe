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

"""From the samples of a benchmark to its rows."""

import contextlib
import io
import json
import pathlib
import tempfile
from unittest import mock

from oslotest import base

from lab.benchmarks import plots
from lab.benchmarks import results

SAMPLES = [{'time': 3.04}, {'time': 1.0}, {'time': 2.0}]


class ResultsTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def test_each_kind_is_first_in_turn(self):
        self.assertEqual(
            [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'],
             ['a', 'b', 'c']],
            [results.in_turn({'a': 1, 'b': 2, 'c': 3}, number)
             for number in range(4)])

    def test_summary_has_median_and_spread_of_figures_there_are(self):
        self.assertEqual(
            {'time': 2.0, 'time_spread': [1.0, 3.0]},
            results.summary(SAMPLES, ('time', 'other'), 1))

    def test_ratios_are_of_the_same_round(self):
        self.assertEqual(
            [2.0, 0.5], results.ratios(
                [{'time': 2}, {'time': 3}], [{'time': 1}, {'time': 6}],
                'time'))
        self.assertRaises(ValueError, results.ratios, SAMPLES, SAMPLES[1:],
                          'time')

    def test_ratio_to_a_rival_that_did_nothing(self):
        self.assertEqual([1e6], results.ratios(
            [{'rate': 1}], [{'rate': 0}], 'rate'))

    def test_cell(self):
        row = results.summary(SAMPLES, ('time',), 2)
        self.assertEqual('2.0 (1.0-3.0)', results.cell(row, 'time', 1))
        self.assertEqual('20 (10-30)', results.cell(row, 'time', 0, 0.1))
        self.assertEqual('-', results.cell(row, 'other', 1))

    def test_rows_are_saved_as_a_list(self):
        with mock.patch.object(results, 'DIRECTORY', self.directory / 'new'):
            results.save('name', [{'mode': 'blk'}])
        self.assertEqual([{'mode': 'blk'}], json.loads(
            (self.directory / 'new/name.json').read_text()))

    def test_groups_of_a_table_are_set_apart(self):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            results.show('title', ('case', 'mode'), [
                ['first', 'blk'], ['first', 'pmem'], ['second', 'blk']],
                groups=1)
        lines = [line.split() for line in said.getvalue().splitlines()]
        at = lines.index(['first', 'blk'])
        self.assertEqual(['first', 'pmem'], lines[at + 1])
        self.assertEqual(['second', 'blk'], lines[at + 3])

    def test_plot_has_the_spread_around_the_median(self):
        rows = [results.summary(SAMPLES, ('time',), 1)]
        self.assertEqual(([4.0], [[2.0], [2.0]]),
                         plots.bars(rows, 'time', 0.5))
        file = self.directory / 'plot.png'
        with plots.panels(file, 2, width=4, height=2) as panels:
            for panel in panels:
                panel.bar(['a'], [1])
        self.assertEqual(b'\x89PNG', file.read_bytes()[:4])
