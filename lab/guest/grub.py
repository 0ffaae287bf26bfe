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

"""GRUB for BIOS in a disk image, without a loop device.

grub-install and grub-bios-setup need a block device. All they do to an image
with a BIOS boot partition is to write two files and the position of the next
piece into each; so does this module.
"""

import pathlib
import struct

from lab.guest import tools

SECTOR = 512

#: Where grub-pc-bin keeps boot.img and the modules.
PLATFORM = pathlib.Path('/usr/lib/grub/i386-pc')

#: boot.img: sector of the core image, 64 bits
#: (GRUB_BOOT_MACHINE_KERNEL_SECTOR, include/grub/i386/pc/boot.h).
KERNEL_SECTOR = 0x5c

#: The master boot record's code ends here; the disk's signature and the
#: protective partition table follow
#: (GRUB_BOOT_MACHINE_WINDOWS_NT_MAGIC, include/grub/i386/pc/boot.h).
BOOT_CODE_END = 0x1b8

#: diskboot.img, the core image's first sector, ends with the position of the
#: rest: start sector (64 bits), count (16), segment (16). grub-mkimage
#: fills in the last two (struct grub_pc_bios_boot_blocklist,
#: include/grub/offsets.h; GRUB_BOOT_MACHINE_LIST_SIZE is 12,
#: include/grub/i386/pc/boot.h).
BLOCK_LIST = SECTOR - 12

#: Needed to read grub.cfg, a kernel and an initrd from ext4 on GPT.
MODULES = ('biosdisk', 'part_gpt', 'ext2', 'normal', 'linux16', 'serial',
           'terminal')


def install(disk: pathlib.Path, first: int, sectors: int,
            root_partition: int) -> None:
    """Make a GPT image bootable by BIOS; GRUB reads /boot/grub/grub.cfg.

    :param disk: raw image, with its partition table
    :param first: first sector of its BIOS boot partition
    :param sectors: size of that partition
    :param root_partition: number of the partition that holds /boot
    :raises GuestBuildError: GRUB is not installed or does not fit
    """
    boot_path = PLATFORM / 'boot.img'
    if not boot_path.exists():
        raise tools.GuestBuildError(
            f'{boot_path} is missing: install grub-pc-bin')
    boot = bytearray(boot_path.read_bytes())
    struct.pack_into('<Q', boot, KERNEL_SECTOR, first)
    core = _core_image(disk.with_name('core.img'), root_partition)
    struct.pack_into('<Q', core, BLOCK_LIST, first + 1)
    if len(core) > sectors * SECTOR:
        raise tools.GuestBuildError(
            f'GRUB has {len(core)} bytes, its partition '
            f'{sectors * SECTOR}')
    with disk.open('r+b') as f:
        f.write(boot[:BOOT_CODE_END])
        f.seek(first * SECTOR)
        f.write(core)


def _core_image(scratch: pathlib.Path, root_partition: int) -> bytearray:
    # Without a disk in the prefix, GRUB uses the disk that it booted from.
    tools.run('grub-mkimage', '--format=i386-pc', f'--output={scratch}',
              f'--prefix=(,gpt{root_partition})/boot/grub', *MODULES)
    core = bytearray(scratch.read_bytes())
    scratch.unlink()
    return core
