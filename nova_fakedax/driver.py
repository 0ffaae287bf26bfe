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

"""The compute driver: which disk, which hook.

Each override follows the method of nova.virt.libvirt.driver.LibvirtDriver
34.0 whose name it has, and calls a room of this package. The file, disk and
block device names of Nova stay as they are: an instance's disks are made
raw, and turned from ``<disk>`` into ``<memory>`` as the last step of making
a domain.
"""

from __future__ import annotations

import functools
import glob
import typing as ty

from lxml import etree
from nova import block_device
from nova.compute import power_state
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova.network import model as network_model
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging
from oslo_serialization import jsonutils

from nova_fakedax import capability
from nova_fakedax import conf
from nova_fakedax import domain
from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import migration
from nova_fakedax import recovery
from nova_fakedax import refusals
from nova_fakedax import snapshot
from nova_fakedax import spec

CONF = nova_conf.CONF
conf.register_opts(CONF)
LOG = logging.getLogger(__name__)

_IMAGE_PREFIX = 'image_'


def _hook_guest_parser() -> None:
    """Let every reader of a domain see its disks on fake DAX.

    Wraps nova.virt.libvirt.config.LibvirtConfigGuest.parse_dom. The method
    is wrapped and not the class replaced, since the class's methods name it
    in super().
    """
    parse_dom = vconfig.LibvirtConfigGuest.parse_dom

    @functools.wraps(parse_dom)
    def parse_dom_and_virtio_pmems(
        self: vconfig.LibvirtConfigGuest, xmldoc: etree._Element,
    ) -> None:
        parse_dom(self, xmldoc)
        domain.parse_virtio_pmems(self, xmldoc)

    vconfig.LibvirtConfigGuest.parse_dom = parse_dom_and_virtio_pmems


_hook_guest_parser()


def _hook_find_disk() -> None:
    """Let a snapshot find a root disk that is no ``<disk>``.

    Wraps nova.virt.libvirt.utils.find_disk, which takes the first ``<disk>``
    of a domain: the root disk's boot view, but without one that may be the
    config drive.
    """
    find_disk = libvirt_utils.find_disk

    @functools.wraps(find_disk)
    def find_disk_or_virtio_pmem(
        guest: libvirt_guest.Guest,
    ) -> tuple[str, str | None]:
        for disk, _device in domain.fake_dax_disks(guest.get_config()):
            if disk.id.role == 'root':
                return disk.path, 'raw'
        found: tuple[str, str | None] = find_disk(guest)
        return found

    libvirt_utils.find_disk = find_disk_or_virtio_pmem


_hook_find_disk()


def _spec(instance: objects.Instance) -> spec.FakeDaxSpec:
    """What the instance's flavor asks for; nothing if it cannot be read."""
    try:
        return spec.FakeDaxSpec.from_flavor(instance.flavor)
    except spec.InvalidSpec:
        # The build was refused: there are no such disks.
        return spec.FakeDaxSpec()


def _image_paths(instance: objects.Instance) -> list[str]:
    """The backing files of the instance's disks on fake DAX."""
    wanted = _spec(instance)
    directory = libvirt_utils.get_instance_path(instance)
    return [path for path in sorted(glob.glob(f'{directory}/disk*'))
            if wanted.wants(path)]


class FakeDaxDriver(driver.LibvirtDriver):
    """A LibvirtDriver whose flavors can have disks on fake DAX."""

    def __init__(self, virtapi: ty.Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self.image_backend = imagebackend.FakeDaxBackend(CONF.use_cow_images)
        #: Why this host cannot run fake DAX; found out by init_host.
        self._reasons_against: list[str] = ['nova-compute is starting']
        #: Why such instances cannot migrate from and to it.
        self._migration_reasons_against = self._reasons_against

    # What this host can do.

    def init_host(self, host: str) -> None:
        super().init_host(host)
        self._reasons_against = capability.reasons_against(
            CONF, self._host)
        if self._reasons_against:
            LOG.warning(
                'This host cannot run flavors with %(namespace)s:* extra '
                'specs and does not report the trait %(trait)s: %(reasons)s',
                {'namespace': spec.NAMESPACE, 'trait': spec.TRAIT,
                 'reasons': '; '.join(self._reasons_against)})
        self._migration_reasons_against = (
            self._reasons_against
            or capability.migration_reasons_against(CONF, self._host))
        if self._migration_reasons_against and not self._reasons_against:
            LOG.info(
                'Live migration of instances with disks on fake DAX is off '
                'on this host: %s', '; '.join(self._migration_reasons_against))

    def process_instances_at_startup(
        self, context: nova_context.RequestContext,
        instances: objects.InstanceList,
    ) -> objects.InstanceList:
        """Leave out instances whose guests have left for another host.

        And let those run on that stood still when nova-compute died.
        """
        instances = super().process_instances_at_startup(context, instances)
        instances.objects = [
            instance for instance in instances
            if not self._has_departed(context, instance)]
        for instance in instances:
            if _spec(instance):
                snapshot.resume_interrupted(self, context, instance)
        return instances

    def _has_departed(
        self, context: nova_context.RequestContext,
        instance: objects.Instance,
    ) -> bool:
        if not _spec(instance) or self.instance_exists(instance):
            return False
        departure = recovery.departure(context, instance)
        if departure is None or not recovery.runs_at(
                self._host, self._live_migration_uri(departure.dest_compute),
                instance):
            return False
        recovery.finish(context, instance, departure, self.virtapi._compute)
        return True

    def update_provider_tree(
        self, provider_tree: ty.Any, nodename: str,
        allocations: ty.Any = None,
    ) -> None:
        super().update_provider_tree(provider_tree, nodename, allocations)
        # LibvirtDriver.static_traits drops CUSTOM_* traits; and the driver
        # keeps a copy of the tree of its own.
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
        """Say to scheduler.FakeDaxFilter that this driver is in use.

        ResourceTracker._copy_resources makes the compute node's statistics
        anew from what the driver gives.
        """
        resources: dict[str, ty.Any] = super().get_available_resource(nodename)
        if not self._reasons_against:
            resources.setdefault('stats', {})[spec.STATISTIC] = spec.SUPPORTED
        return resources

    # Making an instance.

    def spawn(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
        injected_files: ty.Any, admin_password: ty.Any, allocations: ty.Any,
        network_info: ty.Any = None, block_device_info: ty.Any = None,
        power_on: bool = True, accel_info: ty.Any = None,
    ) -> None:
        self._check_build(instance)
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
        """Check, then leave it to ComputeManager._rebuild_default_impl.

        That destroys the disks first and makes new ones by spawn(). It is
        also how ComputeManager evacuates an instance to this host.
        """
        if _spec(instance):
            try:
                if evacuate:
                    raise refusals.refused('evacuate')
                self._check_build(instance)
            except exception.NovaException as exc:
                raise exception.InstanceFaultRollback(exc)
        super().rebuild(
            context, instance, image_meta, injected_files, admin_password,
            allocations, bdms, detach_block_devices, attach_block_devices,
            network_info, evacuate, block_device_info, preserve_ephemeral,
            accel_uuids, reimage_boot_volume)

    def _check_build(self, instance: objects.Instance) -> None:
        """Check what is to be built before anything is made.

        The image's properties are read from the instance, which keeps all
        of them; nova.objects.ImageMeta drops those that Nova does not know.

        :raises nova.exception.InvalidInput: no host can run the flavor
        :raises nova.exception.ImageUnacceptable: nor with this image
        :raises nova.exception.ComputeResourcesUnavailable: this host cannot
        """
        properties = {
            key.removeprefix(_IMAGE_PREFIX): value
            for key, value in instance.system_metadata.items()
            if key.startswith(_IMAGE_PREFIX)}
        try:
            wanted = spec.FakeDaxSpec.from_flavor(instance.flavor)
            if not wanted:
                return
            wanted.check_flavor(instance.flavor)
            wanted.check_image(properties)
        except spec.InvalidImage as exc:
            raise exception.ImageUnacceptable(
                image_id=instance.image_ref, reason=str(exc))
        except spec.InvalidSpec as exc:
            raise exception.InvalidInput(reason=str(exc))
        if self._reasons_against:
            raise exception.ComputeResourcesUnavailable(
                reason='; '.join(self._reasons_against))

    def _get_guest_config(
        self, instance: objects.Instance, network_info: ty.Any,
        image_meta: objects.ImageMeta, disk_info: ty.Any,
        rescue: ty.Any = None, *args: ty.Any, **kwargs: ty.Any,
    ) -> vconfig.LibvirtConfigGuest:
        guest = super()._get_guest_config(
            instance, network_info, image_meta, disk_info, rescue, *args,
            **kwargs)
        wanted = _spec(instance)
        # A rescue image need not know fake DAX: it gets ordinary disks.
        if wanted and not rescue:
            domain.convert(
                guest, libvirt_utils.get_instance_path(instance),
                wanted.wants, CONF.fakedax.emulator)
            try:
                wanted.check_disks({
                    disk.id.role
                    for disk, _device in domain.fake_dax_disks(guest)})
            except spec.InvalidSpec as exc:
                raise exception.InvalidInput(reason=str(exc))
        return guest

    # Reading it back.

    def _get_instance_disk_info_from_config(
        self, guest_config: vconfig.LibvirtConfigGuest,
        block_device_info: ty.Any,
    ) -> list[dict[str, ty.Any]]:
        disks: list[dict[str, ty.Any]] = (
            super()._get_instance_disk_info_from_config(
                guest_config, block_device_info))
        # The root disk's boot view is in the list already.
        known = {info['path'] for info in disks}
        for disk, _device in domain.fake_dax_disks(guest_config):
            if disk.path not in known:
                disks.append({
                    'type': 'raw', 'path': disk.path, 'backing_file': '',
                    'virt_disk_size': disk.size, 'disk_size': disk.size,
                    'over_committed_disk_size': 0})
        return disks

    def _build_device_metadata(
        self, context: nova_context.RequestContext,
        instance: objects.Instance,
    ) -> objects.InstanceDeviceMetadata | None:
        """Give tagged disks on fake DAX the address of their pmem device.

        LibvirtDriver gives the root disk that of its boot view, and the
        ephemeral disks none.
        """
        metadata = super()._build_device_metadata(context, instance)
        if not _spec(instance):
            return metadata
        guest = self._host.get_guest(instance).get_config()
        bdms = objects.BlockDeviceMappingList.get_by_instance_uuid(
            context, instance.uuid)
        ephemerals = [
            bdm for bdm in bdms if block_device.new_format_is_ephemeral(bdm)]
        devices = metadata.devices if metadata else []
        for number, (disk, device) in enumerate(
                domain.fake_dax_disks(guest)):
            if disk.id.role == 'root':
                bdm = next((bdm for bdm in bdms if bdm.is_root), None)
            else:
                bdm = (ephemerals[disk.id.index]
                       if disk.id.index < len(ephemerals) else None)
            if bdm is None or not bdm.tag:
                continue
            devices = [other for other in devices
                       if getattr(other, 'tags', None) != [bdm.tag]]
            devices.append(objects.DiskMetadata(
                tags=[bdm.tag], path=f'/dev/pmem{number}',
                bus=self._prepare_device_bus(device)))
        return (objects.InstanceDeviceMetadata(devices=devices)
                if devices else None)

    # Turning it off.

    def power_off(
        self, instance: objects.Instance, timeout: int = 0,
        retry_interval: int = 0,
    ) -> None:
        super().power_off(instance, timeout, retry_interval)
        # What a guest has stored outlives QEMU only in this host's memory.
        for path in _image_paths(instance):
            hostcache.flush(path)

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
        migrate_data = super().check_can_live_migrate_destination(
            context, instance, src_compute_info, dst_compute_info,
            block_migration, disk_over_commit)
        if wanted:
            migration.offer_machines(
                migrate_data, capability.machines(CONF, self._host))
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
            migration.check_machine(dest_check_data, guest)
        migrate_data = super().check_can_live_migrate_source(
            context, instance, dest_check_data, block_device_info)
        if wanted:
            migration.check_storage(migrate_data)
        return migrate_data

    def _live_migration_operation(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, dest: str, block_migration: bool,
        migrate_data: ty.Any, guest: ty.Any, device_names: ty.Any,
    ) -> None:
        try:
            with migration.preflush(_image_paths(instance)):
                super()._live_migration_operation(
                    context, instance, dest, block_migration, migrate_data,
                    guest, device_names)
        except driver.libvirt.libvirtError:
            # Logged by then. LibvirtDriver._live_migration would raise it
            # once more after its monitor has seen the guest run on here and
            # rolled back, and ComputeManager._do_live_migration would put a
            # healthy instance into ERROR.
            if not _spec(instance):
                raise

    def post_live_migration_at_source(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, network_info: ty.Any,
    ) -> None:
        super().post_live_migration_at_source(context, instance, network_info)
        migration.forget(_image_paths(instance))

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
        """Refuse a flavor that the disks do not fit while the guest runs."""
        try:
            wanted = spec.FakeDaxSpec.from_flavor(flavor)
            _spec(instance).check_resize(wanted)
            if wanted:
                wanted.check_flavor(flavor)
        except spec.InvalidSpec as exc:
            raise exception.InstanceFaultRollback(
                exception.ResizeError(reason=str(exc)))
        return super().migrate_disk_and_power_off(
            context, instance, dest, flavor, network_info, block_device_info,
            timeout, retry_interval)

    def finish_migration(
        self, context: nova_context.RequestContext,
        migration: objects.Migration, instance: objects.Instance,
        disk_info: str, network_info: ty.Any,
        image_meta: objects.ImageMeta, resize_instance: bool,
        allocations: dict[str, ty.Any],
        block_device_info: dict[str, ty.Any] | None = None,
        power_on: bool = True, share_info: ty.Any = None,
    ) -> None:
        wanted = _spec(instance)
        if wanted:
            self._check_build(instance)
            # Of a raw disk LibvirtDriver would make a qcow2 one.
            disk_info = jsonutils.dumps([
                info for info in jsonutils.loads(disk_info)
                if not wanted.wants(info['path'])])
        # What the guest has synced is to be in the copy when it is the only
        # one.
        for path in _image_paths(instance):
            hostcache.flush(path)
        super().finish_migration(
            context, migration, instance, disk_info, network_info, image_meta,
            resize_instance, allocations, block_device_info, power_on,
            share_info)

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
        """Where Nova is told not to take snapshots of guests that run.

        Nova saves and restores such a guest; ours need only stand still.
        """
        if not _spec(instance).wants('disk'):
            super()._suspend_guest_for_snapshot(
                context, live_snapshot, current_power_state, instance)
        elif self._needs_suspend_resume_for_snapshot(
                live_snapshot, current_power_state):
            snapshot.stop_vcpus(self._host, self._host.get_guest(instance))

    def _resume_guest_after_snapshot(
        self, context: nova_context.RequestContext, live_snapshot: bool,
        original_power_state: int, instance: objects.Instance,
        guest: libvirt_guest.Guest,
    ) -> None:
        if not _spec(instance).wants('disk'):
            super()._resume_guest_after_snapshot(
                context, live_snapshot, original_power_state, instance, guest)
        elif (not live_snapshot
                and original_power_state == power_state.RUNNING):
            guest.resume()

    # Saving its memory.

    def suspend(
        self, context: nova_context.RequestContext,
        instance: objects.Instance,
    ) -> None:
        if _spec(instance) and not migration.keeps_state(
                self._host.get_guest(instance)):
            raise exception.InstanceFaultRollback(refusals.refused('suspend'))
        super().suspend(context, instance)

    # What is not right yet: refusals.REFUSED says why.

    def attach_interface(
        self, context: nova_context.RequestContext,
        instance: objects.Instance, image_meta: objects.ImageMeta,
        vif: ty.Any,
    ) -> None:
        if (vif['vnic_type'] in network_model.VNIC_TYPES_DIRECT_PASSTHROUGH
                and _spec(instance)):
            raise refusals.refused('attach of a passed-through interface')
        super().attach_interface(context, instance, image_meta, vif)
