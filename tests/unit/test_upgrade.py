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

import os
import pathlib
import subprocess
import sys
from unittest import mock

import fixtures
from oslotest import base
import testscenarios

from nova_fakedax.cmd import upgrade

load_tests = testscenarios.load_tests_apply_scenarios

GOOD = {
    'DEFAULT': {'compute_driver': 'fakedax.FakeDaxDriver'},
    'filter_scheduler': {
        'enabled_filters': 'ComputeFilter,FakeDaxFilter',
        'available_filters': 'nova_fakedax.scheduler.FakeDaxFilter'}}


class CheckTest(base.BaseTestCase):
    """The command, as an operator runs it."""

    scenarios = [
        ('good', {
            'changed': {}, 'status': 0, 'said': 'Success'}),
        ('no driver is configured', {
            'changed': {'DEFAULT': {}}, 'status': 0, 'said': 'Success'}),
        ('another driver', {
            'changed': {'DEFAULT': {
                'compute_driver': 'libvirt.LibvirtDriver'}},
            'status': 1, 'said': 'compute_driver is libvirt.LibvirtDriver'}),
        ('the filter is not enabled', {
            'changed': {'filter_scheduler': {
                **GOOD['filter_scheduler'],
                'enabled_filters': 'ComputeFilter'}},
            'status': 1, 'said': 'enabled_filters lacks FakeDaxFilter'}),
        ('the filter is not found', {
            'changed': {'filter_scheduler': {
                'enabled_filters': 'FakeDaxFilter'}},
            'status': 1, 'said': 'available_filters lacks '
            'nova_fakedax.scheduler.FakeDaxFilter'}),
    ]

    def test_check(self):
        conf = os.path.join(self.useFixture(fixtures.TempDir()).path, 'conf')
        with open(conf, 'w') as file:
            for section, options in (GOOD | self.changed).items():
                print(f'[{section}]', *(
                    f'{name} = {value}' for name, value in options.items()),
                    sep='\n', file=file)
        done = subprocess.run(
            [pathlib.Path(sys.executable).parent / 'nova-fakedax-status',
             '--config-file', conf, 'upgrade', 'check'],
            capture_output=True, text=True)
        said = ' '.join(done.stdout.replace('|', ' ').split())
        self.assertEqual((self.status, ''), (done.returncode, done.stderr),
                         done.stdout)
        self.assertIn(self.said, said)


class ReleaseTest(base.BaseTestCase):

    def test_releases_of_nova(self):
        for version, code in (('33.0.1', 2), ('34.0.0', 0), ('34.1.0', 0),
                              ('35.0.0', 2)):
            with mock.patch('importlib.metadata.version',
                            return_value=version):
                result = upgrade.Checks()._release()
            self.assertEqual(code, result.code, version)
            if code:
                self.assertIn(f'nova {version} is installed', result.details)


class ExtraSpecsTest(base.BaseTestCase):

    def test_without_the_entry_point(self):
        with mock.patch('stevedore.ExtensionManager') as manager:
            manager.return_value.names.return_value = ['hw']
            result = upgrade.Checks()._extra_specs()
        self.assertEqual(2, result.code)
        self.assertIn('no entry point fakedax', result.details)
