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


"""Once an ordinary image has been converted, its root is on DAX."""

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
from lab import wait
from tests.image import base

load_tests = testscenarios.load_tests_apply_scenarios

#: Options of build that make an image without anything for fake DAX.
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
        # The image is as distributions give it out, and as growpart leaves it:
        # neither is the partition's end a multiple of 4 KiB, nor the file's
        # size one of 2 MiB.
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
            # DKMS makes a key, which the image must not keep.
            self.assertEqual([], list(root.glob('var/lib/dkms/mok.*')))
        image = self.disk(4096, converted)
        with self.boot(*qemu.boot_view(image), *qemu.pmem(image)) as booted:
            self.assertOnPmem(booted, 'pmem0p2')
            self.assertGreater(booted.root_mib(), 3500)
            self.reconfigure_grub(booted)
            booted.run('sync')
        self.assertStartsKernel([*qemu.boot_view(image), *qemu.pmem(image)])
        self.assertStartsKernel(qemu.virtio_blk(image))

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
        # Nova makes a raw file from the qcow2 image for a server's disk.
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
        # A converted image can be converted again.
        done = subprocess.run(
            [base.ELEMENTS / 'convert', self.raw, '--in-place'], text=True,
            capture_output=True)
        self.assertEqual(0, done.returncode, done.stderr)

    @base.on_demand
    def test_interrupted_conversion_leaves_nothing(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A terminal sends SIGINT to all programs in the foreground. A
            # shell in the background, as this one may be, would ignore it.
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
            # Let its programs run for a while.
            time.sleep(1)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            # communicate() would wait for leftovers, which hold the pipes.
            status = process.wait(timeout=base.BOOT_SECONDS)
            self.assertNothingLeft()
            self.assertEqual(128 + number, status)
            for pipe in (process.stdout, process.stderr):
                assert pipe
                pipe.close()
            self.assertFalse((self.directory / 'cloud-fakedax.raw').exists())

    def assertNothingLeft(self) -> None:
        """Assert that convert left no process, no loop device and no file.

        Without a loop device there is no mount either.
        """
        left = [process.info for process in psutil.process_iter(['cmdline'])
                if '.fakedax-convert' in str(process.info['cmdline'])]
        self.assertEqual([], left)
        self.assertEqual([], list(self.directory.glob('.fakedax-*')))

        def loops() -> str:
            return subprocess.run(
                ['losetup', '--list', '--noheadings', '--output',
                 'BACK-FILE'], check=True, capture_output=True, text=True
            ).stdout

        # The kernel detaches one a moment after its last mount has gone.
        wait.until('the loop devices to be detached',
                   lambda: str(self.directory) not in loops(), 60, state=loops)

    def _apt(self, root: pathlib.Path) -> dict[str, str]:
        """apt's configuration and lists."""
        return {str(path.relative_to(root)): path.read_text()
                for directory in ('etc/apt', 'var/lib/apt/lists')
                for path in sorted((root / directory).rglob('*'))
                if path.is_file() and path.suffix != '.gpg'}
