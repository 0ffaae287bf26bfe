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

"""Live migrations during which something fails."""

from collections.abc import Callable
import contextlib
import ctypes
import os
import signal
import socket
import typing as ty

import libvirt
import psutil

from lab.deploy import host
from lab.deploy import lifecycle
from lab.deploy import servers
from lab.deploy import supervision
from lab import paths
from lab import wait
from nova_fakedax import evacuation
from tests.cloud import base
from tests.cloud import moving

#: MiB/s: so slow that a test can interfere, and no limit in practice.
CRAWL = 2
GALLOP = 10_000

_PATIENCE_SECONDS = 90
#: pidfd_getfd(2), which Python does not have.
_NR_PIDFD_GETFD = 438


class RecoveryTestCase(moving.MigrationTestCase):
    """A guest that writes and checks what it wrote while it migrates."""

    alone = True

    def begin(self, flavor: ty.Any = None) -> servers.Server:
        server = self.create(flavor or self.flavor(), self.image())
        self.churn = moving.Churn(server)
        self.find_hosts(server)
        return server

    def find_hosts(self, server: servers.Server) -> None:
        self.source = server.host
        [self.destination] = [
            node for node in host.HOSTS if node != self.source]

    def depart(self, server: servers.Server, speed: int = CRAWL) -> ty.Any:
        """Start a migration, at so many MiB/s; return it once it runs."""
        self.known = server.migrations()
        self.set_speed(server, speed)
        self.cloud.compute.live_migrate_server(
            server.id, block_migration='auto')
        self.wait_for(
            'the guest to be on its way',
            lambda: self.job(server).get('memory_processed', 0) > 1 << 20)
        [migration] = self.cloud.compute.server_migrations(server.id)
        self.assertEqual('running', migration.status)
        return migration

    def set_speed(self, server: servers.Server, mib_per_second: int) -> None:
        with self.domain(server, self.source) as domain:
            domain.migrateSetMaxSpeed(mib_per_second)

    def job(self, server: servers.Server) -> dict[str, ty.Any]:
        """The progress of its migration: libvirt's job statistics."""
        with self.domain(server, self.source) as domain:
            return domain.jobStats()

    @contextlib.contextmanager
    def domain(self, server: servers.Server,
               node: host.Host) -> ty.Iterator[ty.Any]:
        with node.libvirt() as connection:
            yield connection.lookupByUUIDString(server.id)

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        wait.until(what, condition, _PATIENCE_SECONDS, interval=0.2)

    def is_defined(self, server: servers.Server, node: host.Host) -> bool:
        try:
            with self.domain(server, node):
                return True
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return False

    def wait_gone(self, server: servers.Server, node: host.Host) -> None:
        self.wait_for(f'{node.name} to have no domain of the server',
                      lambda: not self.is_defined(server, node))

    def emulator(self, server: servers.Server,
                 node: host.Host) -> psutil.Process:
        [process] = node.emulators(server.id)
        return process

    def kill_service(self, name: str) -> None:
        """Kill a service; it is started again after the test."""
        self.addCleanup(self.revive, name)
        pid = supervision.Supervisor().processes()[name].pid
        os.kill(pid, signal.SIGKILL)
        self.wait_for(
            f'{name} to end',
            lambda: not supervision.Supervisor().processes()[name].running)

    def fail_compute(self) -> None:
        """Nova takes the source for down until the end of the test."""
        [service] = self.cloud.compute.services(
            binary='nova-compute', host=self.source.name)
        set_down = self.cloud.compute.update_service_forced_down
        # Once it has started again, and done its part of the evacuation.
        self.addCleanup(set_down, service, forced=False)
        self.kill_service(f'nova-compute{self.source.number}')
        set_down(service, forced=True)

    def revive(self, *_names: str) -> None:
        """Start what is down, and wait until it is ready.

        nova-compute disables its service while it has no libvirt.
        """
        lifecycle.restart([])
        self.wait_for('all nova-computes to be enabled', lambda: all(
            service.status == 'enabled'
            for service in self.cloud.compute.services(
                binary='nova-compute')))

    def assert_stays(self, server: servers.Server, status: str) -> None:
        """Assert that its migration left nothing, and that the next works."""
        self.assertEqual(status, server.migration_status(self.known))
        self.wait(server.id, 'ACTIVE')
        self.assert_runs_on(server, self.source)
        self.set_speed(server, GALLOP)
        self.assertEqual(self.destination.name, self.migrate(server))
        self.assert_runs_on(server, self.destination)

    def assert_moved(self, server: servers.Server) -> None:
        self.assertEqual('completed', server.migration_status(self.known))
        self.wait(server.id, 'ACTIVE')
        self.assert_runs_on(server, self.destination)

    def assert_runs_on(self, server: servers.Server, node: host.Host) -> None:
        """Assert that it runs only there, with every byte right."""
        self.assertEqual(node.name, server.show().compute_host)
        self.assertEqual(node, server.host)
        [other] = [each for each in host.HOSTS if each != node]
        # A libvirt that was killed looks after its guests once it is ready.
        self.wait_gone(server, other)
        self.assertEqual([], other.emulators(server.id))
        self.churn.wait_round()
        self.assertEqual([], self.churn.bad())


class UserTest(RecoveryTestCase):

    # Hosts and services stay as they are.
    alone = False

    def test_abort(self) -> None:
        server = self.begin()
        migration = self.depart(server)
        self.cloud.compute.abort_server_migration(migration, server.id)
        self.assert_stays(server, 'cancelled')

    def test_force_complete(self) -> None:
        server = self.begin()
        migration = self.depart(server)
        self.cloud.compute.force_complete_server_migration(
            migration, server.id)
        with self.domain(server, self.source) as domain:
            self.wait_for(
                'Nova to pause the guest',
                lambda: domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)
        self.set_speed(server, GALLOP)
        self.assert_moved(server)

    def test_several_at_once_with_all_their_disks(self) -> None:
        flavor = self.flavor(
            base.ROOT | {'fakedax:disks': 'root,ephemeral'}, ephemeral=1)
        moving_on = []
        for node in host.HOSTS:
            server = self.create(
                flavor, self.image(), availability_zone=f'nova:{node.name}')
            churn = moving.Churn(server)
            with server.agent() as agent:
                agent.run('mkdir -p /run/eph && mount -o dax=always '
                          '/dev/pmem1 /run/eph && '
                          'probe write /run/eph/keep 4 7', check=True)
            moving_on.append((server, node, churn))
        for server, _node, _churn in moving_on:
            self.cloud.compute.live_migrate_server(
                server.id, block_migration='auto')
        for server, source, self.churn in moving_on:
            self.assertEqual('completed', server.migration_status(()))
            self.wait(server.id, 'ACTIVE')
            [destination] = [node for node in host.HOSTS if node != source]
            self.assert_runs_on(server, destination)
            with server.agent() as agent:
                agent.run('probe verify /run/eph/keep 4 7 && '
                          'probe fsync /run/eph/after 3', check=True)


class AutoConvergeTest(RecoveryTestCase):

    @base.on_demand
    def test_auto_converge(self) -> None:
        """A guest that writes to its RAM faster than it can be sent."""
        self.configure({'libvirt': {
            'live_migration_permit_auto_converge': 'true'}})
        server = self.begin()
        with server.agent() as agent:
            agent.run('while :; do dd if=/dev/urandom of=/dev/dirt bs=1M '
                      'count=16 conv=notrunc; done >/dev/null 2>&1 &',
                      check=True)
        self.depart(server, speed=8)
        self.wait_for(
            'QEMU to throttle the guest',
            lambda: self.job(server).get('auto_converge_throttle', 0) > 0)
        self.set_speed(server, GALLOP)
        self.assert_moved(server)


class FaultTest(RecoveryTestCase):

    def test_the_connection_is_cut(self) -> None:
        server = self.begin()
        self.depart(server)
        cut(self.emulator(server, self.source), self.destination.address)
        self.assert_stays(server, 'failed')

    @base.on_demand
    def test_qemu_is_killed_at_the_destination(self) -> None:
        """As by the kernel when memory runs out."""
        server = self.begin()
        self.depart(server)
        self.emulator(server, self.destination).kill()
        self.assert_stays(server, 'failed')

    @base.on_demand
    def test_libvirt_is_killed_at_the_destination(self) -> None:
        server = self.begin()
        self.depart(server)
        self.kill_service(f'libvirtd{self.destination.number}')
        self.revive()
        self.assert_stays(server, 'failed')

    def test_libvirt_is_killed_at_the_source(self) -> None:
        """Nova cannot know where the guest is, so it sets ERROR.

        The guest runs on. An administrator who has seen that resets the state.
        """
        server = self.begin()
        self.depart(server)
        self.kill_service(f'libvirtd{self.source.number}')
        self.revive()
        self.assertEqual('error', server.migration_status(self.known))
        self.wait(server.id, 'ERROR')
        self.assert_runs_on(server, self.source)
        self.cloud.compute.reset_server_state(server.id, 'active')
        self.assertEqual(self.destination.name, self.migrate(server))
        self.assert_runs_on(server, self.destination)

    @base.on_demand
    def test_nova_compute_is_killed_at_the_destination(self) -> None:
        """The guest moves, and Nova does its part later."""
        server = self.begin()
        self.depart(server)
        self.kill_service(f'nova-compute{self.destination.number}')
        self.set_speed(server, GALLOP)
        self.wait_gone(server, self.source)
        self.revive()
        self.assert_moved(server)

    @base.on_demand
    def test_nova_compute_is_killed_at_the_source(self) -> None:
        """If it is back while the guest is on its way, the guest stays."""
        server = self.begin()
        self.depart(server)
        self.kill_service(f'nova-compute{self.source.number}')
        self.revive()
        self.assert_stays(server, 'error')

    def test_nova_compute_is_killed_at_the_source_and_back_too_late(
            self) -> None:
        """The guest has left by then, and Nova finds it where it is."""
        server = self.begin()
        self.depart(server)
        self.kill_service(f'nova-compute{self.source.number}')
        self.set_speed(server, GALLOP)
        self.wait_gone(server, self.source)
        self.revive()
        self.assert_moved(server)


class CommandTest(RecoveryTestCase):
    """nova-compute of the source stays dead, and an operator goes on."""

    def test_a_guest_that_has_left(self) -> None:
        server = self.begin()
        self.depart(server)
        self.fail_compute()
        self.set_speed(server, GALLOP)
        self.wait_gone(server, self.source)
        done = self.source.run(
            [paths.STATE / 'venv/bin/nova-fakedax',
             '--config-file', self.source.state / 'nova.conf',
             '--config-dir', self.source.drop_in,
             'recover', '-f', 'value', '-c', 'Result', server.id],
            capture_output=True, text=True)
        self.assertEqual(
            (0, f'finished: its guest runs on {self.destination.name}\n'),
            (done.returncode, done.stdout), done.stderr)
        self.assert_moved(server)


class EvacuateTestCase(RecoveryTestCase):
    """A host fails, and the administrator evacuates its server."""

    def find_hosts(self, server: servers.Server) -> None:
        super().find_hosts(server)
        # A periodic task of Nova looks once a minute.
        self.wait_for(
            f'{self.destination.name} to have seen {self.source.name}',
            self.destination.path(
                host.INSTANCES / evacuation.DIRECTORY / 'seen' /
                self.destination.name / self.source.name).exists)

    def evacuate(self, server: servers.Server) -> ty.Any:
        """Evacuate it; return what the compute did, once that has ended."""
        self.cloud.compute.evacuate_server(server.id)
        return wait.until(
            f'the evacuation of server {server.id} to end',
            lambda: next((
                event for event in self.events(server, 'evacuate')
                if event['event'] == 'compute_rebuild_instance'
                and event['result']), None),
            _PATIENCE_SECONDS, interval=0.5,
            state=lambda: self.events(server, 'evacuate'))


class EvacuateTest(EvacuateTestCase):

    def test_guest_of_a_host_that_died(self) -> None:
        server = self.begin()
        with server.agent() as agent:
            agent.run('probe write /root/keep 4 1', check=True)
        # It leaves pages at the destination that are stale later.
        for node in (self.destination, self.source):
            self.assertEqual(node.name, self.migrate(server))
        with server.agent() as agent:
            agent.run('probe write /root/keep 4 2', check=True)
        emulator = self.emulator(server, self.source)
        self.fail_compute()
        emulator.kill()
        event = self.evacuate(server)
        self.assertEqual('Success', event['result'], event)
        server = servers.Server(self.cloud, server.id)
        self.assertEqual(self.destination, server.host)
        if server.show().status == 'SHUTOFF':
            self.act(server, 'ACTIVE', 'start_server')
        with server.agent() as agent:
            agent.run('probe verify /root/keep 4 2', check=True)

    def test_guest_that_only_hangs_keeps_its_image(self) -> None:
        server = self.begin()
        emulator = self.emulator(server, self.source)
        self.fail_compute()
        emulator.suspend()
        self.addCleanup(emulator.resume)
        event = self.evacuate(server)
        self.assertEqual('Error', event['result'], event)
        self.assertIn('disk locked', event['details'])
        emulator.resume()
        self.wait(server.id, 'ACTIVE')
        self.assert_runs_on(server, self.source)


def cut(process: psutil.Process, address: str) -> None:
    """Shut down a process's TCP connections to an address.

    :raises LookupError: it has none
    """
    found = [each for each in process.net_connections('tcp')
             if each.raddr and each.raddr.ip == address]
    if not found:
        raise LookupError(f'process {process.pid}: nothing to {address}')
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(process.pid)
    try:
        for each in found:
            descriptor = libc.syscall(_NR_PIDFD_GETFD, pidfd, each.fd, 0)
            if descriptor < 0:
                raise OSError(ctypes.get_errno(), 'pidfd_getfd')
            with socket.socket(fileno=descriptor) as connection:
                connection.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)
