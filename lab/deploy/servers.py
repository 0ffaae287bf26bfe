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

"""Servers of the lab's cloud: images, flavors, volumes, access to guests."""

from collections.abc import Collection, Iterator
import contextlib
import functools
import pathlib
from typing import Any

import libvirt
from openstack import connection
import psutil

from lab.deploy import host
from lab import errors
from lab import guest
from lab.machine import agent
from lab import wait

#: Properties of an image of the test guest.
PROPERTIES = {'fakedax_guest': 'true', 'hw_qemu_guest_agent': 'yes'}

#: Of an image of guest-image-elements, whose build prints them.
DISTRIBUTION_PROPERTIES = PROPERTIES | {
    'os_type': 'linux', 'hw_cdrom_bus': 'scsi',
    'hw_scsi_model': 'virtio-scsi'}

#: Statuses of a migration that has ended.
_ENDED = ('completed', 'failed', 'error', 'cancelled')
_MIGRATION_SECONDS = 300
_VOLUME_SECONDS = 180


class ServerError(errors.LabError):
    """The server is not where, or as, it was expected."""


def image(cloud: connection.Connection, name: str, built: guest.Guest,
          kernel: bool = False, **properties: str) -> Any:
    """The test guest as an image, uploaded unless Glance has it.

    :param kernel: boot from kernel and initrd images; otherwise firmware and
        GRUB load them from the disk
    :param properties: override :data:`PROPERTIES`; '' removes one
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
    """A file as an image, uploaded unless Glance has it.

    :param path: in a directory whose name changes with the content
    """
    properties = properties | {'guest_build': path.parent.name}
    # Any: its type allows version 1 of the API as well.
    glance: Any = cloud.image
    found = glance.find_image(name)
    if found:
        if all(found.properties.get(key, found.get(key)) == value
               for key, value in properties.items()):
            return found
        glance.delete_image(found)
    return glance.create_image(
        name, filename=str(path), disk_format=disk_format,
        container_format='bare' if disk_format == 'raw' else disk_format,
        visibility='public', wait=True, **properties)


def flavor(cloud: connection.Connection, name: str, *, ram: int = 256,
           disk: int = 1, ephemeral: int = 0, swap: int = 0,
           extra_specs: dict[str, str] | None = None) -> Any:
    """A flavor; one with this name and other values is replaced.

    :param ram: MiB
    :param disk: GiB of the root disk
    :param ephemeral: GiB of the ephemeral disk
    :param swap: MiB of the swap disk
    """
    extra_specs = extra_specs or {}
    found = cloud.compute.find_flavor(name, get_extra_specs=True)
    if found:
        if (found.ram, found.disk, found.ephemeral, found.swap or 0,
                found.extra_specs) == (
                    ram, disk, ephemeral, swap, extra_specs):
            return found
        cloud.compute.delete_flavor(found)
    made = cloud.compute.create_flavor(
        name=name, ram=ram, vcpus=1, disk=disk, ephemeral=ephemeral,
        swap=swap)
    if extra_specs:
        cloud.compute.create_flavor_extra_specs(made, extra_specs)
    return made


class VolumeError(errors.LabError):
    """A volume, or a snapshot of one, is not as it was expected."""


def volume(cloud: connection.Connection, name: str, backend: str,
           gib: int = 1, **arguments: Any) -> Any:
    """Make a volume, and wait until it can be used.

    :param backend: the name of a volume type; of
        :data:`lab.deploy.config.BACKENDS`, if no other was made
    :param arguments: of openstacksdk's create_volume, such as ``image_id``
    :raises VolumeError: it cannot be made
    """
    made = block_storage(cloud).create_volume(
        name=name, volume_type=backend, size=gib, **arguments)
    return wait_volume(cloud, made.id)


def wait_volume(cloud: connection.Connection, volume_id: str,
                *statuses: str) -> Any:
    """Wait until a volume has one of these statuses.

    :param statuses: 'available' by default
    :raises VolumeError: it has another that is final, or does not get there
    """
    wanted = statuses or ('available',)

    def show() -> Any:
        return block_storage(cloud).get_volume(volume_id)

    def reached() -> Any:
        found = show()
        if found.status in wanted:
            return found
        if found.status.startswith('error'):
            raise VolumeError(f'volume {volume_id}: {found.status}; see '
                              '"lab/cloud logs cinder-volume"')
        return None

    return wait.until(
        f'volume {volume_id} to be {" or ".join(wanted)}', reached,
        _VOLUME_SECONDS, interval=0.3, state=lambda: show().status,
        error=VolumeError)


def mappings(*volumes: Any) -> list[dict[str, Any]]:
    """The block devices of a server that boots from the first volume.

    As openstacksdk's create_server takes them.
    """
    return [{'boot_index': -1 if index else 0, 'uuid': each.id,
             'source_type': 'volume', 'destination_type': 'volume'}
            for index, each in enumerate(volumes)]


def block_storage(cloud: connection.Connection) -> Any:
    """Cinder's API."""
    # Any: its type allows version 2 of the API as well.
    return cloud.block_storage


class Server:
    """A server of the cloud, seen from its host.

    :raises ServerError: by all that needs the host: the server has none
    """

    def __init__(self, cloud: connection.Connection, server_id: str) -> None:
        self.cloud = cloud
        self.id = server_id

    def show(self) -> Any:
        """The server, as Nova's API has it now."""
        return self.cloud.compute.get_server(self.id)

    @functools.cached_property
    def host(self) -> host.Host:
        """Its host, cached until a migration ends."""
        name = self.show().compute_host
        for candidate in host.HOSTS:
            if candidate.name == name:
                return candidate
        raise ServerError(f'server {self.id} is on host {name!r}')

    def file(self, name: str) -> pathlib.Path:
        """A file in its directory, through its host's mount."""
        return self.host.path(host.INSTANCES / self.id / name)

    def emulator(self) -> psutil.Process:
        """The QEMU process that runs it."""
        for process in self.host.emulators(self.id):
            return process
        raise ServerError(f'no emulator runs server {self.id}')

    def live_migrate(self, **arguments: Any) -> str:
        """Live-migrate it; return the status of the migration at its end.

        :param arguments: of openstacksdk's live_migrate_server
        :raises ServerError: the migration did not end in time
        """
        known = self.migrations()
        self.cloud.compute.live_migrate_server(
            self.id, block_migration='auto', **arguments)
        return self.migration_status(known)

    def migrations(self) -> set[Any]:
        """The ids of all its migrations, also of those that have ended."""
        return {each.id for each in self._migrations()}

    def migration_status(self, known: Collection[Any]) -> str:
        """Wait until its new migration ends; return the status.

        :param known: ids of its earlier migrations
        :raises ServerError: the migration did not end in time
        """
        statuses: list[str] = []

        def ended() -> bool:
            statuses[:] = [each.status for each in self._migrations()
                           if each.id not in known]
            return bool(statuses) and statuses[0] in _ENDED

        wait.until(
            f'the migration of server {self.id} to end', ended,
            _MIGRATION_SECONDS, interval=0.2,
            state=lambda: f'status {statuses}', error=ServerError)
        # It may be on another one now.
        vars(self).pop('host', None)
        return statuses[0]

    def _migrations(self) -> list[Any]:
        return [each for each in self.cloud.compute.migrations()
                if each.server_id == self.id]

    def migration_statistics(self) -> dict[str, Any]:
        """libvirt's statistics of its last migration, on the destination.

        https://libvirt.org/html/libvirt-libvirt-domain.html, job statistics:
        times in ms, sizes in bytes.
        """
        with self.domain() as domain:
            statistics: dict[str, Any] = domain.jobStats(
                libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
                | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED)
        return statistics

    @contextlib.contextmanager
    def domain(self) -> Iterator[Any]:
        """Its libvirt domain."""
        with self.host.libvirt() as libvirt_connection:
            yield libvirt_connection.lookupByUUIDString(self.id)

    @contextlib.contextmanager
    def agent(self, timeout: float = 120) -> Iterator[agent.Agent]:
        """The agent in its guest, once it answers.

        :param timeout: seconds that it has to answer
        :raises lab.machine.agent.AgentTimeoutError: it does not answer
        """
        with self.domain() as domain:
            connected = agent.Agent(
                agent.DomainTransport(domain), self.console)
            connected.wait_ready(timeout)
            yield connected

    def console(self) -> str:
        """The console log, by Nova's API."""
        return str(self.cloud.compute.get_server_console_output(
            self.id)['output'])
