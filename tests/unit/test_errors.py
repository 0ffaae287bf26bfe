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

"""The project's errors, as Nova shows them to users."""

import importlib
import pkgutil

from nova.compute import utils as compute_utils
from nova import exception
from oslotest import base
import testscenarios

import nova_fakedax
from nova_fakedax import emulator
from nova_fakedax import filelock
from nova_fakedax import inventory
from nova_fakedax import monitor
from nova_fakedax import privsep
from nova_fakedax import rebuild
from nova_fakedax import recovery
from nova_fakedax import spec

load_tests = testscenarios.load_tests_apply_scenarios

#: Errors that never leave the package: who catches them says more. Of a
#: RebuildRefused Nova shows the error that it holds. NoSuchServer is for the
#: operator's command.
INTERNAL = {emulator.ProbeError, filelock.Locked, inventory.NoSuchServer,
            monitor.MonitorError, privsep.HelperError, rebuild.RebuildRefused,
            recovery.NoSuchMove, recovery.RecoveryRefused, spec.InvalidSpec,
            spec.InvalidImage}


def _errors():
    modules = [importlib.import_module(f'nova_fakedax.{found.name}')
               for found in pkgutil.iter_modules(nova_fakedax.__path__)]
    return sorted({value for module in modules
                   for value in vars(module).values()
                   if isinstance(value, type)
                   and issubclass(value, Exception)
                   and value.__module__ == module.__name__} - INTERNAL,
                  key=lambda error: error.__name__)


class ErrorTest(base.BaseTestCase):

    scenarios = [(error.__name__, {'error': error}) for error in _errors()]

    def test_its_text_is_the_message_of_a_fault(self):
        """Of any other error Nova shows the name of the class."""
        self.assertTrue(issubclass(self.error, exception.NovaException))
        fault = compute_utils.exception_to_dict(self.error(
            'what and why', path='disk', size=1, reason='', operation=''))
        self.assertEqual('what and why', fault['message'])


class FaultTest(base.BaseTestCase):

    def test_the_errors_are_found(self):
        self.assertIn('InvalidLayout', {
            error.__name__ for error in _errors()})
