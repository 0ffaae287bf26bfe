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


"""The scripts of guest-image-elements, on trees that stand in for a guest.

No machine is started: /sys and /proc are ordinary files, and mount, blkid and
the like are stubs that log how they were called.
"""

import itertools
import os
import pathlib
import shutil
import subprocess
import tempfile

from oslotest import base

from lab import paths

STATIC = paths.ROOT / 'guest-image-elements/fakedax/static'
LIBRARY = STATIC / 'usr/local/lib/fakedax'

MIB = 1024 * 1024
SECTOR = 512

#: What fakedax-guest says to do about a driver that is not known to be right.
REMEDY = ('install the driver of this project (DKMS package fakedax-driver), '
          "or a kernel of Debian's whose own is safe: 6.12.112 or later in "
          '6.12, 7.3.4 or later')

#: STATX_ATTR_DAX, include/uapi/linux/stat.h.
DAX = 0x200000

#: /proc/version of one of Debian's kernels, without its package's version.
BANNER = (
    'Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org) '
    '(gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0, GNU ld (GNU Binutils for '
    'Debian) 2.40) #1 SMP PREEMPT_DYNAMIC Debian {} (2026-11-20)\n')


class Guest:
    """A tree with /sys, /proc and /dev of a guest, and stubs of programs."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.root = directory / 'root'
        self.bin = directory / 'bin'
        self.log = directory / 'log'
        self.bin.mkdir()
        self.log.touch()
        self._devices = itertools.count()
        self.write('proc/kallsyms', '0000000000000000 T dax_iomap_rw\n')
        self.write('proc/cmdline', 'root=LABEL=img console=ttyS0\n')
        self.write('proc/meminfo', 'MemTotal:        1000000 kB\n')
        self.kernel('6.12.117-1~deb12u1')
        self.write('etc/fstab', 'LABEL=img / ext4 defaults 0 1\n')
        self.write('etc/os-release', 'ID=test\n')
        self.mounts('rootfs / rootfs rw 0 0', '/dev/pmem0p3 / ext4 rw 0 0')
        self.tags: dict[str, dict[str, str]] = {}
        self.statx(DAX)
        self.stub('stat', 'echo 4096')
        self.stub('tune2fs', 'echo "Filesystem features:      has_journal"')
        self.stub('mount')
        self.stub('umount')
        self.stub('sleep')
        self.stub('modprobe')

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mounts(self, *lines: str) -> None:
        self.write('proc/mounts', '\n'.join(lines) + '\n')

    def stub(self, name: str, script: str = '',
             directory: str | None = None) -> None:
        """Make a program in PATH, or in a directory of the tree."""
        path = (self.root / directory if directory else self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n'
                        f'{script}\n')
        path.chmod(0o755)

    def kernel(self, version: str) -> None:
        """Give the guest one of Debian's kernels, by its /proc/version."""
        self.write('proc/version', BANNER.format(version))

    def driver(self, version: str | None) -> None:
        """Set the version of the driver; the kernel's own has none."""
        if version is not None:
            self.write('sys/module/nd_virtio/version', f'{version}\n')

    def flushes(self, *, failed: int = 0, number: int = 0,
                disk: str | None = 'pmem0') -> None:
        """Set what our driver counts for a device."""
        base = f'sys/bus/virtio/devices/virtio{number}'
        for name, value in (('flushes', 12), ('requests', 7),
                            ('failed', failed)):
            self.write(f'{base}/flush/{name}', f'{value}\n')
        if disk:
            self.write(f'{base}/ndbus0/region0/namespace0.0/block/{disk}/dev',
                       '259:0\n')

    def bounce_buffers(self, slabs: int, used: int,
                       most_used: int | None = None) -> None:
        """What debugfs has; how many were used at most, since Linux 6.4."""
        base = 'sys/kernel/debug/swiotlb/io_tlb'
        self.write(f'{base}_nslabs', f'{slabs}\n')
        self.write(f'{base}_used', f'{used}\n')
        if most_used is not None:
            self.write(f'{base}_used_hiwater', f'{most_used}\n')

    def boot_order(self, *paths: str) -> None:
        """What QEMU tells firmware."""
        self.write('sys/firmware/qemu_fw_cfg/by_name/bootorder/raw',
                   '\n'.join(paths) + '\0')

    def statx(self, attributes: int) -> None:
        self.stub('xfs_io', f'echo "stat.attributes = {attributes:#x}"')

    def virtio_pmem(self, size: int | None = None) -> None:
        """Add a device; with a size, libnvdimm has seen it."""
        number = next(self._devices)
        self.write(f'sys/bus/virtio/devices/virtio{number}/device',
                   '0x001b\n')
        if size is not None:
            self.write('sys/bus/virtio/drivers/virtio_pmem/bind', '')
            self.write(f'sys/bus/nd/devices/region{number}/size', f'{size}\n')

    def disk(self, name: str, mib: int, *partitions: tuple[int, int],
             serial: str = '', dax: str = '1', below: str = '') -> None:
        """Add a disk; partitions have a start and a size in sectors.

        :param below: where on the first PCI bus it is, as in sysfs
        """
        base = f'sys/block/{name}'
        if below:
            device = f'sys/devices/pci0000:00/{below}/block/{name}'
            (self.root / device).mkdir(parents=True)
            (self.root / base).parent.mkdir(parents=True, exist_ok=True)
            (self.root / base).symlink_to(f'../../{device}')
        self.write(f'{base}/size', f'{mib * MIB // SECTOR}\n')
        self.write(f'{base}/queue/dax', f'{dax}\n')
        self.write(f'{base}/queue/write_cache', 'write back\n')
        if serial:
            self.write(f'{base}/serial', serial)
        joint = 'p' if name[-1].isdigit() else ''
        for number, (start, size) in enumerate(partitions, 1):
            part = f'{base}/{name}{joint}{number}'
            self.write(f'{part}/partition', f'{number}\n')
            self.write(f'{part}/start', f'{start}\n')
            self.write(f'{part}/size', f'{size}\n')

    def tag(self, device: str, **tags: str) -> None:
        """Set what blkid reads from a device."""
        self.tags[f'/dev/{device}'] = tags
        cases = ''.join(
            f'"{name} {tag}") echo {value} ;;\n'
            for name, known in self.tags.items()
            for tag, value in known.items())
        self.stub('blkid', f'case "$6 $3" in\n{cases}*) exit 2 ;;\nesac')

    def run(self, *command: str | pathlib.Path,
            shell: str = 'dash') -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shell, *command], text=True, capture_output=True,
            env=os.environ | {
                'PATH': f'{self.bin}:{os.environ["PATH"]}:/usr/sbin:/sbin',
                'FAKEDAX_ROOT': str(self.root),
                'FAKEDAX_LIB': str(LIBRARY)})

    def calls(self, program: str) -> list[str]:
        """The command lines with which a stub was called."""
        return [line for line in self.log.read_text().splitlines()
                if line.split()[0] == program]


class ScriptTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = pathlib.Path(tempfile.mkdtemp(prefix='script-test-'))
        self.addCleanup(shutil.rmtree, directory)
        self.guest = Guest(directory)

    def root_on_pmem(self, mib: int = 2048, below: str = '') -> None:
        """Add a root on fake DAX and its boot view, as Nova shows them."""
        partitions = [(2048, 2048), (4096, 131072),
                      (135168, mib * 2048 - 135168 - 2048)]
        self.guest.virtio_pmem(mib * MIB)
        self.guest.disk('pmem0', mib, *partitions)
        self.guest.disk('vda', mib, *partitions, serial='fakedax-boot',
                        below=below)
        for device in ('pmem0p3', 'vda3'):
            self.guest.tag(device, LABEL='img', UUID='1-2-3', TYPE='ext4',
                           PART_ENTRY_UUID='4-5-6', PART_ENTRY_NAME='root')


#: Where QEMU puts a disk, by libvirt's name for the bus: in Open Firmware, and
#: in sysfs. For virtio also by the type of the machine.
PLACES = {
    'virtio, pc': ('/pci@i0cf8/scsi@4/disk@0,0', '0000:00:04.0/virtio1'),
    'virtio, q35': ('/pci@i0cf8/pci-bridge@2,3/scsi@0/disk@0,0',
                    '0000:00:02.3/0000:03:00.0/virtio1'),
    'scsi': ('/pci@i0cf8/scsi@1f/channel@0/disk@b,1',
             '0000:00:1f.0/virtio2/host2/target2:0:11/2:0:11:1'),
    'sata': ('/pci@i0cf8/pci8086,2922@1f,2/drive@2/disk@0',
             '0000:00:1f.2/ata6/host5/target5:0:0/5:0:0:0'),
    'ide': ('/pci@i0cf8/ide@1,1/drive@1/disk@1',
            '0000:00:01.1/ata5/host4/target4:0:1/4:0:1:0'),
    'usb': ('/pci@i0cf8/usb@1d,7/storage@1/channel@0/disk@0,0',
            '0000:00:1d.7/usb1/1-1/1-1:1.0/host7/target7:0:0/7:0:0:0'),
}


class BootDiskTestCase(ScriptTestCase):
    """boot_disk(), in the shells that an initramfs and a guest have."""

    def boot_disk(self) -> str:
        seen = {self.guest.run(
            *shell[1:], '-c', f'modprobe() {{ :; }}; . {LIBRARY}/common.sh; '
            'boot_disk', shell=shell[0]).stdout.strip()
            for shell in (['dash'], ['busybox', 'sh'], ['bash', '--posix'])}
        self.assertEqual(1, len(seen), seen)
        found = seen.pop()
        for name in ('vda', 'vdb', 'sda', 'sdb'):
            done = self.guest.run(LIBRARY / 'is-boot-disk', name)
            self.assertEqual(name == (found or 'vda'), not done.returncode)
        return found

    def test_each_bus(self) -> None:
        self.guest.disk('vda', 64, below='0000:00:02.0/virtio0')
        self.guest.disk('sda', 64, below='0000:00:1f.0/virtio2/host2/'
                                         'target2:0:1/2:0:1:0')
        # The first ports of the controllers.
        for place in ('0000:00:1f.2/ata4', '0000:00:01.1/ata4',
                      '0000:00:1f.2/ata10'):
            (self.guest.root / 'sys/devices/pci0000:00' / place).mkdir(
                parents=True)
        for bus, (path, place) in PLACES.items():
            name = 'vdb' if 'virtio' in bus else 'sdb'
            self.guest.disk(name, 64, below=place)
            self.guest.boot_order(path, '/pci@i0cf8/scsi@2/disk@0,0')
            self.assertEqual(name, self.boot_disk(), bus)
            (self.guest.root / f'sys/block/{name}').unlink()
        self.guest.boot_order('/pci@i0cf8/scsi@2/disk@0,0')
        self.assertEqual('vda', self.boot_disk())

    def test_what_is_not_known(self) -> None:
        self.guest.disk('vda', 64, below='0000:00:02.0/virtio0')
        self.assertEqual('', self.boot_disk())
        for first in ('/rom@genroms/linuxboot_dma.bin', '',
                      '/pci@i0cf8/ethernet@3/ethernet-phy@0',
                      '/pci@i0cf8/scsi@5/disk@0,0',
                      '/pci@i0cf8/scsi@2/new@0/disk@0,0'):
            self.guest.boot_order(first, '/pci@i0cf8/scsi@2/disk@0,0')
            self.assertEqual('', self.boot_disk(), first)
        # Two disks by USB.
        path, place = PLACES['usb']
        self.guest.boot_order(path)
        self.guest.disk('sda', 64, below=place)
        self.guest.disk('sdb', 64, below=place)
        self.assertEqual('', self.boot_disk())


class ChooseRootTestCase(ScriptTestCase):
    """choose_root(), in the shells that an initramfs has."""

    def choose(self, root: str = 'LABEL=img') -> dict[str, str]:
        seen = []
        # busybox prefers its own programs to those in PATH.
        stubs = ''.join(
            f'{name}() {{ {self.guest.bin}/{name} "$@"; }}; '
            for name in ('mount', 'umount', 'sleep', 'modprobe'))
        for shell in (['dash'], ['busybox', 'sh'], ['bash', '--posix']):
            done = self.guest.run(
                *shell[1:], '-c',
                f'{stubs}. {LIBRARY}/common.sh; . {LIBRARY}/choose-root.sh; '
                f'choose_root "{root}"; record_choice', shell=shell[0])
            self.assertEqual(0, done.returncode, done.stderr)
            record = (self.guest.root / 'run/fakedax/root').read_text()
            seen.append(dict(line.split('=', 1)
                             for line in record.splitlines()))
            seen[-1]['said'] = done.stderr
        self.assertEqual(seen[0], seen[1])
        self.assertEqual(seen[0], seen[2])
        return seen[0]

    def test_ordinary_flavor(self) -> None:
        self.guest.disk('vda', 2048, (2048, 4096))
        self.assertEqual({'device': '', 'option': '', 'obstacle': '',
                          'said': ''}, self.choose())
        self.assertEqual([], self.guest.calls('mount'))

    def test_pmem_is_taken_however_root_is_named(self) -> None:
        self.root_on_pmem()
        for root in ('LABEL=img', 'UUID=1-2-3', 'PARTUUID=4-5-6',
                     'PARTLABEL=root', '/dev/disk/by-label/img',
                     '/dev/disk/by-uuid/1-2-3', '/dev/disk/by-partuuid/4-5-6',
                     '/dev/vda3', '/dev/pmem0p3'):
            self.assertEqual(
                {'device': '/dev/pmem0p3', 'option': 'dax=always',
                 'obstacle': '', 'said': ''}, self.choose(root), root)

    def _rescue(self, bus: str, name: str) -> None:
        """A stable-device rescue: the rescue's disk comes last."""
        partitions = [(2048, 2048), (4096, 131072), (135168, 131072)]
        path, place = PLACES[bus]
        self.guest.disk('vda', 256, *partitions, below='0000:00:02.0/virtio0')
        self.guest.disk(name, 256, *partitions, below=place)
        self.guest.tag('vda3', LABEL='img', UUID='1-2-3', TYPE='ext4',
                       PART_ENTRY_UUID='4-5-6', PART_ENTRY_NAME='root')
        self.guest.tag(f'{name}3', **self.guest.tags['/dev/vda3'])
        self.guest.boot_order(path)

    def test_a_rescue_by_the_same_image(self) -> None:
        for bus, name in (('virtio, q35', 'vdb'), ('scsi', 'sda')):
            self._rescue(bus, name)
            for root in ('LABEL=img', 'UUID=1-2-3', 'PARTUUID=4-5-6',
                         '/dev/disk/by-label/img'):
                self.assertEqual(
                    {'device': f'/dev/{name}3', 'option': '', 'obstacle': '',
                     'said': ''}, self.choose(root))
            shutil.rmtree(self.guest.root / 'sys/block')
            shutil.rmtree(self.guest.root / 'sys/devices')

    def test_a_rescue_by_the_same_image_next_to_a_root_on_pmem(self) -> None:
        self._rescue('virtio, q35', 'vdb')
        self.guest.virtio_pmem(256 * MIB)
        self.guest.disk('pmem0', 256, (135168, 131072))
        self.guest.tag('pmem0p1', **self.guest.tags['/dev/vda3'])
        self.assertEqual('/dev/vdb3', self.choose()['device'])

    def test_a_rescue_by_another_image(self) -> None:
        self._rescue('virtio, q35', 'vdb')
        self.guest.tag('vda3', LABEL='other', UUID='7-8-9', TYPE='ext4')
        self.assertEqual('/dev/vdb3', self.choose()['device'])
        self.assertEqual('', self.choose('UUID=7-8-9')['device'])

    def test_firmware_boots_from_the_boot_view(self) -> None:
        self.root_on_pmem(below='0000:00:02.0/virtio0')
        self.guest.boot_order('/pci@i0cf8/scsi@2/disk@0,0')
        self.assertEqual('/dev/pmem0p3', self.choose()['device'])

    def test_arguments(self) -> None:
        self.root_on_pmem()
        for argument, option in (
                ('off', 'dax=never'), ('inode', 'dax=inode'),
                ('always', 'dax=always'), ('maybe', 'dax=always')):
            self.guest.write('proc/cmdline', f'quiet daxroot={argument} ro\n')
            chosen = self.choose()
            self.assertEqual('/dev/pmem0p3', chosen['device'])
            self.assertEqual(option, chosen['option'])
        self.assertIn("daxroot=maybe on the kernel's command line is not one "
                      'of off, inode, always', chosen['said'])

    def test_root_elsewhere_than_on_pmem(self) -> None:
        self.guest.virtio_pmem(512 * MIB)
        self.guest.disk('pmem0', 512)
        self.guest.tag('pmem0', LABEL='ephemeral0', TYPE='ext4')
        self.guest.disk('vda', 2048, (2048, 4096))
        for root in ('LABEL=img', '/dev/vda1'):
            self.assertEqual('', self.choose(root)['device'])

    def test_two_pmem_devices_with_the_same_label(self) -> None:
        self.root_on_pmem()
        self.guest.virtio_pmem(512 * MIB)
        self.guest.disk('pmem1', 512)
        self.guest.tag('pmem1', LABEL='img', TYPE='ext4')
        chosen = self.choose()
        self.assertEqual('/dev/pmem0p3', chosen['device'])
        self.assertIn('more than one pmem device', chosen['said'])

    def test_two_pmem_devices_of_which_the_second_is_root(self) -> None:
        self.guest.virtio_pmem(512 * MIB)
        self.guest.virtio_pmem(512 * MIB)
        self.guest.disk('pmem0', 512)
        self.guest.disk('pmem1', 512)
        self.guest.tag('pmem0', LABEL='ephemeral0', TYPE='ext4')
        self.guest.tag('pmem1', LABEL='img', TYPE='ext4')
        self.assertEqual('/dev/pmem1', self.choose()['device'])

    def test_obstacles_leave_the_option_out(self) -> None:
        self.root_on_pmem()
        part = 'sys/block/pmem0/pmem0p3'
        for obstacle, name, text in (
                ('kernel', 'proc/kallsyms', '0 T dax_alive\n'),
                ('disk', 'sys/block/pmem0/queue/dax', '0\n'),
                ('partition', f'{part}/start', '135169\n'),
                ('partition', f'{part}/size', '100001\n')):
            path = self.guest.root / name
            before = path.read_text()
            path.write_text(text)
            chosen = self.choose()
            path.write_text(before)
            self.assertEqual('/dev/pmem0p3', chosen['device'])
            self.assertEqual('', chosen['option'], obstacle)
            self.assertEqual(obstacle, chosen['obstacle'])
            self.assertIn(f'without DAX ({obstacle})', chosen['said'])
        self.assertEqual([], self.guest.calls('mount'))

    def test_a_mount_that_fails_leaves_the_option_out(self) -> None:
        self.root_on_pmem()
        self.guest.stub('mount', 'exit 32')
        chosen = self.choose()
        self.assertEqual('/dev/pmem0p3', chosen['device'])
        self.assertEqual('', chosen['option'])
        self.assertEqual('filesystem', chosen['obstacle'])

    def test_the_trial_writes_nothing(self) -> None:
        self.root_on_pmem()
        self.choose()
        for call in self.guest.calls('mount'):
            self.assertIn('-t ext4 -o ro,noload,dax=always /dev/pmem0p3', call)
        self.guest.tag('pmem0p3', LABEL='img', TYPE='xfs')
        self.choose()
        self.assertIn('-t xfs -o ro,norecovery,dax=always /dev/pmem0p3',
                      self.guest.calls('mount')[-1])

    def test_a_device_that_becomes_no_disk_is_waited_for(self) -> None:
        self.guest.virtio_pmem(512 * MIB + SECTOR)
        self.guest.disk('vda', 2048, (2048, 4096))
        chosen = self.choose()
        self.assertEqual('', chosen['device'])
        self.assertIn('1 virtio-pmem device(s) have become only 0 disk(s)',
                      chosen['said'])
        self.assertEqual(3 * 50, len(self.guest.calls('sleep')))


class GrowRootTestCase(ScriptTestCase):

    def grow(self) -> subprocess.CompletedProcess[str]:
        for name in ('sfdisk', 'partx', 'resize2fs', 'xfs_growfs'):
            if not (self.guest.bin / name).exists():
                self.guest.stub(name, 'cat >> "$0.input"'
                                if name == 'sfdisk' else '')
        return self.guest.run(LIBRARY / 'grow-root')

    def _grown_to(self, disk_sectors: int) -> int | None:
        """The end that root's partition gets on a disk of this size."""
        self.guest.write('sys/block/pmem0/size', f'{disk_sectors}\n')
        given = self.guest.bin / 'sfdisk.input'
        given.unlink(missing_ok=True)
        done = self.grow()
        self.assertEqual(0, done.returncode, done.stderr)
        text = given.read_text() if given.exists() else ''
        if not text:
            return None
        return 135168 + int(text.strip().removeprefix(','))

    def test_end_is_aligned_and_before_the_backup_table(self) -> None:
        self.guest.disk('pmem0', 2048, (2048, 2048), (4096, 131072),
                        (135168, 100000))
        for sectors in (4 * 1024 * 2048, 4 * 1024 * 2048 + 1,
                        4 * 1024 * 2048 + 32, 4 * 1024 * 2048 + 33,
                        4 * 1024 * 2048 + 2047):
            end = self._grown_to(sectors)
            assert end
            self.assertEqual(0, end % 2048)
            self.assertLessEqual(end, sectors - 33)
            self.assertGreater(end, sectors - 33 - 2048)

    def test_never_smaller(self) -> None:
        self.guest.disk('pmem0', 2048, (2048, 2048), (4096, 131072),
                        (135168, 2048 * 2048 - 135168 - 33))
        self.assertIsNone(self._grown_to(2048 * 2048))
        self.assertEqual([], self.guest.calls('sfdisk'))

    def test_the_file_system_grows_even_if_the_partition_has(self) -> None:
        self.root_on_pmem()
        self.assertEqual(0, self.grow().returncode)
        self.assertEqual([], self.guest.calls('sfdisk'))
        self.assertEqual(['resize2fs /dev/pmem0p3'],
                         self.guest.calls('resize2fs'))

    def test_xfs(self) -> None:
        self.root_on_pmem()
        self.guest.mounts('/dev/pmem0p3 / xfs rw 0 0')
        self.assertEqual(0, self.grow().returncode)
        self.assertEqual(['xfs_growfs /'], self.guest.calls('xfs_growfs'))

    def test_an_ordinary_disk(self) -> None:
        self.guest.disk('vda', 4096, (2048, 4096))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        self.assertEqual(0, self.grow().returncode)
        self.assertIn('partx --update --nr 1 /dev/vda',
                      self.guest.calls('partx'))

    def test_root_before_another_partition(self) -> None:
        self.guest.disk('vda', 4096, (2048, 4096), (6144, 2048))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        done = self.grow()
        self.assertEqual(0, done.returncode)
        self.assertIn('vda1 is not the last partition of vda', done.stdout)
        self.assertEqual([], self.guest.calls('sfdisk'))

    def test_a_whole_disk(self) -> None:
        self.guest.disk('pmem0', 4096)
        self.guest.mounts('/dev/pmem0 / ext4 rw 0 0')
        self.assertEqual(0, self.grow().returncode)
        self.assertEqual([], self.guest.calls('sfdisk'))
        self.assertEqual(['resize2fs /dev/pmem0'],
                         self.guest.calls('resize2fs'))

    def test_the_disk_for_grub(self) -> None:
        """It is another one on each flavor that the server is resized to."""
        link = self.guest.root / 'run/fakedax/root-disk'
        self.root_on_pmem()
        self.grow()
        self.assertEqual('/dev/pmem0', os.readlink(link))
        self.guest.mounts('/dev/vda3 / ext4 rw 0 0')
        self.grow()
        self.assertEqual('/dev/vda', os.readlink(link))

    def test_a_failure_is_reported(self) -> None:
        self.root_on_pmem()
        self.guest.stub('resize2fs', 'exit 1')
        done = self.grow()
        self.assertEqual(1, done.returncode)
        self.assertIn('does not grow; run resize2fs /dev/pmem0p3 to see why',
                      done.stdout)


class MountEphemeralTestCase(ScriptTestCase):

    def mount(self, label: str = 'ephemeral0', device: str = 'pmem1') -> None:
        link = self.guest.root / f'dev/disk/by-label/{label}'
        link.parent.mkdir(parents=True, exist_ok=True)
        # readlink -f leads out of the tree, to a name that need not exist.
        link.symlink_to(f'/dev/{device}')
        done = self.guest.run(LIBRARY / 'mount-ephemeral', label)
        self.assertEqual(0, done.returncode, done.stderr)

    def test_on_pmem(self) -> None:
        self.guest.disk('pmem1', 512)
        self.mount()
        self.assertEqual(['mount -o dax=always /dev/pmem1 /mnt/ephemeral0'],
                         self.guest.calls('mount'))

    def test_any_number(self) -> None:
        self.guest.disk('pmem1', 512)
        self.mount('ephemeral12')
        self.assertEqual(['mount -o dax=always /dev/pmem1 /mnt/ephemeral12'],
                         self.guest.calls('mount'))

    def test_where_dax_is_refused(self) -> None:
        self.guest.disk('pmem1', 512)
        self.guest.stub('mount', 'test "$1" != -o')
        self.mount()
        self.assertEqual('mount /dev/pmem1 /mnt/ephemeral0',
                         self.guest.calls('mount')[-1])

    def test_an_ordinary_disk(self) -> None:
        self.guest.disk('vdb', 512)
        self.mount(device='vdb')
        self.assertEqual(['mount /dev/vdb /mnt/ephemeral0'],
                         self.guest.calls('mount'))

    def test_off(self) -> None:
        self.guest.disk('pmem1', 512)
        self.guest.write('proc/cmdline', 'daxroot=off')
        self.mount()
        self.assertEqual(['mount /dev/pmem1 /mnt/ephemeral0'],
                         self.guest.calls('mount'))

    def test_what_fstab_mounts_is_left_alone(self) -> None:
        self.guest.disk('pmem1', 512)
        self.guest.write('etc/fstab', 'LABEL=ephemeral0 /data ext4 x 0 0\n')
        self.mount()
        self.assertEqual([], self.guest.calls('mount'))

    def test_labels(self) -> None:
        for label in ('ephemeral', 'ephemeral1x', 'eph0', '../x', 'x0'):
            done = self.guest.run(LIBRARY / 'mount-ephemeral', label)
            self.assertEqual(2, done.returncode, label)
            self.assertIn(label, done.stderr)
        self.assertEqual([], self.guest.calls('mount'))


class GrubInstallTestCase(ScriptTestCase):
    """What GRUB's own grub-install is called with."""

    MODULES = '--modules=part_gpt part_msdos'
    ON_PMEM = '--no-nvram --force-extra-removable'

    def setUp(self) -> None:
        super().setUp()
        self.guest.stub('grub-install.distrib', directory='usr/sbin')

    def assertInstalls(self, expected: str, *given: str) -> None:
        done = self.guest.run(LIBRARY / 'grub-install', *given)
        self.assertEqual(0, done.returncode, done.stderr)
        *_, call = self.guest.calls('grub-install.distrib')
        self.assertEqual(f'grub-install.distrib {expected}', call)

    def test_ordinary_flavor(self) -> None:
        self.guest.disk('vda', 2048, (2048, 4096), (6144, 4096))
        self.guest.mounts('/dev/vda2 / ext4 rw 0 0')
        self.assertInstalls(f'{self.MODULES} /dev/vda', '/dev/vda')
        # Whoever says so wants it in the partition.
        self.assertInstalls(f'{self.MODULES} /dev/vda2', '/dev/vda2')

    def test_each_way_to_the_disk_on_fake_dax(self) -> None:
        self.root_on_pmem()
        for given in ('/dev/pmem0', '/dev/pmem0p3', '/dev/vda', '/dev/vda3'):
            self.assertInstalls(
                f'{self.MODULES} {self.ON_PMEM} --target=i386-pc /dev/pmem0',
                '--target=i386-pc', given)

    def test_another_disk(self) -> None:
        self.root_on_pmem()
        self.guest.disk('vdb', 2048, (2048, 4096))
        self.assertInstalls(f'{self.MODULES} {self.ON_PMEM} /dev/vdb',
                            '/dev/vdb')

    def test_modules_that_are_asked_for(self) -> None:
        """GRUB takes the last option and forgets the others."""
        self.guest.disk('vda', 2048, (2048, 4096))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        for given in (['--modules=lvm ls'], ['--modules', 'lvm ls'],
                      ['--mod=lvm', '--modules', 'ls']):
            self.assertInstalls(
                f'{self.MODULES} lvm ls --force /dev/vda', *given, '--force',
                '/dev/vda')

    def test_efi(self) -> None:
        self.root_on_pmem()
        self.assertInstalls(f'{self.MODULES} {self.ON_PMEM}')
        # GRUB refuses the two together.
        self.assertInstalls(f'{self.MODULES} --no-nvram --removable',
                            '--removable')

    def test_no_disk(self) -> None:
        self.guest.mounts('/dev/vda3 / ext4 rw 0 0')
        self.assertInstalls(f'{self.MODULES} --version', '--version')


class OrderingTestCase(ScriptTestCase):
    """driver_orders(), in the shells that a guest and a builder have."""

    def orders(self, version: str, banner: str) -> str:
        seen = {self.guest.run(
            *shell[1:], '-c',
            f'. {LIBRARY}/ordering.sh; driver_orders "$1" "$2"', '-', version,
            banner, shell=shell[0]).stdout.strip()
            for shell in (['dash'], ['busybox', 'sh'], ['bash'])}
        self.assertEqual(1, len(seen), seen)
        return seen.pop()

    def test_driver_of_this_project(self) -> None:
        for banner in (BANNER.format('6.1.192-2'), '#48-Ubuntu SMP', ''):
            self.assertEqual('yes', self.orders('fakedax-1.0', banner))

    def test_drivers_of_debian(self) -> None:
        for version, expected in (
                ('5.10.1-1', 'no'), ('6.1.192-2', 'no'), ('6.1.999-1', 'no'),
                ('6.12.95-1~bpo12+1', 'no'), ('6.12.100-1', 'no'),
                ('6.12.111-1', 'no'), ('6.12.112-1', 'yes'),
                ('6.12.115-1', 'yes'), ('6.12.117-1', 'yes'),
                ('6.12.117-1~deb12u1', 'yes'), ('6.18.200-1', 'no'),
                ('7.0.200-1', 'no'), ('7.2.9-1', 'no'),
                ('7.3.3-1~exp1', 'no'), ('7.3.4-1~bpo13+1', 'yes'),
                ('7.4.0-1', 'yes'), ('7.10.1-1', 'yes'), ('8.0.1-1', 'yes'),
                ('10.1.1-1', 'yes')):
            self.assertEqual(
                expected, self.orders('', BANNER.format(version)), version)

    def test_other_drivers_are_unknown(self) -> None:
        for banner in (
                '#48-Ubuntu SMP PREEMPT_DYNAMIC Fri Sep 27 2026', '',
                'Linux version 6.12.117 (me@host) (gcc (Debian 12.2.0-14) '
                '12.2.0, GNU ld (GNU Binutils for Debian) 2.40) #1 SMP Thu'):
            self.assertEqual('unknown', self.orders('', banner), banner)
        # Somebody else's module, in a kernel whose own driver is right.
        self.assertEqual('unknown', self.orders(
            '2.0', BANNER.format('6.12.117-1')))


class ReportTestCase(ScriptTestCase):
    """fakedax-guest: one sentence per finding, and the exit status."""

    def report(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.guest.run(
            STATIC / 'usr/local/sbin/fakedax-guest', *arguments)

    def assertWrong(self, sentence: str) -> None:
        done = self.report()
        self.assertEqual(1, done.returncode, done.stdout + done.stderr)
        self.assertIn(f'wrong: {sentence}\n', done.stdout)

    def assertRight(self, sentence: str) -> None:
        done = self.report()
        self.assertIn(sentence + '\n', done.stdout)
        self.assertNotIn('wrong', done.stdout)
        self.assertEqual(0, done.returncode)
        self.assertEqual('', done.stderr)

    def test_all_well(self) -> None:
        self.root_on_pmem()
        self.assertRight('ok: / (/dev/pmem0p3, ext4) uses DAX')
        self.assertRight('ok: pmem0 is write-back: fsync flushes it on the '
                         'host')
        self.assertRight("ok: pmem0 (2048 MiB) takes 32 of the guest's 976 "
                         'MiB of RAM for page descriptors')

    def test_the_mount_option_alone_is_not_believed(self) -> None:
        self.root_on_pmem()
        self.guest.mounts('/dev/pmem0p3 / ext4 rw,dax=always 0 0')
        self.guest.statx(0)
        self._chose('/dev/pmem0p3', option='dax=always')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: its files do not, '
            'although the initramfs has mounted it with dax=always: look for '
            "ext4 in the kernel's log")

    def _chose(self, device: str, option: str = '',
               obstacle: str = '') -> None:
        """Write what the initramfs writes down."""
        self.guest.write('run/fakedax/root', f'device={device}\n'
                         f'option={option}\nobstacle={obstacle}\n')

    def test_an_initramfs_without_the_choice(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: the initramfs has not '
            'chosen it: rebuild the initramfs and reboot')

    def test_a_refusal_by_the_kernel(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self._chose('/dev/pmem0p3', obstacle='filesystem')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: the kernel did not '
            'mount it with dax=always: look for ext4 in its log')

    def test_inline_data(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self._chose('/dev/pmem0p3', obstacle='filesystem')
        self.guest.stub('tune2fs', 'echo "Filesystem features:      '
                        'has_journal extent inline_data sparse_super"')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: its ext4 may keep files '
            'in inodes (inline_data): make it again with mkfs.ext4 -b 4096 -O '
            '^inline_data')

    def test_data_in_the_journal(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self._chose('/dev/pmem0p3', obstacle='filesystem')
        self.guest.mounts('/dev/pmem0p3 / ext4 rw,relatime,data=journal 0 0')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: it is mounted with '
            'data=journal: take that out of /etc/fstab, of rootflags= on the '
            "kernel's command line and of its default options (tune2fs -o "
            '^journal_data /dev/pmem0p3)')

    def test_another_file_system_that_is_mounted_without_dax(self) -> None:
        self.root_on_pmem()
        self.guest.disk('pmem1', 512)
        self.guest.statx(0)
        self.guest.write('srv/file', '')
        for options, reason in (
                ('rw', 'it is mounted without DAX: mount it with dax=always; '
                       'if the kernel refuses that, its log says why'),
                ('rw,dax=inode', 'it is mounted with dax=inode and its files '
                                 'do not carry the flag: run chattr -R +x '
                                 '/srv')):
            self.guest.mounts('/dev/vda3 / ext4 rw 0 0',
                              f'/dev/pmem1 /srv ext4 {options} 0 0')
            self.assertWrong('/srv (/dev/pmem1, ext4) does not use DAX: '
                             f'{reason}')

    def test_without_a_way_to_tell(self) -> None:
        self.root_on_pmem()
        self.guest.stub('xfs_io', 'exit 127')
        self.assertWrong(
            'it is not known whether / (/dev/pmem0p3, ext4) uses DAX: install '
            'xfs_io (package xfsprogs)')

    def test_ordinary_flavor(self) -> None:
        self.guest.disk('vda', 2048, (2048, 4096))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        self.assertRight('note: root is on /dev/vda1, an ordinary disk')

    def test_ordinary_flavor_where_pmem_was_asked_for(self) -> None:
        self.guest.disk('vda', 2048, (2048, 4096))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        self.guest.write('proc/cmdline', 'ro daxroot=always\n')
        self.assertWrong(
            "root is on /dev/vda1, an ordinary disk, and daxroot= on the "
            "kernel's command line asks for pmem: boot on a flavor with "
            'fakedax:disks=root')

    def test_size_that_is_not_a_multiple_of_2_mib(self) -> None:
        self.root_on_pmem()
        shutil.rmtree(self.guest.root / 'sys/block/pmem0')
        size = 2049 * MIB
        self.guest.write('sys/bus/nd/devices/region0/size', f'{size}\n')
        self.guest.mounts('/dev/vda3 / ext4 ro 0 0')
        self.assertWrong(
            f'a virtio-pmem device of {size} bytes is not a disk because its '
            "size is not a multiple of 2 MiB: enlarge the disk's file on the "
            'host to the next multiple')
        self.assertWrong(
            'root is the read-only boot view (/dev/vda3): the pmem device '
            'that shows the same file cannot be used')

    def test_more_pmem_than_ram_can_describe(self) -> None:
        self.root_on_pmem()
        shutil.rmtree(self.guest.root / 'sys/block/pmem0')
        self.guest.write('sys/bus/nd/devices/region0/size',
                         f'{64 * 1024 * MIB}\n')
        self.assertWrong(
            'a virtio-pmem device of 65536 MiB is not a disk because its page '
            'descriptors take 1024 MiB and the guest has 976 MiB of RAM: take '
            'a flavor with more RAM or a smaller disk')

    def test_much_pmem(self) -> None:
        self.root_on_pmem(20 * 1024)
        self.assertRight(
            "note: pmem0 (20480 MiB) takes 320 of the guest's 976 MiB of RAM "
            'for page descriptors: take a flavor with more RAM or a smaller '
            'disk')

    def test_descriptors_on_the_device(self) -> None:
        self.root_on_pmem(20 * 1024)
        self.guest.write('sys/block/pmem0/device/mode', 'pmem\n')
        self.assertRight('ok: pmem0 (20480 MiB) keeps its page descriptors on '
                         "itself, not in the guest's RAM")
        # The kernel's word for a device that has them in RAM all the same.
        self.guest.write('sys/block/pmem0/device/mode', 'ram\n')
        self.assertRight(
            "note: pmem0 (20480 MiB) takes 320 of the guest's 976 MiB of RAM "
            'for page descriptors: take a flavor with more RAM or a smaller '
            'disk')

    def test_bounce_buffers(self) -> None:
        self.root_on_pmem()
        self.guest.bounce_buffers(512, used=0)
        self.assertRight('ok: 1024 KiB of RAM are set aside for bounce '
                         'buffers (swiotlb)')
        self.guest.bounce_buffers(32768, used=0)
        self.assertRight(
            'note: 64 MiB of RAM are set aside for bounce buffers (swiotlb), '
            'and no device uses them: put swiotlb=512 on the kernel\'s '
            'command line')
        in_use = ('ok: 64 MiB of RAM are set aside for bounce buffers '
                  '(swiotlb), and some device uses them')
        self.guest.bounce_buffers(32768, used=2)
        self.assertRight(in_use)
        # Since Linux 6.4: also where none is used just now.
        self.guest.bounce_buffers(32768, used=0, most_used=2)
        self.assertRight(in_use)

    def test_no_bounce_buffers(self) -> None:
        self.root_on_pmem()
        (self.guest.root / 'sys/kernel/debug/swiotlb').mkdir(parents=True)
        self.assertRight('ok: 0 KiB of RAM are set aside for bounce buffers '
                         '(swiotlb)')

    def test_bounce_buffers_of_an_ordinary_flavor(self) -> None:
        self.guest.disk('vda', 2048, (2048, 4096))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        self.guest.bounce_buffers(32768, used=0)
        self.assertNotIn('swiotlb', self.report().stdout)

    def test_kernel_without_virtio_pmem(self) -> None:
        self.guest.virtio_pmem()
        self.guest.disk('vda', 2048, (2048, 4096), serial='fakedax-boot')
        self.guest.mounts('/dev/vda1 / ext4 ro 0 0')
        self.assertWrong(
            '1 virtio-pmem device(s) have no driver: install a kernel with '
            'virtio_pmem, or put the driver into the initramfs')
        self.assertNotIn('the driver of virtio-pmem', self.report().stdout)

    def test_driver_of_this_project(self) -> None:
        self.root_on_pmem()
        self.guest.kernel('6.1.192-2')
        self.guest.driver('fakedax-1.0')
        self.guest.flushes()
        self.assertRight(
            'ok: the driver of virtio-pmem is fakedax-1.0: no commit reaches '
            'the disk before its blocks')
        self.assertRight(
            'note: pmem0 was flushed 12 times, by 7 requests to the host')

    def test_driver_of_a_kernel_that_is_right(self) -> None:
        self.root_on_pmem()
        self.assertRight(
            "ok: the driver of virtio-pmem is this kernel's (Debian "
            '6.12.117-1~deb12u1): no commit reaches the disk before its '
            'blocks')
        self.assertNotIn('flushed', self.report().stdout)

    def test_driver_whose_commits_overtake_their_blocks(self) -> None:
        self.root_on_pmem()
        self.guest.kernel('6.1.192-2')
        self.assertWrong(
            "the driver of virtio-pmem is this kernel's (Debian 6.1.192-2): a "
            'commit can reach the disk before its blocks, and after a power '
            'cut the file system may not mount: ' + REMEDY)

    def test_driver_of_which_nothing_is_known(self) -> None:
        self.root_on_pmem()
        self.guest.stub('uname', 'echo 9.9')
        self.guest.write('proc/version', 'Linux version 9.9 #1 SMP\n')
        self.assertWrong(
            'it is not known whether the driver of virtio-pmem (kernel 9.9) '
            'keeps commits behind their blocks; if not, the file system may '
            'not mount after a power cut: ' + REMEDY)
        self.guest.driver('2.0')
        self.assertWrong(
            'it is not known whether the driver of virtio-pmem (kernel 9.9, '
            'driver 2.0) keeps commits behind their blocks; if not, the file '
            'system may not mount after a power cut: ' + REMEDY)

    def test_driver_without_a_device(self) -> None:
        self.guest.kernel('6.1.192-2')
        self.guest.write('sys/bus/virtio/drivers/virtio_pmem/bind', '')
        self.guest.disk('vda', 2048, (2048, 4096))
        self.guest.mounts('/dev/vda1 / ext4 rw 0 0')
        self.assertRight('note: root is on /dev/vda1, an ordinary disk')
        self.assertNotIn('driver', self.report().stdout)

    def test_a_flush_that_the_host_could_not_do(self) -> None:
        self.root_on_pmem()
        self.guest.driver('fakedax-1.0')
        self.guest.flushes(failed=1)
        sentence = (
            'the host could not flush {}: what was written since its last '
            'successful flush may be lost, and each fsync fails: ask the '
            "operator what the host's storage says, then reboot")
        self.assertWrong(sentence.format('pmem0'))
        # A device that has not become a disk goes by its own name.
        self.guest.virtio_pmem()
        self.guest.disk('pmem1', 64)
        self.guest.flushes(failed=1, number=1, disk=None)
        self.assertWrong(sentence.format('virtio1'))

    def test_kernel_without_fs_dax(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.guest.stub('uname', 'echo 9.9')
        self.guest.write('proc/kallsyms', '')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: this kernel (9.9) is '
            'built without FS_DAX: install one that has it')

    def test_partition_off_alignment(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.guest.write('sys/block/pmem0/pmem0p3/size', '999999\n')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: pmem0p3 does not begin '
            'and end on a multiple of 4 KiB: make its start and size '
            'multiples of 8 sectors')

    def test_small_blocks(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.guest.stub('stat', 'echo 1024')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: its ext4 has blocks of '
            '1024 bytes: make it again with mkfs.ext4 -b 4096')

    def test_reflink(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.guest.mounts('/dev/pmem0p3 / xfs rw 0 0')
        self.guest.stub('xfs_info', 'echo "  = reflink=1 bigtime=1"')
        self.assertWrong(
            '/ (/dev/pmem0p3, xfs) does not use DAX: its xfs has reflink: '
            'make it again with mkfs.xfs -m reflink=0')

    def test_the_esp_needs_no_dax(self) -> None:
        self.root_on_pmem()
        self.guest.mounts('/dev/pmem0p3 / ext4 rw 0 0',
                          'systemd-1 /efi autofs rw 0 0',
                          '/dev/pmem0p2 /efi vfat rw 0 0')
        self.guest.write('efi/EFI/BOOT/BOOTX64.EFI', '')
        self.assertRight('ok: / (/dev/pmem0p3, ext4) uses DAX')
        self.assertNotIn('/efi', self.report().stdout)

    def test_kernels_on_a_partition_of_their_own_need_no_dax(
            self) -> None:
        self.root_on_pmem()
        self.guest.mounts('/dev/pmem0p3 / ext4 rw 0 0',
                          '/dev/pmem0p2 /boot ext4 rw 0 0')
        # Only files in /boot are without DAX.
        self.guest.write('boot/vmlinuz', '')
        self.guest.stub('xfs_io', 'case "$*" in\n*/boot/*) a=0 ;;\n'
                        f'*) a={DAX:#x} ;;\nesac\n'
                        'echo "stat.attributes = $a"')
        self.assertRight('ok: / (/dev/pmem0p3, ext4) uses DAX')

    def test_vfat(self) -> None:
        self.root_on_pmem()
        self.guest.mounts('/dev/vda3 / ext4 rw 0 0',
                          '/dev/pmem0 /mnt/ephemeral0 vfat rw 0 0')
        self.guest.write('mnt/ephemeral0/file', '')
        self.guest.statx(0)
        self.assertWrong(
            '/mnt/ephemeral0 (/dev/pmem0, vfat) does not use DAX: vfat cannot '
            'do DAX: make it ext4 with blocks of 4 KiB, or xfs without '
            'reflink')

    def test_files_without_the_flag(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.guest.write('proc/cmdline', 'daxroot=inode')
        self.assertWrong(
            '/ (/dev/pmem0p3, ext4) does not use DAX: daxroot=inode is on the '
            "kernel's command line and its files do not carry the flag: run "
            'chattr -R +x /, or remove the argument')

    def test_off(self) -> None:
        self.root_on_pmem()
        self.guest.statx(0)
        self.guest.write('proc/cmdline', 'daxroot=off')
        self.assertRight(
            'note: / (/dev/pmem0p3, ext4) does not use DAX: daxroot=off is on '
            "the kernel's command line")

    def test_write_through(self) -> None:
        self.root_on_pmem()
        self.guest.write('sys/block/pmem0/queue/write_cache',
                         'write through\n')
        self.assertWrong(
            "pmem0 is 'write through', so fsync does not reach the host: run "
            "echo 'write back' > /sys/block/pmem0/queue/write_cache")

    def test_an_empty_disk_is_tried_with_a_file_of_its_own(self) -> None:
        self.root_on_pmem()
        self.guest.disk('pmem1', 512)
        self.guest.mounts('/dev/pmem0p3 / ext4 rw 0 0',
                          '/dev/pmem1 /mnt/ephemeral0 ext4 rw 0 0')
        empty = self.guest.root / 'mnt/ephemeral0'
        empty.mkdir(parents=True)
        self.assertRight('ok: /mnt/ephemeral0 (/dev/pmem1, ext4) uses DAX')
        self.assertEqual([], list(empty.iterdir()))

    def test_ephemeral_disk_that_is_not_mounted(self) -> None:
        self.root_on_pmem()
        self.guest.disk('pmem1', 512)
        links = self.guest.root / 'dev/disk/by-label'
        links.mkdir(parents=True)
        (links / 'ephemeral0').symlink_to('/dev/pmem1')
        self.assertWrong(
            '/dev/pmem1 (ephemeral0) is not mounted: run systemctl status '
            'fakedax-ephemeral@ephemeral0')

    def test_arguments(self) -> None:
        done = self.report('--help')
        self.assertEqual(0, done.returncode)
        self.assertIn('One finding per line', done.stdout)
        done = self.report('nonesuch')
        self.assertEqual(2, done.returncode)
        self.assertIn("unknown argument 'nonesuch'; allowed: --help",
                      done.stderr)
