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

from unittest import mock

import fixtures
from nova import context as nova_context
from nova import objects
from nova.tests.fixtures import libvirt
from oslo_privsep import daemon

from nova_fakedax import hostcache
from tests.functional import base

WARNING = 'does not report the trait CUSTOM_FAKEDAX'


class TraitTest(base.FakeDaxTestCase):

    def assert_not_reported(self, reason):
        self.assertNotIn(base.TRAIT, self.traits())
        warnings = [line for line in self.stdlog.logger.output.splitlines()
                    if WARNING in line]
        self.assertEqual(1, len(warnings), warnings)
        self.assertIn(reason, warnings[0])

    def test_a_host_that_can_reports_it(self):
        self.start_compute()
        self.assertIn(base.TRAIT, self.traits())
        self.assertNotIn(WARNING, self.stdlog.logger.output)

    def test_a_libvirt_that_is_too_old(self):
        self.start_compute(libvirt_version=9_000_000)
        self.assert_not_reported('libvirt is older than 9.1.0')

    def test_the_first_libvirt_that_can(self):
        self.start_compute(libvirt_version=9_001_000)
        self.assertIn(base.TRAIT, self.traits())

    def test_an_emulator_without_the_device(self):
        self.emulator.answer('')
        self.start_compute()
        self.assert_not_reported(
            f'{self.emulator.path} has no device virtio-pmem-pci')

    def break_helper(self):
        """Let nova-compute open no image, and its privsep helper not start."""
        def denied(path):
            raise PermissionError(13, 'Permission denied', path)

        for name in 'flush', 'invalidate':
            self.useFixture(fixtures.MockPatchObject(
                hostcache._Local, name, denied))
            self.useFixture(fixtures.MockPatchObject(
                hostcache, f'privileged_{name}',
                side_effect=daemon.FailedToDropPrivileges('no sudo')))

    def test_a_privsep_helper_that_does_not_start(self):
        self.break_helper()
        self.start_compute()
        self.assert_not_reported(
            'nova-compute cannot flush images: [Errno 13] no sudo')
        node = objects.ComputeNodeList.get_all_by_host(
            nova_context.get_admin_context(), 'compute1')[0]
        self.assertIn('no sudo', node.stats['fakedax_supported'])

    def test_a_server_whose_helper_is_gone_can_be_stopped(self):
        self.start_compute()
        server = self.boot()
        self.break_helper()
        with mock.patch('os.sync') as sync:
            self._stop_server(server)
        sync.assert_called_once_with()

    def test_images_in_ceph(self):
        self.flags(images_type='rbd', images_rbd_pool='vms', group='libvirt')
        self.useFixture(fixtures.MockPatch(
            'nova.storage.rbd_utils.rbd'))
        self.useFixture(fixtures.MockPatch(
            'nova.storage.rbd_utils.rados'))
        self.start_compute()
        self.assert_not_reported("[libvirt]images_type is 'rbd'")

    def test_images_in_lvm(self):
        self.flags(images_type='lvm', images_volume_group='vms',
                   group='libvirt')
        self.start_compute()
        self.assert_not_reported("[libvirt]images_type is 'lvm'")

    def test_a_restart_finds_out_again(self):
        self.start_compute()
        self.restart_compute_service(
            'compute1', keep_hypervisor_state=False,
            libvirt_version=9_000_000)
        self.assert_not_reported('libvirt is older than 9.1.0')
        self.restart_compute_service('compute1', keep_hypervisor_state=False)
        self.assertIn(base.TRAIT, self.traits())


class SchedulingTest(base.FakeDaxTestCase):
    """An operator who forgot trait:CUSTOM_FAKEDAX=required."""

    def start_both(self):
        """compute1 cannot run fake DAX, but is the scheduler's favourite."""
        self.start_compute(
            'compute1', libvirt_version=9_000_000,
            host_info=libvirt.HostInfo(
                cpu_nodes=2, cpu_sockets=1, cpu_cores=2, cpu_threads=2,
                kB_mem=64 << 20))
        self.start_compute('compute2')

    def leave_trait_behind(self):
        """Give compute1 the trait, as if a former driver had reported it."""
        self._create_trait(base.TRAIT)
        self._set_provider_traits(
            self.compute_rp_uuids['compute1'], self.traits() | {base.TRAIT})
        self.assertIn(base.TRAIT, self.traits())

    def test_the_server_lands_on_a_host_that_can(self):
        self.start_both()
        ordinary = self.boot(self.put_flavor(None))
        self.assertEqual('compute1', ordinary['OS-EXT-SRV-ATTR:host'])
        server = self.boot()
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(['disk'], self.pmems(server, 'compute2'))

    def test_without_such_a_host_it_lands_nowhere(self):
        self.start_compute(libvirt_version=9_000_000)
        server = self.boot(expected_state='ERROR')
        self.assertIn('No valid host', server['fault']['message'])
        self.assert_nothing_left(server)

    def test_a_trait_that_another_driver_left_behind_is_not_enough(self):
        self.start_compute(libvirt_version=9_000_000)
        self.leave_trait_behind()
        server = self.boot(expected_state='ERROR')
        self.assertIn('No valid host', server['fault']['message'])
        self.assertIn('compute1 has the trait CUSTOM_FAKEDAX in placement, '
                      'but its driver does not', self.stdlog.logger.output)
        self.assert_nothing_left(server)

    def test_a_host_that_is_asked_for_must_be_able_too(self):
        self.start_both()
        server = self.boot(host='compute1', expected_state='ERROR')
        self.assertIn('No valid host', server['fault']['message'])
        self.assert_nothing_left(server)


class SchedulerWithoutFilterTest(SchedulingTest):
    """An operator who forgot the scheduler's filter as well."""

    FILTER_ENABLED = False

    def test_the_server_lands_on_a_host_that_can(self):
        self.start_both()
        # compute1 refuses, and Nova tries the next.
        server = self.boot()
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(['disk'], self.pmems(server, 'compute2'))
        self.assertEqual([], self.domains('compute1'))
        self.assertIn('libvirt is older than 9.1.0',
                      self.stdlog.logger.output)

    def _assert_built_nowhere(self, server):
        # What Nova tells the user whenever the last host has refused.
        self.assertIn('Exceeded maximum number of retries',
                      server['fault']['message'])
        self.assertIn('ComputeResourcesUnavailable: Insufficient compute '
                      'resources: libvirt is older than 9.1.0',
                      self.stdlog.logger.output)
        self.assert_nothing_left(server)

    def test_without_such_a_host_it_lands_nowhere(self):
        self.start_compute(libvirt_version=9_000_000)
        self._assert_built_nowhere(self.boot(expected_state='ERROR'))

    def test_a_host_that_is_asked_for_must_be_able_too(self):
        self.start_both()
        self._assert_built_nowhere(
            self.boot(host='compute1', expected_state='ERROR'))

    def test_a_trait_that_another_driver_left_behind_is_not_enough(self):
        self.start_compute(libvirt_version=9_000_000)
        self.leave_trait_behind()
        self._assert_built_nowhere(self.boot(
            self.put_flavor(**{'trait:CUSTOM_FAKEDAX': 'required'}),
            expected_state='ERROR'))

    def test_the_trait_on_the_flavor_is_enough(self):
        self.start_compute(libvirt_version=9_000_000)
        server = self.boot(
            self.put_flavor(**{'trait:CUSTOM_FAKEDAX': 'required'}),
            expected_state='ERROR')
        self.assertIn('No valid host', server['fault']['message'])
