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


"""Block devices of the hosts: loop devices over files of the shared storage.

The kernel of a development machine has neither iSCSI nor a device mapper. So
the file of a volume becomes a block device of a host by a loop device that is
made over the host's own mount of the shared storage. Each host has a page
cache of its own for it, as with a disk that a storage network attaches to two
hosts. With direct I/O, so that the file itself is in no page cache.

All hosts see all devices of the machine. A host's are those that have a link
in its directory: it keeps its name, whichever number the device gets.
"""

import pathlib
import subprocess

from lab.deploy import host
from lab import errors
from lab import paths

#: Where each host has the files.
FILES = host.VOLUMES / 'block'

_LINKS = paths.STATE / 'cinder/devices'
_SYSFS = pathlib.Path('/sys/block')


class LoopError(errors.LabError):
    """A loop device cannot be made."""


def link(node: host.Host, name: str) -> pathlib.Path:
    """Where a host has the device of a file, whether it has one or not."""
    return _LINKS / node.name / name


def attach(node: host.Host, name: str) -> pathlib.Path:
    """Have a device of a file on a host; it stays until :func:`detach`.

    :raises LoopError: it cannot be made
    :raises host.HostDownError: the lab is down
    """
    path = link(node, name)
    if _is_attached(path):
        return path
    done = node.run(['losetup', '--find', '--show', '--direct-io=on',
                     FILES / name], capture_output=True, text=True)
    if done.returncode:
        raise LoopError(f'{node.name}: {done.stderr.strip()}')
    device = pathlib.Path(done.stdout.strip())
    if _read(device.name, 'dio') != '1':
        _losetup_detach(device)
        raise LoopError(f'{node.name}: {device} has no direct I/O')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(device)
    return path


def detach(node: host.Host, name: str) -> None:
    """Take the device of a file from a host, if it has one.

    One that is open goes when it is closed.
    """
    path = link(node, name)
    if _is_attached(path):
        _losetup_detach(path.resolve())
    path.unlink(missing_ok=True)


def restore(node: host.Host) -> None:
    """Make the devices that a host had before it, or the lab, went down.

    :raises LoopError: one cannot be made
    """
    for path in _links(node):
        if node.path(FILES / path.name).exists():
            attach(node, path.name)
        else:
            path.unlink()


def release(node: host.Host) -> None:
    """Let go of a host's devices, for :func:`restore` to make them again."""
    for path in _links(node):
        if _is_attached(path):
            _losetup_detach(path.resolve())


def devices() -> list[pathlib.Path]:
    """All that the lab has made, also those of hosts that are gone."""
    return sorted(pathlib.Path('/dev', each.parents[1].name)
                  for each in _SYSFS.glob('loop*/loop/backing_file')
                  if _is_of_the_lab(each.parents[1].name))


def detach_all() -> None:
    """Let go of the devices of all hosts, for :func:`restore`."""
    for device in devices():
        _losetup_detach(device)


def _links(node: host.Host) -> list[pathlib.Path]:
    return sorted((_LINKS / node.name).glob('*'))


def _is_attached(path: pathlib.Path) -> bool:
    """Whether a link leads to a device of the file of its name."""
    return path.is_symlink() and _backing(path.readlink().name).endswith(
        f'/{host.VOLUMES.name}/{FILES.name}/{path.name}')


def _is_of_the_lab(device: str) -> bool:
    backing = _backing(device)
    # Once the host's mount is gone, the path begins at the mount's root.
    return backing.startswith((
        f'{FILES}/', f'/{host.VOLUMES.name}/{FILES.name}/'))


def _backing(device: str) -> str:
    """The path of the file behind a device; empty if it has none.

    As the host sees it that it was made on.
    """
    return _read(device, 'backing_file').removesuffix(' (deleted)')


def _read(device: str, attribute: str) -> str:
    try:
        return (_SYSFS / device / 'loop' / attribute).read_text().rstrip('\n')
    except OSError:
        return ''


def _losetup_detach(device: pathlib.Path) -> None:
    # It may have gone meanwhile: it does when QEMU closes it.
    subprocess.run(['losetup', '--detach', device], capture_output=True)
