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

"""A short form of ``python -m tests.paravirt.stress``."""

import os

from oslotest import base

from tests.paravirt import committing
from tests.paravirt import stress

FLUSHES = int(os.environ.get('FAKEDAX_STRESS_FLUSHES', '10000'))


class StressTestCase(base.BaseTestCase):

    def test_no_completion_is_lost_and_nothing_is_left(self) -> None:
        said: list[str] = []
        self.addOnException(lambda _: print('\n'.join(said)))
        seen, faults = stress.stress(
            committing.package('6.12'), FLUSHES, said.append)
        self.assertEqual(stress.TASKS, seen['ended'], said)
        self.assertGreaterEqual(seen['syncs'], FLUSHES - stress.TASKS)
        self.assertNotEqual({}, faults)
