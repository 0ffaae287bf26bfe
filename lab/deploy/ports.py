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

"""Whether a port that the lab needs is free."""

from collections.abc import Iterable
import contextlib
import socket

import psutil

from lab import errors


class PortTakenError(errors.LabError):
    """Another process listens on a port that a service needs."""


def check(service: str, listens: Iterable[tuple[str, int]]) -> None:
    """Check that a service can listen on its ports.

    :raises PortTakenError: it cannot; names the port and its owner
    """
    for address, port in listens:
        with contextlib.closing(socket.socket()) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((address, port))
            except OSError as error:
                raise PortTakenError(
                    f'{service} needs {address}:{port}: {error.strerror}; '
                    f'{_holder(port)} has it') from error


def _holder(port: int) -> str:
    for each in psutil.net_connections('tcp'):
        if (each.status == psutil.CONN_LISTEN and each.laddr.port == port
                and each.pid):
            with contextlib.suppress(psutil.Error):
                command = ' '.join(psutil.Process(each.pid).cmdline())
                return f'process {each.pid} ({command[:80]})'
    return 'an unknown process'
