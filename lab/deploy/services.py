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

"""The services of the lab: commands, dependencies, and readiness."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import datetime
import functools
import pathlib
import socket
import time

import amqp
from kombu import connection as kombu_connection
from kombu import entity
import libvirt
import pymysql
import requests

from lab.deploy import clients
from lab.deploy import config
from lab.deploy import credentials
from lab.deploy import host
from lab.deploy import loops
from lab.deploy import storage
from lab import paths

#: Where programs are, whoever starts the lab.
_PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

#: A report of nova-compute that is no older counts after a restart. Less than
#: service_down_time, by more than it takes to the next one.
_FRESH_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Service:
    """One supervised process."""

    name: str
    #: As in supervisord.conf: words, no shell.
    command: str
    #: Whether it serves, by when it was started, in seconds since the epoch.
    #: Must answer soon: the services are asked in turn.
    ready: Callable[[float], bool]
    #: Services that it needs: they are ready before it starts, and stop
    #: after it.
    after: tuple[str, ...] = ()
    #: Addresses that it listens on.
    listens: tuple[tuple[str, int], ...] = ()
    #: Files and directories that it reads only when it starts.
    reads: tuple[pathlib.Path, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: The service in whose namespaces it runs; both restart together.
    within: str | None = None
    #: Called before each start.
    prepare: Callable[[], None] = lambda: None
    #: Seconds that it may take to stop.
    stop_seconds: int = 10


def accepts(address: str, port: int) -> bool:
    """Whether anything listens there."""
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), timeout=1).close()
        return True
    return False


def _database_ready(_started: float) -> bool:
    try:
        clients.database().close()
    except pymysql.err.OperationalError:
        return False
    return True


def _api_ready(port: int, _started: float) -> bool:
    try:
        answer = requests.get(f'http://127.0.0.1:{port}/', timeout=0.5)
    except requests.RequestException:
        return False
    return answer.status_code < 500


def _port_ready(address: str, port: int, _started: float) -> bool:
    return accepts(address, port)


def _holder_ready(node: host.Host, _started: float) -> bool:
    try:
        name = str(node.run(['hostname'], capture_output=True,
                            text=True).stdout)
        return name.strip() == node.name
    except host.HostDownError:
        return False


def _mount_ready(node: host.Host, _started: float) -> bool:
    return node.mounted()


def _cinder_mount_ready(_started: float) -> bool:
    return storage.mounted()


def _libvirt_ready(node: host.Host, _started: float) -> bool:
    try:
        with node.libvirt() as connection:
            return str(connection.getHostname()) == node.name
    except libvirt.libvirtError:
        return False


def _consumes(topic: str, _started: float) -> bool:
    """Whether a service of Nova or Cinder takes messages from its queue."""
    try:
        with kombu_connection.Connection(
                'amqp://127.0.0.1', port=config.PORTS['rabbitmq'],
                userid='lab', password=credentials.load()['rabbitmq'],
                connect_timeout=2) as broker:
            queue = entity.Queue(topic, channel=broker.channel())
            declared = queue.queue_declare(passive=True)
            return bool(declared.consumer_count > 0)
    except (OSError, amqp.AMQPError):
        return False


def _computes(node: host.Host, started: float) -> bool:
    """Whether the scheduler can choose the host, and nova-compute hears it.

    The scheduler ignores a host that has not reported to the database for
    service_down_time. nova-compute reports 5 s after its start
    (nova.servicegroup.api), which one that was just restarted need not wait
    for. Before it takes messages it updates its compute node
    (nova.service.Service.start); until then its queue may have the consumer
    of the one that ended.
    """
    with contextlib.closing(clients.database('nova')) as database:
        cursor = database.cursor()
        cursor.execute(
            'SELECT last_seen_up, compute_nodes.updated_at FROM services'
            ' LEFT JOIN compute_nodes ON compute_nodes.host = services.host'
            ' AND compute_nodes.deleted = 0 WHERE services.deleted = 0'
            " AND `binary` = 'nova-compute' AND services.host = %s",
            (node.name,))
        seen, updated = (
            each and each.replace(tzinfo=datetime.timezone.utc).timestamp()
            for each in cursor.fetchone() or (None, None))
    if not seen:
        return False
    if seen > started:
        return True
    # The database has whole seconds; a start takes more.
    return bool(seen > time.time() - _FRESH_SECONDS
                and updated and updated > started + 1
                and _consumes(f'compute.{node.name}', started))


def _cinder_ready(program: str, hosts: tuple[str, ...],
                  started: float) -> bool:
    """Whether Cinder takes a service for up, and the service hears it."""
    with contextlib.closing(clients.database('cinder')) as database:
        cursor = database.cursor()
        cursor.execute(
            'SELECT host, COALESCE(updated_at, created_at) FROM services'
            ' WHERE deleted = 0 AND `binary` = %s', (program,))
        seen = {name: when.replace(tzinfo=datetime.timezone.utc).timestamp()
                for name, when in cursor.fetchall()}
    return all(seen.get(name, 0) > started
               and _consumes(f'{program}.{name}', started) for name in hosts)


def _on(node: host.Host, command: str) -> str:
    """``command`` in the namespaces of a host, as supervisord's own child."""
    return (f"/bin/sh -c 'exec nsenter --target $(cat {node.pid_file})"
            f" --mount --uts -- {command}'")


def _script(name: str) -> str:
    """A program of the shared environment, by this clone's interpreter."""
    return f'{config.PYTHON} {config.BASE}/bin/{name}'


def _mariadb() -> Service:
    return Service(
        'mariadb', mariadbd(host.RUN, paths.STATE / 'mysql'),
        _database_ready, stop_seconds=30)


def mariadbd(run: pathlib.Path, data: pathlib.Path) -> str:
    """The command of a MariaDB that listens only on a socket.

    It does not wait for disks: its data need not survive a crash of the
    machine.
    """
    return (
        f'mariadbd --no-defaults --user=root --datadir={data}'
        f' --socket={run}/mysqld.sock --pid-file={run}/mysqld.pid'
        ' --skip-networking --skip-log-bin --skip-name-resolve'
        ' --innodb-buffer-pool-size=128M --innodb-log-file-size=32M'
        ' --innodb-flush-log-at-trx-commit=0'
        ' --innodb-flush-method=nosync --innodb-fast-shutdown=1'
        ' --max-connections=400 --performance-schema=off'
        ' --character-set-server=utf8mb4')


def _rabbitmq() -> list[Service]:
    directory = paths.STATE / 'rabbitmq'
    ports = config.PORTS
    return [
        Service(
            'epmd', f'epmd -address 127.0.0.1 -port {ports["epmd"]}',
            functools.partial(_port_ready, '127.0.0.1', ports['epmd']),
            listens=(('127.0.0.1', ports['epmd']),)),
        Service(
            'rabbitmq', '/usr/lib/rabbitmq/bin/rabbitmq-server',
            functools.partial(_port_ready, '127.0.0.1', ports['rabbitmq']),
            after=('epmd',),
            listens=(('127.0.0.1', ports['rabbitmq']),
                     ('127.0.0.1', ports['erlang'])),
            reads=(config.ETC / 'rabbitmq/rabbitmq.conf',),
            environment={
                'HOME': str(directory),
                'RABBITMQ_NODENAME': 'lab@localhost',
                'RABBITMQ_CONFIG_FILE':
                    str(config.ETC / 'rabbitmq/rabbitmq.conf'),
                'RABBITMQ_ENABLED_PLUGINS_FILE':
                    str(directory / 'enabled_plugins'),
                'RABBITMQ_MNESIA_BASE': str(directory / 'mnesia'),
                'RABBITMQ_LOG_BASE': str(directory / 'log'),
                'RABBITMQ_PID_FILE': str(directory / 'pid'),
                'RABBITMQ_DIST_PORT': str(ports['erlang']),
                'ERL_EPMD_ADDRESS': '127.0.0.1',
                'ERL_EPMD_PORT': str(ports['epmd']),
                # Few cores: Erlang's schedulers must not spin.
                'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS':
                    '-kernel inet_dist_use_interface {127,0,0,1}'
                    ' +sbwt none +sbwtdcpu none +sbwtdio none',
            },
            stop_seconds=20),
    ]


def _api(name: str, directory: str, after: tuple[str, ...],
         reads: tuple[pathlib.Path, ...] = ()) -> Service:
    port = config.PORTS[directory]
    etc = config.ETC / directory
    variable = f'OS_{directory.upper()}_CONFIG_'
    environment = {variable + 'DIR': str(etc)}
    if directory in ('keystone', 'neutron'):
        environment[variable + 'FILES'] = f'{directory}.conf'
    return Service(
        name, f'{config.BASE}/bin/uwsgi --ini {etc}/uwsgi.ini',
        functools.partial(_api_ready, port), after=after,
        listens=(('127.0.0.1', port),), reads=(etc, *reads),
        environment=environment)


def _nova(program: str, after: tuple[str, ...],
          reads: tuple[pathlib.Path, ...] = ()) -> Service:
    return Service(
        program,
        f'{_script(program)} --config-file {config.ETC}/nova/nova.conf',
        functools.partial(_consumes, program.removeprefix('nova-')),
        after=after,
        reads=(config.ETC / 'nova', *reads))


def _cinder(program: str, *hosts: str) -> Service:
    """A service of Cinder, which knows it by the names of ``hosts``."""
    return Service(
        program,
        f'{_script(program)} --config-file {config.ETC}/cinder/cinder.conf',
        functools.partial(_cinder_ready, program, hosts),
        after=('mariadb', 'rabbitmq'), reads=(config.ETC / 'cinder',))


def _block_storage() -> list[Service]:
    volume = _cinder('cinder-volume',
                     *(f'lab@{backend}' for backend in config.BACKENDS))
    package = pathlib.Path(__file__).parent
    return [
        Service(
            'cinder-mount',
            'glusterfs --no-daemon --log-file=/dev/stderr'
            f' --volfile={config.ETC}/gluster/client.vol'
            # It sees at once what the hosts have written.
            ' --attribute-timeout=0 --entry-timeout=0 --fopen-keep-cache=off'
            f' {storage.MOUNT}',
            _cinder_mount_ready, after=('gluster-brick',),
            reads=(config.ETC / 'gluster/client.vol',),
            prepare=storage.make_mount_point),
        _api('cinder-api', 'cinder', ('mariadb', 'keystone')),
        _cinder('cinder-scheduler', 'lab'),
        dataclasses.replace(
            volume,
            # What it mounts goes with it.
            command=f'unshare --mount -- {volume.command}',
            # A backend tells the schedulers that listen what it can do, and
            # then not for a minute.
            after=(*volume.after, 'cinder-mount', 'cinder-scheduler'),
            reads=(*volume.reads, package / 'loopdriver.py',
                   package / 'loops.py'),
            environment={'PATH': f'{config.PROGRAMS}:{_PATH}',
                         'PYTHONPATH': str(paths.ROOT)}),
    ]


def _reset(node: host.Host) -> None:
    node.reset()
    loops.release(node)


def _host(node: host.Host, package: pathlib.Path) -> list[Service]:
    number = node.number
    holder = f'host{number}'
    mount = f'gluster-mount{number}'
    daemon = f'libvirtd{number}'
    instances = host.INSTANCES
    return [
        Service(
            holder,
            'unshare --mount --uts --propagation private'
            f' /bin/bash {node.state}/hold.sh',
            functools.partial(_holder_ready, node),
            reads=(node.state / 'hold.sh',),
            prepare=functools.partial(_reset, node), stop_seconds=5),
        Service(
            mount,
            _on(node, f'glusterfs --no-daemon --log-file=/dev/stderr'
                      f' --volfile={config.ETC}/gluster/client.vol'
                      f' {instances}'),
            functools.partial(_mount_ready, node),
            after=('gluster-brick', holder),
            reads=(config.ETC / 'gluster/client.vol',), within=holder,
            prepare=node.unmount),
        Service(
            daemon,
            _on(node, 'libvirtd --listen'
                      ' --pid-file /run/libvirt/libvirtd.pid'),
            functools.partial(_libvirt_ready, node), after=(holder, mount),
            listens=((node.address, host.LIBVIRT_PORT),),
            reads=(node.state / 'etc/libvirtd.conf',
                   node.state / 'etc/qemu.conf'), within=holder),
        Service(
            f'nova-compute{number}',
            _on(node, f'{_script("nova-compute")}'
                      f' --config-file {node.state}/nova.conf'
                      f' --config-dir {node.drop_in}'),
            functools.partial(_computes, node),
            # A call that the conductor does not hear yet costs 10 s.
            after=('nova-conductor', 'placement', daemon),
            reads=(node.state / 'nova.conf', node.drop_in,
                   node.emulator_script, package),
            within=holder,
            environment={'PATH': f'{node.programs}:{_PATH}'},
            prepare=functools.partial(loops.restore, node)),
    ]


def table() -> dict[str, Service]:
    """Every service by its name, in the order of ``status``."""
    package = paths.ROOT / 'nova_fakedax'
    brick = config.PORTS['gluster']
    services = [
        _mariadb(),
        *_rabbitmq(),
        Service(
            'gluster-brick',
            'glusterfsd --no-daemon --log-file=/dev/stderr'
            f' --volfile={config.ETC}/gluster/brick.vol',
            functools.partial(_port_ready, '127.0.0.1', brick),
            listens=(('127.0.0.1', brick),),
            reads=(config.ETC / 'gluster/brick.vol',)),
        _api('keystone', 'keystone', ('mariadb',)),
        # Early: both nova-computes wait for it.
        _nova('nova-conductor', ('mariadb', 'keystone', 'rabbitmq')),
        _api('placement', 'placement', ('mariadb', 'keystone')),
        _api('glance', 'glance', ('mariadb', 'keystone')),
        _api('neutron', 'neutron', ('mariadb', 'keystone')),
        _api('nova-api', 'nova', ('mariadb', 'keystone'), (package,)),
        _nova('nova-scheduler', ('mariadb', 'keystone', 'rabbitmq'),
              (package,)),
    ]
    for node in host.HOSTS:
        services += _host(node, package)
    if config.with_volumes():
        services += _block_storage()
    return {service.name: service for service in services}
