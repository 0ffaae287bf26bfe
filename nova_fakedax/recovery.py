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

libvirt goes on with a live migration without nova-compute. When that is back,
Nova takes the instance for one that has stayed (ComputeManager.
_reset_live_migration), although its guest runs at the destination; started
here as well, two guests would write to one image.
"""

from __future__ import annotations

import typing as ty

from nova.compute import task_states
from nova import context as nova_context
from nova import objects
from nova.virt.libvirt import host as libvirt_host
from oslo_log import log as logging

LOG = logging.getLogger(__name__)

#: Of a migration that nova-compute was in the midst of when it died: before
#: it was back, and after a first start of it that did not find the guest.
_UNFINISHED = ('running', 'error')


def departure(
    context: nova_context.RequestContext, instance: objects.Instance,
) -> objects.Migration | None:
    """The last live migration of an instance, if it was not finished."""
    migrations = objects.MigrationList.get_by_filters(context, {
        'instance_uuid': instance.uuid, 'source_compute': instance.host,
        'migration_type': 'live-migration'})
    last = max(migrations, key=lambda migration: migration.id, default=None)
    return last if last and last.status in _UNFINISHED else None


def runs_at(
    host: libvirt_host.Host, uri: str, instance: objects.Instance,
) -> bool:
    """Ask another host's libvirt whether a guest runs there.

    :param uri: where the source's libvirt connects to when it migrates
    """
    try:
        connection = host._connect(uri, True)
    except libvirt_host.libvirt.libvirtError as exc:
        LOG.error('Cannot ask %(uri)s whether the guest of an unfinished '
                  'live migration is there: %(exc)s',
                  {'uri': uri, 'exc': exc}, instance=instance)
        return False
    try:
        return bool(connection.lookupByUUIDString(instance.uuid).isActive())
    except libvirt_host.libvirt.libvirtError:
        return False
    finally:
        connection.close()


def finish(
    context: nova_context.RequestContext, instance: objects.Instance,
    migration: objects.Migration, compute: ty.Any,
) -> None:
    """Do what ComputeManager._post_live_migration did not come to.

    As that does it, but for what needs the resource tracker, which is empty
    when nova-compute starts. If it fails, the instance is left migrating, so
    that nobody starts it here.

    :param compute: this host's nova.compute.manager.ComputeManager
    """
    dest = migration.dest_compute
    LOG.warning('The guest left for %s while nova-compute was not running '
                'here; finishing its live migration', dest, instance=instance)
    if instance.task_state != task_states.MIGRATING:
        instance.task_state = task_states.MIGRATING
        instance.save()
    try:
        compute.network_api.migrate_instance_start(
            context, instance, migration)
        compute.driver.post_live_migration_at_source(
            context, instance, instance.get_network_info())
        compute.compute_rpcapi.post_live_migration_at_destination(
            context, instance, False, dest)
        migration.status = 'completed'
        migration.save()
        compute._delete_allocation_after_move(context, instance, migration)
    except Exception:
        # nova-compute must start whatever becomes of one instance.
        LOG.exception('Could not finish the live migration to %s; the next '
                      'start of nova-compute tries again', dest,
                      instance=instance)
