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

"""Resize and cold migration: the disks move, grow, and stay raw."""

import os
import shutil
from unittest import mock

import fixtures
from nova.virt.libvirt import driver as libvirt_driver
from oslo_utils import units

from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import layout
from tests.functional import base

VIEW = ('disk', True)


class ResizeTestCase(base.FakeDaxTestCase):
    """Computes with one instances path, as on shared storage."""

    MEMMAP = 'device'
    HOSTS = ('compute1', 'compute2')

    def setUp(self):
        super().setUp()
        # Nova asks by ssh; the fake computes share one directory.
        self.useFixture(fixtures.MockPatchObject(
            libvirt_driver.LibvirtDriver, '_is_path_shared_with',
            lambda *_args: True))
        self.flushed = []
        flush = hostcache.flush

        def flush_and_note(path):
            self.flushed.append(os.path.basename(path))
            flush(path)

        self.useFixture(fixtures.MockPatchObject(
            hostcache, 'flush', flush_and_note))
        for name in self.HOSTS:
            self.start_compute(name)
        # A host tries this at its start.
        self.flushed.clear()
        self.server = self.boot(
            self.put_flavor('root,ephemeral', 1, 1), host='compute1')
        self.store(self.server, b'DATA')
        self.larger = self.put_flavor('root,ephemeral', 2, 2)

    def resize(self, flavor=None, status='VERIFY_RESIZE'):
        self.act(self.server, 'resize', flavorRef=flavor or self.larger)
        return self._wait_for_state_change(self.server, status)

    def assert_disks(self, host, size, memmap=None):
        """Assert that they are raw, allocated and mapped, with their data.

        Nova takes an ephemeral disk along and leaves its size alone.
        """
        memmap = (memmap or self.MEMMAP) == 'device'
        wanted = [layout.planned(size, memmap),
                  layout.planned(units.Gi, memmap)]
        self.assertEqual(
            ['disk', 'disk.eph0'], self.pmems(self.server, host))
        self.assertEqual([VIEW], self.disks(self.server, host))
        self.assertEqual(wanted, [
            self.layout_of(self.server, name)
            for name in ('disk', 'disk.eph0')])
        self.assertEqual({'disk': wanted[0]} if memmap else {},
                         self.slices(self.server, host))
        targets = self.xml(self.server, host).findall(
            "./devices/memory[@model='virtio-pmem']/target/size")
        self.assertEqual(
            [found.file_size for found in wanted],
            [int(target.text) * units.Ki for target in targets])
        self.assertEqual(b'DATA' + self.content[4:],
                         self.stored(self.server, len(self.content)))


class ResizeTest(ResizeTestCase):

    def test_to_larger_disks_on_another_host(self):
        self.resize()
        self.assert_disks('compute2', 2 * units.Gi)
        # At the source before the guest ends and after, and at the
        # destination.
        self.assertEqual(['disk', 'disk.eph0'] * 3, self.flushed)
        self.act(self.server, 'confirmResize')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.assert_disks('compute2', 2 * units.Gi)
        self._delete_server(self.server)
        self.assertFalse(os.path.exists(self.path(self.server, '')))
        self.assertEqual({}, self.allocations(self.server))

    def test_revert_brings_the_old_disks_back(self):
        self.resize()
        self.act(self.server, 'revertResize')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.assert_disks('compute1', units.Gi)
        self.assertEqual([], self.domains('compute2'))

    def test_cold_migration(self):
        self.act(self.server, 'migrate')
        self._wait_for_state_change(self.server, 'VERIFY_RESIZE')
        self.assert_disks('compute2', units.Gi)
        self.act(self.server, 'confirmResize')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.act(self.server, 'migrate')
        self._wait_for_state_change(self.server, 'VERIFY_RESIZE')
        self.assert_disks('compute1', units.Gi)

    def test_a_server_that_is_off_stays_off(self):
        self._stop_server(self.server)
        self.resize()
        self.act(self.server, 'confirmResize')
        self._wait_for_state_change(self.server, 'SHUTOFF')
        self._start_server(self.server)
        self.assert_disks('compute2', 2 * units.Gi)

    def test_no_space_for_the_larger_disks(self):
        """The destination cannot allocate them; the old ones are whole."""
        with mock.patch.object(layout, 'fit',
                               side_effect=OSError(28, 'No space left')):
            self.resize(status='ERROR')
        self.assertIn('No space left', self.failure(
            self.server, 'resize', 'compute_finish_resize'))
        self.assertEqual([], self.domains('compute2'))
        # What an operator does to recover.
        directory = os.path.join(self.instances_path, self.server['id'])
        shutil.rmtree(directory)
        os.rename(f'{directory}_resize', directory)
        self.admin_api.post_server_action(
            self.server['id'], {'os-resetState': {'state': 'active'}})
        self._reboot_server(self.server, hard=True)
        self.assert_disks('compute2', units.Gi)

    def test_a_flavor_with_the_memmap_elsewhere_converts(self):
        other = 'guest' if self.MEMMAP == 'device' else 'device'
        self.resize(self.put_flavor(
            'root,ephemeral', 2, 2, **{'fakedax:memmap': other}))
        self.assert_disks('compute2', 2 * units.Gi, other)
        self.act(self.server, 'revertResize')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.assert_disks('compute1', units.Gi)

    def test_an_image_that_is_larger_than_the_flavor_is_kept(self):
        """As when a guest overwrites its info block."""
        self._stop_server(self.server)
        path = self.path(self.server)
        with open(path, 'r+b') as image:
            image.seek(4096)
            image.write(bytes(4096))
        size = layout.planned(units.Gi, True).file_size
        os.truncate(path, size)
        layout.allocate(path, size)
        self.act(self.server, 'migrate')
        self._wait_for_state_change(self.server, 'VERIFY_RESIZE')
        self.assertEqual(layout.Layout(0, size), self.layout_of(self.server))

    def test_a_host_that_cannot_run_it_says_why(self):
        self.driver('compute2')._reasons_against = ['too old']
        self.resize(status='ERROR')
        self.assertIn('too old', self.failure(
            self.server, 'resize', 'compute_finish_resize'))
        self.assertEqual([], self.domains('compute2'))

    def test_ordinary_disks_are_left_to_nova(self):
        """Nova converts them to qcow2 here."""
        server = self.boot(
            self.put_flavor(None), image_uuid=self.ordinary_image,
            host='compute1')
        with mock.patch.object(imagebackend.FakeDaxImage, 'cache') as cache:
            self.act(server, 'resize', flavorRef=self.put_flavor(None, 2))
            self._wait_for_state_change(server, 'VERIFY_RESIZE')
        cache.assert_not_called()
        with open(self.path(server), 'rb') as image:
            self.assertEqual(b'QFI\xfb', image.read(4))


class ResizeOnTheSameHostTest(ResizeTestCase):

    HOSTS = ('compute1',)

    def test_to_larger_disks(self):
        self.flags(allow_resize_to_same_host=True)
        self.resize()
        self.assert_disks('compute1', 2 * units.Gi)
        self.act(self.server, 'confirmResize')
        self._wait_for_state_change(self.server, 'ACTIVE')
        self.assert_disks('compute1', 2 * units.Gi)


class ResizeMemmapInGuestTest(ResizeTestCase):

    MEMMAP = 'guest'
    test_to_larger_disks = ResizeTest.test_to_larger_disks_on_another_host
    test_conversion = (
        ResizeTest.test_a_flavor_with_the_memmap_elsewhere_converts)
