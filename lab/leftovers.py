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

"""What of a lab is on the machine although no supervisord answers for it."""

import contextlib
import os
import pathlib
import shutil
import time

import psutil

from lab import host
from lab import paths

#: Set for every service by supervisord.conf, and inherited.
_MARK = ('NOVA_FAKEDAX_LAB', 'yes')

#: The file in the run directory that names the clone whose lab is up.
_OWNER = host.RUN / 'clone'


class AnotherLabError(Exception):
    """The lab of another clone is up on this machine."""


class LeftoverError(Exception):
    """Something of the lab could not be taken away."""


def claim() -> None:
    """Make this clone's lab the one of this machine.

    :raises AnotherLabError: another clone's is
    """
    check_owner()
    host.RUN.mkdir(mode=0o700, exist_ok=True)
    _OWNER.write_text(str(paths.ROOT))


def check_owner() -> None:
    """See that no other clone's lab is up.

    :raises AnotherLabError: one is
    """
    try:
        owner = pathlib.Path(_OWNER.read_text())
    except FileNotFoundError:
        return
    if owner == paths.ROOT:
        return
    if (owner / 'lab/cloud').exists():
        raise AnotherLabError(
            f'a lab is up on this machine, and there can be one only: '
            f'take it down first with {owner}/lab/cloud down')
    # The clone was deleted with its lab up.
    remove()


def processes() -> list[psutil.Process]:
    """The lab's processes: services by their mark, guests by their host."""
    found = [process for node in host.HOSTS for process in node.emulators()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # A container's lab is seen from here, but is not ours.
            here = os.path.samefile(f'/proc/{process.pid}/ns/pid',
                                    '/proc/self/ns/pid')
            if here and process.environ().get(_MARK[0]) == _MARK[1]:
                found.append(process)
    return [each for each in found if each.pid != os.getpid()]


def mounts() -> list[str]:
    """Mount points of the lab that are seen outside its namespaces."""
    ours = (str(paths.STATE) + '/', str(host.RUN) + '/')
    found = []
    for line in pathlib.Path('/proc/self/mounts').read_text().splitlines():
        where = line.split()[1]
        if where.startswith(ours):
            found.append(where)
    return found


def remove() -> list[str]:
    """End every process of the lab and forget its run directory.

    :returns: what had to be ended
    :raises LeftoverError: something is still there
    """
    ended = []
    deadline = time.monotonic() + 15
    while remaining := processes():
        if time.monotonic() > deadline:
            raise LeftoverError(
                'these do not end: '
                + ', '.join(f'{each.pid}' for each in remaining))
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                name = process.name()
                process.kill()
                ended.append(f'{name} ({process.pid})')
        psutil.wait_procs(remaining, timeout=5)
    if still := mounts():
        raise LeftoverError(f'still mounted: {", ".join(still)}')
    shutil.rmtree(host.RUN, ignore_errors=True)
    return ended
