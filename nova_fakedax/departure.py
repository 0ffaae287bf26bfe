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

"""Guests that left while their host's nova-compute was dead.

libvirt completes a live migration without nova-compute. When nova-compute is
back, Nova assumes that the instance has stayed
(ComputeManager._reset_live_migration), although its guest runs at the
destination, and tries to start it again.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
import typing as ty

from nova.compute import rpcapi
from nova.compute import task_states
from nova import context as nova_context
from nova.network import neutron
from nova import objects
from nova.scheduler.client import report
from nova.virt.libvirt import host as libvirt_host
from nova.volume import cinder
from oslo_log import log as logging

from nova_fakedax import spec

LOG = logging.getLogger(__name__)

#: The status of a migration that was under way when nova-compute died: before
#: nova-compute is back, and after it was back without finding the guest.
_UNFINISHED = ('running', 'error')


def complete(
    context: nova_context.RequestContext, instance: objects.Instance,
    driver: ty.Any, migration_uri: Callable[[str], str],
) -> bool:
    """Complete the live migration of an instance whose guest has left.

    :param driver: this host's LibvirtDriver
    :param migration_uri: the URI by which this host's libvirt connects to
        another host, by its name
    :returns: whether the guest has left, or may have left: nothing else may
        be done for it here
    """
    if (not spec.FakeDaxSpec.from_instance(instance)
            or driver.instance_exists(instance)):
        return False
    migration = unfinished(context, instance)
    if migration is None:
        return False
    asked = uris(migration, migration_uri)
    left = runs_at(driver._host, asked, instance)
    if left:
        LOG.warning('The guest left for %s while nova-compute was not running '
                    'here; finishing its live migration',
                    migration.dest_compute, instance=instance)
        try:
            finish(context, instance, migration, driver)
        except Exception:
            # nova-compute must start whatever becomes of one instance.
            LOG.exception('Could not finish the live migration to %s; the '
                          'next start of nova-compute tries again',
                          migration.dest_compute, instance=instance)
    elif left is None:
        LOG.error(
            'The domain is gone since a live migration to %s, whose libvirt '
            'does not answer at %s. The instance is left as it is. Restart '
            'nova-compute when that libvirt answers. If the guest does not '
            'run there, reset the state of the server and reboot it hard',
            migration.dest_compute, ' or '.join(asked), instance=instance)
    return left is not False


def uris(
    migration: objects.Migration, migration_uri: Callable[[str], str],
) -> list[str]:
    """The URIs of the libvirt of a migration's destination.

    dest_host is that host's my_ip (ResourceTracker._create_migration), which
    may answer where the name does not.

    :param migration_uri: as for :func:`complete`
    """
    return [migration_uri(name) for name in
            (migration.dest_compute, migration.dest_host) if name]


def unfinished(
    context: nova_context.RequestContext, instance: objects.Instance,
) -> objects.Migration | None:
    """The last live migration of an instance, if it was not finished."""
    migrations = objects.MigrationList.get_by_filters(context, {
        'instance_uuid': instance.uuid, 'source_compute': instance.host,
        'migration_type': 'live-migration'})
    last = max(migrations, key=lambda migration: migration.id, default=None)
    return last if last and last.status in _UNFINISHED else None


def runs_at(
    host: libvirt_host.Host, uris: Iterable[str], instance: objects.Instance,
) -> bool | None:
    """Ask another host's libvirt whether a guest runs there.

    Connects by nova.virt.libvirt.host.Host._connect: Nova's only function
    that takes a URI, and answers libvirt as nova-compute does when libvirt
    asks for credentials.

    :param uris: of the other libvirt; the first that answers counts
    :returns: None if none answers
    """
    for uri in uris:
        try:
            connection = host._connect(uri, True)
        except libvirt_host.libvirt.libvirtError as exc:
            LOG.warning('Cannot ask %(uri)s for a guest: %(exc)s',
                        {'uri': uri, 'exc': exc}, instance=instance)
            continue
        try:
            return bool(
                connection.lookupByUUIDString(instance.uuid).isActive())
        except libvirt_host.libvirt.libvirtError as exc:
            if (exc.get_error_code()
                    == libvirt_host.libvirt.VIR_ERR_NO_DOMAIN):
                return False
            LOG.warning('%(uri)s does not say whether a guest is there: '
                        '%(exc)s', {'uri': uri, 'exc': exc},
                        instance=instance)
        finally:
            connection.close()
    return None


def finish(
    context: nova_context.RequestContext, instance: objects.Instance,
    migration: objects.Migration, driver: ty.Any,
) -> None:
    """Finish a live migration on behalf of the source.

    The steps of ComputeManager._post_live_migration that do not need the
    resource tracker, which is empty when nova-compute starts, through the
    public interfaces of neutron, the driver, the destination's nova-compute
    and placement. After an error the instance stays in the task 'migrating',
    so that Nova does not start it here.

    :param driver: this host's LibvirtDriver
    :raises Exception: one of them does not answer
    """
    dest = migration.dest_compute
    if instance.task_state != task_states.MIGRATING:
        instance.task_state = task_states.MIGRATING
        instance.save()
    placement = report.report_client_singleton()
    neutron.API().migrate_instance_start(context, instance, migration)
    driver.post_live_migration_at_source(
        context, instance, instance.get_network_info())
    rpcapi.ComputeAPI().post_live_migration_at_destination(
        context, instance, False, dest)
    migration.status = 'completed'
    migration.save()
    placement.delete_allocation_for_instance(
        context, migration.uuid, consumer_type='migration')
    _give_up_attachments(context, instance)


def _give_up_attachments(
    context: nova_context.RequestContext, instance: objects.Instance,
) -> None:
    """Delete this host's attachments of the volumes of an instance.

    As ComputeManager._delete_dangling_bdms: since
    ComputeManager.pre_live_migration, Nova knows only those of the
    destination. So nobody knows any more how this host has connected them,
    and they stay connected here until it restarts.
    """
    mappings = [mapping for mapping in
                objects.BlockDeviceMappingList.get_by_instance_uuid(
                    context, instance.uuid)
                if mapping.is_volume and mapping.attachment_id]
    if not mappings:
        return
    api = cinder.API()
    known = {mapping.attachment_id for mapping in mappings}
    try:
        for attachment in api.attachment_get_all(context, instance.uuid):
            if attachment['id'] not in known:
                api.attachment_delete(context, attachment['id'])
    except Exception:
        # Of Cinder or Keystone. The server has moved; a hard reboot does the
        # same.
        LOG.exception('Cannot delete the attachments of its volumes to this '
                      'host', instance=instance)
    LOG.warning('Volumes %s stay connected to this host until it restarts',
                ', '.join(mapping.volume_id for mapping in mappings),
                instance=instance)
