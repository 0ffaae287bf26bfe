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

"""Bringing the lab up and down, and restarting what has changed."""

from collections.abc import (
    Collection, Iterable, Iterator, Mapping, Sequence)
import concurrent.futures
import contextlib
import fcntl
import pathlib
import shutil
import subprocess
import time

from lab.deploy import catalog
from lab.deploy import clients
from lab.deploy import config
from lab.deploy import database
from lab.deploy import host
from lab.deploy import leftovers
from lab.deploy import loops
from lab.deploy import ports
from lab.deploy import servers
from lab.deploy import services
from lab.deploy import storage
from lab.deploy import supervision
from lab import errors
from lab.machine import emulators
from lab import paths
from lab import progress

#: Seconds that a service has to become ready.
_PATIENCE = 180

_LOCK = paths.STATE / 'lock.pid'


class ServiceError(errors.LabError):
    """A service did not start, or ended; has the end of its log."""

    def __init__(self, name: str, what: str) -> None:
        log = supervision.log_of(name)
        lines = (log.read_text(errors='replace').splitlines()
                 if log.exists() else [])
        super().__init__('\n'.join([
            f'{name} {what}. The end of its log:',
            *(f'  {line}' for line in lines[-15:]),
            f'(all of it: {log})']))


class BusyError(errors.LabError):
    """Another command is changing the lab."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other commands from changing this clone's lab.

    :raises BusyError: one is changing it
    """
    paths.STATE.mkdir(exist_ok=True)
    with _LOCK.open('a+') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                'another command is changing the lab of this clone; wait '
                'until it ends') from error
        yield


def up(kvm: bool = False,
       qemu: Sequence[str] = emulators.CHOICES[:1],
       storage_gib: int | None = None) -> None:
    """Start what is not running, and restart what has changed.

    It can be interrupted, and called again.

    :param kvm: guests run with KVM, not TCG
    :param qemu: of :data:`lab.machine.emulators.CHOICES`: the QEMU of servers
        on fake DAX, one for all hosts or one for each
    :param storage_gib: as of :func:`lab.deploy.storage.attach`
    :raises storage.StorageError: the shared storage is of another size
    :raises emulators.EmulatorError: an emulator cannot be built
    :raises leftovers.AnotherLabError: another clone's lab is up
    :raises ports.PortTakenError: another process listens on its ports
    :raises database.DatabaseError: the databases cannot be made
    :raises catalog.CatalogError: Keystone cannot be prepared
    :raises ServiceError: a service did not start
    :raises BusyError: another command is changing the lab
    """
    with _alone():
        leftovers.claim()
        supervisor = supervision.Supervisor()
        if not supervisor.alive() and leftovers.processes():
            # supervisord was killed.
            with progress.step('ending processes of an earlier lab'):
                leftovers.remove()
                leftovers.claim()
        if database.outdated():
            with progress.step('deleting the state of other releases'):
                _stop(supervisor)
                leftovers.claim()
                _forget()
        storage.attach(storage_gib)
        _make_directories()
        catalog.make_keys()
        config.write(kvm, _emulators(qemu))
        database.prepare()
        table = services.table()
        config.render(
            'supervisord.conf.j2', config.ETC / 'supervisord.conf',
            config.values() | {'services': table.values()})
        supervisor.start()
        _stop_stale(supervisor, table)
        if not catalog.bootstrapped():
            _start(supervisor, table, ['mariadb'])
            with progress.step('making the admin'):
                catalog.bootstrap()
        if not catalog.filled():
            _start(supervisor, table, ['keystone'])
            with progress.step('filling the catalog'):
                catalog.fill()
        _start(supervisor, table, table)
        _discover_hosts()
        if config.with_volumes():
            _make_volume_types()


def down(wipe: bool = False) -> list[str]:
    """Stop the lab, guests included.

    :param wipe: also delete servers, images, flavors and all other state
    :returns: processes that had to be killed
    :raises leftovers.LeftoverError: something is still there
    :raises leftovers.AnotherLabError: another clone's lab is up
    :raises BusyError: another command is changing the lab
    """
    with _alone():
        leftovers.check_owner()
        killed = _stop(supervision.Supervisor())
        config.forget_volumes()
        if wipe:
            _forget()
    return killed


@contextlib.contextmanager
def borrowed(kvm: bool = False) -> Iterator[None]:
    """The lab, up; taken down afterwards unless it was up before.

    Raises what :func:`up` and :func:`down` raise.

    :param kvm: as of :func:`up`
    """
    was_up = supervision.Supervisor().alive()
    try:
        up(kvm)
        yield
    finally:
        if not was_up:
            down()


def restart(names: Iterable[str]) -> None:
    """Stop services and start them again.

    :raises KeyError: there is no such service
    :raises ServiceError: one did not start
    :raises BusyError: another command is changing the lab
    """
    table = services.table()
    wanted = [table[name].name for name in names]
    with _alone():
        leftovers.check_owner()
        supervisor = supervision.Supervisor()
        _stop_with_inmates(supervisor, table, wanted)
        _start(supervisor, table, table)


def _emulators(qemu: Sequence[str]) -> list[str]:
    """The emulator of each host."""
    with progress.step(f'QEMU {", ".join(qemu)} for servers on fake DAX '
                       '(about 3 minutes each, once)'):
        chosen = [emulators.chosen(choice) for choice in qemu]
    return chosen if len(chosen) > 1 else chosen * len(host.HOSTS)


def _make_directories() -> None:
    for name in ('cinder/conversion', 'cinder/devices', 'glance/images',
                 'glance/staging', 'glance/tasks', 'instances', 'keystone',
                 'lock', 'log', 'neutron', 'nova', 'rabbitmq'):
        (paths.STATE / name).mkdir(parents=True, exist_ok=True)
    for node in host.HOSTS:
        for name in ('cache', 'etc/qemu', 'lib/images', 'log', 'nova', 'run',
                     'nova.conf.d'):
            (node.state / name).mkdir(parents=True, exist_ok=True)
    # Mount points, some of which packages do not make.
    for name in ('/run/libvirt', '/var/cache/libvirt', '/var/log/libvirt'):
        pathlib.Path(name).mkdir(parents=True, exist_ok=True)


def _forget() -> None:
    for name in ('brick', 'brick.ext4', 'cinder', 'glance', 'instances',
                 'keystone', 'mysql', 'mysql.key', 'neutron', 'nova',
                 'rabbitmq', *(node.name for node in host.HOSTS)):
        path = paths.STATE / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _start(supervisor: supervision.Supervisor,
           table: Mapping[str, services.Service],
           names: Iterable[str]) -> None:
    """Start services and those they need, each as soon as possible."""
    wanted = _with_needs(table, names)
    known = supervisor.processes()
    _stop_with_inmates(
        supervisor, table,
        [name for name in wanted if not known[name].running])
    ready: set[str] = set()
    since: dict[str, float] = {}
    while len(ready) < len(wanted):
        known = supervisor.processes()
        for name in wanted:
            if name in ready:
                continue
            service = table[name]
            process = known[name]
            if not process.running:
                if name in since:
                    raise ServiceError(
                        name, f'ended with status {process.exit_status}')
                if ready.issuperset(service.after):
                    ports.check(name, service.listens)
                    service.prepare()
                    supervisor.start_service(name)
                    since[name] = time.monotonic()
                continue
            began = since.setdefault(name, time.monotonic())
            if service.ready(process.started):
                ready.add(name)
                took = time.monotonic() - began
                if took > 0.5:
                    progress.say(f'{name}: ready after {took:.1f} s')
            elif time.monotonic() > began + _PATIENCE:
                raise ServiceError(name, f'is not ready after {_PATIENCE} s')
        time.sleep(0.1)
    known = supervisor.processes()
    for name in wanted:
        if not known[name].running:
            raise ServiceError(
                name, f'ended with status {known[name].exit_status}')


def _with_needs(table: Mapping[str, services.Service],
                names: Iterable[str]) -> list[str]:
    wanted = set(names)
    while more := {need for name in wanted
                   for need in table[name].after} - wanted:
        wanted |= more
    return [name for name in table if name in wanted]


def _stop_with_inmates(supervisor: supervision.Supervisor,
                       table: Mapping[str, services.Service],
                       names: Collection[str]) -> None:
    """Stop services, and first those that run in their namespaces."""
    inmates = [each.name for each in table.values() if each.within in names]
    supervisor.stop(inmates)
    supervisor.stop(list(names))


def _stop_stale(supervisor: supervision.Supervisor,
                table: Mapping[str, services.Service]) -> None:
    """Stop services whose files have changed since they started."""
    stale = [
        name for name, process in supervisor.processes().items()
        if process.running and _newest(table[name].reads) > process.started]
    if stale:
        with progress.step(f'stopping {", ".join(stale)}: files changed'):
            _stop_with_inmates(supervisor, table, stale)


def _newest(paths_read: Iterable[pathlib.Path]) -> int:
    """When the files last changed, in whole seconds since the epoch."""
    newest = 0
    for path in paths_read:
        files = path.rglob('*') if path.is_dir() else [path]
        for file in files:
            if file.is_file() and '__pycache__' not in file.parts:
                newest = max(newest, int(file.stat().st_mtime))
    return newest


def _stop(supervisor: supervision.Supervisor) -> list[str]:
    """Stop everything, dependents first; nova-compute before its guests.

    If it saw them end, Nova would record that a user has stopped them.
    """
    if supervisor.alive():
        table = services.table()
        running = [name for name, process in supervisor.processes().items()
                   if process.running]
        while running:
            needed = {need for name in running for need in table[name].after}
            wave = [name for name in running if name not in needed]
            guests = any(name.startswith('libvirtd') for name in wave)
            with progress.step(f'stopping {", ".join(wave)}'):
                if guests:
                    _destroy_guests()
                supervisor.stop(wave)
                if guests:
                    # While what they have cached can still be written.
                    loops.detach_all()
            running = [name for name in running if name not in wave]
        supervisor.shutdown()
    return leftovers.remove()


def _destroy_guests() -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _done in pool.map(host.Host.destroy_guests, host.HOSTS):
            pass


def _discover_hosts() -> None:
    """Add new hosts to Nova's cell."""
    with contextlib.closing(clients.database('nova_api')) as connection:
        cursor = connection.cursor()
        cursor.execute('SELECT host FROM host_mappings')
        known = {row[0] for row in cursor.fetchall()}
    if known.issuperset(node.name for node in host.HOSTS):
        return
    with progress.step('adding the hosts to the cell'):
        log = supervision.log_of('nova-manage')
        with log.open('ab') as output:
            done = subprocess.run(
                [config.PYTHON, config.BASE / 'bin/nova-manage',
                 '--config-file', config.ETC / 'nova/nova.conf', 'cell_v2',
                 'discover_hosts'], stdout=output, stderr=output)
        if done.returncode:
            raise ServiceError('nova-manage', 'did not add the hosts')


def _make_volume_types() -> None:
    """Make a type for each of Cinder's backends, with its name."""
    with contextlib.closing(clients.database('cinder')) as connection:
        cursor = connection.cursor()
        cursor.execute('SELECT name FROM volume_types WHERE deleted = 0')
        known = {row[0] for row in cursor.fetchall()}
    missing = [name for name in config.BACKENDS if name not in known]
    if missing:
        with progress.step('making the volume types'):
            cinder = servers.block_storage(clients.connect())
            for name in missing:
                cinder.create_type(
                    name=name, extra_specs={'volume_backend_name': name})
