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

"""What a guest says about its root disk.

By SSH a test runs ``report.sh`` when it asks. Where there is no network to the
guest, ``report.sh`` is the server's user data: it runs at each boot, reports
again and again on the serial console, and Nova's API has the console's output.
"""

import base64
from collections.abc import Callable
import dataclasses
import hashlib
import pathlib
import re
import shlex
import time
from typing import Any, Protocol

from tempest import config
from tempest.lib import exceptions

CONF = config.CONF

_SCRIPT = pathlib.Path(__file__).with_name('report.sh')

#: The words of a report, and their MD5.
_REPORT = re.compile(r'fakedax-report (boot=\S+(?: \S+=\S+)+) ([0-9a-f]{32})')

#: Characters of the console that an error shows.
_TAIL = 2000


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``report.sh`` has found out.

    :ivar boot: changes with each boot
    :ivar turn: of the reports of this boot, the first is 1; 0 by SSH
    :ivar found: the last number in the log on the disk, before this report
    :ivar acknowledged: the number that was appended, and whose fsync has
        returned
    :ivar device: what root is mounted from
    :ivar options: its mount options
    :ivar root_kib: size of the root file system, in KiB
    :ivar data_kib: size of the data that was read, in KiB
    :ivar cached_kib: by how much that made the guest's page cache grow, in
        KiB
    :ivar sum: of the data, which no two guests have in common
    """

    boot: str
    turn: int
    found: int
    acknowledged: int
    device: str
    options: str
    root_kib: int
    data_kib: int
    cached_kib: int
    sum: str

    @property
    def survived(self) -> int:
        """The last number in the log when this boot began."""
        return self.found - max(0, self.turn - 1)


def parse(text: str) -> list[Report]:
    """The reports in a text, in their order.

    Without those that the console has cut or garbled: when a guest migrates,
    its serial port can repeat some characters.
    """
    reports = []
    for match in _REPORT.finditer(text):
        digest = hashlib.md5(match[1].encode(), usedforsecurity=False)
        if digest.hexdigest() != match[2]:
            continue
        values: dict[str, Any] = dict(
            word.split('=', 1) for word in match[1].split())
        for field in dataclasses.fields(Report):
            if field.type is int:
                values[field.name] = int(values[field.name])
        reports.append(Report(**values))
    return reports


def user_data() -> str:
    """User data that reports on the console, as Nova's API wants it.

    The first line has cloud-init run it at each boot, not only at the first.
    """
    script = (f'#cloud-boothook\n#!/bin/sh\nset -- {CONF.fakedax.data_mib} '
              f'watch\n{_SCRIPT.read_text()}')
    return base64.b64encode(script.encode()).decode()


class Guest(Protocol):
    """A guest that can be asked."""

    def report(self) -> Report:
        """What it says now.

        After a reboot, the first report of the new boot.

        :raises tempest.lib.exceptions.TimeoutException: it says nothing
        """


class Console:
    """A guest whose user data is that of :func:`user_data`.

    :param client: the servers client
    """

    def __init__(self, client: Any, server_id: str) -> None:
        self._client = client
        self._server_id = server_id

    def report(self) -> Report:
        mark = next(reversed(parse(self._output())), None)
        deadline = time.monotonic() + CONF.compute.build_timeout
        while True:
            output = self._output()
            reports = _after(mark, parse(output))
            if reports:
                return reports[0]
            if time.monotonic() > deadline:
                raise exceptions.TimeoutException(
                    f'the guest of server {self._server_id} says nothing new '
                    f'on its console, which ends with: {output[-_TAIL:]}')
            time.sleep(CONF.compute.build_interval)

    def _output(self) -> str:
        try:
            output: str = self._client.get_console_output(
                self._server_id)['output']
            return output
        except (exceptions.NotFound, exceptions.Conflict):
            # QEMU has not made it yet.
            return ''


def _after(mark: Report | None, reports: list[Report]) -> list[Report]:
    """The reports that were begun after a moment.

    :param mark: the last one that had been printed then, if the console
        showed any. It may have gone: the log begins again when QEMU does. The
        next one of the same boot may have been begun before.
    """
    if mark is None and reports and reports[0].turn > 1:
        mark = reports[0]
    if mark is None:
        return reports
    if mark in reports:
        reports = reports[reports.index(mark) + 1:]
    return [each for each in reports
            if each.boot != mark.boot or each.turn > mark.turn + 1]


class Ssh:
    """A guest that SSH reaches.

    :param connect: makes a client, which retries until the guest answers
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect

    def report(self) -> Report:
        said = self._connect().exec_command(
            f'sudo sh -c {shlex.quote(_SCRIPT.read_text())} report.sh '
            f'{CONF.fakedax.data_mib}')
        return parse(said)[-1]
