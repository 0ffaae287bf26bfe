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

import importlib.metadata

from nova.api.validation.extra_specs import validators
from nova import exception
from oslotest import base
import testscenarios

from nova_fakedax import extra_specs

load_tests = testscenarios.load_tests_apply_scenarios


class ExtraSpecsTest(base.BaseTestCase):

    def test_nova_finds_the_validators_by_their_entry_point(self):
        [entry] = importlib.metadata.entry_points(
            group='nova.api.extra_spec_validators', name='fakedax')
        self.assertIs(extra_specs, entry.load())

    def test_other_namespaces_are_left_alone(self):
        validators.validate('hw:cpu_policy', 'dedicated')
        validators.validate('acme:disks', 'root')


class ValidateTestCase(base.BaseTestCase):
    """Through Nova's own loader, so that the entry point is tested too."""

    def refused(self, key, value):
        exc = self.assertRaises(
            exception.ValidationError, validators.validate, key, value)
        self.assertEqual(400, exc.code)
        return exc.format_message()


class KnownValueTest(ValidateTestCase):

    scenarios = [(value, {'value': value}) for value in (
        'root', 'ephemeral', 'root,ephemeral')]

    def test_it_is_taken(self):
        validators.validate('fakedax:disks', self.value)


class UnknownValueTest(ValidateTestCase):

    scenarios = [(repr(value), {'value': value}) for value in (
        '', 'root,root', 'yes', 'ROOT')]

    def test_it_is_refused_with_what_is_allowed(self):
        self.assertIn(
            f"'{self.value}' is not a value of fakedax:disks; allowed: "
            f"'root', 'ephemeral', 'root,ephemeral'",
            self.refused('fakedax:disks', self.value))


class UnknownKeyTest(ValidateTestCase):

    scenarios = [(key, {'key': key}) for key in (
        'fakedax:disk', 'fakedax:root', 'fakedax:')]

    def test_it_is_refused_with_what_is_allowed(self):
        self.assertIn(
            f"'{self.key}' is not an extra spec of fake DAX; allowed: "
            f"fakedax:disks", self.refused(self.key, 'root'))
