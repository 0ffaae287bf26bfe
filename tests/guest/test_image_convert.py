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


"""What guest-image-elements/convert refuses, on almost empty images.

tests/image converts an image that boots.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

from oslotest import base

from lab import paths

CONVERT = paths.ROOT / 'guest-image-elements/convert'
CHECK = paths.ROOT / 'guest-image-elements/check'

MIB = 1024 * 1024
SECTOR = 512
PATH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'

DEBIAN = 'ID=debian\nVERSION_ID="12"\n'
#: Two of Debian's kernels: one whose driver is right, and one whose is wrong.
SAFE, UNSAFE = 'Debian 6.12.117-1', 'Debian 6.1.192-2'

KERNEL = 'CONFIG_FS_DAX=y\nCONFIG_VIRTIO_PMEM=m\nCONFIG_BLK_DEV_PMEM=m\n'


class RefusalTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='convert-test-'))
        self.addCleanup(shutil.rmtree, self.directory)
        self.image = self.directory / 'cloud.raw'

    def run_tool(self, *command: str | pathlib.Path,
                 input: str | None = None) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True,
                       input=input, env=os.environ | {'PATH': PATH})

    def make(self, *, label: str = 'gpt', start: int = 4096,
             mkfs: tuple[str, ...] = ('mkfs.ext4', '-b', '4096'),
             release: str = DEBIAN, kernel: str | None = KERNEL,
             version: str = SAFE, mib: int = 32,
             files: dict[str, str] | None = None, var_mib: int = 0) -> None:
        """An image whose only partition is a root.

        :param files: more files, by their paths below root
        :param var_mib: make another partition of this size, labelled "var"
        :param kernel: the configuration of its kernel
        :param version: the distribution's version of that kernel
        """
        root = self.directory / 'root'
        for name in ('proc', 'sys', 'dev', 'run', 'tmp'):
            (root / name).mkdir(parents=True)
        for name, text in (('etc/os-release', release),
                           ('boot/config-6.1.0-1-test', kernel),
                           *(files or {}).items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                path.write_text(text)
        # kernel_version of the setup header (Documentation/arch/x86/boot.rst).
        (root / 'boot/vmlinuz-6.1.0-1-test').write_bytes(
            bytes(0x20e) + (0x300 - 0x200).to_bytes(2, 'little') +
            bytes(0x300 - 0x210) +
            f'6.1.0-1-test (x@y) #1 SMP {version} (2026-11-20)\0'.encode())
        with self.image.open('wb') as f:
            f.truncate((mib + var_mib + 4) * MIB)
        self.run_tool('sfdisk', self.image, input=(
            f'label: {label}\nstart={start}, size={mib * MIB // SECTOR}\n' + (
                f'size={var_mib * MIB // SECTOR}\n' if var_mib else '')))
        offset = start * SECTOR
        if var_mib:
            self.run_tool('mkfs.ext4', '-q', '-F', '-L', 'var', '-E',
                          f'offset={offset + mib * MIB}', self.image,
                          f'{var_mib}M')
        if mkfs[0] == 'mkfs.ext4':
            self.run_tool(*mkfs, '-q', '-F', '-d', root, '-E',
                          f'offset={offset}', self.image, f'{mib}M')
        elif mkfs:
            part = self.directory / 'part'
            with part.open('wb') as f:
                f.truncate(mib * MIB)
            self.run_tool(*mkfs, part)
            self.run_tool('dd', f'if={part}', f'of={self.image}', 'bs=1M',
                          'conv=notrunc,sparse', 'oflag=seek_bytes',
                          f'seek={offset}')

    def convert(self, *arguments: str | pathlib.Path
                ) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CONVERT, *arguments], text=True,
                              capture_output=True)

    def assertRefused(self, *expected: str,
                      driver: str = 'kernel') -> None:
        """Assert that one sentence says all this, and nothing changes."""
        before = hashlib.sha256(self.image.read_bytes()).hexdigest()
        # The image must not change even with --in-place.
        for option in ([], ['--in-place']):
            done = self.convert(self.image, '--driver', driver, *option)
            self.assertEqual(1, done.returncode, done.stderr)
            self.assertEqual('', done.stdout)
            *_, last = done.stderr.splitlines()
            for text in ('convert: ', str(self.image), *expected):
                self.assertIn(text, last)
            self.assertEqual(
                before, hashlib.sha256(self.image.read_bytes()).hexdigest())
            self.assertEqual([], [
                path.name for path in self.directory.iterdir()
                if path.name not in ('cloud.raw', 'root', 'part')])

    def test_image_without_a_fault_passes_all_checks(self) -> None:
        """convert then fails only because the image has no programs to run."""
        self.make()
        done = self.convert(self.image, '--driver', 'kernel')
        self.assertEqual(1, done.returncode)
        self.assertNotIn('allowed:', done.stderr)
        self.assertIn("chroot: failed to run command", done.stderr)

    def test_root_is_not_the_largest_partition(self) -> None:
        self.make(var_mib=64)
        done = self.convert(self.image, '--driver', 'kernel')
        self.assertIn("chroot: failed to run command", done.stderr)

    def test_a_partition_of_its_own_for_var(self) -> None:
        for line in ('LABEL=var /var ext4 defaults 0 2',
                     '/dev/vda2 /var ext4 defaults 0 2'):
            # What is not in the image does not matter.
            self.make(var_mib=64, files={'etc/fstab': (
                'LABEL=img / ext4 defaults 0 1\n# /dev/vda1 /old ext4\n'
                f'LABEL=volume /srv ext4 nofail 0 2\n{line}\n')})
            self.assertRefused('partitions of their own for /var;',
                               'allowed: ')
            shutil.rmtree(self.directory / 'root')
            self.image.unlink()

    def test_a_machine_that_may_not_mount(self) -> None:
        self.make()
        for tool in (CONVERT, CHECK):
            done = subprocess.run(
                ['setpriv', '--bounding-set', '-sys_admin', tool, self.image],
                text=True, capture_output=True)
            self.assertNotEqual(0, done.returncode)
            self.assertEqual(
                f'{tool.name}: may not mount anything here, even as root; '
                'allowed: a machine, or a privileged container\n',
                done.stderr)

    def test_a_machine_without_loop_devices(self) -> None:
        self.make()
        hide = ('for name in /dev/loop*; do mount --bind /dev/null $name; '
                'done; exec "$@"')
        for tool in (CONVERT, CHECK):
            done = subprocess.run(
                ['unshare', '--mount', 'sh', '-ec', hide, '-', tool,
                 self.image], text=True, capture_output=True)
            self.assertNotEqual(0, done.returncode)
            self.assertIn(f'{tool.name}: there is no loop device', done.stderr)

    def test_root_off_alignment(self) -> None:
        self.make(start=4097)
        self.assertRefused('sector 4097', 'allowed: a multiple of 8')

    def test_ext4_with_small_blocks(self) -> None:
        self.make(mkfs=('mkfs.ext4', '-b', '1024'))
        self.assertRefused('blocks of 1024 bytes', 'allowed: 4096')

    def test_ext4_with_data_in_inodes(self) -> None:
        self.make(mkfs=('mkfs.ext4', '-b', '4096', '-O', 'inline_data'))
        self.assertRefused('inline_data', 'allowed: ')

    def test_ext4_with_data_in_the_journal(self) -> None:
        self.make()
        self.run_tool('tune2fs', '-o', 'journal_data',
                      f'{self.image}?offset={4096 * SECTOR}')
        self.assertRefused('data=journal', 'default', 'tune2fs -o')

    def test_options_of_root_that_exclude_dax(self) -> None:
        for name, text, expected in (
                ('etc/default/grub.d/50.cfg', 'GRUB_CMDLINE_LINUX="ro '
                 'rootflags=noatime,data=journal"\n',
                 'rootflags=noatime,data=journal'),
                ('etc/fstab', 'LABEL=img / ext4 rw,data=journal 0 1\n',
                 'rw,data=journal'),
                ('etc/fstab', 'LABEL=img / ext4 dax=inode 0 1\n',
                 'dax=inode')):
            self.make(files={name: text})
            self.assertRefused(expected, 'allowed: ')
            shutil.rmtree(self.directory / 'root')
            self.image.unlink()

    def test_xfs_with_reflink(self) -> None:
        self.make(mkfs=('mkfs.xfs', '-m', 'reflink=1'), mib=320)
        self.assertRefused('reflink=1', 'allowed: reflink=0')

    def test_another_file_system(self) -> None:
        self.make(mkfs=('mkfs.vfat',))
        self.assertRefused('is vfat', 'allowed: ext4')

    def test_another_partition_table(self) -> None:
        self.make(label='dos')
        self.assertRefused('of type dos', 'allowed: GPT')

    def test_no_partition_table(self) -> None:
        with self.image.open('wb') as f:
            f.truncate(8 * MIB)
        self.assertRefused('no partition table', 'allowed: GPT')

    def test_kernel_without_what_dax_needs(self) -> None:
        self.make(kernel='CONFIG_VIRTIO_PMEM=m\n# CONFIG_FS_DAX is not set\n')
        self.assertRefused(
            'kernel 6.1.0-1-test lacks CONFIG_FS_DAX, CONFIG_BLK_DEV_PMEM;',
            'allowed: ')

    def test_no_kernel(self) -> None:
        self.make(kernel=None)
        self.assertRefused('no kernel', 'allowed: ')

    def test_kernels_whose_own_driver_is_not_known_to_be_right(self) -> None:
        for version, said in ((UNSAFE, f' ({UNSAFE})'),
                              ('Debian 6.12.95-1~bpo12+1', ' (Debian 6.12.95'),
                              ('#48-Ubuntu', ':')):
            self.make(version=version)
            self.assertRefused(
                f'kernel 6.1.0-1-test{said}', 'its own driver',
                'allowed: --driver fakedax')
            shutil.rmtree(self.directory / 'root')
            self.image.unlink()

    def test_too_little_room_for_the_driver(self) -> None:
        self.make(version=UNSAFE)
        self.assertRefused('MiB free', 'takes up to ', 'allowed: enlarge',
                           driver='fakedax')

    def test_another_distribution(self) -> None:
        self.make(release='ID=debian\nVERSION_ID="11"\n')
        self.assertRefused("'debian 11'", 'allowed: debian 12, debian 13')

    def test_no_distribution(self) -> None:
        self.make(release='NAME=x\n')
        self.assertRefused("''", 'allowed: debian 12, debian 13')

    def test_backing_file(self) -> None:
        """It could be any file of the machine that converts the image."""
        secret = self.directory / 'part'
        secret.write_bytes(b'secret' * 1000)
        self.run_tool('qemu-img', 'create', '-f', 'qcow2', '-F', 'raw', '-b',
                      str(secret), str(self.image))
        self.assertRefused('backing file', 'allowed: ')

    def test_another_format(self) -> None:
        self.run_tool('qemu-img', 'create', '-f', 'vmdk', self.image, '8M')
        self.assertRefused('is vmdk', 'allowed: raw, qcow2')

    def test_arguments(self) -> None:
        self.make()
        other = self.directory / 'other'
        for arguments, expected in (
                ([self.image, '--output', self.image], 'exists'),
                ([self.image, '--output', self.directory / 'no/x'],
                 'no directory'),
                ([self.image, '--in-place', '--output', other],
                 'allowed: one of them'),
                ([self.image, other], 'allowed: one'),
                ([other], 'no such file'),
                (['--outptu'], "unknown argument '--outptu'"),
                ([self.image, '--driver', 'x'],
                 '--driver x: must be one of fakedax kernel'),
                ([self.image, '--driver'], 'needs a value'),
                ([self.image, '--output'], 'needs a value')):
            done = self.convert(*arguments)
            self.assertEqual(1, done.returncode, arguments)
            self.assertIn(expected, done.stderr)
