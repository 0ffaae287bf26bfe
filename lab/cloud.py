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

"""The lab's cloud: up, down and what a person needs in between."""

from collections.abc import Iterator
import contextlib
import datetime
import os
import subprocess
import sys
import time

import click
import openstack.exceptions
import psutil
import rich.console
import rich.table

from lab import catalog
from lab import config
from lab import database
from lab import emulators
from lab import host
from lab import leftovers
from lab import lifecycle
from lab import paths
from lab import ports
from lab import progress
from lab import services
from lab import supervision

#: What is a message to the user, not a bug to trace.
_ERRORS = (
    catalog.CatalogError, database.DatabaseError, emulators.BuildError,
    leftovers.AnotherLabError, leftovers.LeftoverError, lifecycle.BusyError,
    lifecycle.ServiceError, openstack.exceptions.SDKException,
    ports.PortTakenError, supervision.SupervisionError,
)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """What goes wrong as a message for the user, without a traceback."""
    try:
        yield
    except _ERRORS as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException(
            'interrupted: the same command goes on from here, and '
            '"lab/cloud down" takes away what is there') from None


def _service_names(_context: click.Context, _parameter: click.Parameter,
                   value: tuple[str, ...]) -> tuple[str, ...]:
    known = services.table()
    for name in value:
        if name not in known:
            raise click.BadParameter(
                f'{name!r} is no service; there are: {", ".join(known)}')
    return value


def _one_or_one_each(_context: click.Context, _parameter: click.Parameter,
                     value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) not in (0, 1, len(host.HOSTS)):
        raise click.BadParameter(
            f'{len(value)} of them; give one for all hosts, or '
            f'{len(host.HOSTS)}, one for each')
    return value


@click.group(context_settings={'help_option_names': ['-h', '--help']})
def main() -> None:
    """A one-machine OpenStack with two compute hosts.

    MariaDB, RabbitMQ, Keystone, Placement, Glance, Neutron's API and Nova,
    with a libvirt, a GlusterFS mount and a nova-compute for each host. All
    of it listens on loopback only and keeps its state in .lab/.

    "lab/cloud --cold COMMAND" starts from nothing: no state, no cache.
    """


@main.command()
@click.option('--kvm', is_flag=True,
              help='Run guests with KVM; without it QEMU translates (TCG).')
@click.option('--qemu', multiple=True, callback=_one_or_one_each,
              type=click.Choice(emulators.CHOICES),
              help='What servers on fake DAX run on: our device in QEMU 10.0 '
                   "(the default), 10.2 or 7.2, or Debian's QEMU with its "
                   'own device. Once for all hosts, or once for each.')
@click.option('--stock-qemu', is_flag=True, help='Same as --qemu debian.')
def up(kvm: bool, qemu: tuple[str, ...], stock_qemu: bool) -> None:
    """Bring up what is not up, and wait until it works.

    Services whose configuration or code has changed are started anew. May
    be interrupted and called again.
    """
    if kvm and not os.access('/dev/kvm', os.R_OK | os.W_OK):
        raise click.ClickException('--kvm: /dev/kvm cannot be used here')
    if stock_qemu and qemu:
        raise click.UsageError('--stock-qemu and --qemu exclude each other')
    if stock_qemu:
        qemu = ('debian',)
    started = time.monotonic()
    with messages():
        lifecycle.up(kvm, qemu or emulators.CHOICES[:1])
    progress.say(f'the cloud is up ({time.monotonic() - started:.1f} s); '
                 'try "lab/cloud shell"')


@main.command()
@click.option('--wipe', is_flag=True,
              help='Forget servers, images, flavors and everything else.')
def down(wipe: bool) -> None:
    """Take everything down, guests included.

    Guests lose their power; what the cloud knows, their disks included, is
    kept for the next "up".
    """
    started = time.monotonic()
    with messages():
        killed = lifecycle.down(wipe)
    if killed:
        progress.say(f'had to be killed: {", ".join(killed)}')
    progress.say(f'the cloud is down ({time.monotonic() - started:.1f} s)')


@main.command()
@click.argument('service', nargs=-1, required=True, callback=_service_names)
def restart(service: tuple[str, ...]) -> None:
    """Stop services and start them again, and whatever else is down."""
    with messages():
        leftovers.check_owner()
        if not supervision.Supervisor().alive():
            raise click.ClickException(
                'the lab is down; "lab/cloud up" starts it')
        lifecycle.restart(service)


@main.command()
def status() -> None:
    """Show every service; exit status 1 unless all of them work."""
    supervisor = supervision.Supervisor()
    with messages():
        leftovers.check_owner()
    processes = supervisor.processes()
    table = rich.table.Table(box=None, pad_edge=False)
    for heading in ('service', 'state', 'pid', 'up', 'MiB', 'listens on'):
        table.add_column(
            heading, justify='right' if heading == 'MiB' else 'left',
            no_wrap=True)
    healthy = True
    for name, service in services.table().items():
        process = processes.get(name)
        state = _state(service, process)
        healthy &= state == 'ready'
        listens = ' '.join(f'{address}:{port}'
                           for address, port in service.listens)
        if process and process.running:
            age = datetime.timedelta(
                seconds=int(time.time() - process.started))
            table.add_row(name, state, str(process.pid), str(age),
                          str(_resident(process.pid)), listens)
        else:
            table.add_row(name, state, '', '', '', listens)
    # A pipe has no width to keep to.
    width = None if sys.stdout.isatty() else 200
    rich.console.Console(highlight=False, width=width).print(table)
    if not processes:
        click.echo('The lab is down; "lab/cloud up" starts it.')
    elif not healthy:
        click.echo('Something is down: "lab/cloud logs SERVICE" tells why, '
                   '"lab/cloud up" starts it again.')
    sys.exit(0 if healthy else 1)


def _state(service: services.Service,
           process: supervision.Process | None) -> str:
    if process is None or (not process.running and not process.ended):
        return 'down'
    if not process.running:
        when = datetime.datetime.fromtimestamp(process.ended)
        how = (f'status {process.exit_status}' if process.exit_status >= 0
               else 'a signal')
        return f'ended at {when:%H:%M:%S} by {how}'
    try:
        return 'ready' if service.ready(process.started) else 'not ready'
    except Exception as error:
        # A service's check may need another that is down.
        return f'not ready ({type(error).__name__})'


def _resident(pid: int) -> int:
    """Memory of a process and its descendants, in MiB."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
    return total >> 20


@main.command()
@click.argument('service', nargs=-1, callback=_service_names)
@click.option('--follow', '-f', is_flag=True, help='Go on as lines come.')
@click.option('--lines', '-n', type=click.IntRange(min=0), default=50,
              show_default=True, help='How many, of each log.')
def logs(service: tuple[str, ...], follow: bool, lines: int) -> None:
    """Show the end of services' logs; of all of them by default."""
    names = service or tuple(services.table())
    files = [path for name in names
             if (path := supervision.log_of(name)).exists()]
    if not files:
        raise click.ClickException('no log yet')
    command = ['tail', f'--lines={lines}', *map(str, files)]
    if follow:
        command.insert(1, '--follow=name')
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(subprocess.run(command).returncode)


@main.command(context_settings={'ignore_unknown_options': True})
@click.argument('command', nargs=-1, type=click.UNPROCESSED)
def shell(command: tuple[str, ...]) -> None:
    """A shell with the admin's credentials, or one COMMAND with them.

    \b
    lab/cloud shell
    lab/cloud shell openstack server list
    """
    with messages():
        leftovers.check_owner()
    if not supervision.Supervisor().alive():
        raise click.ClickException(
            'the lab is down; "lab/cloud up" starts it')
    environment = os.environ | {
        'OS_CLIENT_CONFIG_FILE': str(config.ETC / 'clouds.yaml'),
        'OS_CLOUD': os.environ.get('OS_CLOUD', 'admin'),
        'PATH': os.pathsep.join([
            str(paths.STATE / 'venv/bin'), str(config.BASE / 'bin'),
            os.environ['PATH']]),
    }
    words = list(command) or [
        'bash', '--rcfile', str(config.ETC / 'shell.rc')]
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        raise click.ClickException(f'{words[0]}: {error.strerror}') from error


if __name__ == '__main__':
    main(prog_name='lab/cloud')
