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

Such a flavor must never land on a host that cannot run it. Naming
:class:`FakeDaxFilter` in ``[filter_scheduler]available_filters`` and
``enabled_filters`` of nova-scheduler does two things:

* Nova asks placement for hosts with the trait ``CUSTOM_FAKEDAX``
  (:mod:`.request_filter`);
* the filter checks that placement was asked, and that the host's driver is
  still the one that reported the trait.
"""

from __future__ import annotations

import typing as ty

from nova import objects
from nova.scheduler import filters
from oslo_log import log as logging

from nova_fakedax import hooks
from nova_fakedax import spec

LOG = logging.getLogger(__name__)


class FakeDaxFilter(filters.BaseHostFilter):
    """Passes hosts whose driver reports now that it can run such flavors."""

    def __init__(self) -> None:
        super().__init__()
        hooks.install_scheduler()

    def host_passes(
        self, host_state: ty.Any, spec_obj: objects.RequestSpec,
    ) -> bool:
        if not spec.given(spec_obj.flavor):
            return True
        if spec.TRAIT not in spec_obj.root_required:
            LOG.error(
                'The flavor has %(namespace)s:* extra specs, but placement '
                'was not asked for hosts with %(trait)s: require_fake_dax '
                'did not run',
                {'namespace': spec.NAMESPACE, 'trait': spec.TRAIT})
            return False
        said = host_state.stats.get(spec.STATISTIC)
        if said != spec.SUPPORTED:
            LOG.warning(
                '%(host)s has the trait %(trait)s in placement, but its '
                'driver does not run fake DAX (%(why)s); remove the trait',
                {'host': host_state.host, 'trait': spec.TRAIT,
                 'why': said or 'it is another driver'})
            return False
        return True
