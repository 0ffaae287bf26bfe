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

"""A disk on fake DAX, as a value, and the table of the disks there can be."""

import dataclasses
import os
import re

ALIAS_PREFIX = 'ua-fakedax-'


@dataclasses.dataclass(frozen=True, order=True)
class Role:
    """What a disk is to its instance: a row of :data:`ROLES`.

    :ivar rank: orders disks: the guest numbers those of the lowest rank
        first
    :ivar name: the role in ``fakedax:disks`` and in messages
    :ivar file_name: matches the names that Nova gives the disks' files in
        the instance's directory; its group ``index`` is the disk's number,
        0 where there is no such group or it matches nothing
        (nova.virt.libvirt.blockinfo: 'disk', 'disk.local', get_eph_disk());
        None if Nova makes no such file
    :ivar alias: the device's alias after ALIAS_PREFIX, with ``{index}`` or
        ``{volume}`` where there can be more than one such disk
    :ivar flavor_field: the field of nova.objects.Flavor that is the disk's
        size in GiB, empty if no field is
    :ivar flavor_label: what messages call that field
    """

    rank: int
    name: str = dataclasses.field(compare=False)
    file_name: re.Pattern[str] | None = dataclasses.field(compare=False)
    alias: str = dataclasses.field(compare=False)
    flavor_field: str = dataclasses.field(compare=False)
    flavor_label: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.name


#: Root has the lowest rank, so that it is /dev/pmem0 where it is on fake DAX.
ROOT = Role(0, 'root', re.compile('disk'), 'root', 'root_gb', 'disk')

EPHEMERAL = Role(
    1, 'ephemeral', re.compile(r'disk\.(?:local|eph(?P<index>\d+))'),
    'eph{index}', 'ephemeral_gb', 'ephemeral disk')

#: A Cinder volume, root or not: a domain names it by its ID alone. Which one
#: the server boots from is in Nova's block device mappings.
VOLUME = Role(2, 'volume', None, '{volume}', '', '')

#: All of them, by rank.
ROLES = (ROOT, EPHEMERAL, VOLUME)

#: Those that Nova makes as files.
FILE_ROLES = tuple(role for role in ROLES if role.file_name)

_UUID = '[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}'


@dataclasses.dataclass(frozen=True, order=True)
class DiskId:
    """Which of an instance's disks: files ordered as the guest numbers them.

    :ivar index: the disk's number among those of its role, from 0; 0 for a
        volume
    :ivar volume: the volume's ID, empty for a file
    """

    role: Role
    index: int
    volume: str = ''

    @classmethod
    def of_volume(cls, volume: str) -> 'DiskId':
        """The disk that is the volume with this ID."""
        return cls(VOLUME, 0, volume)

    @property
    def alias(self) -> str:
        """The device's alias in libvirt and its id in QEMU."""
        return ALIAS_PREFIX + self.role.alias.format(
            index=self.index, volume=self.volume)

    @classmethod
    def from_path(cls, path: str) -> 'DiskId | None':
        """Identify the disk by its name in the instance's directory.

        :param path: a path or a bare name: ``disk``, ``disk.local`` or
            ``disk.ephN``
        :returns: None for any other disk (swap, config drive, rescue)
        """
        name = os.path.basename(path)
        for role in ROLES:
            if role.file_name and (match := role.file_name.fullmatch(name)):
                return cls(role, int(match.groupdict().get('index') or 0))
        return None

    @classmethod
    def from_alias(cls, alias: str) -> 'DiskId | None':
        """Identify the disk by its device's alias.

        :returns: None for the alias of any other device
        """
        for role in ROLES:
            pattern = ALIAS_PREFIX + role.alias.format(
                index=r'(?P<index>\d+)', volume=f'(?P<volume>{_UUID})')
            if match := re.fullmatch(pattern, alias):
                found = match.groupdict()
                return cls(role, int(found.get('index') or 0),
                           found.get('volume') or '')
        return None


@dataclasses.dataclass(frozen=True, order=True)
class FakeDaxDisk:
    """A disk on fake DAX: what it is, its backing file, its size in bytes."""

    id: DiskId
    path: str
    size: int
