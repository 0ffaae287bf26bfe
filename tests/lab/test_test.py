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

import concurrent.futures
import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from unittest import mock

from click import testing
from oslotest import base
from pre_commit import clientlib

from lab.commands import test as lab_test
from lab import paths


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
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))

    def run_command(self, *arguments):
        return testing.CliRunner().invoke(lab_test.main, arguments)

    def test_all_parts(self):
        done = self.run_command()
        self.assertEqual(1, done.exit_code)
        self.assertEqual('2 passed, 1 failed, 0 skipped',
                         done.output.splitlines()[-1])
        self.assertIn('failed: hacking\n    E501\n', done.output)

    def test_the_counts_name_what_failed(self):
        done = self.run_command()
        self.assertRegex(done.output, r'style +0 passed, 1 failed, 0 skipped '
                                      r'\[\d+ s\]\n +failed: hacking\n')

    def test_filters_of_a_part(self):
        done = self.run_command('unit', '--', 'test_a', '-b')
        self.assertEqual(0, done.exit_code, done.output)
        self.unit.assert_called_once_with(['test_a', '-b'], True)
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

    def test_each_part_has_one_lane(self):
        self.assertEqual(sorted(lab_test.PARTS), sorted(
            part for stage in lab_test.STAGES for lane in stage
            for part in lane))


class LanesTestCase(base.BaseTestCase):

    STAGES = ((('a', 'b'), ('c',)), (('d',),))

    def setUp(self):
        super().setUp()
        self.begun = []
        self.both = threading.Barrier(2, timeout=30)
        for patch in (
            mock.patch.dict(lab_test.PARTS, {
                name: self.part(name) for name in 'abcd'}, clear=True),
            mock.patch.object(lab_test, 'STAGES', self.STAGES),
            mock.patch.object(lab_test, '_COMMANDS', lab_test._Commands()),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def part(self, name):
        def run(_filters, alone):
            self.begun.append((name, alone))
            if not alone and name in 'ac':
                self.both.wait()
            return lab_test.Count(passed=1)

        return run

    def test_lanes_run_at_the_same_time_and_stages_do_not(self):
        results = lab_test._run_stages('abcd', [])
        self.assertEqual({'a', 'b', 'c', 'd'}, set(results))
        self.assertEqual({('a', False), ('c', False)}, set(self.begun[:2]))
        self.assertEqual([('b', False), ('d', True)], self.begun[2:])

    def test_the_only_lane_of_a_stage_is_alone(self):
        lab_test._run_stages('ab', [])
        self.assertEqual([('a', True), ('b', True)], self.begun)

    def test_after_an_interrupt_nothing_begins(self):
        lab_test._COMMANDS.interrupt()
        self.assertEqual({}, lab_test._run_stages('abcd', []))
        self.assertEqual([], self.begun)

    def test_an_interrupt_does_not_hide_what_failed(self):
        def interrupted(_filters, _alone):
            lab_test._COMMANDS.interrupt()
            return lab_test.Count(failed=1, failures=[('test_x', 'a reason')])

        lab_test.PARTS['a'] = interrupted
        with contextlib.redirect_stdout(io.StringIO()) as said:
            lab_test._run_stages('ab', [])
        self.assertIn('failed: test_x\n    a reason\n', said.getvalue())


class CommandsTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.commands = lab_test._Commands()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.runs = pathlib.Path(directory.name) / 'runs'
        os.mkfifo(self.runs)
        # The shell ends only when what it waits for has ended, so that must
        # get the interrupt, too. It is no shell: dash loses an interrupt that
        # comes right before it executes a command.
        waits = ('import signal, sys, time; '
                 'signal.signal(signal.SIGINT, signal.SIG_DFL); '
                 'print("runs", file=open(sys.argv[1], "w"), flush=True); '
                 'time.sleep(60)')
        self.command = ['sh', '-c', 'trap "exit 3" INT; "$@"; exit 4', 'sh',
                        sys.executable, '-c', waits, str(self.runs)]

    def test_an_interrupt_reaches_the_command_and_its_children(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            status = pool.submit(
                self.commands.run, self.command, dict(os.environ))
            self.assertEqual('runs\n', self.runs.read_text())
            self.commands.interrupt()
            self.assertEqual(3, status.result(30))

    def test_it_reaches_a_command_that_begins_later(self):
        self.commands.interrupt()
        self.assertEqual(-signal.SIGINT, self.commands.run(
            ['sleep', '60'], dict(os.environ)))


class StyleTestCase(base.BaseTestCase):

    def style(self, returncode, stdout):
        """Count one hook that ends with this status and output."""
        done = subprocess.CompletedProcess([], returncode, stdout)
        with mock.patch.object(
                lab_test.subprocess, 'run', return_value=done) as run:
            count = lab_test._style(['^mypy$'])
        self.assertEqual('mypy', run.call_args.args[0][-1])
        run.assert_called_once()
        return count

    def test_no_check_of_that_name(self):
        count = lab_test._style(['nonsense'])
        self.assertEqual((0, 1), (count.passed, count.failed))
        self.assertIn('hacking', count.failures[0][1])

    def test_hook_that_passes(self):
        count = self.style(0, 'mypy....Passed\n')
        self.assertEqual((1, 0, 0),
                         (count.passed, count.failed, count.skipped))

    def test_hook_that_fails_is_shown(self):
        count = self.style(1, 'x.py:1: error: no\n')
        self.assertEqual((0, 1), (count.passed, count.failed))
        self.assertEqual([('mypy', 'x.py:1: error: no\n')], count.failures)

    def test_hook_that_is_skipped(self):
        count = self.style(0, 'mypy....Skipped\n')
        self.assertEqual((0, 0, 1),
                         (count.passed, count.failed, count.skipped))

    def test_hook_that_has_nothing_to_check_fails(self):
        count = self.style(0, 'mypy....(no files to check)Skipped\n')
        self.assertEqual((0, 1), (count.passed, count.failed))

    def test_hooks_need_no_network(self):
        config = clientlib.load_config(
            paths.ROOT / '.pre-commit-config.yaml')
        self.assertEqual({'local'}, {
            repo['repo'] for repo in config['repos']})
        hooks = [hook for repo in config['repos'] for hook in repo['hooks']]
        self.assertLessEqual({hook['language'] for hook in hooks},
                             {'system', 'unsupported', 'pygrep'})
        self.assertEqual([hook['id'] for hook in hooks], lab_test._hooks())
