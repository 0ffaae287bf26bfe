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

import base64
import hashlib
import itertools
import pathlib
import re
import subprocess
import types
import unittest
from unittest import mock

from oslo_config import cfg
from oslotest import base
from tempest.lib import exceptions
from tempest.scenario import manager
from tempest import test as tempest_test
from tempest.test_discover import plugins
import testtools

from nova_fakedax.tempest import base as tempest_base
from nova_fakedax.tempest import config
from nova_fakedax.tempest import guest
from nova_fakedax.tempest import plugin


def line(boot='a', turn=1, found=0, **others):
    said = {'boot': boot, 'turn': turn, 'found': found,
            'acknowledged': found + 1, 'device': '/dev/pmem0p1',
            'options': 'rw,dax=always', 'root_kib': 1 << 20,
            'data_kib': 16384, 'cached_kib': 0, 'sum': 'd41d'} | others
    words = ' '.join(f'{key}={value}' for key, value in said.items())
    digest = hashlib.md5(words.encode(), usedforsecurity=False).hexdigest()
    return f'fakedax-report {words} {digest}\n'


class PluginTest(base.BaseTestCase):

    def test_tempest_finds_it(self):
        found = plugins.TempestTestPluginManager()
        self.assertIsInstance(found.ext_plugins['fakedax'].obj,
                              plugin.FakeDaxPlugin)

    def test_its_options_are_registered_and_listed(self):
        conf = cfg.ConfigOpts()
        made = plugin.FakeDaxPlugin()
        made.register_opts(conf)
        conf([])
        self.assertEqual('console', conf.fakedax.guest_access)
        self.assertEqual([('fakedax', config.OPTS)], made.get_opt_lists())

    def test_the_page_for_operators_names_each_option(self):
        page = (pathlib.Path(__file__).parents[2]
                / 'doc/source/admin/tempest.rst').read_text()
        self.assertEqual(
            [option.name for option in config.OPTS],
            re.findall(r'^   \* - ``(\w+)``$',
                       page.partition('\nOptions\n')[2], re.MULTILINE))

    def test_its_tests_load(self):
        directory, top = plugin.FakeDaxPlugin().load_tests()
        loader = unittest.TestLoader()
        names = [test.id() for test in testtools.iterate_tests(
            loader.discover(directory, top_level_dir=top))]
        self.assertEqual([], loader.errors)
        self.assertIn('SuspendTest.test_resumed_guest_goes_on', ' '.join(
            names))
        for name in names:
            self.assertTrue(name.startswith('nova_fakedax.tempest.'), name)


class HostsTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(manager.ScenarioTest, 'resource_setup')
        patch.start()
        self.addCleanup(patch.stop)
        self.traits = {}

    def resource_setup(self, hosts=0):
        class Case(tempest_base.FakeDaxTest):
            os_admin = mock.Mock()

        def providers(required):
            return {'resource_providers': [
                {'name': name} for name, traits in self.traits.items()
                if required in traits]}

        client = Case.os_admin.resource_providers_client
        client.list_resource_providers.side_effect = providers
        with mock.patch.object(tempest_base, 'CONF', types.SimpleNamespace(
                fakedax=types.SimpleNamespace(hosts=hosts))):
            Case.resource_setup()
        return Case

    def test_a_cloud_without_such_hosts_is_skipped(self):
        self.assertRaisesRegex(
            unittest.SkipTest, 'no host reports the trait CUSTOM_FAKEDAX',
            self.resource_setup)

    def test_a_cloud_that_must_have_them_is_not(self):
        self.assertEqual(set(), self.resource_setup(hosts=1).hosts)

    def test_hosts_are_known_by_their_traits(self):
        self.traits = {
            'one': {'CUSTOM_FAKEDAX'},
            'two': {'CUSTOM_FAKEDAX', 'CUSTOM_FAKEDAX_MIGRATION'},
            'three': set()}
        case = self.resource_setup()
        self.assertEqual({'one', 'two'}, case.hosts)
        self.assertEqual({'two'}, case.migration_hosts)


class NetworkTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(tempest_test.BaseTestCase,
                                  'setup_credentials')
        patch.start()
        self.addCleanup(patch.stop)

    def setup_credentials(self, access):
        class Case(tempest_base.FakeDaxTest):
            # setUpClass sets it.
            _BaseTestCase__setup_credentials_called = False

        with mock.patch.object(tempest_base, 'CONF', types.SimpleNamespace(
                fakedax=types.SimpleNamespace(guest_access=access))):
            Case.setup_credentials()
        return set(Case._network_resources.values())

    def test_a_project_has_one_only_if_guests_are_asked_by_ssh(self):
        self.assertEqual({False}, self.setup_credentials('console'))
        self.assertEqual({True}, self.setup_credentials('ssh'))


class ReportTest(base.BaseTestCase):

    def test_only_whole_lines_are_reports(self):
        garbled = line('b0').replace('boot=b0', 'boot=b0ot=b')
        text = 'login: ' + line() + line(turn=2)[:60] + '\nkernel\n' + garbled
        report, = guest.parse(text)
        self.assertEqual(('a', 1, 1, '/dev/pmem0p1'), (
            report.boot, report.turn, report.acknowledged, report.device))

    def test_what_survived_a_boot_does_not_count_what_it_wrote(self):
        first, third, ssh = guest.parse(
            line(found=5) + line(turn=3, found=7) + line(turn=0, found=5))
        self.assertEqual([5, 5, 5], [
            first.survived, third.survived, ssh.survived])

    def test_user_data_is_a_boothook(self):
        script = base64.b64decode(guest.user_data()).decode()
        self.assertEqual(['#cloud-boothook', '#!/bin/sh',
                          'set -- 16 watch'], script.splitlines()[:3])
        subprocess.run(['sh', '-n'], input=script, text=True, check=True)


class ConsoleTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(guest, 'CONF', types.SimpleNamespace(
            compute=types.SimpleNamespace(build_timeout=0.1,
                                          build_interval=0)))
        patch.start()
        self.addCleanup(patch.stop)

    def ask(self, *outputs):
        """Ask a guest whose console reads so, time after time."""
        client = mock.Mock()
        client.get_console_output.side_effect = (
            each if isinstance(each, Exception) else {'output': each}
            for each in itertools.chain(
                outputs, itertools.repeat(outputs[-1])))
        return guest.Console(client, 'uuid').report()

    def test_the_first_report_of_a_guest_that_boots(self):
        said = self.ask(exceptions.NotFound(), '', line(), line())
        self.assertEqual(1, said.turn)

    def test_a_report_that_was_begun_before_does_not_count(self):
        log = line() + line(turn=2)
        said = self.ask(log, log, log + line(turn=3),
                        log + line(turn=3) + line(turn=4))
        self.assertEqual(4, said.turn)

    def test_a_log_that_begins_again_after_a_migration(self):
        logs = ['', line(turn=9), line(turn=9) + line(turn=10),
                line(turn=9) + line(turn=10) + line(turn=11)]
        self.assertEqual(10, self.ask(line(turn=8), *logs).turn)
        # Nobody knows when the first one was begun.
        self.assertEqual(11, self.ask(*logs).turn)

    def test_the_first_report_after_a_reboot(self):
        for log in '', line(turn=8):
            said = self.ask(line(turn=8), log,
                            log + line('b', 1) + line('b', 2))
            self.assertEqual(('b', 1), (said.boot, said.turn))

    def test_a_silent_guest_is_an_error_that_shows_the_console(self):
        self.assertRaisesRegex(
            exceptions.TimeoutException, 'Kernel panic',
            self.ask, line(), line() + 'Kernel panic')


class SshTest(base.BaseTestCase):

    def test_it_runs_the_script_as_root(self):
        client = mock.Mock()
        client.exec_command.return_value = line(turn=0, found=4)
        report = guest.Ssh(lambda: client).report()
        self.assertEqual(4, report.survived)
        command, = client.exec_command.call_args.args
        program, *arguments = subprocess.run(
            ['sh', '-c', f'sudo() {{ printf "%s\\n--\\n" "$@"; }}; {command}'],
            text=True, check=True, capture_output=True,
        ).stdout.removesuffix('\n--\n').split('\n--\n')
        script = pathlib.Path(guest.__file__).with_name('report.sh')
        self.assertEqual(
            ('sh', ['-c', script.read_text(), 'report.sh', '16']),
            (program, arguments))
