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

"""What is left of a lab whose supervisord has ended."""

import contextlib
import os
import pathlib
import shutil

import psutil

from lab.deploy import host
from lab.deploy import loops
from lab.deploy import storage
from lab import errors
from lab import paths
from lab import wait

#: supervisord.conf sets it for every service; their children inherit it.
_MARK = ('NOVA_FAKEDAX_LAB', 'yes')

#: The file in the run directory that names the clone whose lab is up.
_OWNER = host.RUN / 'clone'


class AnotherLabError(errors.LabError):
    """The lab of another clone is up on this machine."""


class LeftoverError(errors.LabError):
    """Something of the lab cannot be removed."""


def claim() -> None:
    """Make this clone's lab the one of this machine.

    :raises AnotherLabError: another clone's lab is up
    """
    check_owner()
    host.RUN.mkdir(mode=0o700, exist_ok=True)
    _OWNER.write_text(str(paths.ROOT))


def check_owner() -> None:
    """Check that no other clone's lab is up.

    :raises AnotherLabError: one is up
    """
    try:
        owner = pathlib.Path(_OWNER.read_text())
    except FileNotFoundError:
        return
    if owner == paths.ROOT:
        return
    if (owner / 'lab/cloud').exists():
        raise AnotherLabError(
            f'a lab is up on this machine, which can have only one; '
            f'take it down first: {owner}/lab/cloud down')
    # The clone was deleted while its lab was up.
    remove()


def processes() -> list[psutil.Process]:
    """The lab's processes: marked ones, and the guests of the hosts."""
    found = [process for node in host.HOSTS for process in node.emulators()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # A lab in a container is visible here, but is not this one.
            here = os.path.samefile(f'/proc/{process.pid}/ns/pid',
                                    '/proc/self/ns/pid')
            if here and process.environ().get(_MARK[0]) == _MARK[1]:
                found.append(process)
    return [each for each in found if each.pid != os.getpid()]


def mounts() -> list[str]:
    """Mount points of the lab outside its namespaces."""
    prefixes = (str(paths.STATE) + '/', str(host.RUN) + '/')
    found = []
    for line in pathlib.Path('/proc/self/mounts').read_text().splitlines():
        where = line.split()[1]
        if where.startswith(prefixes):
            found.append(where)
    return found


def remove() -> list[str]:
    """Kill every process of the lab, and remove the rest of it.

    That is the devices of its hosts, its mounts, and its directory.

    :returns: what was killed
    :raises LeftoverError: something is still there
    :raises storage.StorageError: the shared storage is still in use
    """
    ended: list[str] = []

    def killed() -> bool:
        remaining = processes()
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                name = process.name()
                process.kill()
                ended.append(f'{name} ({process.pid})')
        psutil.wait_procs(remaining, timeout=5)
        return not remaining

    wait.until(
        'processes to end', killed, 15, interval=0, error=LeftoverError,
        state=lambda: ', '.join(str(each.pid) for each in processes()))
    loops.detach_all()
    storage.detach()
    if still := mounts():
        raise LeftoverError(f'still mounted: {", ".join(still)}')
    if open_ := loops.devices():
        raise LeftoverError(
            f'still in use: {", ".join(map(str, open_))}')
    shutil.rmtree(host.RUN, ignore_errors=True)
    return ended
