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

"""What a flavor and an image ask for, validated."""

from collections.abc import Mapping
from collections.abc import Set
import dataclasses
import typing as ty

from nova_fakedax import disk

NAMESPACE = 'fakedax'
DISKS_KEY = f'{NAMESPACE}:disks'
KEYS = (DISKS_KEY,)

#: The values of ``fakedax:disks`` and the disks they name.
DISKS_VALUES: Mapping[str, frozenset[disk.Role]] = {
    'root': frozenset({'root'}),
    'ephemeral': frozenset({'ephemeral'}),
    'root,ephemeral': frozenset({'root', 'ephemeral'}),
}

#: The trait of a host that can run such flavors.
TRAIT = 'CUSTOM_FAKEDAX'

#: The trait of a host that such instances can migrate to while they run.
MIGRATION_TRAIT = 'CUSTOM_FAKEDAX_MIGRATION'

#: What such a host says of itself among the statistics of its compute node,
#: and the value. Placement keeps a trait until it is taken back, also when
#: the host has gone back to another driver; statistics are made anew.
STATISTIC = 'fakedax_supported'
SUPPORTED = 'true'

#: The image property that says the guest knows fake DAX.
IMAGE_PROPERTY = 'fakedax_guest'

#: Extra specs that cannot be beside fake DAX, and why.
CONFLICTS: Mapping[str, str] = {
    'pci_passthrough:alias': 'a passed-through device pins the whole image',
    'resources:VGPU': 'a mediated device pins the whole image',
    'accel:device_profile': 'an accelerator pins the whole image',
    'hw:cpu_realtime': 'locked memory holds the whole image in RAM',
    'hw:locked_memory': 'locked memory holds the whole image in RAM',
    'hw:pmem': 'real and fake persistent memory cannot be told apart',
    'hw:mem_encryption': 'a host file cannot be encrypted guest memory',
}

_FALSE = frozenset({'false', 'no', 'off', '0', 'f', 'n', ''})
_TRUE = frozenset({'true', 'yes', 'on', '1', 't', 'y'})


class InvalidSpec(ValueError):
    """The flavor or the image asks for something that cannot be."""


class InvalidImage(InvalidSpec):
    """The image is not one that fake DAX can boot."""


class Flavor(ty.Protocol):
    """The part of nova.objects.Flavor that is read."""

    extra_specs: dict[str, str]
    root_gb: int
    ephemeral_gb: int

    def __contains__(self, field: str) -> bool:
        ...


def check_extra_spec(key: str, value: str) -> None:
    """Check one extra spec of the ``fakedax`` namespace.

    :raises InvalidSpec: names what was given and what is allowed
    """
    if key not in KEYS:
        raise InvalidSpec(
            f"'{key}' is not an extra spec of fake DAX; "
            f"allowed: {', '.join(KEYS)}")
    if value not in DISKS_VALUES:
        raise InvalidSpec(
            f"'{value}' is not a value of {key}; allowed: "
            f"{', '.join(repr(allowed) for allowed in DISKS_VALUES)}")


@dataclasses.dataclass(frozen=True)
class FakeDaxSpec:
    """The disks that a flavor puts on fake DAX; false if there are none."""

    roles: frozenset[disk.Role] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.roles)

    def __str__(self) -> str:
        """The value of the extra spec; empty if there is none."""
        return next((value for value, roles in DISKS_VALUES.items()
                     if roles == self.roles), '')

    def wants(self, path: str) -> bool:
        """Whether the disk of this name or path is to be on fake DAX."""
        disk_id = disk.DiskId.from_path(path)
        return disk_id is not None and disk_id.role in self.roles

    @classmethod
    def from_flavor(cls, flavor: Flavor) -> 'FakeDaxSpec':
        """Read the flavor's extra specs.

        A flavor whose extra specs are not loaded asks for nothing: Nova
        hands such flavors to code that does not look at extra specs.

        :raises InvalidSpec: an extra spec of the namespace is unknown or
            has an unknown value; the API rejects these, but only since
            microversion 2.86 and only where this package is installed
        """
        extra_specs = flavor.extra_specs if 'extra_specs' in flavor else {}
        ours = {key: value for key, value in extra_specs.items()
                if key.partition(':')[0] == NAMESPACE}
        for key, value in ours.items():
            check_extra_spec(key, value)
        return cls(DISKS_VALUES[ours[DISKS_KEY]] if ours else frozenset())

    def check_flavor(self, flavor: Flavor) -> None:
        """Check that the rest of the flavor goes with fake DAX.

        :raises InvalidSpec: names the conflict
        """
        if 'root' in self.roles and not flavor.root_gb:
            raise InvalidSpec(
                f"{DISKS_KEY} names the root disk, but the flavor's disk is "
                f"0 GiB; allowed: 1 GiB or more")
        if 'ephemeral' in self.roles and not flavor.ephemeral_gb:
            raise InvalidSpec(
                f"{DISKS_KEY} names the ephemeral disk, but the flavor's "
                f"ephemeral disk is 0 GiB; allowed: 1 GiB or more")
        for key, why in CONFLICTS.items():
            value = flavor.extra_specs.get(key)
            if value is not None and value.lower() not in _FALSE:
                raise InvalidSpec(
                    f"{key}='{value}' cannot be beside {DISKS_KEY}: {why}")

    def check_resize(self, new: 'FakeDaxSpec') -> None:
        """Check that a server can be resized to a flavor with other disks.

        Nova takes the files as they are, and an ordinary disk's may be no
        raw image.

        :raises InvalidSpec: names both flavors' disks
        """
        if new != self:
            raise InvalidSpec(
                f"{DISKS_KEY} is '{new}' in the new flavor; allowed: "
                f"'{self}', as in the server's, whose disks stay what they "
                f"are")

    def check_disks(self, roles: Set[disk.Role]) -> None:
        """Check that the instance has the disks that the flavor names.

        :param roles: those of its disks that can be on fake DAX
        :raises InvalidSpec: names the disk
        """
        for role in sorted(self.roles - roles):
            raise InvalidSpec(
                f"{DISKS_KEY} names the {role} disk, but the instance's is a "
                f"volume or there is none; allowed: a disk that Nova makes "
                f"as a file")

    def check_image(self, properties: Mapping[str, ty.Any]) -> None:
        """Check that the image's guest knows fake DAX.

        Only a root disk needs that: an ephemeral disk is looked for, or not,
        by whatever guest has booted from an ordinary disk.

        :param properties: the image's properties, by name
        :raises InvalidImage: names the property
        """
        value = str(properties.get(IMAGE_PROPERTY, ''))
        if 'root' in self.roles and value.lower() not in _TRUE:
            raise InvalidImage(
                f"{DISKS_KEY} names the root disk, but the image's property "
                f"{IMAGE_PROPERTY} is '{value}'; allowed: 'true', for an "
                f"image whose guest mounts its root from /dev/pmem0")
