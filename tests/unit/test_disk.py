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

import itertools
import re
from unittest import mock

from nova import objects
from oslotest import base

from nova_fakedax import disk
from tests import fixtures


class DiskIdTest(base.BaseTestCase):

    def test_novas_file_names_name_the_disks(self):
        for path, expected in {
            'disk': disk.DiskId(disk.ROOT, 0),
            'disk.local': disk.DiskId(disk.EPHEMERAL, 0),
            'disk.eph0': disk.DiskId(disk.EPHEMERAL, 0),
            'disk.eph12': disk.DiskId(disk.EPHEMERAL, 12),
            '/instances/4f/disk': disk.DiskId(disk.ROOT, 0),
            '/instances/4f/disk.eph1': disk.DiskId(disk.EPHEMERAL, 1),
        }.items():
            self.assertEqual(expected, disk.DiskId.from_path(path), path)

    def test_other_files_are_no_disks(self):
        for path in ('disk.swap', 'disk.config', 'disk.rescue', 'disk.info',
                     'disk.eph', 'disk.eph0.bak', 'disk.local.tmp', 'xdisk',
                     'disk_eph0', 'console.log', '', '/disk/'):
            self.assertIsNone(disk.DiskId.from_path(path), path)

    def test_the_alias_says_which_disk_it_is(self):
        for disk_id, alias in {
            disk.DiskId(disk.ROOT, 0): 'ua-fakedax-root',
            disk.DiskId(disk.EPHEMERAL, 0): 'ua-fakedax-eph0',
            disk.DiskId(disk.EPHEMERAL, 11): 'ua-fakedax-eph11',
        }.items():
            self.assertEqual(alias, disk_id.alias)
            self.assertEqual(disk_id, disk.DiskId.from_alias(alias))

    def test_the_aliases_of_other_devices_are_no_disks(self):
        for alias in ('', 'ua-fakedax-', 'ua-fakedax-eph', 'ua-root',
                      'ua-fakedax-root2', 'xua-fakedax-root', 'virtio-disk0'):
            self.assertIsNone(disk.DiskId.from_alias(alias), alias)

    def test_disks_are_ordered_root_first_then_by_number(self):
        ordered = [disk.DiskId.from_path(name) for name in (
            'disk', 'disk.eph0', 'disk.eph2', 'disk.eph10')]
        for some_order in itertools.permutations(ordered):
            self.assertEqual(ordered, sorted(some_order))


class VolumeIdTest(base.BaseTestCase):

    def test_the_alias_is_the_volume_s_id(self):
        found = disk.DiskId.of_volume(fixtures.UUID)
        self.assertEqual(f'ua-fakedax-{fixtures.UUID}', found.alias)
        self.assertEqual(found, disk.DiskId.from_alias(found.alias))
        self.assertEqual(disk.VOLUME, found.role)

    def test_what_is_no_uuid_is_no_volume(self):
        # Nova's own alias of the <disk>, and others that begin so.
        for alias in (f'ua-{fixtures.UUID}', 'ua-fakedax-volume',
                      f'ua-fakedax-{fixtures.UUID}0', 'ua-fakedax-'):
            self.assertIsNone(disk.DiskId.from_alias(alias), alias)

    def test_it_has_no_file_of_the_instance(self):
        self.assertIsNone(disk.DiskId.from_path(fixtures.UUID))
        self.assertIsNone(disk.DiskId.from_path(f'volume-{fixtures.UUID}'))


class RolesTest(base.BaseTestCase):
    """A new role is a row of the table."""

    def test_no_two_rows_can_be_confused(self):
        for attribute in ('rank', 'name', 'alias', 'flavor_field'):
            values = [getattr(role, attribute) for role in disk.ROLES]
            self.assertEqual(len(values), len(set(values)), attribute)

    def test_they_are_in_the_order_of_their_ranks(self):
        self.assertEqual(sorted(disk.ROLES), list(disk.ROLES))
        self.assertEqual('root', str(disk.ROLES[0]))

    def test_a_row_is_all_that_a_new_role_needs(self):
        scratch = disk.Role(
            2, 'scratch', re.compile(r'disk\.scratch(?P<index>\d+)'),
            'scratch{index}', 'scratch_gb', 'scratch disk')
        with mock.patch.object(disk, 'ROLES', (*disk.ROLES, scratch)):
            found = disk.DiskId.from_path('disk.scratch3')
            self.assertEqual(disk.DiskId(scratch, 3), found)
            self.assertEqual('ua-fakedax-scratch3', found.alias)
            self.assertEqual(found, disk.DiskId.from_alias(found.alias))
            self.assertGreater(found, disk.DiskId.from_path('disk.eph9'))

    def test_the_flavor_has_the_fields(self):
        objects.register_all()
        self.assertEqual(
            disk.FILE_ROLES,
            tuple(role for role in disk.ROLES if role.flavor_field))
        for role in disk.FILE_ROLES:
            self.assertIn(role.flavor_field, objects.Flavor.fields)


class FakeDaxDiskTest(base.BaseTestCase):

    def test_the_number_orders_disks_and_not_the_path(self):
        root = disk.FakeDaxDisk(disk.DiskId(disk.ROOT, 0), '/z/disk', 4)
        ephemeral = disk.FakeDaxDisk(
            disk.DiskId(disk.EPHEMERAL, 0), '/a/disk.eph0', 2)
        self.assertEqual([root, ephemeral], sorted([ephemeral, root]))
