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

"""Flavors, servers and hosts as a cloud's API has them.

By openstacksdk, with the user's ``clouds.yaml`` or ``OS_...`` variables. What
a guest does with its memory is not in the API.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses
import typing as ty
import warnings

#: Of the compute API: the last that has the hosts' memory (2.87), and one in
#: which a server has its flavor as it was, not as a link (2.47).
_MICROVERSION = '2.87'


class CloudError(Exception):
    """The cloud does not say what is asked."""


@dataclasses.dataclass(frozen=True)
class Flavor:
    """A flavor of servers.

    :ivar ram: MiB
    :ivar count: of its servers that are active
    """

    name: str
    ram: float
    count: int


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What a plan needs of a cloud.

    :ivar hosts: memory of each host that runs guests of libvirt, MiB
    """

    flavors: Sequence[Flavor]
    hosts: Sequence[float]


def read(name: str | None) -> Cloud:
    """Ask a cloud for its hosts and for its servers by flavor.

    :param name: of clouds.yaml; None: what OS_CLOUD or OS_... say
    :raises CloudError: it does not answer, or the user may not ask; or
        openstacksdk is not installed
    """
    try:
        # Imported here because only this needs it.
        from keystoneauth1 import exceptions as auth_exceptions
        import openstack
        from openstack import exceptions
    except ImportError as exc:
        raise CloudError(
            f'to ask a cloud, install openstacksdk: {exc}') from exc
    try:
        with warnings.catch_warnings():
            # Of attributes that later microversions do not have.
            warnings.simplefilter('ignore')
            compute = openstack.connect(cloud=name).compute
            # Not an argument of connect(): that refuses a clouds.yaml with a
            # microversion as compute_api_version, as many have.
            compute.default_microversion = _MICROVERSION
            return _read(compute)
    except (exceptions.SDKException,
            auth_exceptions.ClientException) as exc:
        which = f"cloud '{name}'" if name else "the environment's cloud"
        raise CloudError(f'{which}: {str(exc).strip()}') from exc


def _read(compute: ty.Any) -> Cloud:
    hosts = [hypervisor.memory_size
             for hypervisor in compute.hypervisors(details=True)
             if hypervisor.hypervisor_type in ('QEMU', 'KVM')
             and hypervisor.state == 'up' and hypervisor.status == 'enabled']
    counts = collections.Counter(
        (server.flavor.original_name, server.flavor.ram)
        for server in compute.servers(
            details=True, all_projects=True, status='ACTIVE'))
    return Cloud([Flavor(name, ram, count)
                  for (name, ram), count in sorted(counts.items())], hosts)
