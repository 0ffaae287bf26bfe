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

"""Live migration on shared storage: what comes before and after.

The device does what must happen at the switchover (qemu-device/SPEC.rst): the
source syncs the image once the vCPUs have stopped; the destination drops its
cached pages of the image before they run there, and refuses the guest if it
cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import os
import stat
import threading
import typing as ty

from lxml import etree
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.privsep import path as nova_path
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import timeutils

from nova_fakedax import capability
from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import emulator
from nova_fakedax import hostcache
from nova_fakedax import layout
from nova_fakedax import monitor
from nova_fakedax import refusals

LOG = logging.getLogger(__name__)

#: The event that reports how the guest came in.
EVENT = 'fakedax_incoming'

#: Seconds between two flushes of an image whose guest is about to leave.
_FLUSH_INTERVAL = 1


def _refused(reason: str) -> exception.MigrationPreCheckError:
    return exception.MigrationPreCheckError(reason=f'Fake DAX: {reason}')


def check_destination(
    host: str, reasons_against: Sequence[str], block_migration: bool | None,
) -> None:
    """Check at the destination that it can take the guest.

    :param host: the destination's name
    :param reasons_against: as of capability.migration_reasons_against
    :param block_migration: as the user asked for it; None for automatic
    :raises nova.exception.MigrationPreCheckError: says why it cannot
    """
    if block_migration:
        raise _refused(
            'block migration does not see what the guest stores through a '
            'mapping; ask for none, with the instances on shared storage')
    if reasons_against:
        raise _refused(f'host {host}: {"; ".join(reasons_against)}')


def machines(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> frozenset[str]:
    """The machine types that guests can come with.

    :param conf: nova's configuration, with ``[fakedax]``
    :param host: the connection to libvirt
    :raises nova.exception.MigrationPreCheckError: the emulator does not list
        them
    """
    try:
        return capability.machines(conf, host)
    except emulator.ProbeError as exc:
        raise _refused(f'host {conf.host}: {exc}')


def offer_machines(
    instances_path: str, migrate_data: objects.LibvirtLiveMigrateData,
    machines: Iterable[str],
) -> None:
    """Tell the source, from the destination, which machine types it has.

    Writes them to the empty file that LibvirtDriver.
    check_can_live_migrate_destination creates on the instances path. The
    source looks for that file to find out whether the path is shared
    (_check_shared_storage_test_file), and ComputeManager removes it once the
    source has answered. Instances on fake DAX migrate on shared storage only,
    so the source either sees the file or refuses.

    The destination cannot decide by itself, since it does not know the
    version of the guest's machine type. In system_metadata,
    ``image_hw_machine_type`` (LibvirtDriver._configure_guest_by_virt_type) is
    the name that Nova gave to libvirt, mostly an alias such as ``q35``, which
    is another version to each host's QEMU. libvirt puts the version into the
    running guest's XML, and that is at the source. LibvirtLiveMigrateData has
    no field for it.

    :param instances_path: ``[DEFAULT]instances_path``
    :param migrate_data: as LibvirtDriver.check_can_live_migrate_destination
        makes it
    """
    try:
        with open(_offer_path(instances_path, migrate_data), 'w') as offer:
            json.dump(sorted(machines), offer)
            offer.flush()
            # close(2) does not wait for GlusterFS's write-behind.
            os.fsync(offer.fileno())
    except OSError as exc:
        # Raised, it would keep ComputeManager from removing the file. The
        # source refuses without an offer.
        LOG.warning('Cannot tell the source the machine types: %s', exc)


def check_machine(
    instances_path: str, migrate_data: objects.LibvirtLiveMigrateData,
    guest: libvirt_guest.Guest,
) -> None:
    """Check at the source that the destination has the guest's machine type.

    QEMU has the machine types of its own release and earlier ones. libvirt
    would find out as well, but only nova-compute's log would say so.

    The offer is also the proof that the destination has this driver, since no
    other fills the file. A user can name a host to which the scheduler would
    not send the guest, and Nova's own driver would give it ordinary disks at
    the next start.

    :param instances_path: ``[DEFAULT]instances_path``
    :param migrate_data: as the destination made it
    :raises nova.exception.MigrationPreCheckError: it does not, or it offers
        nothing
    """
    machine = guest.get_config().os_mach_type
    offered = _offered_machines(_offer_path(instances_path, migrate_data))
    if not offered:
        raise _refused(
            'the destination does not say that its driver runs fake DAX; see '
            '[DEFAULT]compute_driver and the log of nova-compute there')
    if machine not in offered:
        raise _refused(
            f"the guest's machine type is '{machine}', which the "
            f"destination's QEMU does not have; a type that all hosts "
            f"have can be chosen by [libvirt]hw_machine_type, or by the "
            f"image property hw_machine_type, before the guest starts")


def _offer_path(
    instances_path: str, migrate_data: objects.LibvirtLiveMigrateData,
) -> str:
    return os.path.join(instances_path, migrate_data.filename)


def _offered_machines(path: str) -> list[str]:
    """What offer_machines() has written; nothing if it cannot be read."""
    try:
        with open(path) as offer:
            return list(json.loads(offer.read() or '[]'))
    except (OSError, ValueError) as exc:
        LOG.warning('Cannot read the machine types of the destination: %s',
                    exc)
        return []


def keeps_state(guest: libvirt_guest.Guest) -> bool:
    """Whether the guest's devices save their state.

    Asks the running QEMU: the binary may have been replaced since it started.
    """
    for found, _device in domain.fake_dax_disks(guest.get_config()):
        try:
            monitor.device_property(guest, found.id.alias, 'drop-cache')
        except monitor.MonitorError as exc:
            LOG.info('%(alias)s does not migrate: %(exc)s',
                     {'alias': found.id.alias, 'exc': exc})
            return False
    return True


def check_source(
    host: str, reasons_against: Sequence[str], guest: libvirt_guest.Guest,
) -> None:
    """Check at the source that the running guest can leave it.

    :param host: the source's name
    :param reasons_against: as of capability.migration_reasons_against
    :raises nova.exception.MigrationPreCheckError: says why it cannot
    """
    if not keeps_state(guest):
        raise exception.MigrationPreCheckError(
            reason=refusals.refused('live migration').format_message())
    if reasons_against:
        raise _refused(f'host {host}: {"; ".join(reasons_against)}')


def check_storage(migrate_data: objects.LibvirtLiveMigrateData) -> None:
    """Check at the source that both hosts have the images.

    :param migrate_data: as LibvirtDriver.check_can_live_migrate_source
        leaves it
    :raises nova.exception.MigrationPreCheckError: they do not
    """
    if not migrate_data.is_shared_instance_path:
        raise _refused(
            'the instances path of the two hosts is not on the same shared '
            'storage: the source does not see a file of the destination')
    if migrate_data.block_migration:
        check_destination('', (), True)


def move_volumes(
    xml: etree._Element, at_destination: Iterable[ty.Any],
    get_volume_config: Callable[..., vconfig.LibvirtConfigGuestDisk],
) -> None:
    """Name the volumes of a guest that migrates as its destination does.

    A block device has a number of its own on each host: by the source's path
    the guest would get another's volume, or none.

    :param xml: the source's ``<domain>``; changed
    :param at_destination: the nova.objects.LibvirtLiveMigrateBDMInfo of what
        LibvirtDriver.pre_live_migration has connected there
    :param get_volume_config: LibvirtDriver._get_volume_config
    :raises nova.exception.MigrationError: the destination has not connected
        one of them, or not to a path
    """
    connected = {info.serial: info for info in at_destination}
    paths = {}
    for source, volume in _volume_sources(xml):
        path = None
        if (info := connected.get(volume)) and info.connection_info:
            path = get_volume_config(
                info.connection_info, info.as_disk_info()).source_path
        if not path:
            raise exception.MigrationError(reason=(
                f'Fake DAX: the destination does not say where it has '
                f'connected volume {volume}'))
        paths[source.text or ''] = path
        source.text = path
    for view in xml.findall('./devices/disk'):
        _move_boot_view(view, paths)


def _volume_sources(
    xml: etree._Element,
) -> Iterator[tuple[etree._Element, str]]:
    """The sources of the devices of volumes, with the volumes' IDs."""
    for device in xml.findall("./devices/memory[@model='virtio-pmem']"):
        alias, source = device.find('./alias'), device.find('./source/path')
        found = disk.DiskId.from_alias(
            '' if alias is None else alias.get('name', ''))
        if found and found.volume and source is not None:
            yield source, found.volume


def _move_boot_view(view: etree._Element, paths: Mapping[str, str]) -> None:
    """Let the boot view of a root volume be one of the destination's.

    :param paths: the destination's, by those of the source
    """
    source = view.find('./source')
    if (source is None
            or view.findtext('./serial') != domain.BOOT_VIEW_SERIAL):
        return
    for attribute in ('dev', 'file'):
        old = source.get(attribute, '')
        for here, there in paths.items():
            # Or a link next to it, which layout.view() has made.
            if old == here or old.startswith(here) and layout.is_view(old):
                source.set(attribute, there + old.removeprefix(here))


@contextlib.contextmanager
def preflush(paths: Sequence[str]) -> Iterator[None]:
    """Flush images again and again while their guest migrates.

    So that the sync at the switchover, for which the guest waits, has little
    to write. An error here is only logged: if the last sync fails as well,
    it keeps the guest where it is.
    """
    ended = threading.Event()

    def flush() -> None:
        for path in paths:
            try:
                hostcache.flush(path)
            except OSError as exc:
                LOG.warning('Cannot flush %(path)s before a live migration: '
                            '%(exc)s', {'path': path, 'exc': exc})

    def flush_until_ended() -> None:
        while not ended.wait(_FLUSH_INTERVAL):
            flush()

    flush()
    # Not joined: storage that hangs must not delay what comes after.
    threading.Thread(target=flush_until_ended, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def keep_owner(paths: Sequence[str]) -> Iterator[None]:
    """Give files back to the user that runs QEMU, whichever guest has ended.

    With dynamic_ownership, libvirt gives the file of a memory device to root
    when its guest has ended here, even if that goes on at the destination
    (virSecurityDACRestoreAllLabel of libvirt 11.3); disks on shared storage
    it leaves alone.
    """
    owners = {path: owner for path in paths if (owner := _owner(path))}
    try:
        yield
    finally:
        for path, owner in owners.items():
            if _owner(path) not in (owner, None):
                _give(path, *owner)


def _give(path: str, uid: int, gid: int) -> None:
    try:
        nova_path.chown(path, uid, gid)
    except Exception as exc:
        # The guest has moved, and QEMU has the file open.
        LOG.warning('Cannot give %(path)s back to %(uid)d:%(gid)d: %(exc)s',
                    {'path': path, 'uid': uid, 'gid': gid, 'exc': exc})


def _owner(path: str) -> tuple[int, int] | None:
    """The user and group of a file, None if there is none any more.

    Of a block device, too: that at the destination is another.
    """
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if not stat.S_ISBLK(status.st_mode):
            return status.st_uid, status.st_gid
    return None


def forget(paths: Sequence[str]) -> None:
    """Drop the source's cached pages of images whose guest has left."""
    for path in paths:
        try:
            hostcache.invalidate(path)
        except OSError as exc:
            # Costs memory only: the device drops them when the guest is back.
            LOG.warning('Cannot drop the cached pages of %(path)s: %(exc)s',
                        {'path': path, 'exc': exc})


def report(
    context: nova_context.RequestContext, host: str,
    instance: objects.Instance, guest: libvirt_guest.Guest,
) -> None:
    """Report at the destination what the device did when the guest came in.

    In the log, and as an event of the server's action, next to those of
    nova.compute.manager.

    :param host: the destination's name
    """
    said = []
    failed = False
    for found, _device in domain.fake_dax_disks(guest.get_config()):
        try:
            dropped, left, error = (
                monitor.device_property(guest, found.id.alias, name)
                for name in ('cache-dropped', 'cache-left', 'last-error'))
        except monitor.MonitorError as exc:
            LOG.warning('Cannot read the counters of %(alias)s: %(exc)s',
                        {'alias': found.id.alias, 'exc': exc},
                        instance=instance)
            continue
        came_in = (f'{found.id.alias} came in: {dropped} bytes of '
                   f'{found.path} dropped from the page cache, {left} left')
        LOG.info(came_in, instance=instance)
        said.append(came_in)
        if error:
            failed = True
            came_in = (f'{found.id.alias} came in after a failed sync '
                       f'({os.strerror(error)}): every flush of the guest '
                       f'fails')
            LOG.error(came_in, instance=instance)
            said.append(came_in)
    if said:
        _record(context, host, instance, '; '.join(said), failed)


def _record(
    context: nova_context.RequestContext, host: str,
    instance: objects.Instance, details: str, failed: bool,
) -> None:
    """Add an event to the server's action.

    As nova.compute.utils.EventReporter does, which records details of an
    exception only.
    """
    now = timeutils.utcnow(with_timezone=True)
    event = objects.InstanceActionEvent(
        context, event=EVENT, host=host, start_time=now, finish_time=now,
        result='Error' if failed else 'Success', details=details)
    try:
        event.create(instance.uuid, context.request_id)
    except exception.InstanceActionNotFound:
        # departure.finish() is nobody's request.
        LOG.debug('No action to add the event %s to', EVENT,
                  instance=instance)
