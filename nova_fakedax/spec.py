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
import math
import re
import typing as ty

from oslo_utils import units

from nova_fakedax import disk

NAMESPACE = 'fakedax'
DISKS_KEY = f'{NAMESPACE}:disks'

#: The values of ``fakedax:disks`` and the disks they name: every choice of
#: roles, in the order of their ranks.
DISKS_VALUES: Mapping[str, frozenset[disk.Role]] = {
    ','.join(role.name for role in roles): frozenset(roles)
    for count in range(1, len(disk.FILE_ROLES) + 1)
    for roles in itertools.combinations(disk.FILE_ROLES, count)}

#: Which of an instance's Cinder volumes the guest sees as fake persistent
#: memory: none, the one that it boots from, or that one and all others.
VOLUMES_KEY = f'{NAMESPACE}:volumes'
NO_VOLUMES, BOOT_VOLUME, ALL_VOLUMES = 'none', 'boot', 'all'
VOLUMES_VALUES = (NO_VOLUMES, BOOT_VOLUME, ALL_VOLUMES)

#: Where the guest keeps its struct pages of the disks, and whether that is the
#: disks themselves (:mod:`.layout`).
MEMMAP_KEY = f'{NAMESPACE}:memmap'
MEMMAP_VALUES: Mapping[str, bool] = {'device': True, 'guest': False}
MEMMAP_DEFAULT = 'device'

#: MiB of RAM that the struct pages of 1 GiB of disk take.
_MEMMAP_MIB = 16

#: MiB of RAM with which no Linux starts that has a memmap in it.
_LEAST_RAM_MIB = 64

#: The trait of a host that can run such flavors.
TRAIT = 'CUSTOM_FAKEDAX'

#: The trait of a host that such instances can migrate to while they run.
MIGRATION_TRAIT = 'CUSTOM_FAKEDAX_MIGRATION'

#: What such a host reports among the statistics of its compute node, and the
#: value; a host that cannot reports why instead. Placement keeps a trait until
#: somebody removes it, also when the host has gone back to another driver;
#: statistics are replaced at each report.
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

    And the field that each of :data:`nova_fakedax.disk.FILE_ROLES` names.
    """

    extra_specs: dict[str, str]
    memory_mb: int

    def __contains__(self, field: str) -> bool:
        ...


class Instance(ty.Protocol):
    """The part of nova.objects.Instance that is read."""

    flavor: Flavor


class Properties(ty.Protocol):
    """An image's properties: a dict, or nova.objects.ImageMetaProps."""

    def get(self, name: str, default: ty.Any = None, /) -> ty.Any:
        ...


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
        VOLUMES_KEY, VOLUMES_VALUES,
        'The volumes that the guest sees as fake persistent memory: none, '
        'the volume that it boots from, or that one and all others that are '
        'attached to it.'),
    ExtraSpec(
        MEMMAP_KEY, tuple(MEMMAP_VALUES),
        "Where the guest's struct pages of these disks are: on the disks, "
        'where they cost it no RAM, or in its RAM, of which they take 16 MiB '
        'for each GiB of disk.'),
)}


@dataclasses.dataclass(frozen=True)
class Conflict:
    """What is incompatible with fake DAX: a row of the table.

    :ivar keys: matches the keys of extra specs
    :ivar why: why they are incompatible, for the user
    :ivar image_property: the property by which an image asks for the same
    :ivar only: the only value that is incompatible; empty if each is that
        does not switch the extra spec off
    """

    keys: re.Pattern[str]
    why: str
    image_property: str = ''
    only: str = ''

    def asked_by(self, value: str) -> bool:
        """Whether an extra spec or a property with this value asks for it."""
        value = value.lower()
        return value == self.only if self.only else value not in _FALSE


def _in_any_group(prefix: str, names: str) -> str:
    """Matches resources or traits, also those of a numbered group.

    nova.scheduler.utils.ResourceRequest.XS_KEYPAT.
    """
    return f'{prefix}[a-zA-Z0-9_-]{{0,64}}:{names}'


def _conflict(keys: str, why: str, **others: str) -> Conflict:
    return Conflict(re.compile(keys), why, **others)


_LOCKED = 'locked memory holds the whole image in RAM'

#: All of them.
CONFLICTS: tuple[Conflict, ...] = (
    _conflict('pci_passthrough:alias',
              'a passed-through device pins the whole image'),
    _conflict(_in_any_group('resources', 'VGPU'),
              'a mediated device pins the whole image'),
    _conflict('accel:device_profile',
              'an accelerator pins the whole image'),
    _conflict('hw:cpu_realtime', _LOCKED),
    _conflict('hw:locked_memory', _LOCKED,
              image_property='hw_locked_memory'),
    _conflict('hw:pmem|' + _in_any_group(
        'resources', r'CUSTOM_PMEM_NAMESPACE_\w+'),
        'real and fake persistent memory cannot be told apart'),
    _conflict('hw:mem_encryption',
              'a host file cannot be encrypted guest memory',
              image_property='hw_mem_encryption'),
    _conflict('hw:ephemeral_encryption',
              'an encrypted image cannot be mapped into a guest',
              image_property='hw_ephemeral_encryption'),
    # LibvirtDriver gives all disks of a flavor the same limits
    # (nova.virt.libvirt.imagebackend.Image.disk_qos).
    _conflict(r'quota:disk_\w+',
              'nothing limits what a guest reads and stores through a '
              'mapping'),
    _conflict(_in_any_group('trait', TRAIT),
              'only a host with this trait can run it', only='forbidden'),
)


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

    :ivar roles: those of the disks that Nova makes as files
    :ivar memmap: whether new images have the memmap on the device
    :ivar volumes: of VOLUMES_VALUES
    """

    roles: frozenset[disk.Role] = frozenset()
    memmap: bool = MEMMAP_VALUES[MEMMAP_DEFAULT]
    volumes: str = NO_VOLUMES

    def __bool__(self) -> bool:
        return bool(self.roles) or self.volumes != NO_VOLUMES

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

    def wants_volume(self, root: bool) -> bool:
        """Whether the flavor puts a volume on fake DAX.

        :param root: whether the instance boots from it
        """
        return self.volumes == ALL_VOLUMES or (
            root and self.volumes == BOOT_VOLUME)

    def wants_root(self, from_volume: bool) -> bool:
        """Whether the flavor puts what the instance boots from on fake DAX.

        :param from_volume: whether that is a volume
        """
        return (self.wants_volume(root=True) if from_volume
                else disk.ROOT in self.roles)

    @classmethod
    def from_flavor(cls, flavor: Flavor) -> 'FakeDaxSpec':
        """Read the flavor's extra specs.

        ``fakedax:disks`` and ``fakedax:volumes`` name disks; others of the
        namespace only say more about them. A flavor that names no disk is
        refused: somebody meant fake DAX, and would get ordinary disks. The
        API cannot refuse it, as Nova's validators see one extra spec at a
        time.

        :raises InvalidSpec: an extra spec of the namespace is unknown or
            has an unknown value, which the API rejects as well, but only
            since microversion 2.86 and only where this package is
            installed; or no disk is named
        """
        extra_specs = given(flavor)
        for key, value in extra_specs.items():
            check_extra_spec(key, value)
        if not extra_specs:
            return cls()
        wanted = cls(
            (DISKS_VALUES[extra_specs[DISKS_KEY]]
             if DISKS_KEY in extra_specs else frozenset()),
            MEMMAP_VALUES[extra_specs.get(MEMMAP_KEY, MEMMAP_DEFAULT)],
            extra_specs.get(VOLUMES_KEY, NO_VOLUMES))
        if not wanted:
            raise InvalidSpec(
                f"the flavor has {', '.join(sorted(extra_specs))}, but not "
                f"{DISKS_KEY}; allowed: {DISKS_KEY} with "
                f"{_quoted(DISKS_VALUES)}, or {VOLUMES_KEY} with "
                f"{_quoted(VOLUMES_VALUES[1:])}")
        return wanted

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
        self._check_ram(flavor)
        for conflict, (key, value) in itertools.product(
                CONFLICTS, flavor.extra_specs.items()):
            if conflict.keys.fullmatch(key) and conflict.asked_by(value):
                raise InvalidSpec(
                    f"{key}='{value}' is incompatible with {DISKS_KEY}: "
                    f"{conflict.why}")

    def _check_ram(self, flavor: Flavor) -> None:
        """Check that the guest's RAM holds the memmap, if it is there.

        :raises InvalidSpec: names what it takes and what is allowed
        """
        disks: int = sum(
            getattr(flavor, role.flavor_field) for role in self.roles)
        least = disks * _MEMMAP_MIB + _LEAST_RAM_MIB
        if not self.memmap and flavor.memory_mb < least:
            raise InvalidSpec(
                f"the flavor's RAM is {flavor.memory_mb} MiB, and with "
                f"{MEMMAP_KEY}='guest' {disks} GiB of disk take "
                f"{disks * _MEMMAP_MIB} MiB of it; allowed: {least} MiB or "
                f"more, or {MEMMAP_KEY}='device'")

    def check_boot(self, from_volume: bool) -> None:
        """Check that the flavor is for what the instance boots from.

        :param from_volume: whether that is a volume
        :raises InvalidSpec: names what is on fake DAX, and what to do
        """
        if from_volume and disk.ROOT in self.roles and (
                not self.wants_volume(root=True)):
            raise InvalidSpec(
                f"{DISKS_KEY} names the root disk, but the server boots from "
                f"a volume; allowed: an image, or a flavor with "
                f"{VOLUMES_KEY}='{BOOT_VOLUME}' as well")
        if not from_volume and disk.ROOT not in self.roles and (
                self.volumes == BOOT_VOLUME):
            raise InvalidSpec(
                f"{VOLUMES_KEY} names the root volume, but the server boots "
                f"from an image; allowed: a volume, or a flavor with "
                f"{DISKS_KEY}='{disk.ROOT}' as well")

    def check_volumes_ram(self, flavor: Flavor, sizes: ty.Iterable[int],
                          ) -> None:
        """Check that the guest's RAM holds the memmap of volumes.

        Their content stays at byte 0, as a volume may be attached to any
        server; so their struct pages are the guest's. And so are those of the
        other disks, where the flavor wants that.

        :param sizes: the bytes of volumes that have no memmap
        :raises InvalidSpec: names what it takes and what is allowed
        """
        volumes = sum(sizes) / units.Gi
        files = 0 if self.memmap else sum(
            getattr(flavor, role.flavor_field) for role in self.roles)
        taken = math.ceil((volumes + files) * _MEMMAP_MIB)
        if volumes and flavor.memory_mb < taken + _LEAST_RAM_MIB:
            raise InvalidSpec(
                f"the flavor's RAM is {flavor.memory_mb} MiB, and "
                f"{volumes:.3g} GiB of volumes and {files} GiB of disk take "
                f"{taken} MiB of it; allowed: {taken + _LEAST_RAM_MIB} MiB "
                f"or more, or volumes with a memmap of their own")

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

    def check_image_conflicts(self, properties: Properties) -> None:
        """Check that what the image asks for goes with fake DAX.

        :param properties: the image's properties, by name
        :raises InvalidImage: names the property
        """
        for conflict in CONFLICTS:
            value = (properties.get(conflict.image_property)
                     if conflict.image_property else None)
            if value is not None and conflict.asked_by(str(value)):
                raise InvalidImage(
                    f"the image's property {conflict.image_property}="
                    f"'{value}' is incompatible with {DISKS_KEY}: "
                    f"{conflict.why}")

    def check_image(
        self, properties: Properties, from_volume: bool = False,
    ) -> None:
        """Check that the image's guest knows fake DAX.

        Only a root disk needs that. A guest that boots from an ordinary disk
        may use other disks on fake DAX, or ignore them.

        :param properties: the image's properties, by name, or those in the
            image metadata of a volume
        :param from_volume: whether the instance boots from a volume
        :raises InvalidImage: names the property
        """
        value = str(properties.get(IMAGE_PROPERTY, ''))
        if not self.wants_root(from_volume) or value.lower() in _TRUE:
            return
        if from_volume:
            raise InvalidImage(
                f"{VOLUMES_KEY} names the root volume, but the property "
                f"{IMAGE_PROPERTY} of its image metadata is '{value}'; "
                f"allowed: 'true', for a volume whose guest mounts its root "
                f"from /dev/pmem0")
        raise InvalidImage(
            f"{DISKS_KEY} names the root disk, but the image's property "
            f"{IMAGE_PROPERTY} is '{value}'; allowed: 'true', for an "
            f"image whose guest mounts its root from /dev/pmem0")
