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

from nova.tests.functional.api import client

from tests.functional import base

ALLOWED = "allowed: 'root', 'ephemeral', 'root,ephemeral'"


class FlavorTest(base.FakeDaxTestCase):
    """What the API says to an operator who makes a flavor."""

    def _refused(self, **extra_specs):
        flavor = self._create_flavor()
        exc = self.assertRaises(
            client.OpenStackApiException, self.admin_api.post_extra_spec,
            flavor, {'extra_specs': extra_specs})
        self.assertEqual(400, exc.response.status_code)
        self.assertEqual(
            {}, self.admin_api.get_extra_specs(flavor))
        return exc.response.text

    def test_an_unknown_key(self):
        self.assertIn(
            "'fakedax:disk' is not an extra spec of fake DAX; allowed: "
            "fakedax:disks, fakedax:volumes, fakedax:memmap",
            self._refused(**{'fakedax:disk': 'root'}))

    def test_an_unknown_value(self):
        self.assertIn(
            f"'swap' is not a value of fakedax:disks; {ALLOWED}",
            self._refused(**{'fakedax:disks': 'swap'}))

    def test_a_repeated_disk(self):
        self.assertIn(
            f"'root,root' is not a value of fakedax:disks; {ALLOWED}",
            self._refused(**{'fakedax:disks': 'root,root'}))

    def test_an_empty_value(self):
        self.assertIn(
            f"'' is not a value of fakedax:disks; {ALLOWED}",
            self._refused(**{'fakedax:disks': ''}))

    def test_an_update_is_checked_too(self):
        flavor = self.put_flavor('root')
        exc = self.assertRaises(
            client.OpenStackApiException, self.admin_api.api_put,
            f'/flavors/{flavor}/os-extra_specs/fakedax:disks',
            {'fakedax:disks': 'swap'})
        self.assertEqual(400, exc.response.status_code)
        self.assertIn(ALLOWED, exc.response.text)

    def test_what_is_allowed(self):
        for value in ('root', 'ephemeral', 'root,ephemeral'):
            flavor = self.put_flavor(
                value, **{'trait:CUSTOM_FAKEDAX': 'required'})
            self.assertEqual(
                {'fakedax:disks': value, 'trait:CUSTOM_FAKEDAX': 'required'},
                self.admin_api.get_extra_specs(flavor))
