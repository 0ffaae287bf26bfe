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
from unittest import mock

from nova import conf as nova_conf
from nova.virt.libvirt import host as libvirt_host
from oslo_config import fixture as config_fixture
from oslotest import base
import testscenarios

from nova_fakedax import capability
from nova_fakedax import conf
from nova_fakedax import hostcache
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios

CONF = nova_conf.CONF
conf.register_opts(CONF)


class LibvirtError(Exception):
    """In place of libvirt.libvirtError, whose module may be missing."""


class ReasonsAgainstTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.conf = self.useFixture(config_fixture.Config(CONF))
        self.conf.config(instances_path=self.useFixture(
            config_fixture.fixtures.TempDir()).path)
        self.emulator = self.useFixture(fixtures.EmulatorFixture())
        self.host = mock.create_autospec(libvirt_host.Host, instance=True)
        self.libvirt_version = (11, 3, 0)
        self.host.has_min_version.side_effect = (
            lambda wanted: self.libvirt_version >= wanted)
        self.host.get_capabilities.return_value.host.cpu.arch = 'x86_64'
        self.security_models()
        self.domain_capabilities().return_value = (
            f'<domainCapabilities><path>{self.emulator.path}</path>'
            f'</domainCapabilities>')
        libvirt = mock.Mock(libvirtError=LibvirtError)
        self.useFixture(config_fixture.fixtures.MonkeyPatch(
            'nova.virt.libvirt.host.libvirt', libvirt))

    def domain_capabilities(self):
        return self.host.get_connection.return_value.getDomainCapabilities

    def security_models(self, *models):
        self.host.get_connection.return_value.getCapabilities.return_value = (
            '<capabilities><host>{}</host></capabilities>'.format(''.join(
                f'<secmodel><model>{model}</model><doi>0</doi></secmodel>'
                for model in models)))

    def reasons(self):
        return capability.reasons_against(CONF, self.host)


class ReasonsAgainstTest(ReasonsAgainstTestCase):

    def test_images_that_are_not_made_raw(self):
        self.conf.config(force_raw_images=False)
        self.assertEqual(
            ['force_raw_images is off: images on fake DAX are raw'],
            self.reasons())

    def test_file_backed_memory(self):
        self.conf.config(group='libvirt', file_backed_memory=1024)
        [reason] = self.reasons()
        self.assertIn('[libvirt]file_backed_memory is set', reason)

    def test_encrypted_ephemeral_storage(self):
        self.conf.config(group='ephemeral_storage_encryption', enabled=True)
        [reason] = self.reasons()
        self.assertIn('[ephemeral_storage_encryption]enabled is on', reason)

    def test_images_that_cannot_be_flushed(self):
        self.useFixture(config_fixture.fixtures.MockPatch(
            'nova_fakedax.hostcache.flush',
            side_effect=hostcache.HelperError(13, 'no helper', 'probe')))
        self.assertEqual(
            ["nova-compute cannot flush images: [Errno 13] no helper: "
             "'probe'; see [nova_fakedax_privileged]helper_command"],
            self.reasons())

    def test_the_first_libvirt_that_can(self):
        self.libvirt_version = (9, 1, 0)
        self.assertEqual([], self.reasons())

    def test_apparmor_whose_rules_let_no_guest_lock_images(self):
        rules = os.path.join(self.useFixture(
            config_fixture.fixtures.TempDir()).path, 'nova-fakedax')
        self.useFixture(config_fixture.fixtures.MonkeyPatch(
            'nova_fakedax.capability.APPARMOR_RULES', rules))
        self.security_models('apparmor', 'dac')
        instances = os.path.realpath(CONF.instances_path)
        for text in None, '/var/lib/nova/instances/*/disk* k,':
            if text:
                with open(rules, 'w') as file:
                    file.write(text)
            self.assertEqual(
                [f'libvirt confines guests by AppArmor, and {rules} does not '
                 f'let them lock files in {CONF.instances_path}; see the '
                 f'administrator guide'], self.reasons())
        with open(rules, 'w') as file:
            file.write(f'# {instances}/*/disk* k,\n')
        self.assertEqual(1, len(self.reasons()))
        with open(rules, 'a') as file:
            file.write(f'  {instances}/*/disk* k,\n')
        self.assertEqual([], self.reasons())

    def test_the_rules_are_found_of_a_directory_that_is_a_link(self):
        real = self.useFixture(config_fixture.fixtures.TempDir()).path
        link = os.path.join(CONF.instances_path, 'link')
        os.symlink(real, link)
        rules = os.path.join(real, 'nova-fakedax')
        with open(rules, 'w') as file:
            file.write(f'{os.path.realpath(real)}/*/disk* k,\n')
        self.useFixture(config_fixture.fixtures.MonkeyPatch(
            'nova_fakedax.capability.APPARMOR_RULES', rules))
        self.conf.config(instances_path=link)
        self.security_models('apparmor')
        self.assertEqual([], self.reasons())

    def test_guests_are_confined_by_these_models(self):
        for models in ('apparmor', 'dac'), ('selinux', 'dac'):
            self.security_models(*models)
            self.assertEqual(
                list(models), capability.security_models(self.host))

    def test_an_emulator_without_the_device(self):
        self.emulator.answer('')
        self.assertEqual(
            [f'{self.emulator.path} has no device virtio-pmem-pci'],
            self.reasons())

    def test_the_configured_emulator_is_asked_and_not_libvirts(self):
        self.conf.config(group='fakedax', emulator='/no/such/qemu')
        self.assertEqual(['/no/such/qemu: No such file or directory'],
                         self.reasons())
        self.domain_capabilities().assert_not_called()

    def test_a_libvirt_without_an_emulator(self):
        self.domain_capabilities().side_effect = LibvirtError('no kvm')
        self.assertEqual(['libvirt has no emulator: no kvm'],
                         self.reasons())

    def test_all_reasons_are_given_at_once(self):
        self.conf.config(force_raw_images=False)
        self.conf.config(group='libvirt', images_type='rbd')
        self.libvirt_version = (9, 0, 0)
        self.emulator.answer('')
        self.assertEqual(4, len(self.reasons()))


class GoodHostTest(ReasonsAgainstTestCase):

    scenarios = [(images_type, {'images_type': images_type})
                 for images_type in ('default', 'raw', 'flat', 'qcow2')]

    def test_it_has_nothing_against_it(self):
        self.conf.config(group='libvirt', images_type=self.images_type)
        self.assertEqual([], self.reasons())
        self.domain_capabilities().assert_called_once_with(
            None, 'x86_64', None, 'kvm', 0)


class OtherHypervisorTest(ReasonsAgainstTestCase):

    scenarios = [(virt_type, {'virt_type': virt_type})
                 for virt_type in ('lxc', 'parallels')]

    def test_it_is_the_only_reason_given(self):
        self.conf.config(group='libvirt', virt_type=self.virt_type)
        self.libvirt_version = (1, 0, 0)
        self.assertEqual(
            [f"[libvirt]virt_type is '{self.virt_type}'; allowed: 'kvm', "
             f"'qemu'"], self.reasons())


class ImagesThatAreNoFilesTest(ReasonsAgainstTestCase):

    scenarios = [(images_type, {'images_type': images_type})
                 for images_type in ('rbd', 'lvm', 'ploop')]

    def test_the_reason_names_those_that_are(self):
        self.conf.config(group='libvirt', images_type=self.images_type)
        self.assertEqual(
            [f"[libvirt]images_type is '{self.images_type}': images on fake "
             f"DAX are files; allowed: 'raw', 'flat', 'qcow2', 'default'"],
            self.reasons())


class OldLibvirtTest(ReasonsAgainstTestCase):

    scenarios = [('9.0.0', {'version': (9, 0, 0)}),
                 ('8.0.0', {'version': (8, 0, 0)})]

    def test_it_cannot_start_the_element(self):
        self.libvirt_version = self.version
        self.assertEqual(
            ["libvirt is older than 9.1.0, the first that can start "
             "<memory model='virtio-pmem'>"], self.reasons())


class LogTest(base.BaseTestCase):

    def test_all_reasons_are_in_one_warning(self):
        with self.assertLogs(capability.LOG.logger, 'INFO') as logs:
            capability.log(['too old', 'too full'], ['too old', 'too full'])
        [line] = logs.output
        self.assertTrue(line.startswith('WARNING'))
        self.assertIn(
            'This host cannot run flavors with fakedax:* extra specs and '
            'does not report the trait CUSTOM_FAKEDAX: too old; too full',
            line)

    def test_a_host_that_cannot_migrate_says_why(self):
        with self.assertLogs(capability.LOG.logger, 'INFO') as logs:
            capability.log([], ['too old'])
        [line] = logs.output
        self.assertTrue(line.startswith('INFO'))
        self.assertIn('off on this host: too old', line)
