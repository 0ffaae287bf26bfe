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
import itertools
import re
import typing as ty

from nova_fakedax import disk

NAMESPACE = 'fakedax'
DISKS_KEY = f'{NAMESPACE}:disks'

#: The values of ``fakedax:disks`` and the disks they name: every choice of
#: roles, in the order of their ranks.
DISKS_VALUES: Mapping[str, frozenset[disk.Role]] = {
    ','.join(role.name for role in roles): frozenset(roles)
    for count in range(1, len(disk.ROLES) + 1)
    for roles in itertools.combinations(disk.ROLES, count)}

#: Where the guest keeps its struct pages of the disks, and whether that is the
#: disks themselves (:mod:`.layout`).
MEMMAP_KEY = f'{NAMESPACE}:memmap'
MEMMAP_VALUES: Mapping[str, bool] = {'device': True, 'guest': False}
MEMMAP_DEFAULT = 'device'

#: The trait of a host that can run such flavors.
TRAIT = 'CUSTOM_FAKEDAX'

#: The trait of a host that such instances can migrate to while they run.
MIGRATION_TRAIT = 'CUSTOM_FAKEDAX_MIGRATION'

#: What such a host reports among the statistics of its compute node, and the
#: value. Placement keeps a trait until somebody removes it, also when the
#: host has gone back to another driver; statistics are replaced at each
#: report.
STATISTIC = 'fakedax_supported'
SUPPORTED = 'true'

#: The image property that says the guest knows fake DAX.
IMAGE_PROPERTY = 'fakedax_guest'

_FALSE = frozenset({'false', 'no', 'off', '0', 'f', 'n', ''})
_TRUE = frozenset({'true', 'yes', 'on', '1', 't', 'y'})


class InvalidSpec(ValueError):
    """The flavor or the image asks for something that is not allowed."""


class InvalidImage(InvalidSpec):
    """The image is not one that fake DAX can boot."""


class Flavor(ty.Protocol):
    """The part of nova.objects.Flavor that is read.

    And the field that each role of :data:`nova_fakedax.disk.ROLES` names.
    """

    extra_specs: dict[str, str]

    def __contains__(self, field: str) -> bool:
        ...


class Instance(ty.Protocol):
    """The part of nova.objects.Instance that is read."""

    flavor: Flavor


@dataclasses.dataclass(frozen=True)
class ExtraSpec:
    """An extra spec of the ``fakedax`` namespace: a row of the table.

    :ivar key: the key, with the namespace
    :ivar values: the values that are allowed
    :ivar description: what it is for, in the words of the API's reference
    """

    key: str
    values: tuple[str, ...]
    description: str

    def check(self, value: str) -> None:
        """Check a value.

        :raises InvalidSpec: names what was given and what is allowed
        """
        if value not in self.values:
            raise InvalidSpec(
                f"'{value}' is not a value of {self.key}; allowed: "
                f"{_quoted(self.values)}")


#: All of them, by key.
EXTRA_SPECS: dict[str, ExtraSpec] = {row.key: row for row in (
    ExtraSpec(
        DISKS_KEY, tuple(DISKS_VALUES),
        'The disks that the guest sees as fake persistent memory: its root '
        'disk, its ephemeral disks or both.'),
    ExtraSpec(
        MEMMAP_KEY, tuple(MEMMAP_VALUES),
        "Where the guest's struct pages of these disks are: on the disks, "
        'where they cost it no RAM, or in its RAM, of which they take 16 MiB '
        'for each GiB of disk.'),
)}


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Extra specs that are incompatible with fake DAX: a row of the table.

    :ivar key: matches their keys
    :ivar why: why they are incompatible, for the user
    """

    key: re.Pattern[str]
    why: str

    def found(self, key: str, value: str) -> bool:
        """Whether an extra spec is one of them, and not switched off."""
        return bool(self.key.fullmatch(key)) and value.lower() not in _FALSE


#: All of them.
CONFLICTS: tuple[Conflict, ...] = tuple(
    Conflict(re.compile(key), why) for key, why in (
        ('pci_passthrough:alias',
         'a passed-through device pins the whole image'),
        ('resources:VGPU', 'a mediated device pins the whole image'),
        ('accel:device_profile', 'an accelerator pins the whole image'),
        ('hw:cpu_realtime', 'locked memory holds the whole image in RAM'),
        ('hw:locked_memory', 'locked memory holds the whole image in RAM'),
        ('hw:pmem',
         'real and fake persistent memory cannot be told apart'),
        ('hw:mem_encryption',
         'a host file cannot be encrypted guest memory'),
        # LibvirtDriver gives all disks of a flavor the same limits
        # (nova.virt.libvirt.imagebackend.Image.disk_qos).
        (r'quota:disk_\w+',
         'nothing limits what a guest reads and stores through a mapping'),
    ))


def _quoted(values: ty.Iterable[str]) -> str:
    return ', '.join(f"'{value}'" for value in values)


def check_extra_spec(key: str, value: str) -> None:
    """Check one extra spec of the ``fakedax`` namespace.

    :raises InvalidSpec: names what was given and what is allowed
    """
    if key not in EXTRA_SPECS:
        raise InvalidSpec(
            f"'{key}' is not an extra spec of fake DAX; "
            f"allowed: {', '.join(EXTRA_SPECS)}")
    EXTRA_SPECS[key].check(value)


def given(flavor: Flavor) -> dict[str, str]:
    """The flavor's extra specs of the ``fakedax`` namespace, as they are.

    A flavor whose extra specs are not loaded has none: Nova hands such
    flavors to code that does not look at extra specs.
    """
    extra_specs = flavor.extra_specs if 'extra_specs' in flavor else {}
    return {key: value for key, value in extra_specs.items()
            if key.partition(':')[0] == NAMESPACE}


@dataclasses.dataclass(frozen=True)
class FakeDaxSpec:
    """The disks that a flavor puts on fake DAX; false if there are none.

    :ivar memmap: whether new images have the memmap on the device
    """

    roles: frozenset[disk.Role] = frozenset()
    memmap: bool = MEMMAP_VALUES[MEMMAP_DEFAULT]

    def __bool__(self) -> bool:
        return bool(self.roles)

    def __str__(self) -> str:
        """The value of ``fakedax:disks``; empty if there are no disks."""
        return next((value for value, roles in DISKS_VALUES.items()
                     if roles == self.roles), '')

    def wants(self, path: str) -> bool:
        """Whether the flavor puts the disk of this name or path on fake DAX.

        :param path: as of :meth:`nova_fakedax.disk.DiskId.from_path`
        """
        disk_id = disk.DiskId.from_path(path)
        return disk_id is not None and disk_id.role in self.roles

    @classmethod
    def from_flavor(cls, flavor: Flavor) -> 'FakeDaxSpec':
        """Read the flavor's extra specs.

        Other extra specs of the namespace only say more about disks on fake
        DAX. Without ``fakedax:disks`` the flavor is refused: somebody meant
        fake DAX, and would get ordinary disks. The API cannot refuse it, as
        Nova's validators see one extra spec at a time.

        :raises InvalidSpec: an extra spec of the namespace is unknown or
            has an unknown value, which the API rejects as well, but only
            since microversion 2.86 and only where this package is
            installed; or ``fakedax:disks`` is missing
        """
        extra_specs = given(flavor)
        for key, value in extra_specs.items():
            check_extra_spec(key, value)
        if not extra_specs:
            return cls()
        if DISKS_KEY not in extra_specs:
            raise InvalidSpec(
                f"the flavor has {', '.join(sorted(extra_specs))}, but not "
                f"{DISKS_KEY}; allowed: {DISKS_KEY} with "
                f"{_quoted(DISKS_VALUES)}")
        return cls(
            DISKS_VALUES[extra_specs[DISKS_KEY]],
            MEMMAP_VALUES[extra_specs.get(MEMMAP_KEY, MEMMAP_DEFAULT)])

    @classmethod
    def from_instance(cls, instance: Instance) -> 'FakeDaxSpec':
        """Read the flavor of an instance that has been admitted.

        :returns: no disks if the flavor is invalid: the build was refused,
            so there are none
        """
        try:
            return cls.from_flavor(instance.flavor)
        except InvalidSpec:
            return cls()

    def check_flavor(self, flavor: Flavor) -> None:
        """Check that the rest of the flavor goes with fake DAX.

        :raises InvalidSpec: names the conflict
        """
        for role in sorted(self.roles):
            if not getattr(flavor, role.flavor_field):
                raise InvalidSpec(
                    f"{DISKS_KEY} names the {role} disk, but the flavor's "
                    f"{role.flavor_label} is 0 GiB; allowed: 1 GiB or more")
        for conflict, (key, value) in itertools.product(
                CONFLICTS, flavor.extra_specs.items()):
            if conflict.found(key, value):
                raise InvalidSpec(
                    f"{key}='{value}' is incompatible with {DISKS_KEY}: "
                    f"{conflict.why}")

    def check_resize(self, new: 'FakeDaxSpec') -> None:
        """Check that a resize keeps the same disks on fake DAX.

        Nova keeps the files as they are, and that of an ordinary disk may
        not be a raw image.

        :raises InvalidSpec: names both flavors' disks
        """
        if new.roles != self.roles:
            raise InvalidSpec(
                f"{DISKS_KEY} is '{new}' in the new flavor; allowed: "
                f"'{self}', as in the current one: a resize cannot put a "
                f"disk on fake DAX or take it off")

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

        Only a root disk needs that. A guest that boots from an ordinary disk
        may use an ephemeral disk on fake DAX, or ignore it.

        :param properties: the image's properties, by name
        :raises InvalidImage: names the property
        """
        value = str(properties.get(IMAGE_PROPERTY, ''))
        if disk.ROOT in self.roles and value.lower() not in _TRUE:
            raise InvalidImage(
                f"{DISKS_KEY} names the root disk, but the image's property "
                f"{IMAGE_PROPERTY} is '{value}'; allowed: 'true', for an "
                f"image whose guest mounts its root from /dev/pmem0")
