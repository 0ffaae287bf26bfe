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

"""What QEMU's monitor reports of a running device."""

from __future__ import annotations

import json
import typing as ty

from nova import utils
from nova.virt.libvirt import guest as libvirt_guest


class MonitorError(Exception):
    """QEMU does not answer, or has no such device or property."""


def device_property(
    guest: libvirt_guest.Guest, alias: str, name: str,
) -> ty.Any:
    """Read a property of a device of a running guest (QMP's ``qom-get``).

    libvirt logs that such a query taints the domain; that has no other
    effect.

    :param alias: the device's alias in libvirt
    :raises MonitorError: there is no answer
    """
    # Imported here because libvirt-python is optional, as for Nova.
    import libvirt
    import libvirt_qemu

    query = json.dumps({'execute': 'qom-get', 'arguments': {
        'path': f'/machine/peripheral/{alias}', 'property': name}})
    try:
        answer = json.loads(utils.tpool_wrap(libvirt_qemu).qemuMonitorCommand(
            guest._domain, query, 0))
    except libvirt.libvirtError as exc:
        raise MonitorError(str(exc))
    if 'return' not in answer:
        raise MonitorError(answer.get('error', {}).get('desc', str(answer)))
    return answer['return']
