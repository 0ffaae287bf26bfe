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

"""A short run of tests/device/fuzz.py under the sanitizers."""

from lab.machine import emulators
from tests.device import base
from tests.device import fuzz


class FuzzTestCase(base.DeviceTestCase):

    def test_random_operations_find_nothing(self) -> None:
        # The seeds are 1 to 3: two rounds of split rings, one of packed.
        fuzz.fuzz(emulators.build('--version', '10.0', '--asan'), 30000, 1)
