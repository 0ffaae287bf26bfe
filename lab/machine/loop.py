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

"""A file as a block device: Linux's loop devices, see loop(4)."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess

from lab import errors
from lab import wait

_FREE_SECONDS = 10


class LoopError(errors.LabError):
    """There is no loop device of the file, or it stays in use."""


@contextlib.contextmanager
def device(file: pathlib.Path, *,
           direct: bool = True) -> Iterator[pathlib.Path]:
    """Make a file a block device for the length of a ``with`` block.

    Linux drops the page cache of a block device when the last one closes it.
    This keeps it open, so that the cache lasts as that of a file does, and
    Linux frees the device once this process has ended, however it ended.

    :param file: its size is a multiple of 512 bytes; what is behind that is
        left out
    :param direct: read and write it past its own page cache, as storage of
        another machine has none here
    :returns: the device's node
    :raises LoopError: there is no device, or none with direct I/O; or, at the
        end, something else has it open
    """
    node = pathlib.Path(_losetup(
        '--find', '--show', f'--direct-io={"on" if direct else "off"}',
        str(file)))
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # From now on it is free as soon as nobody has it open.
        _losetup('--detach', str(node))
    backing = _attribute(node, 'backing_file')
    try:
        if direct and _attribute(node, 'dio') != '1':
            raise LoopError(f'{file} cannot be read and written directly')
        yield node
    finally:
        os.close(descriptor)
        # By then it may be another's, but not of the same file.
        wait.until(f'{node} of {file} to be free',
                   lambda: _attribute(node, 'backing_file') != backing,
                   _FREE_SECONDS, error=LoopError)


def resize(node: pathlib.Path) -> None:
    """Give a device the size that its file has now.

    :raises LoopError: it cannot be resized
    """
    _losetup('--set-capacity', str(node))


def size(path: pathlib.Path) -> int:
    """The bytes of a block device, or of a file.

    :raises OSError: it cannot be opened
    """
    with path.open('rb') as opened:
        return opened.seek(0, os.SEEK_END)


def _attribute(node: pathlib.Path, name: str) -> str | None:
    """What Linux says of a loop device in use; None of one that is free."""
    # The directory comes and goes with the file.
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(
            '/sys/block', node.name, 'loop', name).read_text().strip()
    return None


def _losetup(*arguments: str) -> str:
    try:
        done = subprocess.run(['losetup', *arguments], capture_output=True,
                              text=True)
    except FileNotFoundError as e:
        raise LoopError('no losetup: install mount') from e
    if done.returncode:
        raise LoopError(f'losetup {" ".join(arguments)}: '
                        f'{done.stderr.strip()}')
    return done.stdout.strip()
