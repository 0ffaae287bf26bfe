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

"""``lab/cloud``: start, stop, inspect and use the lab's cloud."""

import contextlib
import datetime
import os
import subprocess
import sys
import time

import click
import psutil
import rich.console
import rich.table

from lab.deploy import config
from lab.deploy import host
from lab.deploy import leftovers
from lab.deploy import lifecycle
from lab.deploy import services
from lab.deploy import supervision
from lab import errors
from lab.machine import emulators
from lab import paths
from lab import progress

_DOWN = 'the lab is down; "lab/cloud up" starts it'


def _service_names(_context: click.Context, _parameter: click.Parameter,
                   value: tuple[str, ...]) -> tuple[str, ...]:
    known = services.table()
    for name in value:
        if name not in known:
            raise click.BadParameter(
                f'no service {name!r}; must be one of: {", ".join(known)}')
    return value


def _one_or_one_each(_context: click.Context, _parameter: click.Parameter,
                     value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) not in (0, 1, len(host.HOSTS)):
        raise click.BadParameter(
            f'given {len(value)} times; must be once for all hosts, or '
            f'{len(host.HOSTS)} times, once for each')
    return value


@click.group(context_settings={'help_option_names': ['-h', '--help']})
def main() -> None:
    """A one-machine OpenStack with two compute hosts.

    MariaDB, RabbitMQ, Keystone, Placement, Glance, Neutron's API and Nova,
    with a libvirt, a GlusterFS mount and a nova-compute for each host; and
    Cinder, if FAKEDAX_VOLUMES is in the environment. All of it listens only on
    loopback and keeps its state in .lab/.

    "lab/cloud --cold COMMAND" starts from nothing: no state, no cache.
    """


@main.command()
@click.option('--kvm', is_flag=True,
              help='Run guests with KVM; the default is TCG.')
@click.option('--qemu', multiple=True, callback=_one_or_one_each,
              type=click.Choice(emulators.CHOICES),
              help='The QEMU of servers on fake DAX: 10.0 (the default), '
                   "10.2 or 7.2 with our device, or Debian's with its own. "
                   'Once for all hosts, or once for each.')
@click.option('--stock-qemu', is_flag=True, help='Same as --qemu debian.')
@click.option('--storage', 'storage_gib', metavar='GIB',
              type=click.IntRange(min=10),
              help='The size of the shared storage, in a sparse file: for '
                   'disks that are larger than this machine has space. It '
                   'stays until "down --wipe".')
def up(kvm: bool, qemu: tuple[str, ...], stock_qemu: bool,
       storage_gib: int | None) -> None:
    """Start what is not running, and wait until it works.

    Services whose configuration or code has changed are restarted. Can be
    interrupted and called again.
    """
    if kvm and not os.access('/dev/kvm', os.R_OK | os.W_OK):
        raise errors.LabError('--kvm: /dev/kvm is not usable here')
    if stock_qemu and qemu:
        raise click.UsageError('--stock-qemu and --qemu exclude each other')
    if stock_qemu:
        qemu = ('debian',)
    started = time.monotonic()
    with errors.messages():
        lifecycle.up(kvm, qemu or emulators.CHOICES[:1], storage_gib)
    progress.say(f'the cloud is up ({time.monotonic() - started:.1f} s); '
                 'try "lab/cloud shell"')


@main.command()
@click.option('--wipe', is_flag=True,
              help='Delete servers, images, flavors and all other state.')
def down(wipe: bool) -> None:
    """Stop everything, guests included.

    Guests are powered off. The cloud's state, their disks included, is kept
    for the next "up".
    """
    started = time.monotonic()
    with errors.messages():
        killed = lifecycle.down(wipe)
    if killed:
        progress.say(f'killed: {", ".join(killed)}')
    progress.say(f'the cloud is down ({time.monotonic() - started:.1f} s)')


@main.command()
@click.argument('service', nargs=-1, required=True, callback=_service_names)
def restart(service: tuple[str, ...]) -> None:
    """Restart services, and start whatever else is down."""
    with errors.messages():
        leftovers.check_owner()
        if not supervision.Supervisor().alive():
            raise errors.LabError(_DOWN)
        lifecycle.restart(service)


@main.command()
def status() -> None:
    """Show every service; exit status 1 unless all of them work."""
    supervisor = supervision.Supervisor()
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
    # A pipe has no width.
    width = None if sys.stdout.isatty() else 200
    rich.console.Console(highlight=False, width=width).print(table)
    if not processes:
        click.echo('The lab is down; "lab/cloud up" starts it.')
    elif not healthy:
        click.echo('Something is down: "lab/cloud logs SERVICE" shows why, '
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
        # A check may need another service, which is down.
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
@click.option('--follow', '-f', is_flag=True, help='Continue with new lines.')
@click.option('--lines', '-n', type=click.IntRange(min=0), default=50,
              show_default=True, help='How many lines of each log.')
def logs(service: tuple[str, ...], follow: bool, lines: int) -> None:
    """Show the end of services' logs; by default of all services."""
    names = service or tuple(services.table())
    files = [path for name in names
             if (path := supervision.log_of(name)).exists()]
    if not files:
        raise errors.LabError('there is no log yet')
    command = ['tail', f'--lines={lines}', *map(str, files)]
    if follow:
        command.insert(1, '--follow=name')
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(subprocess.run(command).returncode)


@main.command(context_settings={'ignore_unknown_options': True})
@click.argument('command', nargs=-1, type=click.UNPROCESSED)
def shell(command: tuple[str, ...]) -> None:
    """Start a shell, or run COMMAND, with the admin's credentials.

    \b
    lab/cloud shell
    lab/cloud shell openstack server list
    """
    leftovers.check_owner()
    if not supervision.Supervisor().alive():
        raise errors.LabError(_DOWN)
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
        raise errors.LabError(f'{words[0]}: {error.strerror}') from error


if __name__ == '__main__':
    main(prog_name='lab/cloud')
