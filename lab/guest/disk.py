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

"""A raw disk image with a root file system, made without mounting it."""

import json
import pathlib

from lab.guest import grub
from lab.guest import tools

MIB = 1024 * 1024

#: How the guest's initrd finds root; see initrd/init.
ROOT_NAME = 'fakedax-root'

#: GPT partition types: BIOS boot (GRUB manual, "BIOS installation"), and
#: Linux root on x86-64 (UAPI group, "Discoverable Partitions
#: Specification").
BIOS_BOOT = '21686148-6449-6E6F-744E-656564454649'
LINUX_ROOT = '4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709'

#: The size of a pmem device must be a multiple of this
#: (drivers/nvdimm/pmem.c: memremap needs whole sections of 2 MiB).
GRANULE_MIB = 2


def create(disk: pathlib.Path, size_mib: int, root: pathlib.Path) -> None:
    """Make ``disk``: GPT, GRUB in front, then ext4 with the tree ``root``.

    Root is the last partition, so that the guest can grow it, and begins and
    ends on a multiple of 1 MiB: DAX needs a multiple of 4 KiB.

    :raises GuestBuildError: the size is not usable or the tree does not fit
    """
    check_size(size_mib)
    root_mib = size_mib - 3
    with disk.open('wb') as f:
        f.truncate(size_mib * MIB)
    tools.run('sfdisk', '--quiet', disk, stdin=(
        'label: gpt\n'
        f'start=1MiB, size=1MiB, type={BIOS_BOOT}\n'
        f'start=2MiB, size={root_mib}MiB, type={LINUX_ROOT}, '
        f'name={ROOT_NAME}\n'))
    # 4 KiB blocks for DAX: mkfs would choose 1 KiB for a small disk. Few
    # inodes, so that a grown file system has no large tables to zero in the
    # background. No feature that GRUB 2.06 cannot read.
    tools.run('mkfs.ext4', '-q', '-F', '-b', '4096', '-i', '65536',
              '-O', '^metadata_csum_seed', '-E', f'offset={2 * MIB}',
              '-L', ROOT_NAME, '-d', root, disk, f'{root_mib * 256}')
    table = json.loads(tools.run('sfdisk', '--json', disk))
    bios_boot = table['partitiontable']['partitions'][0]
    grub.install(disk, bios_boot['start'], bios_boot['size'],
                 root_partition=2)


def check_size(size_mib: int) -> None:
    """Check that a pmem device can have this size and the guest fits.

    :raises GuestBuildError: one of these is not so
    """
    if size_mib % GRANULE_MIB or size_mib < 32:
        raise tools.GuestBuildError(
            f'size {size_mib} MiB: must be a multiple of {GRANULE_MIB} MiB '
            f'and at least 32 MiB')
