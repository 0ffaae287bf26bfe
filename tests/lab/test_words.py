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

"""The check for words that this project does not use."""

import io
import pathlib
import tempfile
from unittest import mock

from oslotest import base
import testscenarios

from tests.style import words

load_tests = testscenarios.load_tests_apply_scenarios

TABLE = words.read_table(words.GLOSSARY.read_text())


class WordsTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def write(self, text, name='page.rst'):
        path = self.directory / name
        path.write_text(text)
        return path

    def check(self, *paths):
        """Run the check on files; its exit status and what it printed."""
        with mock.patch('sys.stdout', io.StringIO()) as printed:
            status = words.main([str(path) for path in paths])
        return status, printed.getvalue()

    def lines(self, text, name='page.rst'):
        """The lines of a text in which something is found."""
        path = self.write(text, name)
        return [int(line.removeprefix(f'{path}:').partition(':')[0])
                for line in self.check(path)[1].splitlines()]


class TableTestCase(WordsTestCase):

    scenarios = [(word.pattern, {'word': word}) for word in TABLE]

    def test_the_example_is_found(self):
        path = self.write(f'A first line.\n{self.word.bad}\n')
        status, printed = self.check(path)
        self.assertEqual(1, status)
        self.assertIn(f'{path}:2: ', printed)
        self.assertIn(f'say {self.word.instead}\n', printed)

    def test_what_to_say_is_clean(self):
        self.assertEqual(
            (0, ''), self.check(self.write(
                f'{self.word.good}\n{self.word.instead}\n')))


class FindTestCase(WordsTestCase):

    def test_each_file_is_looked_at(self):
        clean = self.write('Flushes take hours, everybody besides.\n')
        status, printed = self.check(
            self.write('anew', 'first'), clean, self.write('ours', 'second'))
        self.assertEqual(1, status)
        self.assertEqual(
            [f'{self.directory}/first:1', f'{self.directory}/second:1'],
            [line.partition(': ')[0] for line in printed.splitlines()])

    def test_parts_of_words_are_clean(self):
        self.assertEqual([], self.lines(
            'yours, hours, courses; besides; warehouse; renewed; forever\n'
            'for every guest; mushrooms; a room; the point is to begin\n'))

    def test_words_on_two_lines(self):
        self.assertEqual([1], self.lines('The guest stands\nstill.\n'))
        self.assertEqual([1], self.lines('    # it stands\n    # still\n'))
        self.assertEqual([1], self.lines("    'hangs for '\n    'ever'\n"))

    def test_identifiers(self):
        self.assertEqual([1, 2], self.lines(
            'def test_guest_stands_still():\n    OURS = 1\n', 'a.py'))

    def test_quotes_are_left_alone(self):
        self.assertEqual([4], self.lines(
            '.. words: quoted\n"made anew"\n\n'
            'made anew\n'
            'made anew  # words: quoted\n'))

    def test_context_of_a_patch_is_left_alone(self):
        self.assertEqual([1, 7], self.lines(
            'Make it anew\n'
            '\n'
            'diff --git a/x.c b/x.c\n'
            '@@ -1,2 +1,2 @@\n'
            ' /* anew */\n'
            '-/* anew */\n'
            '+/* anew */\n', '0001-x.patch'))

    def test_table_is_left_alone(self):
        self.assertEqual((0, ''), self.check(words.GLOSSARY))


class ReadTableTestCase(base.BaseTestCase):

    def test_no_table(self):
        self.assertRaises(ValueError, words.read_table, 'Glossary\n')

    def test_row_that_cannot_be_read(self):
        text = words.GLOSSARY.read_text()
        broken = text.replace('* - ``anew``', '* - anew')
        self.assertNotEqual(text, broken)
        self.assertRaises(ValueError, words.read_table, broken)
