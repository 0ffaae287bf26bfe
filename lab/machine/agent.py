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

"""Running commands in a guest through QEMU's guest agent.

The protocol is that of qemu-ga (QEMU's docs/interop/qemu-ga-ref); two
transports carry it: libvirt, for the guests of the lab, and the agent's own
socket, for a QEMU that the lab has started itself.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import os
import random
import time
from typing import Any, Protocol

import libvirt
import libvirt_qemu
from qemu.qmp import error as qmp_error
from qemu.qmp import qmp_client

from lab import errors
from lab.machine import monitor
from lab import wait

# libvirt prints every error that it also raises.
libvirt.registerErrorHandler(lambda *_: None, None)


class AgentError(errors.LabError):
    """The agent refused a command, or does not work."""


class AgentTimeoutError(AgentError):
    """The guest did not answer in time, or its command did not end."""


class CommandError(AgentError):
    """A command in the guest ended with a status other than 0."""


class Transport(Protocol):
    """A way to the agent."""

    def call(self, command: str, arguments: Mapping[str, Any],
             timeout: float) -> Any:
        """Send one command of the agent's protocol; return its result.

        :param timeout: seconds
        :raises AgentTimeoutError: there is no answer (yet)
        :raises AgentError: the agent answered with an error
        """


class DomainTransport:
    """The agent of a libvirt domain, on any host."""

    _NO_ANSWER = (
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
        libvirt.VIR_ERR_AGENT_UNSYNCED,
        libvirt.VIR_ERR_AGENT_COMMAND_TIMEOUT,
        # Another call holds the domain, such as one of nova-compute's.
        libvirt.VIR_ERR_OPERATION_TIMEOUT,
    )

    def __init__(self, domain: libvirt.virDomain) -> None:
        self._domain = domain

    def call(self, command: str, arguments: Mapping[str, Any],
             timeout: float) -> Any:
        request = {'execute': command, 'arguments': arguments}
        try:
            reply = libvirt_qemu.qemuAgentCommand(
                self._domain, json.dumps(request),
                max(1, math.ceil(timeout)), 0)
        except libvirt.libvirtError as e:
            if e.get_error_code() in self._NO_ANSWER:
                raise AgentTimeoutError(f'{command}: {e}') from e
            raise AgentError(f'{command}: {e}') from e
        return json.loads(reply)['return']


class SocketTransport:
    """The UNIX socket of the agent's channel in a QEMU without libvirt."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._connection: monitor.Monitor | None = None

    def call(self, command: str, arguments: Mapping[str, Any],
             timeout: float) -> Any:
        try:
            connection = self._connected(timeout)
            connection.settimeout(timeout)
            return connection.cmd(command, **arguments)
        except qmp_client.ExecuteError as e:
            raise AgentError(f'{command}: {e}') from e
        except (TimeoutError, qmp_error.QMPError, OSError, EOFError) as e:
            # What comes late must not be taken for the next answer.
            self.close()
            raise AgentTimeoutError(
                f'{command}: {str(e) or type(e).__name__}') from e

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            # Closing reports again why the connection broke.
            with contextlib.suppress(qmp_error.QMPError, OSError, EOFError):
                connection.close()

    def _connected(self, timeout: float) -> monitor.Monitor:
        if not self._connection:
            connection = monitor.Monitor(self._path)
            connection.connect(negotiate=False)
            self._connection = connection
            connection.settimeout(timeout)
            # The agent may still answer what an earlier connection asked,
            # an earlier guest-sync included.
            token = random.getrandbits(31)
            try:
                synced = connection.cmd('guest-sync', id=token) == token
            except qmp_client.ExecuteError:
                # The agent took this for the rest of an earlier command. A
                # serial port loses the end of one when the guest suspends.
                synced = False
            if not synced:
                raise EOFError('the agent is out of step')
        return self._connection


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended; ``status`` is -N if signal N killed it."""

    status: int
    stdout: str
    stderr: str


class Agent:
    """A guest, through its agent.

    :param console: returns what the guest wrote to its console; an error has
        the end of it when the guest does not answer
    """

    def __init__(self, transport: Transport,
                 console: Callable[[], str] | None = None) -> None:
        self._transport = transport
        self._console = console

    def wait_ready(self, timeout: float = 300) -> None:
        """Wait until the agent answers.

        :param timeout: seconds
        :raises AgentTimeoutError: it did not
        """
        reason = ''

        def answers() -> bool:
            nonlocal reason
            try:
                self._transport.call('guest-ping', {}, 2)
            except AgentTimeoutError as e:
                reason = str(e)
                return False
            return True

        wait.until('the guest agent to answer', answers, timeout,
                   interval=0.2,
                   state=lambda: f'{reason}{self._console_tail()}',
                   error=AgentTimeoutError)

    def run(self, command: str | Sequence[str], *,
            input: str | bytes | None = None, timeout: float = 60,
            check: bool = False) -> Result:
        """Run a command and wait for its end.

        :param command: a line for the guest's shell, or a program and its
            arguments
        :param input: what it reads on standard input
        :param timeout: seconds that it may take; then it is left running
        :param check: raise unless the command ends with status 0
        :raises AgentTimeoutError: no answer, or no end, within ``timeout``
        :raises CommandError: status other than 0, and ``check``
        :raises AgentError: the program cannot be started, or prints more
            than the agent keeps (16 MiB)
        """
        argv = (['/bin/sh', '-c', command] if isinstance(command, str)
                else list(command))
        arguments: dict[str, Any] = {
            'path': argv[0], 'arg': argv[1:], 'capture-output': True}
        if input is not None:
            raw = input.encode() if isinstance(input, str) else input
            arguments['input-data'] = base64.b64encode(raw).decode()
        deadline = time.monotonic() + timeout
        pid = self._call('guest-exec', arguments, timeout)['pid']
        status = self._wait_exit(pid, deadline, argv, timeout)
        if status.get('out-truncated') or status.get('err-truncated'):
            raise AgentError(f'{argv} printed more than the agent keeps')
        result = Result(
            status['exitcode'] if 'exitcode' in status
            else -status['signal'],
            _text(status.get('out-data')), _text(status.get('err-data')))
        if check and result.status:
            raise CommandError(
                f'{argv} ended with status {result.status} in the guest: '
                f'{(result.stderr or result.stdout).strip()}')
        return result

    def read_file(self, path: str, timeout: float = 60) -> bytes:
        """The contents of a file in the guest.

        :param timeout: seconds for each MiB of it
        :raises AgentError: it cannot be read; has the guest's reason
        """
        handle = self._call('guest-file-open', {'path': path}, timeout)
        try:
            pieces = []
            while True:
                piece = self._call('guest-file-read', {
                    'handle': handle, 'count': 1 << 20}, timeout)
                pieces.append(base64.b64decode(piece['buf-b64']))
                if piece['eof']:
                    return b''.join(pieces)
        finally:
            self._call('guest-file-close', {'handle': handle}, timeout)

    def _wait_exit(self, pid: int, deadline: float, argv: list[str],
                   timeout: float) -> dict[str, Any]:
        # Not wait.until(): each call may take only what is left of the time.
        pause = 0.02
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentTimeoutError(
                    f'{argv} did not end within {timeout:g} s in the guest'
                    f'{self._console_tail()}')
            status: dict[str, Any] = self._call(
                'guest-exec-status', {'pid': pid}, left)
            if status['exited']:
                return status
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.5)

    def _call(self, command: str, arguments: Mapping[str, Any],
              timeout: float) -> Any:
        try:
            return self._transport.call(command, arguments, timeout)
        except AgentTimeoutError as e:
            raise AgentTimeoutError(
                f'no answer from the guest agent within {timeout:.0f} s '
                f'({e}){self._console_tail()}') from e

    def _console_tail(self) -> str:
        if not self._console:
            return ''
        lines = self._console().splitlines()[-20:]
        return '; its console ends:\n' + '\n'.join(lines)


def _text(data: str | None) -> str:
    return base64.b64decode(data or '').decode(errors='replace')
