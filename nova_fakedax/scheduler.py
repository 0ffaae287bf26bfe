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

"""Fail-closed placement of flavors with ``fakedax:*`` extra specs.

Such a flavor must never land on a host that cannot run it: a plain
LibvirtDriver there would silently give the instance ordinary disks. Naming
:class:`FakeDaxFilter` in ``[filter_scheduler]available_filters`` and
``enabled_filters`` of nova-scheduler does two things:

* importing this module makes Nova ask placement for hosts with the trait
  ``CUSTOM_FAKEDAX``, whether or not the operator put it on the flavor;
* the filter checks that placement was asked, and that the host's driver is
  still the one that reported the trait.
"""

from __future__ import annotations

import typing as ty

from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.scheduler import filters
from nova.scheduler import request_filter
from oslo_log import log as logging

from nova_fakedax import spec

LOG = logging.getLogger(__name__)


def _asks(request_spec: objects.RequestSpec) -> bool:
    """Whether the flavor has any extra spec of the namespace."""
    flavor = request_spec.flavor
    return any(key.partition(':')[0] == spec.NAMESPACE
               for key in flavor.get('extra_specs', {}))


def _migrates_live(
    ctxt: nova_context.RequestContext, request_spec: objects.RequestSpec,
) -> bool:
    """Whether a destination of a live migration is asked for.

    Nothing in the request says what it is for. The conductor's
    nova.conductor.tasks.live_migrate.LiveMigrationTask ignores the source;
    the instance's task tells it apart from an evacuation.
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
    """Ask placement for hosts that can run the flavor.

    Follows the filters of nova.scheduler.request_filter.

    :raises nova.exception.RequestFilterFailed: no host can; the user reads
        why behind "No valid host was found"
    """
    if not _asks(request_spec):
        return False
    try:
        spec.FakeDaxSpec.from_flavor(
            request_spec.flavor).check_flavor(request_spec.flavor)
    except spec.InvalidSpec as exc:
        raise exception.RequestFilterFailed(reason=str(exc))
    request_spec.root_required.add(spec.TRAIT)
    if _migrates_live(ctxt, request_spec):
        request_spec.root_required.add(spec.MIGRATION_TRAIT)
    LOG.debug('require_fake_dax request filter added required traits; all: %s',
              sorted(request_spec.root_required))
    return True


# nova.scheduler.request_filter.process_reqspec has no configuration; this
# list is all there is.
if require_fake_dax not in request_filter.ALL_REQUEST_FILTERS:
    request_filter.ALL_REQUEST_FILTERS.append(require_fake_dax)


class FakeDaxFilter(filters.BaseHostFilter):
    """Passes hosts that say now that they can run such flavors."""

    def host_passes(
        self, host_state: ty.Any, spec_obj: objects.RequestSpec,
    ) -> bool:
        if not _asks(spec_obj):
            return True
        if spec.TRAIT not in spec_obj.root_required:
            LOG.error(
                'The flavor has %(namespace)s:* extra specs, but placement '
                'was not asked for hosts with %(trait)s: require_fake_dax '
                'did not run',
                {'namespace': spec.NAMESPACE, 'trait': spec.TRAIT})
            return False
        if host_state.stats.get(spec.STATISTIC) != spec.SUPPORTED:
            LOG.warning(
                '%(host)s has the trait %(trait)s in placement, but its '
                'driver does not run fake DAX; remove the trait',
                {'host': host_state.host, 'trait': spec.TRAIT})
            return False
        return True
