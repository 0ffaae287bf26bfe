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

"""The compute driver: overrides that call the modules below it.

Each override follows the method of nova.virt.libvirt.driver.LibvirtDriver
34.0 whose name it has. Nova's names of files, disks and block devices stay as
they are: an instance's disks are made raw, and turned from ``<disk>`` into
``<memory>`` as the last step of making a domain.
"""

from __future__ import annotations

import functools
import itertools
import typing as ty

from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova.network import model as network_model
from nova import objects
from nova.virt import block_device
from nova.virt import driver as virt_driver
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import utils as libvirt_utils

from nova_fakedax import addresses
from nova_fakedax import admission
from nova_fakedax import capability
from nova_fakedax import departure
from nova_fakedax import diagnostics
from nova_fakedax import domain
from nova_fakedax import evacuation
from nova_fakedax import hooks
from nova_fakedax import hotplug
from nova_fakedax import imagebackend
from nova_fakedax import metadata
from nova_fakedax import migration
from nova_fakedax import quiesce
from nova_fakedax import refusals
from nova_fakedax import resize
from nova_fakedax import snapshot
from nova_fakedax import spec
from nova_fakedax import volumes

CONF = nova_conf.CONF


def _spec(instance: objects.Instance) -> spec.FakeDaxSpec:
    return spec.FakeDaxSpec.from_instance(instance)


def _volume_spec(instance: objects.Instance) -> spec.FakeDaxSpec:
    """As :func:`_spec`; nothing of an instance whose flavor is not known.

    Nova's own code and tests know no more than the ID of some, where volumes
    are connected and disconnected, or Cinder takes snapshots.
    """
    try:
        known = getattr(instance, 'flavor', None)
    except exception.OrphanedObjectError:
        known = None
    return _spec(instance) if known else spec.FakeDaxSpec()


def _attached(
    flavor: objects.Flavor, block_device_info: ty.Any,
) -> list[volumes.Volume]:
    """The volumes of an instance, if the flavor is one for fake DAX."""
    return volumes.attached(block_device_info) if spec.given(flavor) else []


class FakeDaxDriver(driver.LibvirtDriver):
    """A LibvirtDriver whose flavors can have disks on fake DAX."""

    def __init__(self, virtapi: ty.Any, read_only: bool = False) -> None:
        hooks.install()
        super().__init__(virtapi, read_only)
        self.image_backend = imagebackend.FakeDaxBackend(CONF.use_cow_images)
        self.image_backend.nothing_stored = (
            lambda instance: snapshot.vcpus_stopped(
                self._host, self._host.get_guest(instance), instance))
        self._hosts = evacuation.Hosts(CONF.instances_path, CONF.host)
        #: Why this host cannot run fake DAX; init_host() finds out.
        self._reasons_against: list[str] = ['nova-compute is starting']
        #: Why such instances cannot migrate from and to it.
        self._migration_reasons_against = self._reasons_against
        #: Why they cannot be evacuated from and to it.
        self._evacuation_reasons_against = self._reasons_against

    # What this host can do.

    def init_host(self, host: str) -> None:
        super().init_host(host)
        self._reasons_against = capability.reasons_against(CONF, self._host)
        self._migration_reasons_against = (
            self._reasons_against
            or capability.migration_reasons_against(CONF, self._host))
        self._evacuation_reasons_against = (
            self._reasons_against
            or capability.evacuation_reasons_against(CONF, self._host))
        capability.log(
            self._reasons_against, self._migration_reasons_against)

    def process_instances_at_startup(
        self, context: nova_context.RequestContext,
        instances: objects.InstanceList,
    ) -> objects.InstanceList:
        """Take up what nova-compute was doing when it died.

        :returns: the instances without those whose guests have left for
            another host
        """
        instances = super().process_instances_at_startup(context, instances)
        instances.objects = [
            instance for instance in instances if not departure.complete(
                context, instance, self, self._live_migration_uri)]
        for instance in instances:
            if _spec(instance):
                snapshot.resume_interrupted(self, context, instance)
                quiesce.resume_interrupted(self, context, instance)
        return instances

    def update_provider_tree(
        self, provider_tree: ty.Any, nodename: str,
        allocations: ty.Any = None,
    ) -> None:
        """Report the traits.

        LibvirtDriver.static_traits drops CUSTOM_* traits, and the driver
        keeps a copy of the tree of its own.
        """
        super().update_provider_tree(provider_tree, nodename, allocations)
        for tree in (provider_tree, self.provider_tree):
            for trait, reasons_against in (
                (spec.TRAIT, self._reasons_against),
                (spec.MIGRATION_TRAIT, self._migration_reasons_against),
            ):
                if reasons_against:
                    tree.remove_traits(nodename, trait)
                else:
                    tree.add_traits(nodename, trait)

    def get_available_resource(self, nodename: str) -> dict[str, ty.Any]:
        """Report to scheduler.FakeDaxFilter that this driver is in use.

        Or why it does not run fake DAX here. A periodic task, which also
        shows other hosts that this one is alive.
        ResourceTracker._copy_resources replaces the compute node's statistics
        by what the driver gives.
        """
        if not self._evacuation_reasons_against:
            self._hosts.look()
        resources: dict[str, ty.Any] = super().get_available_resource(nodename)
        resources.setdefault('stats', {})[spec.STATISTIC] = (
            '; '.join(self._reasons_against) or spec.SUPPORTED)
        return resources

    # Making an instance.

    def _check_build(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, block_device_info: ty.Any,
    ) -> None:
        admission.check_build(
            instance, self._reasons_against,
            self._check_addresses(instance, block_device_info),
            _attached(instance.flavor, block_device_info),
            self._encryption(context))

    def _encryption(
        self, context: nova_context.RequestContext,
    ) -> admission.Encryption:
        return functools.partial(self._get_volume_encryption, context)

    def _check_addresses(
        self, instance: objects.Instance, block_device_info: ty.Any,
    ) -> admission.CheckAddresses:
        """The check of a flavor for this instance, on this host."""
        def check(flavor: objects.Flavor) -> None:
            image_meta = instance.image_meta
            addresses.check(
                CONF, self._host, flavor,
                self._get_guest_cpu_config(flavor, image_meta, None, None),
                libvirt_utils.get_machine_type(image_meta),
                volumes.attached(block_device_info))

        return check

    def spawn(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
        injected_files: ty.Any, admin_password: ty.Any, allocations: ty.Any,
        network_info: ty.Any = None, block_device_info: ty.Any = None,
        power_on: bool = True, accel_info: ty.Any = None,
    ) -> None:
        self._check_build(context, instance, block_device_info)
        super().spawn(
            context, instance, image_meta, injected_files, admin_password,
            allocations, network_info, block_device_info, power_on,
            accel_info)

    def rebuild(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
        injected_files: ty.Any, admin_password: ty.Any, allocations: ty.Any,
        bdms: ty.Any, detach_block_devices: ty.Any,
        attach_block_devices: ty.Any, network_info: ty.Any = None,
        evacuate: bool = False, block_device_info: ty.Any = None,
        preserve_ephemeral: bool = False, accel_uuids: ty.Any = None,
        reimage_boot_volume: bool = False,
    ) -> None:
        """Check before ComputeManager._rebuild_default_impl does it.

        Which destroys the disks first and makes new ones by spawn(). An
        evacuation to this host comes here too.
        """
        admission.check_rebuild(
            instance,
            self._evacuation_reasons_against
            if evacuate and _spec(instance).roles else self._reasons_against,
            self._check_addresses(instance, block_device_info),
            self._hosts if evacuate else None,
            volumes.attached(block_device_info), self._encryption(context))
        super().rebuild(
            context, instance, image_meta, injected_files, admin_password,
            allocations, bdms, detach_block_devices, attach_block_devices,
            network_info, evacuate, block_device_info, preserve_ephemeral,
            accel_uuids, reimage_boot_volume)

    def default_device_names_for_instance(
        self, instance: objects.Instance, root_device_name: str,
        *block_device_lists: ty.Any,
    ) -> None:
        super().default_device_names_for_instance(
            instance, root_device_name, *block_device_lists)
        self._rename_disks(instance, virt_driver.get_block_device_info(
            instance, list(itertools.chain(*block_device_lists))))

    def _rename_disks(
        self, instance: objects.Instance,
        block_device_info: dict[str, ty.Any] | None,
    ) -> None:
        """Name disks as the guest does.

        A resize may have put ephemeral disks on fake DAX, or taken them off.
        """
        wanted = _spec(instance)
        root = wanted.wants_root(volumes.boots_from_volume(block_device_info))
        first = int(root) if wanted.wants('disk.eph0') else None
        if metadata.forget_names(block_device_info, first):
            blockinfo.default_device_names(
                CONF.libvirt.virt_type, nova_context.get_admin_context(),
                instance, block_device_info, instance.image_meta)

    def _get_guest_config(
        self, instance: objects.Instance, network_info: ty.Any,
        image_meta: objects.ImageMeta, disk_info: ty.Any,
        rescue: ty.Any = None, block_device_info: ty.Any = None,
        *args: ty.Any, **kwargs: ty.Any,
    ) -> vconfig.LibvirtConfigGuest:
        guest = super()._get_guest_config(
            instance, network_info, image_meta, disk_info, rescue,
            block_device_info, *args, **kwargs)
        attached = volumes.wanted(_spec(instance), block_device_info)
        if rescue:
            domain.convert_rescue(
                guest, libvirt_utils.get_instance_path(instance),
                _spec(instance).wants, attached)
        elif _spec(instance):
            self._convert(guest, instance, attached)
            metadata.name_volumes(block_device_info, guest)
        return guest

    def _convert(
        self, guest: vconfig.LibvirtConfigGuest, instance: objects.Instance,
        attached: list[volumes.Volume],
    ) -> None:
        """Put the disks of a guest on fake DAX that the flavor wants there.

        :param attached: the volumes among them
        """
        wanted = _spec(instance)
        domain.convert(
            guest, libvirt_utils.get_instance_path(instance), wanted.wants,
            CONF.fakedax.emulator, capability.security_models(self._host),
            attached, domain.spare(CONF, wanted))
        admission.check_disks(wanted, guest, attached)
        admission.check_ram(instance.flavor, guest)

    # Reading it back.

    def _get_instance_disk_info_from_config(
        self, guest_config: vconfig.LibvirtConfigGuest,
        block_device_info: ty.Any,
    ) -> list[dict[str, ty.Any]]:
        return domain.with_fake_dax_disks(
            guest_config, super()._get_instance_disk_info_from_config(
                guest_config, block_device_info))

    def _build_device_metadata(
        self, context: nova_context.RequestContext,
        instance: objects.Instance,
    ) -> objects.InstanceDeviceMetadata | None:
        """Nova's device metadata, with the addresses of pmem devices."""
        devices = super()._build_device_metadata(context, instance)
        if not _spec(instance):
            return devices
        return metadata.with_fake_dax_disks(
            devices, self._host.get_guest(instance).get_config(),
            objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, instance.uuid), self._prepare_device_bus)

    def get_instance_diagnostics(
        self, instance: objects.Instance,
    ) -> objects.Diagnostics:
        found = super().get_instance_diagnostics(instance)
        return (diagnostics.correct(found, self._host.get_guest(instance))
                if _spec(instance) else found)

    def get_diagnostics(self, instance: objects.Instance) -> dict[str, ty.Any]:
        found = super().get_diagnostics(instance)
        return (
            diagnostics.correct_legacy(found, self._host.get_guest(instance))
            if _spec(instance) else found)

    def block_stats(
        self, instance: objects.Instance, disk_id: str,
    ) -> ty.Any:
        """The figures of a ``<disk>``, unless it is only a boot view.

        Nova would take these for the use of the root volume.
        """
        if _volume_spec(instance) and diagnostics.is_boot_view(
                self._host, instance, disk_id):
            return None
        return super().block_stats(instance, disk_id)

    # Turning it off and on.

    def _volume_paths(self, instance: objects.Instance) -> list[str]:
        """The paths of the volumes on fake DAX, of the guest as it is."""
        return (domain.volume_paths(self._host, instance)
                if _spec(instance).volumes != spec.NO_VOLUMES else [])

    def reboot(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, network_info: ty.Any, reboot_type: str,
        block_device_info: ty.Any = None, bad_volumes_callback: ty.Any = None,
        accel_info: ty.Any = None, share_info: ty.Any = None,
    ) -> None:
        """Let a hard reboot repair what it can, as it does for all servers."""
        if reboot_type == 'HARD':
            imagebackend.fill_holes(instance)
        super().reboot(
            context, instance, network_info, reboot_type, block_device_info,
            bad_volumes_callback, accel_info, share_info)

    def power_off(
        self, instance: objects.Instance, timeout: int = 0,
        retry_interval: int = 0,
    ) -> None:
        paths = self._volume_paths(instance)
        failed = imagebackend.flush_early(instance, paths)
        super().power_off(instance, timeout, retry_interval)
        if failed:
            raise failed
        imagebackend.flush(instance, paths)

    def destroy(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, network_info: ty.Any,
        block_device_info: ty.Any = None, destroy_disks: bool = True,
        destroy_secrets: bool = True,
    ) -> None:
        """End the guest, also for a hard reboot."""
        # If the instance runs elsewhere by now, what is dirty here is older.
        if _spec(instance) and instance.host == self._hosts.here:
            imagebackend.flush_early(instance, self._volume_paths(instance))
        super().destroy(
            context, instance, network_info, block_device_info, destroy_disks,
            destroy_secrets)

    # Volumes that come and go.

    def _connect_volume(
        self, context: nova_context.RequestContext,
        connection_info: dict[str, ty.Any], instance: objects.Instance,
        *args: ty.Any, **kwargs: ty.Any,
    ) -> None:
        super()._connect_volume(
            context, connection_info, instance, *args, **kwargs)
        if _volume_spec(instance).wants_volume(root=True):
            hotplug.forget(connection_info)

    def _disconnect_volume(
        self, context: nova_context.RequestContext,
        connection_info: dict[str, ty.Any], instance: objects.Instance,
        *args: ty.Any, **kwargs: ty.Any,
    ) -> None:
        if _volume_spec(instance).wants_volume(root=True):
            hotplug.give_up(connection_info, instance)
        super()._disconnect_volume(
            context, connection_info, instance, *args, **kwargs)

    def attach_volume(
        self, context: nova_context.RequestContext,
        connection_info: dict[str, ty.Any], instance: objects.Instance,
        mountpoint: str, disk_bus: str | None = None,
        device_type: str | None = None, encryption: ty.Any = None,
    ) -> None:
        if _volume_spec(instance).wants_volume(root=False):
            hotplug.attach(
                self, context, connection_info, instance, mountpoint,
                disk_bus, device_type, encryption)
        else:
            super().attach_volume(
                context, connection_info, instance, mountpoint, disk_bus,
                device_type, encryption)

    def _get_guest_disk_device(
        self, guest: libvirt_guest.Guest, disk_dev: str,
        volume_uuid: str | None = None, from_persistent_config: bool = False,
    ) -> ty.Any:
        """Let a detach find the device of a volume on fake DAX."""
        return hotplug.device_of(
            guest, volume_uuid, from_persistent_config) or (
                super()._get_guest_disk_device(
                    guest, disk_dev, volume_uuid, from_persistent_config))

    def detach_volume(
        self, context: nova_context.RequestContext,
        connection_info: dict[str, ty.Any], instance: objects.Instance,
        mountpoint: str, encryption: ty.Any = None,
    ) -> None:
        if _volume_spec(instance):
            hotplug.refuse_detach(
                self._host, instance,
                block_device.get_volume_id(connection_info))
        super().detach_volume(
            context, connection_info, instance, mountpoint, encryption)

    def extend_volume(
        self, context: nova_context.RequestContext,
        connection_info: dict[str, ty.Any], instance: objects.Instance,
        requested_size: int,
    ) -> None:
        """Leave a volume of a running guest as it is.

        Cinder has extended it already, and is not told.
        """
        self._refuse(hotplug.EXTEND, instance, connection_info)
        super().extend_volume(
            context, connection_info, instance, requested_size)

    def swap_volume(
        self, context: nova_context.RequestContext,
        old_connection_info: dict[str, ty.Any],
        new_connection_info: dict[str, ty.Any], instance: objects.Instance,
        mountpoint: str, resize_to: int,
    ) -> None:
        self._refuse(hotplug.SWAP, instance, old_connection_info)
        super().swap_volume(
            context, old_connection_info, new_connection_info, instance,
            mountpoint, resize_to)

    def _refuse(
        self, operation: str, instance: objects.Instance,
        connection_info: dict[str, ty.Any],
    ) -> None:
        if _volume_spec(instance):
            hotplug.refuse(operation, self._host, instance,
                           block_device.get_volume_id(connection_info))

    def _volume_snapshot_create(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, guest: libvirt_guest.Guest,
        volume_id: str, new_file: str,
    ) -> None:
        """Refuse to turn a volume into qcow2; the caller tells Cinder."""
        if _volume_spec(instance):
            hotplug.refuse(hotplug.SNAPSHOT, self._host, instance, volume_id,
                           also_off=True)
        super()._volume_snapshot_create(
            context, instance, guest, volume_id, new_file)

    def _volume_snapshot_delete(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, volume_id: str, *args: ty.Any,
        **kwargs: ty.Any,
    ) -> None:
        if _volume_spec(instance):
            hotplug.refuse(hotplug.SNAPSHOT, self._host, instance, volume_id,
                           also_off=True)
        super()._volume_snapshot_delete(
            context, instance, volume_id, *args, **kwargs)

    # Moving it while it runs.

    def check_can_live_migrate_destination(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, src_compute_info: ty.Any,
        dst_compute_info: ty.Any, block_migration: bool | None = False,
        disk_over_commit: bool = False,
    ) -> ty.Any:
        wanted = _spec(instance)
        if wanted:
            migration.check_destination(
                CONF.host, self._migration_reasons_against, block_migration)
            machines = migration.machines(CONF, self._host)
        migrate_data = super().check_can_live_migrate_destination(
            context, instance, src_compute_info, dst_compute_info,
            block_migration, disk_over_commit)
        if wanted:
            migration.offer_machines(
                CONF.instances_path, migrate_data, machines)
        return migrate_data

    def check_can_live_migrate_source(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, dest_check_data: ty.Any,
        block_device_info: ty.Any = None,
    ) -> ty.Any:
        wanted = _spec(instance)
        if wanted:
            guest = self._host.get_guest(instance)
            migration.check_source(
                CONF.host, self._migration_reasons_against, guest)
            quiesce.check_migration(instance)
        migrate_data = super().check_can_live_migrate_source(
            context, instance, dest_check_data, block_device_info)
        if wanted:
            migration.check_storage(migrate_data)
            migration.check_machine(CONF.instances_path, migrate_data, guest)
        return migrate_data

    def _live_migration_operation(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, dest: str, block_migration: bool,
        migrate_data: ty.Any, guest: ty.Any, device_names: ty.Any,
    ) -> None:
        """Flush ahead, and leave errors to the monitor.

        An error is already logged. LibvirtDriver._live_migration would raise
        it again after its monitor has rolled back, and ComputeManager.
        _do_live_migration would put a healthy instance into ERROR.
        """
        images = [*imagebackend.image_paths(instance),
                  *self._volume_paths(instance)]
        try:
            with migration.keep_owner(images), migration.preflush(images):
                super()._live_migration_operation(
                    context, instance, dest, block_migration, migrate_data,
                    guest, device_names)
        except (driver.libvirt.libvirtError, exception.MigrationError):
            if not _spec(instance):
                raise

    def post_live_migration_at_source(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, network_info: ty.Any,
    ) -> None:
        super().post_live_migration_at_source(context, instance, network_info)
        migration.forget(imagebackend.image_paths(instance))

    def post_live_migration_at_destination(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, network_info: ty.Any,
        block_migration: bool = False, block_device_info: ty.Any = None,
    ) -> None:
        super().post_live_migration_at_destination(
            context, instance, network_info, block_migration,
            block_device_info)
        if _spec(instance):
            migration.report(
                context, CONF.host, instance, self._host.get_guest(instance))

    # Moving it while it is off.

    def migrate_disk_and_power_off(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, dest: str, flavor: objects.Flavor,
        network_info: ty.Any, block_device_info: ty.Any = None,
        timeout: int = 0, retry_interval: int = 0,
    ) -> ty.Any:
        disks = (self._get_instance_disk_info(instance, block_device_info)
                 if resize.concerns(instance.flavor, flavor) else [])
        admission.check_resize(
            instance, flavor, [info['path'] for info in disks],
            self._check_addresses(instance, block_device_info),
            _attached(flavor, block_device_info), self._encryption(context))
        with resize.copies(instance, flavor, disks):
            return super().migrate_disk_and_power_off(
                context, instance, dest, flavor, network_info,
                block_device_info, timeout, retry_interval)

    def finish_migration(
        self, context: nova_context.RequestContext,
        migration: objects.Migration, instance: objects.Instance,
        disk_info: str, network_info: ty.Any,
        image_meta: objects.ImageMeta, resize_instance: bool,
        allocations: dict[str, ty.Any],
        block_device_info: dict[str, ty.Any] | None = None,
        power_on: bool = True, share_info: ty.Any = None,
    ) -> None:
        """Flush the copies of the disks: soon they may be the only ones."""
        self._check_build(context, instance, block_device_info)
        disk_info = resize.to_convert(instance, disk_info, self.image_backend)
        imagebackend.flush(instance)
        self._rename_disks(instance, block_device_info)
        super().finish_migration(
            context, migration, instance, disk_info, network_info, image_meta,
            resize_instance, allocations, block_device_info, power_on,
            share_info)

    def finish_revert_migration(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, network_info: ty.Any,
        migration: objects.Migration,
        block_device_info: dict[str, ty.Any] | None = None,
        power_on: bool = True, share_info: ty.Any = None,
    ) -> None:
        self._rename_disks(instance, block_device_info)
        super().finish_revert_migration(
            context, instance, network_info, migration, block_device_info,
            power_on, share_info)

    # Copying it.

    def _live_snapshot(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, guest: libvirt_guest.Guest,
        disk_path: str, out_path: str, source_format: str,
        image_format: str, image_meta: objects.ImageMeta,
    ) -> None:
        if not _spec(instance).wants(disk_path):
            super()._live_snapshot(
                context, instance, guest, disk_path, out_path, source_format,
                image_format, image_meta)
            return
        snapshot.take(
            disk_path, out_path, image_format,
            snapshot.nothing_stored(
                self, context, instance, guest, image_meta))

    def _suspend_guest_for_snapshot(
        self, context: nova_context.RequestContext, live_snapshot: bool,
        current_power_state: int, instance: objects.Instance,
    ) -> None:
        """Leave the guest alone where live snapshots are switched off.

        Nova saves its memory and restores it. Here it is enough that the
        image's copy pauses the guest (FakeDaxImage.snapshot_extract).
        """
        if not _spec(instance).wants('disk'):
            super()._suspend_guest_for_snapshot(
                context, live_snapshot, current_power_state, instance)

    def _resume_guest_after_snapshot(
        self, context: nova_context.RequestContext, live_snapshot: bool,
        original_power_state: int, instance: objects.Instance,
        guest: libvirt_guest.Guest,
    ) -> None:
        if not _spec(instance).wants('disk'):
            super()._resume_guest_after_snapshot(
                context, live_snapshot, original_power_state, instance, guest)

    def quiesce(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
    ) -> None:
        """Pause a guest whose volumes Cinder takes snapshots of."""
        paths = self._volume_paths(instance)
        if paths:
            quiesce.quiesce(self, context, instance, image_meta, paths)
        else:
            super().quiesce(context, instance, image_meta)

    def unquiesce(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
    ) -> None:
        if self._volume_paths(instance):
            quiesce.unquiesce(self, context, instance, image_meta)
        else:
            super().unquiesce(context, instance, image_meta)

    # Saving its memory.

    def suspend(
        self, context: nova_context.RequestContext,
        instance: objects.Instance,
    ) -> None:
        if _spec(instance) and not migration.keeps_state(
                self._host.get_guest(instance)):
            raise exception.InstanceFaultRollback(refusals.refused('suspend'))
        super().suspend(context, instance)

    # What is not supported: refusals.REFUSED says why.

    def attach_interface(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
        vif: ty.Any,
    ) -> None:
        if (vif['vnic_type'] in network_model.VNIC_TYPES_DIRECT_PASSTHROUGH
                and _spec(instance)):
            raise refusals.refused('attach of a passed-through interface')
        super().attach_interface(context, instance, image_meta, vif)
