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

"""Memory that a cgroup is asked to give back."""

import os
import pathlib
from unittest import mock

import fixtures
from oslotest import base

from lab.machine import cgroup

MIB = 1 << 20


class LimitTest(base.BaseTestCase):

    def test_limit_that_is_never_reached_is_given_up(self):
        self.useFixture(fixtures.MockPatchObject(
            cgroup, '_LIMIT_SECONDS', 0.2))
        directory = self.useFixture(fixtures.TempDir()).path
        # Nobody reads it, so that the one who opens it to write waits.
        os.mkfifo(os.path.join(directory, 'memory.max'))
        group = cgroup.MemoryGroup()
        group._second, group._paths = True, [pathlib.Path(directory)]
        error = self.assertRaises(TimeoutError, group.set_limit, MIB)
        self.assertIn(f'{MIB} is too little', str(error))


class ReclaimTest(base.BaseTestCase):

    def reclaim(self, has: int, at_once: int, in_use: int,
                wanted: int) -> list[int]:
        """Ask for MiB; return what was asked for in turn, in MiB.

        :param at_once: MiB that a group gives if it is asked for all
        :param in_use: MiB that it never gives
        """
        group = cgroup.MemoryGroup()
        left, asked = [has], []

        def give(amount: int) -> None:
            mib = amount // MIB
            asked.append(mib)
            if len(asked) == 1:
                mib = min(mib, at_once)
            left[0] = max(left[0] - mib, min(in_use, left[0]))

        with (mock.patch.object(group, 'usage', lambda: left[0] * MIB),
              mock.patch.object(group, 'stat'),
              mock.patch.object(group, '_reclaim', give)):
            group.reclaim(wanted * MIB)
        return asked

    def test_all_at_once_where_that_does(self):
        self.assertEqual([500], self.reclaim(600, 500, 0, 500))

    def test_the_rest_in_parts(self):
        self.assertEqual([500, 32, 32, 16], self.reclaim(600, 420, 0, 500))

    def test_it_ends_when_nothing_comes_of_it(self):
        self.assertEqual([600, 32, 32, 32, 32, 32],
                         self.reclaim(600, 100, 440, 600))
