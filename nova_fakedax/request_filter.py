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

"""What nova-scheduler asks placement for.

Without this a flavor with ``fakedax:*`` extra specs could land on a host with
Nova's own LibvirtDriver, which would silently give it ordinary disks.
"""

from __future__ import annotations

from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.scheduler import request_filter
from oslo_log import log as logging

from nova_fakedax import spec

LOG = logging.getLogger(__name__)


def _migrates_live(
    ctxt: nova_context.RequestContext, request_spec: objects.RequestSpec,
) -> bool:
    """Whether the request is for the destination of a live migration.

    The request does not say. nova.conductor.tasks.live_migrate.
    LiveMigrationTask ignores the source, and so does an evacuation; the
    instance's task tells them apart.
    """
    if 'ignore_hosts' not in request_spec or not request_spec.ignore_hosts:
        return False
    mapping = objects.InstanceMapping.get_by_instance_uuid(
        ctxt, request_spec.instance_uuid)
    with nova_context.target_cell(ctxt, mapping.cell_mapping) as cell_context:
        instance = objects.Instance.get_by_uuid(
            cell_context, request_spec.instance_uuid)
    return bool(instance.task_state == task_states.MIGRATING)


@request_filter.trace_request_filter
def require_fake_dax(
    ctxt: nova_context.RequestContext, request_spec: objects.RequestSpec,
) -> bool:
    """Require the trait ``CUSTOM_FAKEDAX`` of the host.

    Whether or not the operator put it on the flavor. Follows the filters of
    nova.scheduler.request_filter.

    :raises nova.exception.RequestFilterFailed: no host can; the user reads
        why behind "No valid host was found"
    """
    if not spec.given(request_spec.flavor):
        return False
    try:
        wanted = spec.FakeDaxSpec.from_flavor(request_spec.flavor)
        wanted.check_flavor(request_spec.flavor)
        # Nova 17 did not say so, and servers of then may still be moved.
        if 'is_bfv' in request_spec:
            wanted.check_boot(request_spec.is_bfv)
        if 'image' in request_spec and request_spec.image:
            # Nova knows these properties, and keeps no others here.
            wanted.check_image_conflicts(request_spec.image.properties)
    except spec.InvalidSpec as exc:
        raise exception.RequestFilterFailed(reason=str(exc))
    request_spec.root_required.add(spec.TRAIT)
    if _migrates_live(ctxt, request_spec):
        request_spec.root_required.add(spec.MIGRATION_TRAIT)
    LOG.debug('require_fake_dax request filter added required traits; all: %s',
              sorted(request_spec.root_required))
    return True
