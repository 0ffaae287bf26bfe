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

"""The phases of the DevStack plugin, without DevStack.

Functions of DevStack that the plugin calls only say that they were called.
"""

import configparser
import os
import pathlib
import subprocess

import fixtures
from oslotest import base

PLUGIN = pathlib.Path(__file__).parents[2] / 'devstack'

#: As in functions-common and inc/ini-config of DevStack.
_DEVSTACK = r'''
set -eu
define_plugin() { :; }
trueorfalse() {
    local value=${!2:-$1}
    case $value in
        1 | [Yy]es | [Tt]rue | TRUE) echo True ;;
        *) echo False ;;
    esac
}
die() { shift; echo "[ERROR] $*" >&2; exit 1; }
echo_summary() { :; }
is_service_enabled() { [[ ,$ENABLED_SERVICES, == *,$1,* ]]; }
called() { echo "$*" >>"$CALLS"; }
setup_develop() { called setup_develop "$@"; }
install_package() { called install_package "$@"; }
async_wait() { called async_wait "$@"; }
sudo() { [[ $1 != env ]] || { shift; env "$@"; return; }; called sudo "$@"; }
openstack() {
    called openstack "$@"
    [[ $* != *' show '* ]]
}
iniset() { called iniset "$@"; python3 "$INI" set "$@"; }
iniset_multiline() { called iniset_multiline "$@"; }
iniget() { python3 "$INI" get "$@"; }
'''

_INI = '''
import configparser, sys
action, path, section, name, *value = sys.argv[1:]
parser = configparser.RawConfigParser(default_section='')
parser.read(path)
if action == 'get':
    print(parser.get(section, name, fallback=''))
else:
    if not parser.has_section(section):
        parser.add_section(section)
    parser.set(section, name, *value)
    parser.write(open(path, 'w'))
'''


class PhaseTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path)
        self.calls = self.directory / 'calls'
        self.nova_conf = self.directory / 'nova.conf'
        (self.directory / 'ini.py').write_text(_INI)
        source = self.directory / 'source'
        for program in 'qemu-device', 'guest-image-elements':
            (source / program).mkdir(parents=True)
            build = source / program / 'build'
            build.write_text(
                '#!/bin/sh\n[ "$1" = --packages ] && echo a-package ||'
                f' echo /cache/{program}/built\n')
            build.chmod(0o755)
        self.settings = {
            'DEST': '/dest', 'DATA_DIR': '/data', 'STACK_USER': 'stack',
            'VIRT_DRIVER': 'libvirt', 'LIBVIRT_TYPE': 'qemu',
            'ENABLED_SERVICES': 'n-api,n-sch,n-cpu,g-api',
            'FAKEDAX_DIR': str(source), 'NOVA_CONF': str(self.nova_conf),
            'CALLS': str(self.calls), 'INI': str(self.directory / 'ini.py')}

    def run_phase(self, *phase, **settings):
        """Source the plugin as DevStack does; what went wrong, if anything."""
        self.calls.write_text('')
        done = subprocess.run(
            ['bash', '-c', _DEVSTACK + 'source "$0/settings"\n'
             'source "$0/plugin.sh" "$@"', PLUGIN, *phase],
            env={'PATH': os.environ['PATH']} | self.settings | settings,
            capture_output=True, text=True)
        self.assertEqual(bool(done.returncode), '[ERROR]' in done.stderr,
                         done.stderr)
        return done.stderr

    def called(self):
        return self.calls.read_text().splitlines()

    def test_settings_that_cannot_work(self):
        for name, value in (
                ('VIRT_DRIVER', 'ironic'), ('LIBVIRT_TYPE', 'lxc'),
                ('NOVA_BACKEND', 'LVM')):
            self.assertIn(f'{name}={value}: nova-fakedax needs',
                          self.run_phase('stack', 'pre-install',
                                         **{name: value}))
            # A node without nova-compute need not care.
            self.assertEqual('', self.run_phase(
                'stack', 'pre-install', ENABLED_SERVICES='n-api',
                **{name: value}))
        self.assertEqual('', self.run_phase('stack', 'pre-install'))

    def test_install_on_a_compute(self):
        self.assertEqual('', self.run_phase('stack', 'install'))
        self.assertEqual(
            [f'setup_develop {self.settings["FAKEDAX_DIR"]}',
             'install_package a-package',
             'sudo install -d -o stack /data/nova-fakedax',
             'sudo install -m 755 /dev/stdin /usr/local/bin/qemu-fakedax'],
            self.called())

    def test_install_without_a_build(self):
        for settings in ({'FAKEDAX_STOCK_QEMU': 'True'},
                         {'ENABLED_SERVICES': 'n-api'}):
            self.run_phase('stack', 'install', **settings)
            self.assertEqual(
                [f'setup_develop {self.settings["FAKEDAX_DIR"]}'],
                self.called())

    def configured(self, **settings):
        self.nova_conf.write_text(
            '[filter_scheduler]\nenabled_filters = ComputeFilter\n')
        self.assertEqual('', self.run_phase(
            'stack', 'post-config', **settings))
        parser = configparser.RawConfigParser(default_section='')
        parser.read(self.nova_conf)
        return parser

    def test_configuration(self):
        conf = self.configured()
        self.assertEqual('async_wait configure_neutron_nova',
                         self.called()[0])
        self.assertEqual('fakedax.FakeDaxDriver',
                         conf.get('DEFAULT', 'compute_driver'))
        self.assertEqual('/usr/local/bin/qemu-fakedax',
                         conf.get('fakedax', 'emulator'))
        self.assertEqual('ComputeFilter,FakeDaxFilter',
                         conf.get('filter_scheduler', 'enabled_filters'))
        self.assertIn(
            f'iniset_multiline {self.nova_conf} filter_scheduler '
            'available_filters nova.scheduler.filters.all_filters '
            'nova_fakedax.scheduler.FakeDaxFilter', self.called())

    def test_configuration_that_is_there_already(self):
        self.configured()
        before = self.nova_conf.read_text()
        self.run_phase('stack', 'post-config')
        self.assertEqual(before, self.nova_conf.read_text())

    def test_configuration_of_stock_qemu(self):
        self.assertFalse(
            self.configured(FAKEDAX_STOCK_QEMU='True').has_section('fakedax'))

    def test_flavors_and_image(self):
        self.assertEqual('', self.run_phase('stack', 'extra'))
        created = [line.split()[3:6] for line in self.called()
                   if ' create ' in line]
        self.assertEqual([['flavor', 'create', 'fakedax.tiny'],
                          ['flavor', 'create', 'fakedax.small'],
                          ['image', 'create', 'fakedax-debian']], created)
        self.assertIn('--file /cache/guest-image-elements/built',
                      self.called()[-1])

    def test_a_node_without_the_api_makes_none(self):
        self.run_phase('stack', 'extra', ENABLED_SERVICES='n-cpu')
        self.assertEqual([], self.called())

    def test_clean_leaves_nothing(self):
        self.run_phase('clean', ENABLED_SERVICES='')
        self.assertEqual(['sudo rm -f /usr/local/bin/qemu-fakedax',
                          'sudo rm -rf /data/nova-fakedax'], self.called())

    def test_other_phases_do_nothing(self):
        for phase in (['stack', 'test-config'], ['unstack']):
            self.run_phase(*phase)
            self.assertEqual([], self.called())
        self.run_phase('stack', 'install', ENABLED_SERVICES='key,mysql')
        self.assertEqual([], self.called())
