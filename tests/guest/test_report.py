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

"""What the tests for tempest have a guest report, without a cloud."""

import base64
import subprocess

from lab.machine import qemu
from lab import wait
from nova_fakedax.tempest import guest as tempest_guest
from tests.guest import test_guest


class ReportTest(test_guest.GuestTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.image = self.disk(256)

    def config_drive(self) -> list[str]:
        """A config drive with the user data, as Nova attaches it."""
        files = self.directory / 'config/openstack/latest'
        files.mkdir(parents=True, exist_ok=True)
        (files / 'user_data').write_bytes(
            base64.b64decode(tempest_guest.user_data()))
        drive = self.directory / 'disk.config'
        subprocess.run(
            ['genisoimage', '-quiet', '-J', '-r', '-V', 'config-2',
             '-o', drive, self.directory / 'config'], check=True)
        return ['-device', 'virtio-scsi-pci',
                '-drive', f'if=none,id=config,format=raw,readonly=on,'
                          f'file={drive}',
                '-device', 'scsi-cd,drive=config']

    def reports(self, count: int, *disk: str) -> list[tempest_guest.Report]:
        """Boot it, and kill QEMU once there are as many reports."""
        with qemu.Machine(*self.direct_kernel(), *disk,
                          *self.config_drive()) as machine:
            wait.until(
                'the guest to report',
                lambda: len(tempest_guest.parse(machine.console())) >= count,
                120, state=machine.console)
            return tempest_guest.parse(machine.console())

    def test_pmem_is_not_cached_and_keeps_what_was_acknowledged(
            self) -> None:
        pmem = qemu.pmem(self.image)
        first, second, *others = self.reports(2, *pmem)
        last = [first, second, *others][-1]
        self.assertEqual('/dev/pmem0p2', first.device)
        self.assertIn('dax=always', first.options.split(','))
        self.assertLess(first.cached_kib, 1024)
        self.assertEqual((1, 0, 1), (first.turn, first.found,
                                     first.acknowledged))
        self.assertEqual((2, 1, 2), (second.turn, second.found,
                                     second.acknowledged))
        again = self.reports(1, *pmem)[0]
        self.assertNotEqual(first.boot, again.boot)
        self.assertGreaterEqual(again.survived, last.acknowledged)
        self.assertEqual(first.sum, again.sum)

    def test_an_ordinary_disk_is_cached(self) -> None:
        report = self.reports(1, *qemu.virtio_blk(self.image))[0]
        self.assertEqual('/dev/vda2', report.device)
        self.assertGreater(report.cached_kib, report.data_kib * 3 // 4)
