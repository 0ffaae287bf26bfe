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

"""What the support matrix says is held by tests that exist."""

import ast
import configparser
import pathlib

from oslotest import base
import testscenarios

load_tests = testscenarios.load_tests_apply_scenarios

ROOT = pathlib.Path(__file__).parents[2]

MATRIX = configparser.ConfigParser()
MATRIX.read_string((ROOT / 'doc/source/support-matrix.ini').read_text())

OPERATIONS = [name for name in MATRIX.sections()
              if name.startswith('operation.')]


def exists(name):
    """Whether there is a test, or what has tests, of this name."""
    directory, module, *inside = name.split('.')
    path = ROOT / 'tests' / directory / f'{module}.py'
    if not path.exists():
        return False
    scope = ast.parse(path.read_text())
    for part in inside:
        found = [node for node in scope.body
                 if isinstance(node, (ast.ClassDef, ast.FunctionDef))
                 and node.name == part]
        if not found:
            return False
        [scope] = found
    return True


class RowTest(base.BaseTestCase):

    scenarios = [(name, {'row': MATRIX[name]}) for name in OPERATIONS]

    def test_its_tests_exist(self):
        names = self.row.get('tests', '').split()
        self.assertEqual([], [name for name in names if not exists(name)])
        supported = {self.row[f'driver.{name}'] for name in (
            'device', 'stock')} & {'complete', 'partial'}
        if supported:
            self.assertNotEqual([], names)

    def test_what_it_lacks_has_a_reason(self):
        for driver in ('device', 'stock'):
            if self.row[f'driver.{driver}'] != 'complete':
                self.assertTrue(
                    self.row.get(f'driver-notes.{driver}')
                    or self.row.get('notes'))


class MatrixTest(base.BaseTestCase):

    def test_a_test_that_is_gone_is_found(self):
        here = 'unit.test_support_matrix'
        self.assertTrue(exists(f'{here}.MatrixTest'))
        self.assertFalse(exists(f'{here}.MatrixTest.test_that_is_gone'))
        self.assertFalse(exists(f'{here}.GoneTest'))
        self.assertFalse(exists('unit.test_gone'))
