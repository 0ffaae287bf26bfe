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

"""The compute hosts: each is a mount and a UTS namespace of this machine."""

from collections.abc import Iterator, Mapping, Sequence
import configparser
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
from typing import Any

import libvirt
import psutil

from lab import errors
from lab import paths

#: Sockets and pid files of the lab that is up. Not in the clone: a machine
#: can have one lab only, and a socket's path at most 107 characters.
RUN = pathlib.Path('/run/nova-fakedax-lab')

#: Nova's instances_path, the same on every host. Each host mounts GlusterFS
#: there in its own namespace; outside of these it is empty.
INSTANCES = paths.STATE / 'instances'

#: The volumes of Cinder's backends, on the same storage.
VOLUMES = INSTANCES / 'nova-fakedax-volumes'

LIBVIRT_PORT = 16509

#: The QEMU for servers on fake DAX. Each host can have another one there.
EMULATOR = pathlib.Path('/var/lib/libvirt/qemu-fakedax')


class HostDownError(errors.LabError):
    """The host's namespaces do not exist: the lab is down."""


@dataclasses.dataclass(frozen=True)
class Host:
    """One compute host, up or down."""

    number: int

    @property
    def name(self) -> str:
        return f'compute{self.number}'

    @property
    def address(self) -> str:
        return f'127.0.0.{self.number + 1}'

    @property
    def uuid(self) -> str:
        return f'00000000-0000-4000-8000-{self.number:012d}'

    @property
    def uri(self) -> str:
        """The URI of its libvirt, which works in any namespace."""
        return f'qemu+tcp://{self.address}/system'

    @property
    def state(self) -> pathlib.Path:
        return paths.STATE / self.name

    @property
    def pid_file(self) -> pathlib.Path:
        return RUN / f'{self.name}.pid'

    @property
    def drop_in(self) -> pathlib.Path:
        """nova-compute's --config-dir."""
        return self.state / 'nova.conf.d'

    @property
    def programs(self) -> pathlib.Path:
        """The directory that comes first in nova-compute's PATH."""
        return self.state / 'bin'

    @property
    def emulator_script(self) -> pathlib.Path:
        """The file that this host has at EMULATOR."""
        return self.state / 'lib' / EMULATOR.name

    def pid(self) -> int:
        """The process that holds the namespaces.

        :raises HostDownError: there is none
        """
        try:
            pid = int(self.pid_file.read_text())
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return pid
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            pass
        raise HostDownError(f'{self.name} is down')

    def run(self, args: Sequence[str | os.PathLike[str]],
            **kwargs: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command on the host, by subprocess.run.

        :param kwargs: as of subprocess.run
        :raises HostDownError: the lab is down
        """
        return subprocess.run(
            ['nsenter', '--target', str(self.pid()), '--mount', '--uts',
             '--', *args], **kwargs)

    def path(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """A path of the host, seen from outside its namespace.

        :raises HostDownError: the lab is down
        """
        return pathlib.Path(
            f'/proc/{self.pid()}/root', *pathlib.Path(path).parts[1:])

    def qemu_log(self, domain: str) -> pathlib.Path:
        """The log of a domain's QEMU, seen as by :meth:`path`."""
        return self.path(f'/var/log/libvirt/qemu/{domain}.log')

    @contextlib.contextmanager
    def libvirt(self) -> Iterator[libvirt.virConnect]:
        """A connection to the host's libvirt.

        :raises libvirt.libvirtError: it does not answer
        """
        # libvirt also prints each error that it raises, by default.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def mounted(self) -> bool:
        """Whether the host has the shared storage mounted, and it works."""
        try:
            mounts = pathlib.Path(f'/proc/{self.pid()}/mounts').read_text()
            if f' {INSTANCES} fuse.glusterfs ' not in mounts:
                return False
            self.path(INSTANCES).stat()
        except (HostDownError, OSError):
            return False
        return True

    def unmount(self) -> None:
        """Unmount the shared storage, also if its process has died."""
        while self.run(['umount', '--lazy', INSTANCES],
                       capture_output=True).returncode == 0:
            pass

    def configure(
        self, options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Override options of nova-compute, from its next start on.

        :param options: section to option to value; none to remove the
            overrides
        """
        override = self.drop_in / 'override.conf'
        parser = configparser.RawConfigParser(default_section='')
        parser.read_dict(options or {})
        self.drop_in.mkdir(parents=True, exist_ok=True)
        with override.open('w') as file:
            parser.write(file)

    def emulators(self, server: str = '') -> list[psutil.Process]:
        """The QEMU processes of the host's guests, or of one server's.

        :param server: its UUID
        """
        guests = str(self.state / 'lib/qemu')
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if not process.name().startswith('qemu-system'):
                    continue
                # libvirt keeps a guest's files below /var/lib, where the
                # host's own directory is mounted.
                root = f'/proc/{process.pid}/root/var/lib/libvirt/qemu'
                # It may end at any time, also between these.
                if os.path.samefile(root, guests) and (
                        not server or server in process.cmdline()):
                    found.append(process)
        return found

    def power_off(self) -> None:
        """Kill every guest, as a power failure does."""
        for process in self.emulators():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def reset(self) -> None:
        """Remove what the host's last namespaces have left."""
        self.power_off()
        self.pid_file.unlink(missing_ok=True)

    def destroy_guests(self) -> None:
        """End every guest, by libvirt or, if it does not answer, without."""
        try:
            with self.libvirt() as connection:
                for domain in connection.listAllDomains(
                        libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                    domain.destroy()
        except libvirt.libvirtError:
            pass
        self.power_off()


#: All hosts.
HOSTS = (Host(1), Host(2))
