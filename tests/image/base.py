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


"""A real image of guest-image-elements, and machines that boot it."""

from collections.abc import Iterator
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from typing import Any

from oslotest import base
import testtools

from lab.machine import agent
from lab.machine import qemu
from lab import paths

MIB = 1024 * 1024

ELEMENTS = paths.ROOT / 'guest-image-elements'

#: What modinfo calls the version of fakedax-driver's modules.
DRIVER = 'fakedax-1.0'

#: The images that can be tested, by the options that build them.
IMAGES: dict[str, list[str]] = {
    'bookworm-ext4': [],
    'bookworm-xfs': ['--filesystem', 'xfs'],
    'bookworm-dracut': ['--initramfs', 'dracut'],
    'trixie-ext4': ['--release', 'trixie'],
    'trixie-xfs': ['--release', 'trixie', '--filesystem', 'xfs'],
    'trixie-dracut': ['--release', 'trixie', '--initramfs', 'dracut'],
}

#: The images to test: names in FAKEDAX_TEST_IMAGES, or the one for CI.
CHOSEN = os.environ.get('FAKEDAX_TEST_IMAGES', 'bookworm-ext4').split()

#: For tests that CI has no time for.
on_demand = testtools.skipUnless(
    'FAKEDAX_TEST_IMAGES' in os.environ,
    'takes too long for CI; set FAKEDAX_TEST_IMAGES in the environment to run '
    'it')

#: Longer than any step of a boot takes under TCG on a busy machine, so that
#: only a guest that hangs reaches it.
BOOT_SECONDS = 600


def scenarios() -> list[tuple[str, dict[str, Any]]]:
    """A scenario for each chosen image."""
    return [(name, {'options': IMAGES[name]}) for name in CHOSEN]


def environment() -> dict[str, str]:
    """For guest-image-elements/build, so that it finds its cache."""
    return os.environ | {
        # A test's home directory is not the user's.
        'XDG_CACHE_HOME': str(paths.CACHE.parent),
        'ELEMENTS_PATH': str(paths.ROOT / 'tests/image/elements')}


@functools.cache
def build(*options: str) -> pathlib.Path:
    """Build an image, or take it from the cache.

    :raises RuntimeError: it cannot be built; with the output of the build
    """
    done = subprocess.run(
        [ELEMENTS / 'build', *options], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f'guest-image-elements/build: {done.stderr}')
    return pathlib.Path(done.stdout.strip())


def root_partition(image: pathlib.Path) -> dict[str, Any]:
    """sfdisk's description of the root's partition."""
    table = json.loads(subprocess.run(
        ['/sbin/sfdisk', '--json', image], check=True,
        capture_output=True).stdout)
    part: dict[str, Any] = table['partitiontable']['partitions'][-1]
    return part


@contextlib.contextmanager
def mounted(image: pathlib.Path) -> Iterator[pathlib.Path]:
    """Mount the root's file system read-only, without replaying its log."""
    offset = root_partition(image)['start'] * 512
    with tempfile.TemporaryDirectory() as directory:
        for replay in ('noload', 'norecovery,nouuid'):
            done = subprocess.run(
                ['mount', '-o', f'loop,ro,offset={offset},{replay}', image,
                 directory], capture_output=True)
            if not done.returncode:
                break
        done.check_returncode()
        try:
            yield pathlib.Path(directory)
        finally:
            subprocess.run(['umount', directory], check=True)


class ImageTestCase(base.BaseTestCase):
    """A test of one image; the scenarios run it on each chosen image."""

    options: list[str] = []

    def setUp(self) -> None:
        super().setUp()
        self.image = build(*self.options)
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='image-test-'))
        self.addCleanup(shutil.rmtree, self.directory)

    def disk(self, size_mib: int = 4096, image: pathlib.Path | None = None,
             name: str = 'disk') -> pathlib.Path:
        """Make a disk for the test, grown as Nova grows it for a flavor."""
        path = self.directory / name
        subprocess.run(
            ['cp', '--sparse=always', image or self.image, path], check=True)
        os.truncate(path, size_mib * MIB)
        return path

    def seed(self) -> list[str]:
        """A disk with the data that cloud-init configures the server from."""
        source = self.directory / 'seed'
        source.mkdir()
        (source / 'meta-data').write_text(
            'instance-id: image-test\nlocal-hostname: image-test\n')
        (source / 'user-data').write_text(
            '#cloud-config\nwrite_files:\n'
            '- {path: /root/from-cloud-init, content: hello}\n')
        # The guest's network reaches nothing.
        return [*self.iso(source, 'cidata'),
                '-nic', 'user,model=virtio-net-pci,restrict=on']

    def iso(self, source: pathlib.Path, label: str) -> list[str]:
        """A read-only disk with the files of a directory."""
        iso = self.directory / f'{label}.iso'
        subprocess.run(
            ['genisoimage', '-quiet', '-joliet', '-rock', '-volid', label,
             '-output', iso, source], check=True)
        return ['-drive', f'if=virtio,format=raw,readonly=on,file={iso}']

    def other_kernel(self) -> tuple[pathlib.Path, str]:
        """Download the packages of a kernel that the image does not have.

        They include the headers, and what both depend on. For Debian 12 the
        kernel is the release's own Linux 6.1, whose driver lets commits
        overtake their blocks; for Debian 13 it is that of the backports.

        :returns: the directory of the packages, and the kernel's release
        """
        backports = {'bookworm': [], 'trixie': [
            '--target-release=trixie-backports']}[self._release()]
        packages = self.packages(
            *backports, 'linux-image-cloud-amd64', 'linux-headers-cloud-amd64')
        image, = packages.glob('linux-image-[0-9]*.deb')
        return packages, image.name.partition('_')[0].removeprefix(
            'linux-image-')

    def packages(self, *arguments: str) -> pathlib.Path:
        """Download packages and what they depend on that the image lacks.

        :param arguments: of ``apt-get install``; packages that the image has
            are downloaded, too
        :returns: the directory of the packages
        """
        apt = self.directory / 'apt'
        for name in ('state/lists/partial', 'cache/archives/partial'):
            (apt / name).mkdir(parents=True)
        with mounted(self.image) as root:
            shutil.copy(root / 'var/lib/dpkg/status', apt)
        mirror, security = (subprocess.run(
            ['bash', '-c', f'. {ELEMENTS}/common.bash; mirror {label}'],
            check=True, capture_output=True, text=True).stdout.strip()
            for label in ('Debian', 'Debian-Security'))
        release = self._release()
        (apt / 'sources.list').write_text(
            f'deb {mirror} {release} main\n'
            f'deb {mirror} {release}-backports main\n'
            f'deb {security} {release}-security main\n')
        options = [f'--option=Dir::{name}={value}' for name, value in (
            ('Etc::SourceList', apt / 'sources.list'),
            ('Etc::SourceParts', '-'), ('Etc::Preferences', '-'),
            ('Etc::PreferencesParts', '-'), ('State', apt / 'state'),
            ('State::Status', apt / 'status'), ('Cache', apt / 'cache'))]
        for command in (
                ['update'],
                ['install', '--yes', '--download-only', '--reinstall',
                 '--no-install-recommends', *arguments]):
            subprocess.run(['apt-get', *options, *command], check=True,
                           capture_output=True, text=True)
        return apt / 'cache/archives'

    def _release(self) -> str:
        """The code name of the image's distribution."""
        with mounted(self.image) as root:
            name: str = re.findall(
                '(?m)^VERSION_CODENAME=(.*)',
                (root / 'etc/os-release').read_text())[0]
        return name

    def kernel(self, arguments: str = '') -> list[str]:
        """Options that boot the image's own kernel and initramfs as files."""
        with mounted(self.image) as root:
            kernel, = root.glob('boot/vmlinuz-*')
            initrd, = root.glob('boot/init*.img-*')
            for name, path in (('kernel', kernel), ('initrd', initrd)):
                shutil.copy(path, self.directory / name)
            grub = (root / 'boot/grub/grub.cfg').read_text()
        label = re.findall(r'root=(LABEL=[\w-]+)', grub)[0]
        return qemu.direct_kernel(
            self.directory / 'kernel', self.directory / 'initrd',
            f'root={label} ro console=ttyS0 {arguments}')

    @contextlib.contextmanager
    def boot(self, *options: str, shut_down: bool = False
             ) -> Iterator['Booted']:
        """Boot a guest, and wait until it has checked itself.

        :param shut_down: press the power button at the end of the block, and
            wait for the end of QEMU
        """
        started = time.monotonic()
        # The guest has one CPU: under TCG on a busy machine, a second one may
        # lose its timer, and the guest hangs.
        with qemu.Machine(*options, memory_mib=1024) as machine:
            try:
                machine.agent.wait_ready(BOOT_SECONDS)
                booted = Booted(machine)
                booted.wait_checked()
                took = time.monotonic() - started
                yield booted
                if shut_down:
                    machine.power_off(BOOT_SECONDS)
            finally:
                self.addDetail('console', testtools.content.text_content(
                    machine.console()))
        self.addDetail('boot', testtools.content.text_content(
            f'checked after {took:.1f} s'))


class BootCase(ImageTestCase):
    """What these tests assert of a boot."""

    def assertOnPmem(self, booted: 'Booted',
                     partition: str = 'pmem0p3') -> None:
        device, options = booted.root
        self.assertEqual(f'/dev/{partition}', device)
        self.assertIn('dax=always', options)
        self.assertChecked(
            booted, rf'(?m)^ok: / \(/dev/{partition}, \w+\) uses DAX')
        self.assertOurDriver(booted)

    def assertOnBlk(self, booted: 'Booted', disk: str = 'vda') -> None:
        device, options = booted.root
        self.assertEqual(f'/dev/{disk}3', device)
        self.assertNotIn('dax', ' '.join(options))
        self.assertChecked(booted, f'(?m)^note: root is on /dev/{disk}3, an '
                                   'ordinary disk$')

    def assertChecked(self, booted: 'Booted', pattern: str) -> None:
        """Assert that report and console say so, and that nothing is wrong."""
        report = booted.report()
        self.assertRegex(report.stdout, pattern)
        self.assertEqual(0, report.status, report.stdout)
        self.assertNotIn('wrong:', report.stdout)
        self.assertEqual(
            'active', booted.run('systemctl is-active fakedax-guest'))
        for line in report.stdout.splitlines():
            # These numbers have grown since.
            if ' was flushed ' not in line:
                self.assertIn(line, booted.machine.console())

    def reconfigure_grub(self, booted: 'Booted') -> None:
        """Run what the package manager runs for a new version of GRUB."""
        said = booted.run(
            'DEBIAN_FRONTEND=noninteractive dpkg-reconfigure grub-pc 2>&1',
            timeout=BOOT_SECONDS)
        self.assertIn('Installation finished. No error reported.', said)

    def assertStartsKernel(self, options: list[str]) -> None:
        """Assert that firmware and GRUB start the kernel."""
        with qemu.Machine(*options, memory_mib=1024) as machine:
            machine.wait_console('Linux version')

    def assertFewBounceBuffers(self, booted: 'Booted') -> None:
        """GRUB has seen the virtio-pmem device."""
        self.assertIn('swiotlb=512', booted.run('cat /proc/cmdline').split())
        self.assertChecked(booted, r'(?m)^ok: 1024 KiB of RAM are set aside '
                                   r'for bounce buffers \(swiotlb\)$')

    def assertOurDriver(self, booted: 'Booted') -> None:
        """Assert that fakedax-driver drives the guest's virtio-pmem."""
        for module in ('virtio_pmem', 'nd_virtio'):
            self.assertEqual(DRIVER, booted.run(
                f'cat /sys/module/{module}/version'))
        report = booted.report().stdout
        self.assertIn(f'ok: the driver of virtio-pmem is {DRIVER}: ', report)
        self.assertRegex(
            report, r'(?m)^note: pmem0 was flushed [1-9]\d* times, by [1-9]')


class Booted:
    """A guest that has booted, and what it says of itself."""

    def __init__(self, machine: qemu.Machine) -> None:
        self.machine = machine
        self.agent = machine.agent

    def run(self, command: str, timeout: float = 120) -> str:
        """Run a command that must succeed, and return what it prints."""
        return self.agent.run(
            command, check=True, timeout=timeout).stdout.strip()

    def wait_checked(self) -> None:
        # "systemctl start" waits for a unit that is starting.
        self.agent.run('systemctl start fakedax-guest.service',
                       timeout=BOOT_SECONDS)

    def has_efi(self) -> bool:
        return self.agent.run('test -d /sys/firmware/efi').status == 0

    @property
    def root(self) -> tuple[str, list[str]]:
        """The root's device and mount options."""
        device, options = self.run(
            'findmnt --noheadings --output SOURCE,OPTIONS /').split()
        return device, options.split(',')

    def report(self) -> agent.Result:
        """What fakedax-guest says."""
        return self.agent.run('fakedax-guest')

    def root_mib(self) -> int:
        return int(self.run('df --block-size=1M --output=size / | tail -n 1'))
