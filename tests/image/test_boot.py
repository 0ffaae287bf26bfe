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


"""The image boots everywhere, and has its root on DAX where that is possible.

These tests use real QEMU under TCG, and no OpenStack.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import shutil
import subprocess

import testscenarios

from lab.deploy import servers
from lab.machine import qemu
from tests.image import base

load_tests = testscenarios.load_tests_apply_scenarios

OVMF = pathlib.Path('/usr/share/OVMF')

#: Prints when GRUB for BIOS was installed, and how large it is.
STAT_CORE = 'stat --format "%Y %s" /boot/grub/i386-pc/core.img'


class FirmwareTestCase(base.BootCase):

    scenarios = base.scenarios()

    @base.on_demand
    def test_a_disk_over_its_boots(self) -> None:
        """Boot one disk with each kind of firmware, as each kind of disk.

        A boot takes most of a minute, so each one checks more than its own
        kind.
        """
        image = self.disk()
        self._rebuild_initramfs(image)
        on_pmem = [*qemu.boot_view(image), *qemu.pmem(image)]
        with self.boot(*on_pmem, *self.seed(), shut_down=True) as booted:
            self.assertFalse(booted.has_efi())
            self.assertOnPmem(booted)
            self.assertFewBounceBuffers(booted)
            first = booted.root_mib()
            self.assertGreater(first, 3500)
            booted.run('cloud-init status --wait', timeout=base.BOOT_SECONDS)
            self.assertEqual('hello', booted.run('cat /root/from-cloud-init'))
            self.assertEqual('', booted.run(
                'systemctl --failed --plain --no-legend'))
            # GRUB must find a root on pmem. To run all hooks of a new kernel
            # would take too long.
            self.reconfigure_grub(booted)
        # Boot the grown disk, with GRUB's new configuration, through EFI.
        with self.boot(*on_pmem, *self._efi(), shut_down=True) as booted:
            self.assertTrue(booted.has_efi())
            self.assertOnPmem(booted)
            self.assertFewBounceBuffers(booted)
            self.assertEqual(first, booted.root_mib())
        part = base.root_partition(image)
        self.assertEqual(0, part['start'] % 4096)
        self.assertEqual(0, (part['start'] + part['size']) % 2048)
        # Boot the same disk on an ordinary flavor.
        with self.boot(*qemu.virtio_blk(image)) as booted:
            self.assertOnBlk(booted)
            self.assertNotIn('swiotlb', booted.run('cat /proc/cmdline'))
            self.assertEqual('hello', booted.run('cat /root/from-cloud-init'))

    def test_grub_that_the_running_guest_installs(self) -> None:
        """All firmware and flavors boot what the package's scripts install.

        The boots end with the kernel's first words.
        """
        image = self.disk()
        on_pmem = [*qemu.boot_view(image), *qemu.pmem(image)]
        with self.boot(*on_pmem, shut_down=True) as booted:
            before = booted.run(STAT_CORE)
            self.reconfigure_grub(booted)
            self.assertNotEqual(before, booted.run(STAT_CORE))
        self.assertStartsKernel(on_pmem)
        self.assertStartsKernel(qemu.virtio_blk(image))
        self.assertStartsKernel([*qemu.boot_view(image, scsi=True),
                                 *qemu.pmem(image), *self._efi()])

    @base.on_demand
    def test_grub_on_each_flavor_and_firmware(self) -> None:
        """Install GRUB in each way, and then boot the disk in each way."""
        image = self.disk()
        directory = self.packages(
            'grub-common', 'grub2-common', 'grub-pc', 'grub-pc-bin')
        packages = self.iso(directory, 'packages')
        flavors = {
            # GRUB's own program can write to none of these.
            ('/dev/vda', '/dev/vda3', '/dev/pmem0p3'): [
                *qemu.boot_view(image), *qemu.pmem(image)],
            ('/dev/vda',): qemu.virtio_blk(image)}
        for devices, options in flavors.items():
            with self.boot(*options, *self._efi(), *packages,
                           shut_down=True) as booted:
                # An upgrade must not bring GRUB's own program back.
                booted.run('mount /dev/disk/by-label/packages /mnt')
                booted.run('DEBIAN_FRONTEND=noninteractive dpkg --install '
                           '/mnt/*.deb', timeout=base.BOOT_SECONDS)
                for device in devices:
                    booted.run(f'grub-install --target=i386-pc {device}')
                booted.run('mkdir -p /boot/efi && mount '
                           '/dev/disk/by-partlabel/ESP /boot/efi')
                # Without efibootmgr GRUB cannot be installed in another way on
                # an ordinary disk.
                booted.run('grub-install --removable')
                if 'pmem0' in devices[-1]:
                    booted.run('grub-install')
                booted.run('umount /boot/efi')
            for start in flavors.values():
                self.assertStartsKernel(start)
                self.assertStartsKernel([*start, *self._efi()])

    @base.on_demand
    def test_a_kernel_that_the_running_guest_installs(self) -> None:
        """This is slow: the guest builds the driver and makes an initramfs."""
        image = self.disk()
        on_pmem = [*qemu.boot_view(image), *qemu.pmem(image)]
        directory, release = self.other_kernel()
        packages = self.iso(directory, 'packages')
        with self.boot(*on_pmem, *packages, shut_down=True) as booted:
            self.assertOnPmem(booted)
            self.assertNotEqual(release, booted.run('uname -r'))
            # GRUB would otherwise boot the newer one.
            self._boot_by_default(booted, release)
            booted.run('mount /dev/disk/by-label/packages /mnt')
            booted.run(
                'DEBIAN_FRONTEND=noninteractive '
                'apt-get install --yes /mnt/*.deb', timeout=1500)
        with self.boot(*on_pmem) as booted:
            self.assertEqual(release, booted.run('uname -r'))
            self.assertOnPmem(booted)
            self.assertIn('/updates/dkms/', booted.run(
                'modinfo --field filename nd_virtio'))
            self.assertEqual('', booted.run(
                'systemctl --failed --plain --no-legend'))

    @base.on_demand
    def test_headers_that_come_after_their_kernel(self) -> None:
        """The first initramfs has the kernel's own driver; it is made again.

        This runs in a chroot, because it would take many minutes under TCG.
        """
        image = self.disk()
        directory, release = self.other_kernel()
        initrd = f'boot/initrd.img-{release}'
        packages = sorted(path.name for path in directory.glob('*.deb'))
        # Newer kernels are spread over more packages than linux-image.
        kernels = [name for name in packages if re.match(
            'linux-(image|base|binary|modules)', name)]
        headers = [name for name in packages if name not in kernels]

        def install(*names: str) -> str:
            return self._in_chroot(image, f"""
                mount --bind {directory} mnt
                DEBIAN_FRONTEND=noninteractive chroot . dpkg --install \
                    --force-depends {' '.join(f'/mnt/{n}' for n in names)} >&2
                lsinitramfs {initrd} | grep nd_virtio""")
        self.assertIn(f'/{release}/kernel/', install(*kernels))
        self.assertIn(f'/{release}/updates/dkms/', install(*headers))

    @base.on_demand
    def test_a_kernel_that_the_driver_cannot_be_built_for(self) -> None:
        """The kernel is installed all the same, and uses its own driver."""
        image = self.disk()
        directory, release = self.other_kernel()
        said = self._in_chroot(image, f"""
            mount --bind {directory} mnt
            echo '#error no' >>usr/src/fakedax-driver-1.0/nd_virtio.c
            DEBIAN_FRONTEND=noninteractive chroot . sh -c \
                'dpkg --install /mnt/*.deb' 2>&1
            chroot . dpkg --audit
            lsinitramfs boot/initrd.img-{release} | grep nd_virtio""")
        self.assertIn('#error no', said)
        self.assertIn(
            f'fakedax-driver: kernel {release} will use its own driver of '
            'virtio-pmem', said)
        self.assertIn(f'/{release}/kernel/', said.splitlines()[-1])

    @base.on_demand
    def test_a_rescue_by_the_same_image(self) -> None:
        """Nova rescues like this by default.

        The server's disk comes after the rescue's. Both are ordinary disks,
        with the same labels and UUIDs.
        """
        image = self.disk()
        rescue = self.disk(name='rescue')
        with self.boot(*qemu.virtio_blk(rescue, 'rescue'),
                       *qemu.virtio_blk(image, 'rescued', boot_index=3),
                       shut_down=True) as booted:
            self.assertOnBlk(booted)
            booted.run(f'{self._mount_of_a_twin()} /dev/vdb3 /mnt')
            booted.run('echo rescued > /mnt/root/from-rescue')
        with self.boot(*qemu.boot_view(image), *qemu.pmem(image)) as booted:
            self.assertOnPmem(booted)
            self.assertEqual('rescued', booted.run('cat /root/from-rescue'))

    @base.on_demand
    def test_a_rescue_that_keeps_the_servers_devices(self) -> None:
        """Stable-device rescue: the rescue's disk comes last and boots first.

        All disks are ordinary, and have the same labels and UUIDs.
        """
        image = self.disk()
        rescue = self.disk(name='rescue')
        disks = [*qemu.virtio_blk(image, 'rescued', boot_index=-1),
                 *qemu.virtio_blk(rescue, 'rescue', boot_index=1)]
        for firmware in ([], self._efi()):
            with self.boot(*disks, *firmware, shut_down=True) as booted:
                self.assertOnBlk(booted, 'vdb')
                for name in ('label/ESP', 'partlabel/root'):
                    self.assertIn('/dev/vdb', booted.run(
                        f'readlink -f /dev/disk/by-{name}'))
                if not firmware:
                    mount = self._mount_of_a_twin()
                    booted.run(f'{mount} /dev/vda3 /mnt')
                    booted.run('echo rescued > /mnt/root/from-rescue')
                    booted.run('umount /mnt')
        with self.boot(*qemu.boot_view(image), *qemu.pmem(image)) as booted:
            self.assertOnPmem(booted)
            self.assertEqual('rescued', booted.run('cat /root/from-rescue'))

    @base.on_demand
    def test_a_rescue_by_another_image(self) -> None:
        """It has the same label, as images of diskimage-builder do."""
        image = self.disk()
        rescue = self.disk(name='rescue')
        if 'xfs' in self.options:
            self.skipTest('xfs_admin works on block devices only')
        offset = base.root_partition(image)['start'] * 512
        subprocess.run(
            ['/sbin/tune2fs', '-U', 'random', f'{image}?offset={offset}'],
            check=True, capture_output=True)
        with self.boot(*qemu.virtio_blk(image, 'rescued', boot_index=-1),
                       *qemu.virtio_blk(rescue, 'rescue', boot_index=1)
                       ) as booted:
            self.assertOnBlk(booted, 'vdb')

    def _mount_of_a_twin(self) -> str:
        return 'mount -o nouuid' if 'xfs' in self.options else 'mount'

    def _rebuild_initramfs(self, image: pathlib.Path) -> None:
        """Run what the package manager runs for a new kernel.

        Its hooks rebuild the initramfs and GRUB's configuration. They run in a
        chroot, because an initramfs would take many minutes under TCG.
        """
        said = self._in_chroot(image, """
            stat --format %Y boot/init*.img-* boot/grub/grub.cfg
            DEBIAN_FRONTEND=noninteractive chroot . dpkg-reconfigure \\
                linux-image-$(basename boot/vmlinuz-* | cut -c 9-) >&2
            stat --format %Y boot/init*.img-* boot/grub/grub.cfg""")
        initrd, grub, new_initrd, new_grub = said.split()
        self.assertGreater(int(new_initrd), int(initrd))
        self.assertGreater(int(new_grub), int(grub))

    def _in_chroot(self, image: pathlib.Path, script: str) -> str:
        """Run a script in the root's directory, and return what it prints.

        After "chroot .", it has the machine's /dev, /proc and /sys.
        """
        mount = self.directory / 'mount'
        mount.mkdir(exist_ok=True)
        offset = base.root_partition(image)['start'] * 512
        # There is no PID namespace: Debian 13's systemd-detect-virt would take
        # it for a container, and GRUB's hook does nothing in a container.
        done = subprocess.run(
            ['unshare', '--mount', 'sh', '-ec', f"""
                mount -o loop,offset={offset} {image} {mount}
                for name in dev proc sys; do
                    mount --rbind /$name {mount}/$name
                done
                cd {mount}
                {script}"""],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def _boot_by_default(self, booted: base.Booted, release: str) -> None:
        """Have GRUB boot a kernel that the test will install."""
        title = 'Debian GNU/Linux'
        booted.run(
            f"echo 'GRUB_DEFAULT=\"Advanced options for {title}>{title}, "
            f"with Linux {release}\"' > /etc/default/grub.d/test.cfg")

    def _efi(self) -> list[str]:
        variables = self.directory / 'variables'
        shutil.copy(OVMF / 'OVMF_VARS_4M.fd', variables)
        return ['-drive', 'if=pflash,format=raw,readonly=on,'
                          f'file={OVMF}/OVMF_CODE_4M.fd',
                '-drive', f'if=pflash,format=raw,file={variables}']


class KernelTestCase(base.BootCase):
    """Boots from files of kernel and initramfs, without a boot view."""

    scenarios = base.scenarios()

    def test_root_by_the_flag_of_files_and_ephemeral_disks(self) -> None:
        image = self.disk()
        # cloud-init runs too, because the disks are mounted among its units.
        options = [*self.kernel('daxroot=inode'), *qemu.pmem(image),
                   *self.seed()]
        for index in range(3):
            path = self.directory / f'eph{index}'
            with path.open('wb') as f:
                f.truncate(512 * base.MIB)
            subprocess.run(
                ['/sbin/mkfs.ext4', '-q', '-F', '-b', '4096',
                 '-L', f'ephemeral{index}', path], check=True)
            options += qemu.pmem(path, f'eph{index}')
        with self.boot(*options) as booted:
            device, mount_options = booted.root
            self.assertEqual('/dev/pmem0p3', device)
            self.assertIn('dax=inode', mount_options)
            self.assertChecked(booted, 'ok: / .* uses DAX')
            self.assertOurDriver(booted)
            # A new file inherits the flag from its directory.
            booted.run('echo new > /root/new')
            self.assertRegex(booted.run('lsattr /root/new'), '^[^ ]*x')
            report = booted.report().stdout
            for index in range(3):
                self.assertIn(f'ok: /mnt/ephemeral{index} (/dev/pmem'
                              f'{index + 1}, ext4) uses DAX', report)


class BadInputTestCase(base.BootCase):
    """A guest that cannot use DAX boots as far as it can, and says why."""

    scenarios = base.scenarios()

    @base.on_demand
    def test_each_is_one_sentence_on_the_console(self) -> None:
        # All at once: one boot shows them all.
        size_mib = self.image.stat().st_size // base.MIB
        image = self.disk(size_mib)
        part = base.root_partition(image)
        # Let root end in the last MiB, so that it cannot grow to an end that
        # DAX can map.
        subprocess.run(
            ['/sbin/sfdisk', '--quiet', '--force', '--no-reread', '-N', '3',
             image], check=True, text=True, input=f',{part["size"] + 3}\n')
        options = [*self.kernel(), *qemu.pmem(image)]
        for name, mib, mkfs in (
                ('ephemeral0', 64, ['mkfs.ext4', '-q', '-F', '-b', '1024',
                                    '-L']),
                ('ephemeral1', 64, ['mkfs.vfat', '-n']),
                ('odd', 65, None),
                ('large', 60 * 1024, None)):
            path = self.directory / name
            with path.open('wb') as f:
                f.truncate(mib * base.MIB)
            if mkfs:
                subprocess.run([f'/sbin/{mkfs[0]}', *mkfs[1:], name, path],
                               check=True, capture_output=True)
            options += qemu.pmem(path, name)
        with self.boot(*options) as booted:
            device, mount_options = booted.root
            self.assertEqual('/dev/pmem0p3', device)
            self.assertNotIn('dax=always', mount_options)
            report = booted.report()
            self.assertEqual(1, report.status)
            self.assertEqual('failed', booted.agent.run(
                'systemctl is-active fakedax-guest').stdout.strip())
            console = booted.machine.console()
            for expected in (
                    r'/ \(.*\) does not use DAX: pmem0p3 does not begin and '
                    r'end on a multiple of 4 KiB: make ',
                    r'/mnt/ephemeral0 .* its ext4 has blocks of 1024 bytes: '
                    r'make ',
                    r'/mnt/ephemeral1 .* vfat cannot do DAX: make ',
                    rf'device of {65 * base.MIB} bytes is not a disk .* 2 MiB:'
                    r'enlarge ',
                    r'device of 61440 MiB is not a disk .* take a flavor'):
                self.assertRegex(report.stdout, f'(?m)^wrong: .*{expected}')
                self.assertRegex(console, f'wrong: .*{expected}')
            self.assertEqual(5, report.stdout.count('wrong:'), report.stdout)


class CheckTestCase(base.ImageTestCase):
    """guest-image-elements/check finds what is wrong with an image."""

    scenarios = base.scenarios()

    def _check(self, image: pathlib.Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([base.ELEMENTS / 'check', image], text=True,
                              capture_output=True)

    def test_the_command_that_uploads_it(self) -> None:
        done = subprocess.run(
            [base.ELEMENTS / 'build', *self.options], check=True, text=True,
            env=base.environment(), capture_output=True)
        self.assertEqual(servers.DISTRIBUTION_PROPERTIES, dict(
            re.findall(r'--property (\w+)=(\S+)', done.stderr)))

    def test_the_image(self) -> None:
        done = self._check(self.image)
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)

    def test_what_must_not_be(self) -> None:
        image = self.disk(2049)
        with self._writable(image) as mount:
            (mount / 'etc/machine-id').write_text('0' * 32)
            (mount / 'etc/ssh/ssh_host_rsa_key').write_text('secret')
            (mount / 'var/log/left').write_text('who')
            os.unlink(mount / 'etc/resolv.conf')
            (mount / 'etc/resolv.conf').write_text('nameserver 192.0.2.1')
            (mount / 'etc/apt/sources.list.d/mine.list').write_text(
                'deb http://mirror.example/debian bookworm main')
            os.unlink(mount / 'etc/systemd/system/local-fs.target.wants/'
                      'fakedax-grow.service')
            (mount / 'var/lib/dkms/mok.key').write_text('secret')
        done = self._check(image)
        self.assertEqual(1, done.returncode)
        for expected in ('multiple of 2 MiB', 'machine id', 'ssh_host_rsa_key',
                         'var/log/left', 'resolv.conf', 'mirror.example',
                         'fakedax-grow', 'var/lib/dkms/mok.key'):
            self.assertRegex(done.stdout, f'(?m)^check: failed: .*{expected}')
        self.assertEqual(8, done.stdout.count('failed:'), done.stdout)

    def test_another_driver_than_the_projects(self) -> None:
        """The kernel's own, and a build that the initramfs does not have."""
        image = self.disk(2048)
        with self._writable(image) as mount:
            module, = mount.glob('lib/modules/*/updates/dkms/nd_virtio.ko*')
            release = module.parts[-4]
            own, = mount.glob(f'lib/modules/{release}/kernel/drivers/nvdimm/'
                              'nd_virtio.ko*')
            built = module.read_bytes()
            module.write_bytes(own.read_bytes())
        version = 'the version of kernel .* virtio_pmem is'
        initramfs = 'initrd.img-.* holds the driver'
        self.assertFails(image, version, initramfs)
        with self._writable(image):
            module.unlink()
            subprocess.run(['depmod', '--basedir', mount, release], check=True)
        self.assertFails(image, version, initramfs,
                         "kernel .* loads DKMS's driver: run ")
        with self._writable(image):
            module.write_bytes(built)
            subprocess.run(['depmod', '--basedir', mount, release], check=True)
        done = self._check(image)
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)

    def assertFails(self, image: pathlib.Path, *expected: str) -> None:
        """Assert that these checks fail, and no others."""
        done = self._check(image)
        self.assertEqual(1, done.returncode)
        for pattern in expected:
            self.assertRegex(done.stdout, f'(?m)^check: failed: .*{pattern}')
        self.assertEqual(len(expected), done.stdout.count('failed:'),
                         done.stdout)

    @contextlib.contextmanager
    def _writable(self, image: pathlib.Path) -> Iterator[pathlib.Path]:
        """Mount the root's file system."""
        offset = base.root_partition(image)['start'] * 512
        mount = self.directory / 'mount'
        mount.mkdir(exist_ok=True)
        subprocess.run(['mount', '-o', f'loop,offset={offset}', image, mount],
                       check=True)
        try:
            yield mount
        finally:
            subprocess.run(['umount', mount], check=True)
