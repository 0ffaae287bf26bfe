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

"""Waiting with a limit."""

from unittest import mock

from oslotest import base

from lab import errors
from lab import wait


class OtherError(errors.LabError):
    pass


class UntilTestCase(base.BaseTestCase):

    def test_returns_what_the_condition_returned(self):
        condition = mock.Mock(side_effect=[None, [], 'here'])
        self.assertEqual(
            'here', wait.until('it', condition, 10, interval=0))
        self.assertEqual(3, condition.call_count)

    def test_condition_is_checked_once_without_time(self):
        self.assertTrue(wait.until('it', lambda: True, 0))
        self.assertRaises(wait.WaitError, wait.until, 'it', lambda: False, 0)

    def test_error_names_what_and_how_long_and_the_last_state(self):
        states = iter(['begun', 'half'])
        seen = []

        def condition():
            seen.append(next(states))
            return len(seen) > 2

        error = self.assertRaises(
            wait.WaitError, wait.until, 'the end', condition, 0.05,
            interval=0.06, state=lambda: seen[-1])
        self.assertEqual('waited 0.05 s for the end: half', str(error))

    def test_error_without_a_state(self):
        error = self.assertRaises(
            OtherError, wait.until, 'the end', lambda: None, 0,
            error=OtherError)
        self.assertEqual('waited 0 s for the end', str(error))

    def test_what_the_condition_raises_ends_the_wait(self):
        condition = mock.Mock(side_effect=OtherError('broken'))
        self.assertRaisesRegex(
            OtherError, '^broken$', wait.until, 'it', condition, 10)
        condition.assert_called_once_with()
