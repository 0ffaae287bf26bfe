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

"""What a person sees of an error."""

import click
from click import testing
from openstack import exceptions
from oslotest import base

from lab.deploy import leftovers
from lab import errors


class MessagesTestCase(base.BaseTestCase):

    def run_command(self, error):
        @click.command()
        def main():
            with errors.messages():
                raise error

        return testing.CliRunner().invoke(main)

    def test_error_of_the_lab(self):
        done = self.run_command(leftovers.LeftoverError('still there'))
        self.assertEqual(
            (1, 'Error: still there\n'), (done.exit_code, done.output))

    def test_error_of_openstack(self):
        done = self.run_command(exceptions.SDKException('refused'))
        self.assertEqual(
            (1, 'Error: refused\n'), (done.exit_code, done.output))

    def test_interrupt_says_how_to_continue(self):
        done = self.run_command(KeyboardInterrupt())
        self.assertEqual(1, done.exit_code)
        self.assertIn('lab/cloud down', done.output)

    def test_defect_keeps_its_traceback(self):
        done = self.run_command(KeyError('name'))
        self.assertIsInstance(done.exception, KeyError)
        self.assertEqual('', done.output)
