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

"""Servers of a host that has failed start on another, or are kept there."""

import fcntl
import os
import struct
from unittest import mock

from nova_fakedax import hostcache
from tests import fixtures
from tests.functional import base


class EvacuateTestCase(base.FakeDaxTestCase):

    HELP = fixtures.MIGRATING_HELP

    def setUp(self):
        super().setUp()
        self.emulator.answer(self.HELP)
        self.start_compute()
        self.server = self.boot(
            self.put_flavor('root,ephemeral', ephemeral=1))
        self.start_compute('compute2')
        self.before = {name: os.stat(self.path(self.server, name)).st_ino
                       for name in ('disk', 'disk.eph0')}
        # The periodic task, once on each.
        for host in ('compute2', 'compute1', 'compute2'):
            self.driver(host).get_available_resource(host)

    def fail_host(self):
        """End compute1 and its guest, as far as the storage shows it."""
        service = self.admin_api.get_services(
            host='compute1', binary='nova-compute')[0]['id']
        self.computes['compute1'].stop()
        self.admin_api.put_service_force_down(service, True)
        self.driver()._hosts.release()

    def assert_refused(self, reason):
        before = self.allocated(self.server)
        server = self._evacuate_server(
            self.server, expected_state='ACTIVE', expected_host='compute1',
            expected_migration_status='failed')
        self.assertIn(reason, self.failure(
            server, 'evacuate', 'compute_rebuild_instance'))
        self.assertEqual([], self.domains('compute2'))
        self.assert_disks_are_kept()
        self.assertEqual(before, self.allocated(server))

    def allocated(self, server):
        return {provider: allocation['resources'] for provider, allocation in
                self.allocations(server).items()}

    def assert_disks_are_kept(self):
        self.assertEqual(self.before, {
            name: os.stat(self.path(self.server, name)).st_ino
            for name in self.before})
        self.assertEqual(
            self.content, self.stored(self.server, len(self.content)))


class EvacuateTest(EvacuateTestCase):

    def test_server_starts_on_another_host_with_its_disks(self):
        self.fail_host()
        with mock.patch.object(hostcache, 'invalidate') as invalidate:
            # Nova leaves it off.
            server = self._evacuate_server(
                self.server, expected_host='compute2')
        self.assertEqual(
            [mock.call(self.path(server, name)) for name in self.before],
            invalidate.mock_calls[:2])
        self._start_server(server)
        self.assertEqual(['disk', 'disk.eph0'],
                         self.pmems(server, 'compute2'))
        self.assert_disks_are_kept()

    def test_host_whose_guest_still_runs_keeps_it(self):
        self.fail_host()
        descriptor = os.open(self.path(self.server, 'disk.eph0'), os.O_RDWR)
        self.addCleanup(os.close, descriptor)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(
            'hhqqi4x', fcntl.F_WRLCK, os.SEEK_SET, 300, 1, 0))
        self.assert_refused('disk.eph0 locked')

    def test_host_whose_locks_were_never_seen_keeps_it(self):
        self.fail_host()
        os.unlink(os.path.join(
            self.instances_path, 'fakedax-hosts/seen/compute2/compute1'))
        self.assert_refused('has never seen a lock of it')


class NoLocksTest(EvacuateTestCase):
    """With QEMU's own device, which lets two guests write to one image."""

    HELP = fixtures.HELP

    def test_it_is_refused(self):
        self.fail_host()
        self.assert_refused('does not lock images')
