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

"""lab/bench flush: its disks, and the ratios in its rows."""

import pathlib

import fixtures
from oslotest import base

from lab.benchmarks import flush
from lab.machine import loop
from lab import paths

MIB = 1 << 20


class DiskTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        paths.STATE.mkdir(exist_ok=True)
        directory = self.useFixture(fixtures.TempDir(rootdir=paths.STATE))
        self.image = pathlib.Path(directory.path) / 'image'
        self.image.write_bytes(b'A' * MIB)

    def test_block_device_of_the_image(self):
        mode = flush.MODES['pmem-block']
        with flush._disk(self.image, mode) as disk:
            self.assertTrue(disk.is_block_device())
            self.assertEqual(b'A' * MIB, disk.read_bytes())
            memdev = mode.disk(disk)[1]
            self.assertIn(f'mem-path={disk},size={MIB}', memdev)
        backing = pathlib.Path('/sys/block', disk.name, 'loop/backing_file')
        # It may be another's by now.
        self.assertNotEqual(f'{self.image}\n',
                            backing.exists() and backing.read_text())

    def test_all_others_open_the_image(self):
        for name, mode in flush.MODES.items():
            if name != 'pmem-block':
                with flush._disk(self.image, mode) as disk:
                    self.assertEqual(self.image, disk, name)

    def test_guest_has_as_much_ram_for_itself(self):
        with self.image.open('r+b') as file:
            file.truncate(1 << 30)
        with flush._disk(self.image, flush.MODES['pmem-block']) as disk:
            size = {name: mode.memory_mib(
                disk if mode.block else self.image)
                for name, mode in flush.MODES.items()}
            self.assertEqual(1 << 30, loop.size(disk))
        # 64 bytes of 4096 are the guest's page descriptors.
        for name in ('pmem-stock', 'pmem-memmap-guest'):
            self.assertEqual(1024 + 16, size.pop(name))
        self.assertEqual({1024}, set(size.values()))


class RatioTestCase(base.BaseTestCase):

    def test_a_block_device_is_compared_with_a_file_in_each_round(self):
        samples = {
            ('pmem', 'alone'): [
                {'p50_us': 100.0, 'p99_us': 400.0, 'ops_per_s': 1000.0},
                {'p50_us': 200.0, 'p99_us': 400.0, 'ops_per_s': 1000.0}],
            ('pmem-block', 'alone'): [
                {'p50_us': 150.0, 'p99_us': 200.0, 'ops_per_s': 900.0},
                {'p50_us': 500.0, 'p99_us': 200.0, 'ops_per_s': 800.0}]}
        row = {'mode': 'pmem-block', 'workload': 'alone'}
        flush._compare(row, samples)
        self.assertEqual({'median': 2.0, 'least': 1.5, 'most': 2.5},
                         row['against_pmem']['p50_us'])
        # No disk of the round that was not run.
        self.assertNotIn('against_blk_writeback', row)
        self.assertEqual(
            [['alone', 'pmem-block', 'pmem', '2.00 (1.50-2.50)',
              '0.50 (0.50-0.50)', '0.85 (0.80-0.90)', '-']],
            list(flush._verdicts([row])))

    def test_every_disk_that_is_compared_with_is_one(self):
        for name, rivals in flush._RIVALS.items():
            for rival in (name, *rivals):
                # Only with --before.
                if rival != 'pmem-before':
                    self.assertIn(rival, flush.MODES)
