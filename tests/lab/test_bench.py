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

"""The command lab/bench: its options."""

import click
from oslotest import base

from lab.commands import bench


class BenchTestCase(base.BaseTestCase):

    def test_every_benchmark_runs_without_options(self):
        names = sorted(bench.main.commands)
        self.assertEqual(
            ['boot', 'density', 'downtime', 'flush', 'migrate', 'ram',
             'spawn'], names)
        for name in names:
            # It raises what the command would print.
            context = bench.main.commands[name].make_context(name, [])
            self.assertGreater(context.params['rounds'], 0)

    def test_emulator_to_compare_with_must_exist(self):
        for name in ('downtime', 'flush'):
            self.assertRaisesRegex(
                click.BadParameter, 'nonesuch',
                bench.main.commands[name].make_context, name,
                ['--before', '/nonesuch'])
