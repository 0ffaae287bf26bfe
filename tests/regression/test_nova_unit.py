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

"""nova.tests.unit.virt.libvirt.test_driver."""

import types
import typing as ty
import unittest

from nova.tests.unit.virt.libvirt import test_driver

from nova_fakedax import driver
from tests import regression


class _DriverModule:
    """nova.virt.libvirt.driver, with our driver as its class.

    What a test patches here is patched in the module, where the class looks.
    """

    def __init__(self, module: types.ModuleType) -> None:
        self.__dict__['_module'] = module

    def __getattr__(self, name: str) -> ty.Any:
        if name == 'LibvirtDriver':
            return driver.FakeDaxDriver
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: ty.Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)


class RebindingTest(unittest.TestCase):

    def test_novas_tests_get_our_driver(self):
        self.assertIs(driver.FakeDaxDriver,
                      test_driver.libvirt_driver.LibvirtDriver)


def load_tests(
    loader: unittest.TestLoader, tests: unittest.TestSuite,
    pattern: str | None,
) -> unittest.TestSuite:
    if not isinstance(test_driver.libvirt_driver, _DriverModule):
        test_driver.libvirt_driver = _DriverModule(test_driver.libvirt_driver)
    tests.addTests(regression.tests_of(loader, [test_driver]))
    return tests
