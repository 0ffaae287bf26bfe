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

from nova import objects
from nova.virt.libvirt import config as vconfig
from oslo_utils import units
from oslotest import base

from nova_fakedax import diagnostics
from nova_fakedax import domain
from nova_fakedax import monitor

RAM_GIB = 2
#: GiB of each disk, by alias.
DISKS = {'ua-fakedax-root': 4, 'ua-fakedax-eph0': 1}
TOTAL_KIB = (RAM_GIB + sum(DISKS.values())) * units.Mi
COUNTERS = {
    ('ua-fakedax-root', 'requests'): 7, ('ua-fakedax-root', 'errors'): 1,
    ('ua-fakedax-eph0', 'requests'): 0, ('ua-fakedax-eph0', 'errors'): 0}


class DiagnosticsTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()
        config = vconfig.LibvirtConfigGuest()
        for alias, gib in DISKS.items():
            device = domain.LibvirtConfigGuestVirtioPMEM()
            device.alias = alias
            device.target_size = gib * units.Mi
            config.add_device(device)
        self.guest = mock.Mock()
        self.guest.get_config.return_value = config
        # As virDomainGetInfo(): state, maximum and memory in KiB, ...
        self.guest._get_domain_info.return_value = (
            1, TOTAL_KIB, RAM_GIB * units.Mi, 1, 0)
        self.answer(lambda _guest, alias, name: COUNTERS[alias, name])

    def answer(self, answer):
        """Have QEMU's monitor answer so."""
        patcher = mock.patch.object(
            monitor, 'device_property', side_effect=answer)
        self.addCleanup(patcher.stop)
        patcher.start()

    def stock(self):
        self.answer(monitor.MonitorError('no such property'))

    def made(self):
        """As LibvirtDriver.get_instance_diagnostics makes them."""
        made = objects.Diagnostics(memory_details=objects.MemoryDiagnostics(
            maximum=TOTAL_KIB / units.Mi, used=RAM_GIB))
        made.add_disk(read_bytes=1, errors_count=2)
        return diagnostics.correct(made, self.guest)

    def test_the_images_are_disks_and_not_memory(self):
        made = self.made()
        self.assertEqual(RAM_GIB, made.memory_details.maximum)
        self.assertEqual(RAM_GIB, made.memory_details.used)
        self.assertEqual(3, made.num_disks)
        self.assertEqual([2, 1, 0], [
            disk.errors_count for disk in made.disk_details])
        self.assertIsNone(made.disk_details[1].read_bytes)

    def test_a_disk_without_counters_is_a_disk(self):
        self.stock()
        made = self.made()
        self.assertEqual(3, made.num_disks)
        self.assertIsNone(made.disk_details[1].errors_count)

    def legacy(self):
        return diagnostics.correct_legacy(
            {'memory': TOTAL_KIB, 'memory-actual': RAM_GIB * units.Mi},
            self.guest)

    def test_legacy(self):
        self.assertEqual({
            'memory': RAM_GIB * units.Mi,
            'memory-actual': RAM_GIB * units.Mi,
            'pmem0_flush_req': 7, 'pmem0_errors': 1,
            'pmem1_flush_req': 0, 'pmem1_errors': 0,
        }, self.legacy())

    def test_legacy_without_counters(self):
        self.stock()
        self.assertEqual({
            'memory': RAM_GIB * units.Mi,
            'memory-actual': RAM_GIB * units.Mi}, self.legacy())
