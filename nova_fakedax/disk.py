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

"""One disk on fake DAX, as a value."""

import dataclasses
import os
import re
import typing as ty

#: Which disk of the instance: its root disk or one of its ephemeral disks.
Role = ty.Literal['root', 'ephemeral']

ALIAS_PREFIX = 'ua-fakedax-'

# What Nova calls the files of these disks in the instance's directory
# (nova.virt.libvirt.blockinfo: 'disk', 'disk.local' and get_eph_disk()).
_ROOT_NAME = 'disk'
_EPHEMERAL_NAME = re.compile(r'disk\.(?:local|eph(?P<index>\d+))')


@dataclasses.dataclass(frozen=True, order=True)
class DiskId:
    """Which of an instance's disks: ordered as the guest numbers them.

    Root sorts first, so that root is /dev/pmem0 where it is on fake DAX.
    """

    # 0 for root, 1 for ephemeral: what the order is made of.
    rank: int
    index: int

    @property
    def role(self) -> Role:
        return 'root' if self.rank == 0 else 'ephemeral'

    @property
    def alias(self) -> str:
        """The device's alias in libvirt and its id in QEMU."""
        name = 'root' if self.rank == 0 else f'eph{self.index}'
        return ALIAS_PREFIX + name

    @classmethod
    def from_path(cls, path: str) -> 'DiskId | None':
        """Identify the disk by its name in the instance's directory.

        :param path: a path or a bare name: ``disk``, ``disk.local`` or
            ``disk.ephN``
        :returns: None for any other disk (swap, config drive, rescue)
        """
        name = os.path.basename(path)
        if name == _ROOT_NAME:
            return cls(0, 0)
        if match := _EPHEMERAL_NAME.fullmatch(name):
            return cls(1, int(match['index'] or 0))
        return None

    @classmethod
    def from_alias(cls, alias: str) -> 'DiskId | None':
        """Identify the disk by its device's alias, None if not ours."""
        if alias == ALIAS_PREFIX + 'root':
            return cls(0, 0)
        if match := re.fullmatch(ALIAS_PREFIX + r'eph(\d+)', alias):
            return cls(1, int(match[1]))
        return None


@dataclasses.dataclass(frozen=True, order=True)
class FakeDaxDisk:
    """A disk on fake DAX: what it is, its backing file, its size in bytes."""

    id: DiskId
    path: str
    size: int
