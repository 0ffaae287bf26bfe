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

"""The monitor of a QEMU, or another socket that speaks QMP."""

import asyncio
import socket

from qemu.qmp import legacy


class Monitor(legacy.QEMUMonitorProtocol):
    """A connection that any thread can use, one at a time.

    QEMUMonitorProtocol itself takes the event loop of the thread that makes
    it, so two of one thread cannot be used by two threads at the same time.

    :param address: the path of a UNIX socket, or one that is connected
    """

    def __init__(self, address: str | socket.socket) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        try:
            super().__init__(address)
        finally:
            asyncio.set_event_loop(None)

    def close(self) -> None:
        """Close the connection, if it is open. It cannot be opened again."""
        if self._loop.is_closed():
            return
        try:
            super().close()
        finally:
            self._loop.close()
