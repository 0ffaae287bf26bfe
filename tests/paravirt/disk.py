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

"""A guest's disk whose power can be cut, again and again.

A power cut leaves what was synced, and any part of what was not: the host may
have written each page, or not yet. Here a page of 4 KiB is written whole or
not at all; in practice that depends on the host's storage.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess

from lab.machine import qemu
from lab import wait
from tests.device import backing

PAGE = 4096
_CHUNK = 256 * PAGE


def copy(image: pathlib.Path, path: pathlib.Path) -> None:
    """Copy an image and keep its holes, which Python's copy would fill."""
    subprocess.run(['cp', '--sparse=always', image, path], check=True)


@dataclasses.dataclass(frozen=True)
class Cut:
    """What was on the disk at one moment.

    :ivar synced: image of what a cut cannot take away
    :ivar unsynced: pages that the guest has stored and no sync has covered,
        by their number
    """

    synced: pathlib.Path
    unsynced: Mapping[int, bytes]

    def some(self, chance: float) -> dict[int, bytes]:
        """Choose which unsynced pages the host has written, by chance."""
        return {number: page for number, page in self.unsynced.items()
                if random.random() < chance}

    def image(self, path: pathlib.Path, kept: Mapping[int, bytes]) -> None:
        """Make an image of what was synced, and of some more pages."""
        copy(self.synced, path)
        with path.open('r+b') as file:
            for number, page in kept.items():
                file.seek(number * PAGE)
                file.write(page)


class Disk:
    """A disk in a FUSE file system that knows what was synced.

    :param image: an image with a file system
    :param directory: for the mount, and for the image of what was synced
    """

    def __init__(self, image: pathlib.Path, directory: pathlib.Path) -> None:
        self._synced = directory / 'synced'
        copy(image, self._synced)
        self.backing = backing.BackingFile(
            image, directory / 'host', self._synced)

    @property
    def path(self) -> pathlib.Path:
        """The file to give to QEMU."""
        return self.backing.path

    def close(self) -> None:
        self.backing.close()

    def hold(self, syncs: int, timeout: float = 60) -> None:
        """Let so many syncs end, and wait until the next one has begun.

        That one does not end before backing.release().
        """
        held = self.backing
        held.hold()
        for _ in range(syncs):
            ended = len(held.ended)
            held.wait(lambda: held.begun > ended, timeout)
            held.release_one()
            held.wait(lambda: len(held.ended) > ended, timeout)
        held.wait(lambda: held.begun > len(held.ended), timeout)

    @contextlib.contextmanager
    def cut(self, machine: qemu.Machine) -> Iterator[Cut]:
        """Stop QEMU, and look at the disk; afterwards the guest continues.

        A sync must be held, so that none ends meanwhile.
        """
        with stopped(machine.pid):
            yield Cut(self._synced, self._unsynced())

    def _unsynced(self) -> dict[int, bytes]:
        pages = {}
        # Read the mount's page cache, which is what QEMU maps.
        with self.path.open('rb') as now, self._synced.open('rb') as synced:
            for start in range(0, os.fstat(now.fileno()).st_size, _CHUNK):
                new, old = now.read(_CHUNK), synced.read(_CHUNK)
                if new == old:
                    continue
                for at in range(0, len(new), PAGE):
                    if new[at:at + PAGE] != old[at:at + PAGE]:
                        pages[(start + at) // PAGE] = new[at:at + PAGE]
        return pages


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop all threads of a process, other than those in a system call."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait.until(f'the threads of process {pid} to stop',
                   lambda: _states(pid) <= {'T', 'D'}, 10, interval=0.001,
                   state=lambda: sorted(_states(pid)))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> Collection[str]:
    found = set()
    for path in pathlib.Path(f'/proc/{pid}/task').iterdir():
        # The name that precedes the state may contain a bracket.
        text = (path / 'stat').read_text()
        found.add(text.rpartition(')')[2].split()[0])
    return found
