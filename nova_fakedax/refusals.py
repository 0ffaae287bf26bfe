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

"""Operations not supported for instances with fake DAX disks, and why.

Whoever implements an operation removes it from the table.
"""

from collections.abc import Mapping
import types

from nova import exception
from nova.i18n import _

_NO_STATE = (
    "QEMU's virtio-pmem does not save its state, and the guest's next fsync "
    "would hang forever")

#: The operation, in users' words, and why it is refused.
REFUSED: Mapping[str, str] = types.MappingProxyType({
    'suspend': _NO_STATE,
    'live migration': _NO_STATE,
    'attach of a passed-through interface':
        'a passed-through device pins the whole image in memory',
    'detach of a volume from a running guest':
        'QEMU cannot unplug virtio-pmem; stop the server, detach the volume '
        'and start it again',
    'extension of a volume of a running guest':
        'the guest has it mapped as large as it was; it has the new size when '
        'the server has been stopped and started again',
    'swap or retype of an attached volume':
        "QEMU's block jobs, which would copy it, do not see what the guest "
        'stores through a mapping; detach the volume first',
    "snapshot of an attached volume by Nova's help":
        'its file would become qcow2, which cannot be mapped; use a backend '
        'that takes snapshots by itself, or back the volume up',
})


class OperationRefused(exception.NovaException):
    msg_fmt = _('Fake DAX: %(operation)s of an instance with disks on fake '
                'DAX is not supported: %(reason)s')


def refused(operation: str) -> OperationRefused:
    """The error for an operation of the table.

    :raises KeyError: there is no such operation
    """
    return OperationRefused(operation=operation, reason=REFUSED[operation])
