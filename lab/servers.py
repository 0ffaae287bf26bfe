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

"""Servers of the lab's cloud: what they boot, and a way into them."""

from collections.abc import Collection, Iterator
import contextlib
import functools
import pathlib
import time
from typing import Any

import libvirt
from openstack import connection
import psutil

from lab import agent
from lab import guest
from lab import host

#: Image properties that let the test guest be what it is.
PROPERTIES = {'fakedax_guest': 'true', 'hw_qemu_guest_agent': 'yes'}

#: Those of an image of guest-image-elements, as its build prints them.
DISTRIBUTION_PROPERTIES = PROPERTIES | {
    'os_type': 'linux', 'hw_cdrom_bus': 'scsi',
    'hw_scsi_model': 'virtio-scsi'}

#: How migrations end.
_ENDED = ('completed', 'failed', 'error', 'cancelled')
_MIGRATION_SECONDS = 300


class ServerError(Exception):
    """The server is not what was expected."""


def image(cloud: connection.Connection, name: str, built: guest.Guest,
          kernel: bool = False, **properties: str) -> Any:
    """The test guest as an image, uploaded unless it is there already.

    :param kernel: boot by kernel and initrd images; otherwise firmware and
        GRUB load them from the disk
    :param properties: beside :data:`PROPERTIES`; '' leaves one out
    """
    wanted = {key: value for key, value in (PROPERTIES | properties).items()
              if value}
    if kernel:
        wanted |= {
            'kernel_id': upload(
                cloud, f'{name}-kernel', built.kernel, {}, 'aki').id,
            'ramdisk_id': upload(
                cloud, f'{name}-ramdisk', built.initrd, {}, 'ari').id,
            'os_command_line': guest.COMMAND_LINE}
    return upload(cloud, name, built.disk, wanted)


def upload(cloud: connection.Connection, name: str, path: pathlib.Path,
           properties: dict[str, str], disk_format: str = 'raw') -> Any:
    """A file as an image, uploaded unless it is there already.

    :param path: in a directory that is named by what the file was made from
    """
    properties = properties | {'guest_build': path.parent.name}
    found = cloud.image.find_image(name)
    if found:
        if all(found.properties.get(key, found.get(key)) == value
               for key, value in properties.items()):
            return found
        cloud.image.delete_image(found)
    return cloud.image.create_image(
        name, filename=str(path), disk_format=disk_format,
        container_format='bare' if disk_format == 'raw' else disk_format,
        visibility='public', wait=True, **properties)


def flavor(cloud: connection.Connection, name: str, *, ram: int = 256,
           disk: int = 1, ephemeral: int = 0,
           extra_specs: dict[str, str] | None = None) -> Any:
    """A flavor, made anew unless one of this name is just that.

    :param ram: MiB
    :param disk: GiB of the root disk
    :param ephemeral: GiB of the ephemeral disk
    """
    extra_specs = extra_specs or {}
    found = cloud.compute.find_flavor(name, get_extra_specs=True)
    if found:
        if (found.ram, found.disk, found.ephemeral, found.extra_specs) == (
                ram, disk, ephemeral, extra_specs):
            return found
        cloud.compute.delete_flavor(found)
    made = cloud.compute.create_flavor(
        name=name, ram=ram, vcpus=1, disk=disk, ephemeral=ephemeral)
    if extra_specs:
        cloud.compute.create_flavor_extra_specs(made, extra_specs)
    return made


class Server:
    """A server of the cloud, as its host sees it.

    :raises ServerError: the server is on no host
    """

    def __init__(self, cloud: connection.Connection, server_id: str) -> None:
        self.cloud = cloud
        self.id = server_id

    def show(self) -> Any:
        return self.cloud.compute.get_server(self.id)

    @functools.cached_property
    def host(self) -> host.Host:
        """Its host, as of the first time that this was asked."""
        name = self.show().compute_host
        for candidate in host.HOSTS:
            if candidate.name == name:
                return candidate
        raise ServerError(f'server {self.id} is on host {name!r}')

    def file(self, name: str) -> pathlib.Path:
        """A file of its directory, as its host's mount shows it."""
        return self.host.path(host.INSTANCES / self.id / name)

    def emulator(self) -> psutil.Process:
        """The QEMU process that runs it."""
        for process in self.host.emulators():
            if self.id in process.cmdline():
                return process
        raise ServerError(f'no emulator runs server {self.id}')

    def live_migrate(self, **arguments: Any) -> str:
        """Migrate it while it runs; return the status with which that ended.

        :param arguments: as of openstacksdk's live_migrate_server
        :raises ServerError: it has not ended in time
        """
        known = self.migrations()
        self.cloud.compute.live_migrate_server(
            self.id, block_migration='auto', **arguments)
        return self.migration_status(known)

    def migrations(self) -> set[Any]:
        """The ids of all its migrations, those that have ended included."""
        return {each.id for each in self._migrations()}

    def migration_status(self, known: Collection[Any]) -> str:
        """Wait for the one migration that is not known yet; its last status.

        :raises ServerError: it has not ended in time
        """
        deadline = time.monotonic() + _MIGRATION_SECONDS
        while True:
            statuses = [each.status for each in self._migrations()
                        if each.id not in known]
            if statuses and statuses[0] in _ENDED:
                # Where it is now.
                vars(self).pop('host', None)
                return statuses[0]
            if time.monotonic() > deadline:
                raise ServerError(
                    f'server {self.id}: the migration is still '
                    f'{statuses} after {_MIGRATION_SECONDS} s')
            time.sleep(0.2)

    def _migrations(self) -> list[Any]:
        return [each for each in self.cloud.compute.migrations()
                if each.server_id == self.id]

    def migration_statistics(self) -> dict[str, Any]:
        """What libvirt, on the host that it went to, knows of the last one.

        https://libvirt.org/html/libvirt-libvirt-domain.html, job statistics:
        times in ms, sizes in bytes.
        """
        with self.domain() as domain:
            return domain.jobStats(
                libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
                | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED)

    @contextlib.contextmanager
    def domain(self) -> Iterator[Any]:
        """Its libvirt domain."""
        with self.host.libvirt() as libvirt_connection:
            yield libvirt_connection.lookupByUUIDString(self.id)

    @contextlib.contextmanager
    def agent(self, timeout: float = 120) -> Iterator[agent.Agent]:
        """The agent in its guest, once it answers.

        :param timeout: seconds to wait for that
        :raises lab.agent.AgentTimeoutError: it does not answer
        """
        with self.domain() as domain:
            connected = agent.Agent(
                agent.DomainTransport(domain), self.console)
            connected.wait_ready(timeout)
            yield connected

    def console(self) -> str:
        """The console log, as Nova hands it out."""
        return self.cloud.compute.get_server_console_output(
            self.id)['output']
