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

"""What a power cut has done to a file system and to what was acknowledged."""

from collections.abc import Mapping
import contextlib
import enum
import pathlib
import re
import subprocess

#: How many tasks commit in the guest.
TASKS = 8

#: As in probe.c.
RECORDS = 16
REPLACE_EVERY = 4


class Verdict(enum.Enum):
    """From best to worst."""

    GOOD = 'good'
    #: It mounts and has all that was acknowledged, but needs a repair.
    DAMAGED = 'damaged'
    #: It mounts, but lacks something that was acknowledged.
    LOST = 'lost'
    #: It does not mount.
    UNMOUNTABLE = 'unmountable'


class FileSystem:
    """How to make, mount and check a file system.

    :ivar size: the size of its image in bytes
    """

    def __init__(self, kind: str, size_mib: int, *mkfs: str) -> None:
        self.kind = kind
        self.size = size_mib << 20
        self._mkfs = mkfs

    def make(self, image: pathlib.Path) -> None:
        with image.open('wb') as file:
            file.truncate(self.size)
        _run(f'mkfs.{self.kind}', '-q', *self._mkfs, str(image))

    def damage(self, image: pathlib.Path) -> str:
        """What a check finds wrong after a mount; '' if it finds nothing."""
        check = (['e2fsck', '-f', '-n'] if self.kind == 'ext4'
                 else ['xfs_repair', '-n'])
        done = _try(*check, str(image))
        return (done.stdout + done.stderr).strip() if done.returncode else ''

    def repair(self, image: pathlib.Path) -> None:
        """Make it mount, whatever that loses."""
        _try(*(['e2fsck', '-f', '-y'] if self.kind == 'ext4'
               else ['xfs_repair', '-L']), str(image))


#: With blocks of 4 KiB, for DAX. mkfs.xfs refuses less than 300 MiB.
FILE_SYSTEMS = {
    'ext4': FileSystem('ext4', 64, '-b', '4096', '-F'),
    'ext4-nocsum': FileSystem('ext4', 64, '-b', '4096', '-F',
                              '-O', '^metadata_csum'),
    'xfs': FileSystem('xfs', 304, '-f', '-m', 'reflink=0'),
}


def acknowledged(log: str) -> dict[int, int]:
    """The last generation that each task acknowledged, by task number."""
    # The last line may be incomplete.
    return {int(task): int(generation) for task, generation in
            re.findall(r'(?m)^ack (\d+) (\d+) 0\r?\n', log)}


def missing(found: str, acks: Mapping[int, int]) -> list[str]:
    """A sentence for each thing that was acknowledged and is missing.

    :param found: what ``probe committed`` prints
    """
    lost = []
    rows = [line.split() for line in found.splitlines()]
    for task, generation in sorted(acks.items()):
        *records, newest = rows[task]
        # The task may be writing the next record over the oldest one.
        for wanted in range(max(generation - RECORDS + 2, 1), generation + 1):
            seen = records[wanted % RECORDS]
            if seen != str(wanted):
                lost.append(f'task {task}: record {wanted} is {seen}')
        following = generation + 1
        replaced = generation - generation % REPLACE_EVERY
        allowed = {str(replaced)}
        if following % REPLACE_EVERY == 0:
            allowed.add(str(following))
        if newest not in allowed:
            lost.append(f'task {task}: newest is {newest}, not {replaced}')
    return lost


def judge(image: pathlib.Path, system: FileSystem, probe: pathlib.Path,
          acks: Mapping[int, int]) -> tuple[Verdict, list[str]]:
    """Mount a crash image, look for what was acknowledged, and check it.

    The image changes.

    :returns: the verdict, and what is wrong
    """
    mount = image.with_name('mount')
    mount.mkdir(exist_ok=True)
    options = 'loop,nouuid' if system.kind == 'xfs' else 'loop'
    lost: list[str] = []
    done = _try('mount', '-t', system.kind, '-o', options, str(image),
                str(mount))
    if done.returncode:
        # Look for what is missing even after a repair by hand.
        system.repair(image)
        with contextlib.suppress(subprocess.CalledProcessError):
            _run('mount', '-t', system.kind, '-o', options, str(image),
                 str(mount))
            lost = _missing(mount, probe, acks)
        return Verdict.UNMOUNTABLE, [done.stderr.strip(), *lost]
    lost = _missing(mount, probe, acks)
    damage = system.damage(image)
    if lost:
        return Verdict.LOST, [*lost, damage]
    return (Verdict.DAMAGED, [damage]) if damage else (Verdict.GOOD, [])


def _missing(mount: pathlib.Path, probe: pathlib.Path,
             acks: Mapping[int, int]) -> list[str]:
    """Look at a mounted crash image, and unmount it."""
    try:
        return missing(
            _run(str(probe), 'committed', str(mount), str(TASKS)), acks)
    finally:
        _run('umount', str(mount))


def _try(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, text=True, capture_output=True, errors='replace',
        env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL': 'C'})


def _run(*argv: str) -> str:
    done = _try(*argv)
    done.check_returncode()
    return done.stdout
