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

"""The command lab/test: what it runs, and what it says."""

import pathlib
import tempfile
from unittest import mock

from click import testing
from oslotest import base

from lab import test as lab_test


class LabTestTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.last = pathlib.Path(directory.name) / 'last'
        self.unit = mock.Mock(return_value=lab_test.Count(passed=2))
        self.style = mock.Mock(return_value=lab_test.Count(
            failed=1, failures=[('hacking', 'E501')]))
        for patch in (
            mock.patch.dict(lab_test.PARTS, {
                'unit': self.unit, 'style': self.style}, clear=True),
            mock.patch.object(lab_test, '_LAST', self.last),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def run_command(self, *arguments):
        return testing.CliRunner().invoke(lab_test.main, arguments)

    def test_all_parts(self):
        done = self.run_command()
        self.assertEqual(1, done.exit_code)
        self.assertEqual('2 passed, 1 failed, 0 skipped',
                         done.output.splitlines()[-1])
        self.assertIn('failed: hacking', done.output)

    def test_filters_of_a_part(self):
        done = self.run_command('unit', '--', 'test_a', '-b')
        self.assertEqual(0, done.exit_code, done.output)
        self.unit.assert_called_once_with(['test_a', '-b'])
        self.style.assert_not_called()

    def test_filter_without_a_part(self):
        done = self.run_command('--', 'test_a')
        self.assertEqual(2, done.exit_code)
        self.assertIn('say which part the filter is for', done.output)
        self.unit.assert_not_called()

    def test_unknown_part_names_those_there_are(self):
        done = self.run_command('untit')
        self.assertEqual(2, done.exit_code)
        self.assertIn("'untit'", done.output)
        self.assertIn('unit', done.output)

    def test_list_has_the_last_time_of_a_whole_part(self):
        self.run_command('unit')
        self.run_command('style', '--', 'hacking')
        done = self.run_command('--list')
        lines = done.output.splitlines()
        at = next(number for number, line in enumerate(lines)
                  if line.startswith('unit '))
        self.assertRegex(lines[at + 1],
                         r'last time: 2 passed, 0 failed, 0 skipped \[\d+ s\]')
        at = next(number for number, line in enumerate(lines)
                  if line.startswith('style '))
        self.assertIn('not run here', lines[at + 1])


class PartsTestCase(base.BaseTestCase):

    def test_each_part_is_told_of(self):
        self.assertEqual(list(lab_test.PARTS), list(lab_test.ABOUT))


class StyleFilterTestCase(base.BaseTestCase):

    def test_no_check_of_that_name(self):
        count = lab_test._style(['nonsense'])
        self.assertEqual((0, 1), (count.passed, count.failed))
        self.assertIn('hacking', count.failures[0][1])
