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

"""supervisord, which starts and watches every service of the lab."""

import contextlib
import dataclasses
import pathlib
import subprocess
from typing import Any
import xmlrpc.client

import psutil
from supervisor import states
from supervisor import xmlrpc as supervisor_xmlrpc

from lab.deploy import config
from lab.deploy import host
from lab import errors
from lab import paths
from lab import wait

_SOCKET = host.RUN / 'supervisor.sock'
_CONFIG = config.ETC / 'supervisord.conf'


class SupervisionError(errors.LabError):
    """supervisord, or a service of it, does not do what it was told."""


@dataclasses.dataclass(frozen=True)
class Process:
    """The process of a service, as supervisord sees it."""

    running: bool
    pid: int
    #: When it was started or ended, in seconds since the epoch.
    started: float
    ended: float
    #: -1 if a signal killed it.
    exit_status: int


class Supervisor:
    """The lab's supervisord, running or not."""

    @property
    def _call(self) -> Any:
        # A new one each time: a transport that has failed stays unusable.
        transport = supervisor_xmlrpc.SupervisorTransport(
            None, None, f'unix://{_SOCKET}')
        # The transport uses its socket, not the host of the URL.
        return xmlrpc.client.ServerProxy(
            'http://127.0.0.1', transport=transport).supervisor

    def alive(self) -> bool:
        """Whether it runs and answers."""
        try:
            self._call.getState()
        except (OSError, xmlrpc.client.Error):
            return False
        return True

    def start(self) -> None:
        """Start it, or have the one that runs reload its configuration.

        :raises SupervisionError: it does not start
        """
        if self.alive():
            self._update()
            return
        supervisord = subprocess.run(
            [config.PYTHON, config.BASE / 'bin/supervisord',
             '--configuration', _CONFIG],
            capture_output=True, text=True)
        if supervisord.returncode:
            raise SupervisionError(
                f'supervisord: {supervisord.stderr or supervisord.stdout}')
        wait.until('supervisord to answer', self.alive, 10,
                   error=SupervisionError)

    def _update(self) -> None:
        added, changed, removed = self._call.reloadConfig()[0]
        for name in changed + removed:
            self.stop([name])
            self._call.removeProcessGroup(name)
        for name in changed + added:
            self._call.addProcessGroup(name)

    def processes(self) -> dict[str, Process]:
        """The processes by service; empty if supervisord does not run."""
        try:
            found = self._call.getAllProcessInfo()
        except (OSError, xmlrpc.client.Error):
            return {}
        return {
            each['name']: Process(
                running=each['state'] in states.RUNNING_STATES
                or each['state'] == states.ProcessStates.STOPPING,
                pid=each['pid'], started=each['start'],
                ended=each['stop'], exit_status=each['exitstatus'])
            for each in found}

    def start_service(self, name: str) -> None:
        """Start a service, without waiting for it."""
        self._call.startProcess(name, False)

    def stop(self, names: list[str]) -> None:
        """Stop services, all at the same time, and wait.

        :raises SupervisionError: one is still running
        """
        for name in names:
            with contextlib.suppress(xmlrpc.client.Fault):
                # It was not running.
                self._call.stopProcess(name, False)

        def running() -> list[str]:
            known = self.processes()
            return [name for name in names
                    if name in known and known[name].running]

        wait.until('services to stop', lambda: not running(), 60,
                   state=lambda: ', '.join(running()), error=SupervisionError)

    def shutdown(self) -> None:
        """Stop all services and supervisord itself, and wait."""
        if not self.alive():
            return
        process = psutil.Process(self._call.getPID())
        self._call.shutdown()
        process.wait(timeout=60)


def log_of(name: str) -> pathlib.Path:
    """Where a service's output goes."""
    return paths.STATE / 'log' / f'{name}.log'
