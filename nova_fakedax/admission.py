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
from collections.abc import Sequence

from nova import exception
from nova import objects
from nova.virt.libvirt import config as vconfig

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import evacuation
from nova_fakedax import rebuild
from nova_fakedax import spec

_IMAGE_PREFIX = 'image_'


#: Checks that a guest's addresses hold what a flavor has: addresses.check().
CheckAddresses = Callable[['objects.Flavor'], None]


def check_build(
    instance: objects.Instance, reasons_against: Sequence[str],
    check_addresses: CheckAddresses,
) -> None:
    """Check an instance's flavor, image and host before anything is made.

    :param reasons_against: of this host, as of capability.reasons_against
    :raises nova.exception.InvalidInput: no host can run the flavor
    :raises nova.exception.ImageUnacceptable: no host can run it with this
        image
    :raises nova.exception.ComputeResourcesUnavailable: this host cannot
    """
    try:
        wanted = spec.FakeDaxSpec.from_flavor(instance.flavor)
        if not wanted:
            return
        wanted.check_flavor(instance.flavor)
        properties = _image_properties(instance)
        wanted.check_image_conflicts(properties)
        wanted.check_image(properties)
    except spec.InvalidImage as exc:
        raise exception.ImageUnacceptable(
            image_id=instance.image_ref, reason=str(exc))
    except spec.InvalidSpec as exc:
        raise exception.InvalidInput(reason=str(exc))
    if reasons_against:
        raise exception.ComputeResourcesUnavailable(
            reason='; '.join(reasons_against))
    check_addresses(instance.flavor)


def check_rebuild(
    instance: objects.Instance, reasons_against: Sequence[str],
    check_addresses: CheckAddresses,
    evacuated_from: evacuation.Hosts | None,
) -> None:
    """Check a rebuild before ComputeManager destroys the disks.

    :param evacuated_from: the hosts one of which the instance comes from, if
        that has failed
    :raises rebuild.RebuildRefused: holds what is wrong
    """
    if not spec.FakeDaxSpec.from_instance(instance):
        return
    try:
        check_build(instance, reasons_against, check_addresses)
        if evacuated_from:
            evacuated_from.check_gone(instance)
    except exception.NovaException as exc:
        raise rebuild.RebuildRefused(exc)


def check_resize(
    instance: objects.Instance, flavor: objects.Flavor, paths: Iterable[str],
    check_addresses: CheckAddresses,
) -> None:
    """Check a new flavor while the guest still runs.

    :param paths: of the files of the instance's disks
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
        new.check_image(properties)
        # Nova makes the ephemeral disk that an instance does not have yet.
        new.check_disks({disk.EPHEMERAL} | {
            found.role for found in map(disk.DiskId.from_path, paths)
            if found})
        check_addresses(flavor)
    except (spec.InvalidSpec, exception.InvalidInput) as exc:
        raise exception.InstanceFaultRollback(
            exception.ResizeError(reason=str(exc)))


def check_disks(
    wanted: spec.FakeDaxSpec, guest: vconfig.LibvirtConfigGuest,
) -> None:
    """Check that a guest has all disks that the flavor puts on fake DAX.

    :param guest: as nova_fakedax.domain.convert leaves it
    :raises nova.exception.InvalidInput: names the disk that is missing
    """
    try:
        wanted.check_disks({
            found.id.role for found, _device in domain.fake_dax_disks(guest)})
    except spec.InvalidSpec as exc:
        raise exception.InvalidInput(reason=str(exc))


def _image_properties(instance: objects.Instance) -> dict[str, str]:
    """The properties of the instance's image.

    The instance keeps all of them (nova.utils.get_system_metadata_from_image);
    nova.objects.ImageMeta drops those that Nova does not know.
    """
    return {key.removeprefix(_IMAGE_PREFIX): value
            for key, value in instance.system_metadata.items()
            if key.startswith(_IMAGE_PREFIX)}
