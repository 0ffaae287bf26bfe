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

import ddt
from nova.api.validation.extra_specs import validators
from nova import exception
from oslotest import base

from nova_fakedax import extra_specs


@ddt.ddt
class ExtraSpecsTest(base.BaseTestCase):
    """Through Nova's own loader, so that the entry point is held too."""

    def test_nova_finds_the_validators_by_their_entry_point(self):
        [entry] = importlib.metadata.entry_points(
            group='nova.api.extra_spec_validators', name='fakedax')
        self.assertIs(extra_specs, entry.load())

    @ddt.data('root', 'ephemeral', 'root,ephemeral')
    def test_a_known_value_is_taken(self, value):
        validators.validate('fakedax:disks', value)

    @ddt.data('', 'root,root', 'yes', 'ROOT')
    def test_an_unknown_value_is_refused_with_what_is_allowed(self, value):
        exc = self.assertRaises(
            exception.ValidationError, validators.validate,
            'fakedax:disks', value)
        self.assertIn(
            f"'{value}' is not a value of fakedax:disks; allowed: 'root', "
            f"'ephemeral', 'root,ephemeral'", exc.format_message())
        self.assertEqual(400, exc.code)

    @ddt.data('fakedax:disk', 'fakedax:root', 'fakedax:')
    def test_an_unknown_key_is_refused_with_what_is_allowed(self, key):
        exc = self.assertRaises(
            exception.ValidationError, validators.validate, key, 'root')
        self.assertIn(
            f"'{key}' is not an extra spec of fake DAX; allowed: "
            f"fakedax:disks", exc.format_message())

    def test_other_namespaces_are_left_alone(self):
        validators.validate('hw:cpu_policy', 'dedicated')
        validators.validate('acme:disks', 'root')
