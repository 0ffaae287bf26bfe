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


"""An image that knows nothing of fake DAX, converted, has its root on DAX."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import time

import psutil
import testscenarios

from lab.machine import qemu
from tests.image import base

load_tests = testscenarios.load_tests_apply_scenarios

#: Of diskimage-builder: makes an image that knows nothing of fake DAX.
ORDINARY = ['--element', 'ordinary-disk', '--driver', 'kernel', '--unchecked']


def _hash(path: pathlib.Path) -> str:
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _format(path: pathlib.Path) -> str:
    information = json.loads(subprocess.run(
        ['qemu-img', 'info', '--output', 'json', path], check=True,
        capture_output=True).stdout)
    name: str = information['format']
    return name


class ConvertTestCase(base.BootCase):

    #: One for each release of the chosen images.
    scenarios = [
        (release, {'options': [*ORDINARY, '--release', release]})
        for release in sorted({name.partition('-')[0]
                               for name in base.CHOSEN})]

    def setUp(self) -> None:
        super().setUp()
        # As it is given out, and as growpart leaves it: with a partition that
        # ends off a multiple of 4 KiB, in a file that is none of 2 MiB.
        raw = self.disk((self.image.stat().st_size // base.MIB) + 1)
        part = base.root_partition(raw)
        subprocess.run(
            ['/sbin/sfdisk', '--quiet', '--force', '--no-reread', '-N', '2',
             raw], check=True, text=True, input=f',{part["size"] + 3}\n')
        self.raw = raw.rename(self.directory / 'cloud.img')
        self.source = self.directory / 'cloud.qcow2'
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', self.raw,
             self.source], check=True)

    @base.on_demand
    def test_a_converted_image_boots_with_its_root_on_dax(self) -> None:
        with base.mounted(self.image) as root:
            self.assertFalse((root / 'usr/local/sbin/fakedax-guest').exists())
            sources = self._apt(root)
        before = _hash(self.source)
        done = subprocess.run(
            [base.ELEMENTS / 'convert', self.source], text=True,
            capture_output=True)
        self.assertEqual(0, done.returncode, done.stderr)
        converted = self.directory / 'cloud-fakedax.raw'
        self.assertEqual(f'{converted}\n', done.stdout)
        self.assertIn('openstack image create --disk-format raw',
                      done.stderr)
        self.assertEqual(before, _hash(self.source))
        self.assertNothingLeft()
        with base.mounted(converted) as root:
            self.assertEqual(sources, self._apt(root))
            # DKMS has made a key in there.
            self.assertEqual([], list(root.glob('var/lib/dkms/mok.*')))
        image = self.disk(4096, converted)
        with self.boot(*qemu.boot_view(image), *qemu.pmem(image)) as booted:
            self.assertOnPmem(booted, 'pmem0p2')
            self.assertGreater(booted.root_mib(), 3500)

    @base.on_demand
    def test_the_driver_of_a_kernel_that_is_right(self) -> None:
        done = subprocess.run(
            [base.ELEMENTS / 'convert', self.source, '--driver', 'kernel'],
            text=True, capture_output=True)
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertIn('--property fakedax_guest=true', done.stderr)
        image = self.disk(4096, self.directory / 'cloud-fakedax.raw')
        with base.mounted(image) as root:
            self.assertFalse((root / 'usr/sbin/dkms').exists())
        with self.boot(*qemu.boot_view(image), *qemu.pmem(image)) as booted:
            self.assertChecked(booted, "(?m)^ok: the driver of virtio-pmem is "
                                       r"this kernel's \(Debian ")

    @base.on_demand
    def test_formats_and_places(self) -> None:
        before = _hash(self.raw)
        for source, options, result, wanted in (
                (self.raw, ['--output', self.directory / 'new.qcow2'],
                 self.directory / 'new.qcow2', 'qcow2'),
                (self.source, ['--in-place'], self.source, 'qcow2'),
                (self.raw, ['--in-place'], self.raw, 'raw')):
            source.chmod(0o640)
            done = subprocess.run(
                [base.ELEMENTS / 'convert', source, *options], text=True,
                capture_output=True)
            self.assertEqual(0, done.returncode, done.stderr)
            self.assertEqual(f'{result}\n', done.stdout)
            self.assertEqual(wanted, _format(result))
            self.assertIn(f'--disk-format {wanted} ', done.stderr)
            self.assertNothingLeft()
            if result == source:
                self.assertEqual(0o640, result.stat().st_mode & 0o777)
            else:
                self.assertEqual(before, _hash(self.raw))
        # Converted, and by qcow2: as Nova makes the server's disk of it.
        flat = self.directory / 'flat'
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', self.source,
             flat], check=True)
        for converted in (flat, self.raw):
            image = self.disk(4096, converted)
            with self.boot(*qemu.boot_view(image), *qemu.pmem(image)
                           ) as booted:
                self.assertOnPmem(booted, 'pmem0p2')
                self.assertGreater(booted.root_mib(), 3500)
        # What is converted already is left as good as it was.
        done = subprocess.run(
            [base.ELEMENTS / 'convert', self.raw, '--in-place'], text=True,
            capture_output=True)
        self.assertEqual(0, done.returncode, done.stderr)

    @base.on_demand
    def test_what_is_ended_leaves_nothing(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            # SIGINT as a terminal sends it, to all of the foreground; a shell
            # that is in the background itself would ignore it.
            process = subprocess.Popen(
                [base.ELEMENTS / 'convert', self.source],
                stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                 signal.SIG_DFL))
            assert process.stderr
            for line in process.stderr:
                if 'initramfs' in line:
                    break
            # Its programs run.
            time.sleep(1)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            # Not communicate(): what is left holds the pipes, and may end.
            status = process.wait(timeout=base.BOOT_SECONDS)
            self.assertNothingLeft()
            self.assertEqual(128 + number, status)
            for pipe in (process.stdout, process.stderr):
                assert pipe
                pipe.close()
            self.assertFalse((self.directory / 'cloud-fakedax.raw').exists())

    def assertNothingLeft(self) -> None:
        """No process, no loop device and so no mount, no file of convert's."""
        # Those that are killed end by themselves; nothing is left to finish.
        left = [process.info for process in psutil.process_iter(['cmdline'])
                if '.fakedax-convert' in str(process.info['cmdline'])]
        self.assertEqual([], left)
        self.assertEqual([], list(self.directory.glob('.fakedax-*')))
        # The kernel detaches one a moment after its last mount has gone.
        deadline = time.monotonic() + 60
        while True:
            loops = subprocess.run(
                ['losetup', '--list', '--noheadings', '--output',
                 'BACK-FILE'], check=True, capture_output=True, text=True
            ).stdout
            if str(self.directory) not in loops:
                break
            self.assertLess(time.monotonic(), deadline, loops)
            time.sleep(0.1)

    def _apt(self, root: pathlib.Path) -> dict[str, str]:
        """apt's configuration and lists."""
        return {str(path.relative_to(root)): path.read_text()
                for directory in ('etc/apt', 'var/lib/apt/lists')
                for path in sorted((root / directory).rglob('*'))
                if path.is_file() and path.suffix != '.gpg'}
