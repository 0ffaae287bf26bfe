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

"""Whether an instance may be built, rebuilt or resized as asked.

Turns what :mod:`.spec` refuses into Nova's exceptions: those that make
ComputeManager give up at once where no host could run it, and the one that
makes it try another host where only this one cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import typing as ty

from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt import config as vconfig

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import evacuation
from nova_fakedax import rebuild
from nova_fakedax import spec
from nova_fakedax import volumes

_IMAGE_PREFIX = 'image_'


#: Checks that a guest's addresses hold what a flavor has: addresses.check().
CheckAddresses = Callable[['objects.Flavor'], None]

#: Asks how a volume is encrypted: LibvirtDriver._get_volume_encryption().
Encryption = Callable[[Mapping[str, ty.Any]], Mapping[str, ty.Any]]


def check_build(
    instance: objects.Instance, reasons_against: Sequence[str],
    check_addresses: CheckAddresses,
    attached: Sequence[volumes.Volume] = (),
    encryption: Encryption = lambda _connection_info: {},
) -> None:
    """Check an instance's flavor, image and host before anything is made.

    :param reasons_against: of this host, as of capability.reasons_against
    :param attached: all volumes of the instance
    :param encryption: of one of them, by its connection_info
    :raises nova.exception.InvalidInput: no host can run the flavor, or map
        one of the volumes
    :raises nova.exception.ImageUnacceptable: no host can run it with this
        image
    :raises nova.exception.ComputeResourcesUnavailable: this host cannot
    """
    try:
        wanted = spec.FakeDaxSpec.from_flavor(instance.flavor)
        if not wanted:
            return
        wanted.check_flavor(instance.flavor)
        from_volume = any(volume.root for volume in attached)
        wanted.check_boot(from_volume)
        properties = _image_properties(instance)
        wanted.check_image_conflicts(properties)
        wanted.check_image(properties, from_volume)
    except spec.InvalidImage as exc:
        raise exception.ImageUnacceptable(
            image_id=instance.image_ref or _('of the root volume'),
            reason=str(exc))
    except spec.InvalidSpec as exc:
        raise exception.InvalidInput(reason=str(exc))
    for volume in attached:
        if wanted.wants_volume(volume.root):
            check_volume(volume, encryption)
    if reasons_against:
        raise exception.ComputeResourcesUnavailable(
            reason='; '.join(reasons_against))
    check_addresses(instance.flavor)


def check_volume(volume: volumes.Volume, encryption: Encryption) -> None:
    """Check a volume before it is connected.

    :param encryption: as for :func:`check_build`
    :raises nova_fakedax.volumes.VolumeRefused: it cannot be mapped
    """
    said = volume.connection_info
    encrypted = (said.get('data') or {}).get('encrypted')
    volumes.check_connection(
        volume.id, said, encryption(said) if encrypted else None)


def check_rebuild(
    instance: objects.Instance, reasons_against: Sequence[str],
    check_addresses: CheckAddresses,
    evacuated_from: evacuation.Hosts | None,
    attached: Sequence[volumes.Volume] = (),
    encryption: Encryption = lambda _connection_info: {},
) -> None:
    """Check a rebuild before ComputeManager destroys the disks.

    :param evacuated_from: the hosts one of which the instance comes from, if
        that has failed
    :param attached: as for :func:`check_build`
    :param encryption: likewise
    :raises rebuild.RebuildRefused: holds what is wrong
    """
    if not spec.FakeDaxSpec.from_instance(instance):
        return
    try:
        check_build(instance, reasons_against, check_addresses, attached,
                    encryption)
        if evacuated_from:
            evacuated_from.check_gone(instance)
    except exception.NovaException as exc:
        raise rebuild.RebuildRefused(exc)


def check_resize(
    instance: objects.Instance, flavor: objects.Flavor, paths: Iterable[str],
    check_addresses: CheckAddresses,
    attached: Sequence[volumes.Volume] = (),
    encryption: Encryption = lambda _connection_info: {},
) -> None:
    """Check a new flavor while the guest still runs.

    :param paths: of the files of the instance's disks
    :param attached: as for :func:`check_build`
    :param encryption: likewise
    :raises nova.exception.InstanceFaultRollback: the instance does not fit it;
        holds a nova.exception.ResizeError
    """
    try:
        new = spec.FakeDaxSpec.from_flavor(flavor)
        if not new:
            return
        new.check_flavor(flavor)
        properties = _image_properties(instance)
        new.check_image_conflicts(properties)
        from_volume = any(volume.root for volume in attached)
        new.check_boot(from_volume)
        new.check_image(properties, from_volume)
        # Nova makes the ephemeral disk that an instance does not have yet.
        new.check_disks({disk.EPHEMERAL} | _root_volume(from_volume) | {
            found.role for found in map(disk.DiskId.from_path, paths)
            if found})
        wanted = [volume for volume in attached
                  if new.wants_volume(volume.root)]
        for volume in wanted:
            check_volume(volume, encryption)
        new.check_volumes_ram(flavor, volumes.sizes_without_memmap(wanted))
        check_addresses(flavor)
    except (spec.InvalidSpec, exception.InvalidInput) as exc:
        raise exception.InstanceFaultRollback(
            exception.ResizeError(reason=str(exc)))


def check_disks(
    wanted: spec.FakeDaxSpec, guest: vconfig.LibvirtConfigGuest,
    attached: Sequence[volumes.Volume] = (),
) -> None:
    """Check that a guest has all disks that the flavor puts on fake DAX.

    :param guest: as nova_fakedax.domain.convert leaves it
    :param attached: the volumes on fake DAX
    :raises nova.exception.InvalidInput: names the disk that is missing
    """
    try:
        wanted.check_disks({
            found.id.role for found, _device in domain.fake_dax_disks(guest)
        } | _root_volume(any(volume.root for volume in attached)))
    except spec.InvalidSpec as exc:
        raise exception.InvalidInput(reason=str(exc))


def check_ram(
    flavor: objects.Flavor, guest: vconfig.LibvirtConfigGuest,
) -> None:
    """Check that a guest's RAM holds the memmap of its volumes.

    Which can be read now, as they are connected.

    :param guest: as for :func:`check_disks`
    :raises nova.exception.InvalidInput: names what it takes
    """
    try:
        spec.FakeDaxSpec.from_flavor(flavor).check_volumes_ram(
            flavor, volumes.without_memmap(
                found for found, _device in domain.fake_dax_volumes(guest)))
    except spec.InvalidSpec as exc:
        raise exception.InvalidInput(reason=str(exc))


def _root_volume(from_volume: bool) -> set[disk.Role]:
    """The disk that a root volume is there in place of."""
    return {disk.ROOT} if from_volume else set()


def _image_properties(instance: objects.Instance) -> dict[str, str]:
    """The properties of the instance's image.

    The instance keeps all of them (nova.utils.get_system_metadata_from_image);
    nova.objects.ImageMeta drops those that Nova does not know.
    """
    return {key.removeprefix(_IMAGE_PREFIX): value
            for key, value in instance.system_metadata.items()
            if key.startswith(_IMAGE_PREFIX)}
