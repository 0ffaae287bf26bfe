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

import os
import pathlib
import shutil
import subprocess
import sys

import fixtures
from oslotest import base

PLUGIN = pathlib.Path(__file__).parents[2] / 'devstack'

#: What the plugin calls of functions-common, inc/ini-config, inc/python and
#: inc/async of DevStack, which runs with errexit.
_DEVSTACK = r"""
set -e
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
pip_uninstall() { called pip_uninstall "$@" from "$PIP_VIRTUAL_ENV"; }
iniset() { called iniset "$@"; }
iniset_multiline() { called iniset_multiline "$@"; }
sudo() {
    [[ $1 != env ]] || { shift; env "$@"; return; }
    called sudo "$@"
    [[ $* != *' /dev/stdin '* ]] || cat >>"$CALLS"
}
sg() { called sg "$@"; echo "$HOST_SAYS"; [[ -z $HOST_SAYS ]]; }
openstack() {
    called openstack "$@"
    [[ $* != *' show '* || -n $EXISTS ]] || return 1
    [[ $* != *' -c id' ]] || echo "id-of-$5"
}
"""


class PhaseTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path)
        self.calls = self.directory / 'calls'
        self.source = self.directory / 'source'
        (self.source / 'etc/apparmor').mkdir(parents=True)
        (self.source / 'etc/apparmor/nova-fakedax').write_text(
            '/var/lib/nova/instances/*/disk* k,\n')
        (self.source / 'requirements.txt').write_text(
            'nova>=34.0.0,<35.0.0 # Apache-2.0\n')
        for program in 'qemu-device', 'guest-image-elements':
            self.program(
                self.source / program / 'build', '[ "$1" = --packages ] && '
                f'echo a-package || echo /cache/{program}/built')
        (self.source / 'guest-image-elements/common.bash').write_text(
            'IMAGE_PROPERTIES=(fakedax_guest=true os_type=linux)\n')
        self.pip = self.directory / 'tempest/.tox/tempest/bin/pip'
        self.program(self.pip, 'echo "tempest pip $*" >>"$CALLS"')
        self.nova('34.0.1')
        self.settings = {
            'DEST': '/dest', 'DATA_DIR': '/data', 'STACK_USER': 'stack',
            'VIRT_DRIVER': 'libvirt', 'LIBVIRT_TYPE': 'qemu',
            'LIBVIRT_GROUP': 'libvirt', 'NOVA_FILTERS': 'ComputeFilter',
            'ENABLED_SERVICES': 'n-api,n-sch,n-cpu,g-api,tempest',
            'NOVA_CONF': '/nova.conf', 'NOVA_CPU_CONF': '/nova-cpu.conf',
            'NOVA_BIN_DIR': '/bin', 'NOVA_INSTANCES_PATH': '/data/instances',
            'TEMPEST_DIR': str(self.directory / 'tempest'),
            'TEMPEST_CONFIG': '/tempest.conf',
            'DEVSTACK_VENV': str(self.directory / 'none'),
            'PYTHON': sys.executable, 'FAKEDAX_DIR': str(self.source),
            'PYTHONPATH': str(self.directory / 'site'),
            'CALLS': str(self.calls)}

    def program(self, path, line):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\n{line}\n')
        path.chmod(0o755)

    def nova(self, version):
        """Let this Nova be found first."""
        shutil.rmtree(self.directory / 'site', ignore_errors=True)
        metadata = self.directory / f'site/nova-{version}.dist-info/METADATA'
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f'Name: nova\nVersion: {version}\n')

    def run_phase(self, *phase, **settings):
        """Source the plugin as DevStack does.

        :returns: what die() said; empty if it was not called
        """
        self.calls.write_text('')
        done = subprocess.run(
            ['bash', '-c', _DEVSTACK + 'source "$0/override-defaults"\n'
             'source "$0/settings"\n'
             'source "$0/plugin.sh" "$@"\n'
             'echo "$NOVA_FILTERS"\n'
             'echo "${LIVE_MIGRATION_AVAILABLE:-}"', PLUGIN, *phase],
            env={'PATH': os.environ['PATH']} | self.settings | settings,
            capture_output=True, text=True)
        self.assertEqual(bool(done.returncode), '[ERROR]' in done.stderr,
                         done.stderr)
        if not done.returncode:
            self.filters, self.live_migration = done.stdout.splitlines()[-2:]
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

    def test_another_nova(self):
        for version in '33.0.1.dev373', '35.0.0':
            self.nova(version)
            self.assertIn(
                f'nova {version} is installed: this nova-fakedax is for '
                'nova>=34.0.0,<35.0.0', self.run_phase('stack', 'install'))
            self.assertEqual([], self.called())

    def test_install_on_a_compute(self):
        self.assertEqual('', self.run_phase('stack', 'install'))
        self.assertEqual(
            [f'setup_develop {self.source}',
             'install_package a-package',
             'sudo install -d -o stack /data/nova-fakedax',
             'sudo install -m 755 /cache/qemu-device/built '
             '/usr/bin/qemu-fakedax'], self.called()[:4])

    def test_apparmor(self):
        rules = [
            'sudo install -D -m 644 /dev/stdin /etc/apparmor.d/abstractions/'
            'libvirt-qemu.d/nova-fakedax',
            '/data/instances/*/disk* k,',
            '/usr/bin/qemu-fakedax rmix,']
        if not os.path.isdir('/etc/apparmor.d'):
            rules = []
        self.run_phase('stack', 'install')
        self.assertEqual(rules, self.called()[4:])
        self.run_phase('stack', 'install', FAKEDAX_STOCK_QEMU='True')
        self.assertEqual(rules[:2], self.called()[1:])

    def test_install_without_nova_compute(self):
        self.run_phase('stack', 'install', ENABLED_SERVICES='n-api')
        self.assertEqual([f'setup_develop {self.source}'], self.called())

    def test_configuration(self):
        self.assertEqual('', self.run_phase('stack', 'post-config'))
        self.assertEqual([
            'async_wait configure_neutron_nova',
            'iniset /nova.conf DEFAULT compute_driver '
            'fakedax.FakeDaxDriver',
            'iniset /nova.conf fakedax emulator /usr/bin/qemu-fakedax',
            'iniset_multiline /nova.conf filter_scheduler available_filters '
            'nova.scheduler.filters.all_filters '
            'nova_fakedax.scheduler.FakeDaxFilter'], self.called())

    def test_filters(self):
        self.run_phase('stack', 'post-config')
        self.assertEqual('ComputeFilter,FakeDaxFilter', self.filters)
        # stack.sh reads the settings more than once.
        self.run_phase('stack', 'post-config', NOVA_FILTERS=self.filters)
        self.assertEqual('ComputeFilter,FakeDaxFilter', self.filters)

    def test_configuration_of_stock_qemu(self):
        self.run_phase('stack', 'post-config', FAKEDAX_STOCK_QEMU='True')
        self.assertNotIn(' emulator ', self.calls.read_text())

    def test_configuration_of_each_node(self):
        self.run_phase('stack', 'post-config', ENABLED_SERVICES='n-sch')
        self.assertNotIn('compute_driver', self.calls.read_text())
        self.run_phase('stack', 'post-config', ENABLED_SERVICES='n-cpu')
        self.assertNotIn('FakeDaxFilter', self.calls.read_text())

    def test_flavors_and_image(self):
        self.assertEqual('', self.run_phase('stack', 'extra'))
        created = [line.split()[3:6] for line in self.called()
                   if ' create ' in line]
        self.assertEqual([['flavor', 'create', 'fakedax.tiny'],
                          ['flavor', 'create', 'fakedax.small'],
                          ['image', 'create', 'fakedax-debian']], created)
        self.assertIn('--file /cache/guest-image-elements/built --property '
                      'fakedax_guest=true --property os_type=linux',
                      self.calls.read_text())

    def test_flavors_and_image_that_exist(self):
        self.assertEqual('', self.run_phase('stack', 'extra', EXISTS='yes'))
        self.assertNotIn(' create ', self.calls.read_text())

    def test_flavors_without_an_image(self):
        for settings in ({'FAKEDAX_IMAGE': 'False'},
                         {'ENABLED_SERVICES': 'n-api'}):
            self.assertEqual('', self.run_phase('stack', 'extra', **settings))
            self.assertNotIn(' image ', self.calls.read_text())

    def test_a_host_that_cannot(self):
        self.assertIn(
            "this host cannot run disks on fake DAX: images_type is 'rbd'\n",
            self.run_phase('stack', 'extra',
                           HOST_SAYS="images_type is 'rbd'\nmore"))
        self.assertEqual([
            'sg libvirt /bin/nova-fakedax --config-file /nova-cpu.conf check '
            "-f value -c 'Why not'"], self.called())

    def test_nothing_to_create_on_a_second_compute(self):
        self.assertEqual('', self.run_phase(
            'stack', 'extra', ENABLED_SERVICES='n-cpu'))
        self.assertNotIn('openstack', self.calls.read_text())

    def test_tempest(self):
        self.assertEqual('', self.run_phase(
            'stack', 'test-config', EXISTS='yes',
            FAKEDAX_SHARED_STORAGE='yes'))
        self.assertEqual(
            [f'tempest pip install --no-deps -e {self.source}']
            + [f'iniset /tempest.conf fakedax {line}' for line in (
                'flavor_ref id-of-fakedax.tiny',
                'image_ref id-of-fakedax-debian', 'shared_storage True')],
            [line for line in self.called() if 'openstack' not in line])

    def test_tempest_migrates_servers_if_the_nodes_share_them(self):
        self.run_phase('stack', 'test-config', EXISTS='yes')
        self.assertEqual('', self.live_migration)
        self.run_phase('stack', 'test-config', EXISTS='yes',
                       FAKEDAX_SHARED_STORAGE='True')
        self.assertEqual('True', self.live_migration)
        self.run_phase('stack', 'test-config', EXISTS='yes',
                       FAKEDAX_SHARED_STORAGE='True',
                       LIVE_MIGRATION_AVAILABLE='False')
        self.assertEqual('False', self.live_migration)

    def test_unstack_and_clean_leave_nothing(self):
        # clean.sh begins with unstack.sh, and both may know no services.
        self.assertEqual('', self.run_phase('unstack', ENABLED_SERVICES=''))
        self.assertEqual(
            ['sudo rm -f /usr/bin/qemu-fakedax /etc/apparmor.d/abstractions/'
             'libvirt-qemu.d/nova-fakedax',
             'sudo rmdir --ignore-fail-on-non-empty /etc/apparmor.d/'
             'abstractions/libvirt-qemu.d',
             'pip_uninstall nova-fakedax from '
             + str(self.pip.parents[1])], self.called())
        self.assertEqual('', self.run_phase('clean', ENABLED_SERVICES=''))
        self.assertEqual(['sudo rm -rf /data/nova-fakedax'], self.called())

    def test_a_node_without_nova(self):
        for phase in ('pre-install', 'install', 'post-config', 'extra',
                      'test-config'):
            self.assertEqual('', self.run_phase(
                'stack', phase, ENABLED_SERVICES='key,mysql,tempest'))
            self.assertEqual([], self.called())
