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

import fixtures
from nova.tests.fixtures import libvirt

from nova_fakedax import hotplug
from nova_fakedax import monitor
from nova_fakedax import refusals
from tests.functional import base

#: Each operation of refusals.REFUSED has its test here, in test_volume_moves,
#: or in the unit test of the driver.
TESTED = {
    'suspend', 'live migration',
    'attach of a passed-through interface',
    hotplug.DETACH, hotplug.EXTEND, hotplug.SWAP, hotplug.SNAPSHOT,
}


class RefusedTest(base.FakeDaxTestCase):
    """The user is told why; the guest runs on, where it is."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.server = self.boot(
            self.put_flavor('root,ephemeral', ephemeral=1))
        self.before = self._state()

    def _state(self):
        server = self.api.get_server(self.server['id'])
        [domain] = self.domains()
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain._state)
        self.assertFalse(domain.hasManagedSaveImage(0))
        return {
            'task_state': server['OS-EXT-STS:task_state'],
            'files': {name: os.stat(self.path(self.server, name)).st_ino
                      for name in os.listdir(self.path(self.server, ''))},
            'allocations': {
                provider: allocation['resources'] for provider, allocation in
                self.allocations(self.server).items()},
            'xml': domain.XMLDesc(0),
        } | {key: server[key] for key in ('status', 'OS-EXT-SRV-ATTR:host')}

    def assert_refused(self, operation, action, event):
        self.assertIn(operation, TESTED)
        self.assertEqual(
            refusals.refused(operation).format_message(),
            self.failure(self.server, action, event))
        self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})
        # ComputeManager._revert_allocation() comes after the task's end.
        self._wait_for_assert(
            lambda: self.assertEqual(self.before, self._state()),
            max_retries=60)

    def test_every_operation_of_the_table_is_tested(self):
        self.assertEqual(set(refusals.REFUSED), TESTED)

    def test_suspend(self):
        """With QEMU's own device."""
        self.useFixture(fixtures.MockPatchObject(
            monitor, 'device_property',
            side_effect=monitor.MonitorError('no such property')))
        self.act(self.server, 'suspend')
        self.assert_refused('suspend', 'suspend', 'compute_suspend_instance')

    def test_live_migration(self):
        """With QEMU's own device there is no valid host."""
        self.start_compute('compute2')
        for host in (None, 'compute2'):
            self.act(self.server, 'os-migrateLive', host=host,
                     block_migration='auto')
            self._wait_for_server_parameter(
                self.server, {'OS-EXT-STS:task_state': None})
            self.assertIn('No valid host', self.failure(
                self.server, 'live-migration',
                'conductor_live_migrate_instance'))
            self.assertEqual(self.before, self._state())


class RefusedResizeTest(base.FakeDaxTestCase):
    """A server's disks stay what they are, and it runs on."""

    def setUp(self):
        super().setUp()
        self.start_compute()
        self.start_compute('compute2')

    def assert_refused(self, server, flavor, message):
        self.act(server, 'resize', flavorRef=flavor)
        self.assertIn(message, self.failure(
            server, 'resize', 'compute_resize_instance'))
        shown = self._wait_for_server_parameter(
            server, {'OS-EXT-STS:task_state': None})
        self.assertEqual(
            ('ACTIVE', server['OS-EXT-SRV-ATTR:host']),
            (shown['status'], shown['OS-EXT-SRV-ATTR:host']))
        [domain] = self.domains(server['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain._state)

    def test_to_a_root_disk_that_the_image_does_not_know(self):
        self.assert_refused(
            self.boot(self.put_flavor(None), image_uuid=self.ordinary_image),
            self.put_flavor('root'),
            "fakedax:disks names the root disk, but the image's property "
            "fakedax_guest is ''; allowed: 'true'")

    def test_an_ordinary_resize_is_left_to_nova(self):
        server = self.boot(self.put_flavor(None))
        with mock.patch('nova_fakedax.driver.FakeDaxDriver.'
                        'migrate_disk_and_power_off', autospec=True,
                        side_effect=AssertionError('reached')) as method:
            self.act(server, 'resize',
                     flavorRef=self.put_flavor(None, disk=2))
            self.assertEqual('AssertionError', self.failure(
                server, 'resize', 'compute_resize_instance'))
        method.assert_called_once()


class RefusedResizeWithoutFilterTest(RefusedResizeTest):
    """What the scheduler does not refuse, the compute does."""

    FILTER_ENABLED = False

    def test_to_what_is_incompatible_with_them(self):
        server = self.boot()
        self.assert_refused(
            server, self.put_flavor('root', **{'hw:locked_memory': 'true',
                                               'hw:mem_page_size': 'small'}),
            "hw:locked_memory='true' is incompatible with fakedax:disks")

    def test_to_a_flavor_that_no_host_can_run(self):
        self.admin_api.microversion = '2.85'
        flavor = self.put_flavor('nonsense')
        self.admin_api.microversion = 'latest'
        self.assert_refused(
            self.boot(), flavor,
            "'nonsense' is not a value of fakedax:disks; allowed: "
            "'root', 'ephemeral', 'root,ephemeral'")


class RefusedRebuildTest(base.FakeDaxTestCase):

    def test_to_an_image_that_does_not_know_fake_dax(self):
        self.start_compute()
        server = self.boot()
        before = os.stat(self.path(server)).st_ino
        image, allocations = server['image'], self.allocations(server)
        metadata = self.instance(server).system_metadata
        [domain] = self.domains()
        self.act(server, 'rebuild', imageRef=self.ordinary_image)
        message = self.failure(server, 'rebuild', 'compute_rebuild_instance')
        self.assertIn(self.ordinary_image, message)
        self.assertIn("the image's property fakedax_guest is ''; allowed: "
                      "'true'", message)
        server = self._wait_for_server_parameter(
            server, {'OS-EXT-STS:task_state': None})
        self.assertEqual('ACTIVE', server['status'])
        self.assertEqual(before, os.stat(self.path(server)).st_ino)
        self.assertEqual([domain], self.domains())
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain._state)
        # Nova has changed them before, and a rebuild that fails takes the
        # allocations.
        self.assertEqual(image, server['image'])
        self.assertEqual(metadata, self.instance(server).system_metadata)
        self.assertEqual(allocations, self.allocations(server))
        server = self._reboot_server(server, hard=True)
        self.assertEqual(['disk'], self.pmems(server))
        self.assertEqual(before, os.stat(self.path(server)).st_ino)
        self.start_compute('compute2')
        self._migrate_server(server)
        self._confirm_resize(server)
