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

"""A live migration on shared storage: preconditions and hand-over.

The device does what must happen at the switchover (qemu-device/SPEC.rst): the
source syncs the image once the vCPUs have stopped, the destination drops what
it has cached of it before they run there, and refuses the guest if it cannot.
Here is what comes before and after.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import threading

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt.libvirt import guest as libvirt_guest
from oslo_log import log as logging
from oslo_utils import timeutils

from nova_fakedax import domain
from nova_fakedax import hostcache
from nova_fakedax import monitor
from nova_fakedax import refusals

LOG = logging.getLogger(__name__)

#: The name under which the destination's machine types travel.
_OFFER = 'fakedax-machine-types'

#: The event that says how the guest came in.
EVENT = 'fakedax_incoming'

#: Seconds between two flushes of an image whose guest is about to leave.
_FLUSH_INTERVAL = 1


def _refused(reason: str) -> exception.MigrationPreCheckError:
    return exception.MigrationPreCheckError(reason=f'Fake DAX: {reason}')


def check_destination(
    host: str, reasons_against: Sequence[str], block_migration: bool | None,
) -> None:
    """Check at the destination what can be known there.

    :param host: its name
    :param reasons_against: of the destination, as of
        capability.migration_reasons_against
    :param block_migration: as the user asked for it; None for automatic
    :raises nova.exception.MigrationPreCheckError: says why it cannot be
    """
    if block_migration:
        raise _refused(
            'block migration does not see what the guest stores through a '
            'mapping; put the instances on shared storage')
    if reasons_against:
        raise _refused(f'host {host}: {"; ".join(reasons_against)}')


def offer_machines(
    migrate_data: objects.LibvirtLiveMigrateData, machines: Iterable[str],
) -> None:
    """Tell the source which machine types the destination can run.

    The object has no field for it, and a field of our own would be lost in
    nova-conductor; ``bdms`` is not used before the destination makes it anew
    (LibvirtDriver.pre_live_migration).
    """
    offer = objects.LibvirtLiveMigrateBDMInfo(serial=_OFFER)
    offer.connection_info = sorted(machines)
    migrate_data.bdms = [offer]


def check_machine(
    migrate_data: objects.LibvirtLiveMigrateData, guest: libvirt_guest.Guest,
) -> None:
    """Check at the source that the destination can be the guest's machine.

    QEMU knows the machine types of its own release and earlier ones. libvirt
    would find out as well, but tells nova-compute's log only.

    :raises nova.exception.MigrationPreCheckError: it cannot
    """
    offers = migrate_data.bdms if 'bdms' in migrate_data else []
    machine = guest.get_config().os_mach_type
    for offer in offers:
        if offer.serial == _OFFER and machine not in offer.connection_info:
            raise _refused(
                f"the guest's machine type is '{machine}', which the "
                f"destination's QEMU does not have; a type that all hosts "
                f"have can be chosen by [libvirt]hw_machine_type, or by the "
                f"image property hw_machine_type, before the guest starts")


def keeps_state(guest: libvirt_guest.Guest) -> bool:
    """Whether the guest's devices go with it to another QEMU.

    Asks QEMU itself: the binary may have been replaced since it started.
    """
    for disk, _device in domain.fake_dax_disks(guest.get_config()):
        try:
            monitor.device_property(guest, disk.id.alias, 'drop-cache')
        except monitor.MonitorError as exc:
            LOG.info('%(alias)s does not migrate: %(exc)s',
                     {'alias': disk.id.alias, 'exc': exc})
            return False
    return True


def check_source(
    host: str, reasons_against: Sequence[str], guest: libvirt_guest.Guest,
) -> None:
    """Check at the source that the guest that runs can leave it.

    :raises nova.exception.MigrationPreCheckError: says why it cannot
    """
    if not keeps_state(guest):
        raise exception.MigrationPreCheckError(
            reason=refusals.refused('live migration').format_message())
    if reasons_against:
        raise _refused(f'host {host}: {"; ".join(reasons_against)}')


def check_storage(migrate_data: objects.LibvirtLiveMigrateData) -> None:
    """Check that both hosts have the images, as Nova has found out.

    :raises nova.exception.MigrationPreCheckError: they do not
    """
    if not migrate_data.is_shared_instance_path:
        raise _refused(
            'the instances path of the two hosts is not on the same shared '
            'storage: the destination does not see a file of the source')
    if migrate_data.block_migration:
        check_destination('', (), True)


@contextlib.contextmanager
def preflush(paths: Sequence[str]) -> Iterator[None]:
    """Keep images nearly clean while their guest runs and is copied.

    The sync at the switchover, for which the guest waits, then finds little.
    An error is left to that one, which keeps the guest where it is.
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
    # Not waited for: storage that hangs must not hold what comes after.
    threading.Thread(target=flush_until_ended, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def forget(paths: Sequence[str]) -> None:
    """Drop what the source has cached of images whose guest has left."""
    for path in paths:
        try:
            hostcache.invalidate(path)
        except OSError as exc:
            # Memory, and no danger: the device looks when the guest is back.
            LOG.warning('Cannot drop the cached pages of %(path)s: %(exc)s',
                        {'path': path, 'exc': exc})


def report(
    context: nova_context.RequestContext, host: str,
    instance: objects.Instance, guest: libvirt_guest.Guest,
) -> None:
    """Say at the destination what the device did when the guest came in.

    In the log, and among the events of the move, where those of
    nova.compute.manager are.

    :param host: the destination's name
    """
    said = []
    failed = False
    for disk, _device in domain.fake_dax_disks(guest.get_config()):
        try:
            dropped, left, error = (
                monitor.device_property(guest, disk.id.alias, name)
                for name in ('cache-dropped', 'cache-left', 'last-error'))
        except monitor.MonitorError as exc:
            LOG.warning('Cannot read the counters of %(alias)s: %(exc)s',
                        {'alias': disk.id.alias, 'exc': exc},
                        instance=instance)
            continue
        came_in = (f'{disk.id.alias} came in: {dropped} bytes of {disk.path} '
                   f'dropped from the page cache, {left} left')
        LOG.info(came_in, instance=instance)
        said.append(came_in)
        if error:
            failed = True
            came_in = (f'{disk.id.alias} came in after a failed sync '
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
    """Add an event to the action that the request is.

    As compute_utils.EventReporter does, which gives details only to what
    has raised.
    """
    now = timeutils.utcnow(with_timezone=True)
    event = objects.InstanceActionEvent(
        context, event=EVENT, host=host, start_time=now, finish_time=now,
        result='Error' if failed else 'Success', details=details)
    try:
        event.create(instance.uuid, context.request_id)
    except exception.InstanceActionNotFound:
        # Nobody's request: recovery.finish, at nova-compute's start.
        LOG.debug('No action to add the event %s to', EVENT,
                  instance=instance)
