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

from oslotest import base

from nova_fakedax import disk


class DiskIdTest(base.BaseTestCase):

    def test_novas_file_names_name_the_disks(self):
        for path, expected in {
            'disk': (disk.DiskId(0, 0), 'root'),
            'disk.local': (disk.DiskId(1, 0), 'ephemeral'),
            'disk.eph0': (disk.DiskId(1, 0), 'ephemeral'),
            'disk.eph12': (disk.DiskId(1, 12), 'ephemeral'),
            '/instances/4f/disk': (disk.DiskId(0, 0), 'root'),
            '/instances/4f/disk.eph1': (disk.DiskId(1, 1), 'ephemeral'),
        }.items():
            disk_id = disk.DiskId.from_path(path)
            self.assertEqual(expected, (disk_id, disk_id.role), path)

    def test_other_files_are_no_disks(self):
        for path in ('disk.swap', 'disk.config', 'disk.rescue', 'disk.info',
                     'disk.eph', 'disk.eph0.bak', 'disk.local.tmp', 'xdisk',
                     'disk_eph0', 'console.log', '', '/disk/'):
            self.assertIsNone(disk.DiskId.from_path(path), path)

    def test_the_alias_says_which_disk_it_is(self):
        for disk_id, alias in {
            disk.DiskId(0, 0): 'ua-fakedax-root',
            disk.DiskId(1, 0): 'ua-fakedax-eph0',
            disk.DiskId(1, 11): 'ua-fakedax-eph11',
        }.items():
            self.assertEqual(alias, disk_id.alias)
            self.assertEqual(disk_id, disk.DiskId.from_alias(alias))

    def test_other_aliases_are_not_ours(self):
        for alias in ('', 'ua-fakedax-', 'ua-fakedax-eph', 'ua-root',
                      'ua-fakedax-root2', 'xua-fakedax-root', 'virtio-disk0'):
            self.assertIsNone(disk.DiskId.from_alias(alias), alias)

    def test_disks_are_ordered_root_first_then_by_number(self):
        ordered = [disk.DiskId.from_path(name) for name in (
            'disk', 'disk.eph0', 'disk.eph2', 'disk.eph10')]
        for some_order in itertools.permutations(ordered):
            self.assertEqual(ordered, sorted(some_order))


class FakeDaxDiskTest(base.BaseTestCase):

    def test_the_number_orders_disks_and_not_the_path(self):
        root = disk.FakeDaxDisk(disk.DiskId(0, 0), '/z/disk', 4)
        ephemeral = disk.FakeDaxDisk(disk.DiskId(1, 0), '/a/disk.eph0', 2)
        self.assertEqual([root, ephemeral], sorted([ephemeral, root]))
