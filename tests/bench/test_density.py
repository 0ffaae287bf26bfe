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

"""The density benchmark: that it runs, and cleans up.

No limit on speeds or on how many guests fit: the machine has other work.
"""

import os
import pathlib
import signal
import subprocess

from oslotest import base
import psutil
import testscenarios

from lab.benchmarks.density import modes
from lab.benchmarks import results
from lab.machine import cgroup
from lab import paths
from lab import wait

load_tests = testscenarios.load_tests_apply_scenarios

SWAPS = pathlib.Path('/proc/swaps')


class DensityTestCase(base.BaseTestCase):

    def start(self, *options: str) -> 'subprocess.Popen[str]':
        return subprocess.Popen(
            [paths.ROOT / 'lab/bench', 'density', *options],
            # A test's home directory is not the user's.
            env=os.environ | {'XDG_CACHE_HOME': str(paths.CACHE.parent)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def assert_nothing_left(self, pid: int) -> None:
        self.assertEqual([], [*results.DIRECTORY.glob('density-*.raw')])
        self.assertEqual([], cgroup.left_by(pid))


class QuickTest(DensityTestCase):

    def test_it_has_rows_of_each_part_and_mode(self) -> None:
        with self.start('--quick') as bench:
            said, _ = bench.communicate()
        self.assertEqual(0, bench.returncode, said)
        rows = results.load('density-quick')
        for part in 'one-guest', 'how-many', 'frozen':
            self.assertEqual({*modes.QUICK}, {
                row['mode'] for row in rows if row['part'] == part}, part)
        fits = [row['guests'] for row in rows if row['part'] == 'how-many']
        self.assertTrue(all(fits), rows)
        created = {row['mode']: row for row in rows
                   if row['part'] == 'costs'}
        self.assertGreater(created['raw']['disk_mib'],
                           created['qcow2']['disk_mib'])
        frozen = {row['mode']: row for row in rows
                  if row['part'] == 'frozen'}
        # Counts of bytes, not speeds.
        self.assertGreater(frozen['pmem-fpr']['given_back_mib'], 475)
        self.assertEqual(0, frozen['pmem-fpr']['written_mib'])
        self.assertLess(frozen['blk-none-fpr']['given_back_mib'], 100)
        self.assertTrue((results.DIRECTORY / 'density-quick-frozen.png')
                        .stat().st_size)
        self.assert_nothing_left(bench.pid)


class InterruptTest(DensityTestCase):
    """It takes down what it has started: guests, cgroup, images, swap."""

    scenarios = [('by ' + number.name, {'signal': number})
                 for number in (signal.SIGINT, signal.SIGTERM)]
    signal: signal.Signals

    def test_nothing_is_left(self) -> None:
        swaps = SWAPS.read_text()
        with self.start('--part', 'how-many', '--mode', 'blk-none-zram',
                        '--budget', '1024') as bench:
            process = psutil.Process(bench.pid)
            self.addCleanup(bench.kill)
            wait.until('a guest in a cgroup', lambda: any(
                (path / 'cgroup.procs').read_text()
                for path in cgroup.left_by(bench.pid)), 600)
            children = process.children(recursive=True)
            self.assertNotEqual([], children)
            self.assertNotEqual(swaps, SWAPS.read_text())
            bench.send_signal(self.signal)
            bench.wait(120)
        self.assertNotEqual(0, bench.returncode)
        psutil.wait_procs(children, 10)
        self.assertEqual([], [child for child in children
                              if child.is_running()])
        self.assertEqual(swaps, SWAPS.read_text())
        self.assert_nothing_left(bench.pid)
