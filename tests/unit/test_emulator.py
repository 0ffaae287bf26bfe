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
import shutil

import fixtures as base_fixtures
from oslotest import base

from nova_fakedax import emulator
from tests import fixtures


class ProbeTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.emulator = self.useFixture(fixtures.EmulatorFixture())
        self.path = self.emulator.path

    def _reason(self, path=None):
        return str(self.assertRaises(
            emulator.ProbeError, emulator.probe, path or self.path))

    def test_the_devices_properties_are_read(self):
        self.emulator.answer(
            'virtio-pmem-pci options:\n'
            '  acpi-index=<uint32>    -  (default: 0)\n'
            '  memdev=<link<memory-backend>>\n'
            '  x-flush-requests=<uint64> - counter\n')
        self.assertEqual(
            emulator.Emulator(self.path, frozenset(
                {'acpi-index', 'memdev', 'x-flush-requests'})),
            emulator.probe(self.path))

    def test_a_missing_binary_is_named(self):
        self.assertEqual('/no/such/qemu: No such file or directory',
                         self._reason('/no/such/qemu'))

    def test_a_file_that_cannot_be_run_is_named(self):
        os.chmod(self.path, 0o644)
        self.assertEqual(
            f'{self.path} cannot list the properties of a device',
            self._reason())

    def test_a_binary_that_fails_is_named(self):
        self.emulator.answer('  memdev=<str>\n', status=1)
        self.assertEqual(
            f'{self.path} cannot list the properties of a device',
            self._reason())

    def test_a_binary_without_the_device_is_named(self):
        # What QEMU prints for a device that it does not know.
        self.emulator.answer('')
        self.assertEqual(f'{self.path} has no device virtio-pmem-pci',
                         self._reason())

    def test_the_answer_is_kept_while_the_binary_stays(self):
        emulator.probe(self.path)
        emulator.probe(self.path)
        self.assertEqual(
            ['-device virtio-pmem-pci,help'], self.emulator.calls())

    def test_a_replaced_binary_is_asked_again(self):
        self.assertIn('memdev', emulator.probe(self.path).properties)
        self.emulator.answer('')
        self.assertEqual(f'{self.path} has no device virtio-pmem-pci',
                         self._reason())

    def test_a_refusal_is_not_kept(self):
        self.emulator.answer('  memdev=<str>\n', status=1)
        before = os.stat(self.path)
        self._reason()
        # The same time and size, as if the cause had been elsewhere.
        self.emulator.answer('  memdev=<str>\n', status=0)
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(before.st_size, os.path.getsize(self.path))
        self.assertTrue(emulator.probe(self.path).properties)

    def test_its_machine_types_are_read(self):
        self.assertEqual({'q35', 'pc-q35-10.0', 'pc-0.12'},
                         emulator.machines(self.path))
        self.assertEqual(['-machine help'], self.emulator.calls())

    def test_a_binary_that_does_not_say_its_machine_types_is_named(self):
        self.emulator.answer('', status=1)
        self.assertEqual(
            f'{self.path} cannot list the machine types',
            str(self.assertRaises(
                emulator.ProbeError, emulator.machines, self.path)))

    def test_a_real_qemu_is_understood(self):
        path = shutil.which('qemu-system-x86_64')
        if not path:
            self.skipTest('qemu-system-x86_64 is not installed')
        self.assertIn('memdev', emulator.probe(path).properties)
        machines = emulator.machines(path)
        self.assertIn('q35', machines)
        self.assertTrue(any(name.startswith('pc-q35-') for name in machines))
        self.assertNotIn('Supported', machines)
        self.useFixture(base_fixtures.MockPatchObject(
            emulator, 'DEVICE', 'no-such-device'))
        emulator._answer.cache_clear()
        self.addCleanup(emulator._answer.cache_clear)
        self.assertEqual(f'{path} has no device no-such-device',
                         self._reason(path))
