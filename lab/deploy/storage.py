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

"""The file system of the hosts' shared storage.

It is the directory ``.lab/brick``, which each host mounts, and Cinder. With a
size, a file system of its own is mounted there, in a sparse file: what is
allocated on it takes space of this machine only once it is written, so it can
be larger than the machine's disk.
"""

import os
import pathlib
import subprocess

from lab import errors
from lab import paths

BRICK = paths.STATE / 'brick'
_FILE = paths.STATE / 'brick.ext4'

#: Where Cinder has it mounted.
MOUNT = paths.STATE / 'cinder/shared'


class StorageError(errors.LabError):
    """The shared storage cannot be what is asked for."""


def attach(gib: int | None) -> None:
    """Have the storage in place.

    :param gib: its size if it is to have a file system of its own; None
        leaves it as it was made
    :raises StorageError: it was made otherwise and has files, or it cannot be
        made
    """
    BRICK.mkdir(parents=True, exist_ok=True)
    if gib is not None and not _has(gib):
        if _FILE.exists() or any(BRICK.iterdir()):
            raise StorageError(
                f'--storage {gib}: the shared storage is there and of another '
                'size; "lab/cloud down --wipe" deletes it')
        _make(gib)
    if _FILE.exists() and not BRICK.is_mount():
        # What is deleted there takes no space any more.
        _run('mount', '-o', 'loop,discard,noinit_itable', str(_FILE),
             str(BRICK))


def mounted() -> bool:
    """Whether Cinder has it mounted, and it works."""
    mounts = pathlib.Path('/proc/self/mounts').read_text()
    if f' {MOUNT} fuse.glusterfs ' not in mounts:
        return False
    try:
        MOUNT.stat()
    except OSError:
        return False
    return True


def unmount() -> None:
    """Unmount Cinder's, also if its process has died."""
    while subprocess.run(['umount', '--lazy', MOUNT],
                         capture_output=True).returncode == 0:
        pass


def make_mount_point() -> None:
    """Make the directory of Cinder's mount, with no mount there."""
    unmount()
    MOUNT.mkdir(parents=True, exist_ok=True)


def detach() -> None:
    """Unmount Cinder's, and its file system, if it has one of its own."""
    unmount()
    if BRICK.is_mount():
        _run('umount', str(BRICK))


def _has(gib: int) -> bool:
    return _FILE.exists() and _FILE.stat().st_size == gib << 30


def _make(gib: int) -> None:
    unfinished = _FILE.with_suffix('.unfinished')
    with unfinished.open('wb') as file:
        file.truncate(gib << 30)
    # Few inodes, which take space at once.
    _run('mkfs.ext4', '-q', '-T', 'largefile4', '-m', '0', str(unfinished))
    os.rename(unfinished, _FILE)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StorageError(f'{" ".join(command)}: {done.stderr.strip()}')
