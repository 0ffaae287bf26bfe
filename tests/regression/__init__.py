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

"""Nova's own libvirt tests, run with our driver.

A flavor without ``fakedax:*`` must see no difference. excluded.txt names the
tests that are not run, each with the reason.
"""

import pathlib
import types
import unittest

import testtools

EXCLUDED = pathlib.Path(__file__).with_name('excluded.txt')


def excluded() -> dict[str, str]:
    """The tests and classes that are not run, with the reasons."""
    reasons = {}
    for line in EXCLUDED.read_text().splitlines():
        name, _mark, reason = line.partition('#')
        if name.strip():
            if not reason.strip():
                raise ValueError(f'{EXCLUDED}: {name.strip()} has no reason')
            reasons[name.strip()] = reason.strip()
    return reasons


def tests_of(
    loader: unittest.TestLoader, modules: list[types.ModuleType],
) -> unittest.TestSuite:
    """The tests of Nova's modules, without those that are excluded.

    :raises ValueError: a test that is excluded does not exist any more
    """
    suite = unittest.TestSuite()
    stale = {name for name in excluded()
             if name.startswith(tuple(
                 f'{module.__name__}.' for module in modules))}
    for module in modules:
        for test in testtools.iterate_tests(
                loader.loadTestsFromModule(module)):
            # A module also has the classes of test cases that it imports.
            if not test.id().startswith(f'{module.__name__}.'):
                continue
            names = {test.id(), test.id().rpartition('.')[0]}
            if names & excluded().keys():
                stale -= names
            else:
                suite.addTest(test)
    if stale:
        raise ValueError(f'{EXCLUDED}: no such tests: {sorted(stale)}')
    return suite
