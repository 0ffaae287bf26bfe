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

from nova import exception
from oslotest import base

from nova_fakedax import refusals


class RefusalsTest(base.BaseTestCase):

    def test_an_error_names_the_operation_and_why(self):
        for operation, reason in refusals.REFUSED.items():
            exc = refusals.refused(operation)
            self.assertIsInstance(exc, exception.NovaException)
            self.assertEqual(
                f'Fake DAX: {operation} of an instance with disks on fake '
                f'DAX is not supported: {reason}', exc.format_message())

    def test_only_operations_of_the_table_can_be_refused(self):
        self.assertRaises(KeyError, refusals.refused, 'reboot')

    def test_the_table_cannot_be_changed(self):
        def change():
            refusals.REFUSED['reboot'] = 'because'
        self.assertRaises(TypeError, change)
