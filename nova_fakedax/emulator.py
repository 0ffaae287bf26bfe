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

"""What a QEMU binary and a libvirt can do."""

import dataclasses
import functools
import os
import re

from oslo_concurrency import processutils
from oslo_log import log as logging

LOG = logging.getLogger(__name__)

DEVICE = 'virtio-pmem-pci'

#: libvirt 9.0 defines a domain with ``<memory model='virtio-pmem'>`` but
#: kills it once started: "virtio-pmem memory device info is not handled
#: yet". 9.1.0 is the first release that leaves it running (libvirt commit
#: "qemu: Don't error out on 'unknown' memory model in
#: qemuMonitorJSONGetMemoryDeviceInfo()").
MIN_LIBVIRT = (9, 1, 0)

#: The properties of a device that migrates: it saves its state, syncs when the
#: guest stops and drops the host's cached pages before an incoming guest runs
#: (qemu-device/SPEC.rst). QEMU's own device has none of them.
MIGRATION_PROPERTIES = frozenset({
    'drop-cache', 'last-error', 'cache-dropped', 'cache-left'})

_PROPERTY = re.compile(r'^\s+(?P<name>[\w-]+)=<', re.MULTILINE)
_MACHINE = re.compile(r'^(?P<name>[\w.-]+) {2,}\S', re.MULTILINE)


class ProbeError(Exception):
    """The binary does not report what it can do."""


@dataclasses.dataclass(frozen=True)
class Emulator:
    """A QEMU binary that has the device.

    :ivar path: the binary
    :ivar properties: the names of the device's properties, which show what
        it can do
    """

    path: str
    properties: frozenset[str]

    @property
    def migrates(self) -> bool:
        """Whether instances that it runs can migrate."""
        return self.properties >= MIGRATION_PROPERTIES


def probe(path: str) -> Emulator:
    """Ask the binary for its device's properties.

    The answer is cached until the binary is replaced.

    :raises ProbeError: says what the binary lacks
    """
    properties = frozenset(_PROPERTY.findall(_ask(
        path, 'the properties of a device', '-device', f'{DEVICE},help')))
    # QEMU exits with 0 and prints nothing for a device it does not know.
    if 'memdev' not in properties:
        raise ProbeError(f'{path} has no device {DEVICE}')
    return Emulator(path, properties)


def machines(path: str) -> frozenset[str]:
    """Ask the binary for its machine types.

    Versions and their aliases: ``pc-q35-10.0`` and ``q35``. The answer is
    cached until the binary is replaced.

    :raises ProbeError: the binary does not list them
    """
    return frozenset(_MACHINE.findall(_ask(
        path, 'the machine types', '-machine', 'help')))


def _ask(path: str, what: str, *arguments: str) -> str:
    try:
        status = os.stat(path)
    except OSError as exc:
        raise ProbeError(f'{path}: {exc.strerror}')
    return _answer(
        path, what, arguments, status.st_mtime_ns, status.st_size)


@functools.lru_cache
def _answer(path: str, what: str, arguments: tuple[str, ...],
            _mtime: int, _size: int) -> str:
    try:
        stdout, _stderr = processutils.execute(path, *arguments)
    except (OSError, processutils.ProcessExecutionError) as exc:
        LOG.debug('%(path)s: %(exc)s', {'path': path, 'exc': exc})
        raise ProbeError(f'{path} cannot list {what}')
    return str(stdout)
