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

"""Servers in the lab's cloud, by OpenStack's API."""

import pathlib
import unittest

import testtools


def load_tests(
    loader: unittest.TestLoader, tests: unittest.TestSuite,
    pattern: str | None,
) -> unittest.TestSuite:
    """Those first that need the cloud alone.

    They leave a core to the tests of other parts, which end before these; the
    others then have both.
    """
    found = loader.discover(
        str(pathlib.Path(__file__).parent), pattern or 'test*.py')
    tests.addTests(sorted(
        testtools.iterate_tests(found),
        key=lambda test: not getattr(test, 'alone', False)))
    return tests
