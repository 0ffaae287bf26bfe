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

"""What a live migration costs, by the kind of the server's disk."""

from collections.abc import Iterator
import contextlib
import shutil
import statistics
import threading
import time
from typing import Any

import click
import libvirt
import matplotlib
import rich.box
import rich.console
import rich.table

from lab.benchmarks import results
from lab import clients
from lab import cloud as lab_cloud
from lab import guest
from lab import host
from lab import lifecycle
from lab import paths
from lab import progress
from lab import servers

matplotlib.use('agg')

from matplotlib import pyplot  # noqa: E402

MODES = {
    'blk': {},
    'pmem': {'fakedax:disks': 'root', 'trait:CUSTOM_FAKEDAX': 'required'},
}
DISKS_GIB = (1, 8, 32)

#: MiB. The pages of a disk on fake DAX are described in the guest's RAM, 16
#: MiB for each GiB; a server of the other kind gets as much, to be like it.
_RAM_MIB = 1024
_CHURN_MIB = 16
_TICKS = '/dev/ticks'

_FIGURES = ('total_s', 'bytes', 'downtime_guest_ms', 'downtime_qemu_ms',
            'longest_tick_ms', 'request_s')
_DOCS = paths.ROOT / 'doc/source/admin'


@click.command()
@click.option('--rounds', default=3, show_default=True,
              type=click.IntRange(min=1),
              help='Moves of each server, without and with the writer.')
@click.option('--disk', 'disks', multiple=True, type=click.IntRange(min=1),
              default=DISKS_GIB, show_default=True,
              help='GiB of the root disk; may be given several times.')
@click.option('--docs', is_flag=True,
              help='Put the table and the plot into doc/ as well.')
def migrate(rounds: int, disks: tuple[int, ...], docs: bool) -> None:
    """Live-migrate a server on virtio-blk and one on fake DAX.

    The same image and shared storage; for each size of disk a server of
    each kind, which move in turn, first idle and then with a process that
    writes, fsyncs and reads back.

    Rows in .lab/bench/migrate.json, medians of the rounds, each with its
    spread: mode, disk_gib, writer; total_s and bytes as QEMU counts them;
    downtime_guest_ms, from the stop of the guest at the source until it runs
    at the destination; downtime_qemu_ms, QEMU's own figure; longest_tick_ms,
    the longest that a sleep of 1 ms took by the guest's clock; request_s,
    from the user's request until the server is ACTIVE there.
    """
    samples: dict[tuple[str, int, bool], list[dict[str, float]]] = {}
    with lab_cloud.messages(), lifecycle.borrowed(), _Switchovers() as seen:
        cloud = clients.connect()
        image = servers.image(cloud, 'fakedax-bench', guest.build())
        for disk in disks:
            with contextlib.ExitStack() as stack:
                made = {mode: stack.enter_context(
                    _server(cloud, image, mode, disk)) for mode in MODES}
                for writer in (False, True):
                    if writer:
                        for server in made.values():
                            _begin_writer(server)
                    for number in range(rounds):
                        modes = list(MODES)
                        for mode in modes if number % 2 else modes[::-1]:
                            sample = _move(made[mode], seen)
                            samples.setdefault(
                                (mode, disk, writer), []).append(sample)
                            progress.say(
                                f'{disk} GiB, {mode}'
                                f'{", writer" if writer else ""}: '
                                f'{sample["total_s"]:.2f} s, down '
                                f'{sample["downtime_guest_ms"]:.0f} ms')
    rows = [_row(mode, disk, writer, samples[mode, disk, writer])
            for disk in disks for writer in (False, True) for mode in MODES]
    results.save('migrate', rows)
    plot = results.DIRECTORY / 'migrate.png'
    _plot(rows, plot)
    _show(rows)
    progress.say(f'the plot is {plot}')
    if docs:
        shutil.copy(plot, _DOCS / 'migrate.png')
        results.write_table(
            _DOCS / 'migrate-table.inc', _HEADINGS, _cells(rows))


class _Switchovers:
    """When guests stop and run, as libvirt says on both hosts.

    The guest's own clock stands still in between.
    """

    def __enter__(self) -> '_Switchovers':
        self._times: dict[tuple[str, int], float] = {}
        self._ended = threading.Event()
        libvirt.virEventRegisterDefaultImpl()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._connections = [libvirt.open(node.uri) for node in host.HOSTS]
        for connection in self._connections:
            connection.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._note, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for connection in self._connections:
            connection.close()

    def _run(self) -> None:
        # The loop would wait for ever where nothing happens any more.
        libvirt.virEventAddTimeout(100, lambda *_: None, None)
        while not self._ended.is_set():
            libvirt.virEventRunDefaultImpl()

    def _note(self, _connection: Any, domain: Any, event: int, detail: int,
              _opaque: object) -> None:
        # The first stop and the last start: a guest may also be stopped at
        # the destination before it runs there.
        key = (domain.UUIDString(), event)
        now = time.monotonic()
        if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            self._times[key] = now
        elif event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            self._times.setdefault(key, now)

    def forget(self, server: servers.Server) -> None:
        for event in (libvirt.VIR_DOMAIN_EVENT_SUSPENDED,
                      libvirt.VIR_DOMAIN_EVENT_RESUMED):
            self._times.pop((server.id, event), None)

    def downtime(self, server: servers.Server) -> float:
        """Seconds of the last move."""
        return (self._times[server.id, libvirt.VIR_DOMAIN_EVENT_RESUMED]
                - self._times[server.id, libvirt.VIR_DOMAIN_EVENT_SUSPENDED])


@contextlib.contextmanager
def _server(cloud: Any, image: Any, mode: str,
            disk: int) -> Iterator[servers.Server]:
    """A server with a ticker in it, for the length of a block."""
    flavor = servers.flavor(
        cloud, f'fakedax.bench.migrate.{mode}.{disk}', ram=_RAM_MIB,
        disk=disk, extra_specs=MODES[mode])
    with progress.step(f'a server with {disk} GiB on {mode}'):
        made = cloud.compute.create_server(
            name=f'fakedax-bench-{mode}', flavor_id=flavor.id,
            image_id=image.id, networks='none')
    try:
        cloud.compute.wait_for_server(made, interval=0.5, wait=300)
        server = servers.Server(cloud, made.id)
        with server.agent() as agent:
            agent.run(f'probe tick {_TICKS} >/dev/null 2>&1 &', check=True)
        yield server
    finally:
        cloud.compute.delete_server(made.id)
        cloud.compute.wait_for_delete(made, interval=0.5)


def _begin_writer(server: servers.Server) -> None:
    with server.agent() as agent:
        agent.run(f'touch /dev/churn && probe write /root/churn {_CHURN_MIB} 1'
                  ' && sync', check=True)
        agent.run(f'probe churn /root/churn {_CHURN_MIB} /dev/churn '
                  '>/dev/null 2>&1 &', check=True)


def _move(server: servers.Server, seen: _Switchovers) -> dict[str, float]:
    with server.agent() as agent:
        agent.run(f'echo >{_TICKS}', check=True)
    seen.forget(server)
    started = time.monotonic()
    status = server.live_migrate()
    if status != 'completed':
        raise click.ClickException(f'a migration ended as {status}')
    took = time.monotonic() - started
    statistic = server.migration_statistics()
    with server.agent() as agent:
        ticks = agent.run(f'cat {_TICKS}', check=True).stdout.split()
    return {
        'total_s': statistic['time_elapsed'] / 1000,
        'bytes': statistic['memory_processed'],
        'downtime_guest_ms': seen.downtime(server) * 1000,
        'downtime_qemu_ms': statistic['downtime'],
        'longest_tick_ms': max(map(int, ticks), default=0) / 1000,
        'request_s': took,
    }


def _row(mode: str, disk: int, writer: bool,
         samples: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {'mode': mode, 'disk_gib': disk, 'writer': writer}
    for figure in _FIGURES:
        values = [sample[figure] for sample in samples]
        row[figure] = round(statistics.median(values), 2)
        row[f'{figure}_spread'] = [round(min(values), 2),
                                   round(max(values), 2)]
    row['rounds'] = len(samples)
    return row


_HEADINGS = ('disk', 'writer', 'kind', 'total s', 'MiB sent', 'guest down ms',
             'QEMU downtime ms', 'down against blk')


def _cells(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The rows of a table: the median, and the spread in brackets."""
    down = {(row['disk_gib'], row['writer']): row['downtime_guest_ms']
            for row in rows if row['mode'] == 'blk'}
    for row in rows:
        cells = [f'{row["disk_gib"]} GiB', 'yes' if row['writer'] else 'no',
                 row['mode']]
        for figure, unit, digits in (
                ('total_s', 1, 2), ('bytes', 1 << 20, 1),
                ('downtime_guest_ms', 1, 0), ('downtime_qemu_ms', 1, 0)):
            least, most = row[f'{figure}_spread']
            cells.append(f'{row[figure] / unit:.{digits}f} '
                         f'({least / unit:.{digits}f}-'
                         f'{most / unit:.{digits}f})')
        ratio = (row['downtime_guest_ms']
                 / down[row['disk_gib'], row['writer']])
        cells.append(f'{ratio:.2f}')
        yield cells


def _show(rows: list[dict[str, Any]]) -> None:
    table = rich.table.Table(title='Live migration', box=rich.box.SIMPLE)
    for heading in _HEADINGS:
        table.add_column(heading, no_wrap=True)
    for cells in _cells(rows):
        table.add_row(*cells, end_section=cells[2] == list(MODES)[-1])
    rich.console.Console(width=130).print(table)


def _plot(rows: list[dict[str, Any]], file: Any) -> None:
    """Bytes and downtime by the size of the disk, a line a kind."""
    figure, panels = pyplot.subplots(
        1, 3, figsize=(12, 3.6), layout='constrained')
    for panel, (name, unit, label) in zip(panels, (
            ('bytes', 1 << 20, 'MiB sent'), ('total_s', 1, 'total, s'),
            ('downtime_guest_ms', 1, 'guest down, ms')), strict=True):
        for number, mode in enumerate(MODES):
            for writer, style in ((False, '-'), (True, '--')):
                shown = [row for row in rows if row['mode'] == mode
                         and row['writer'] == writer]
                values = [row[name] / unit for row in shown]
                spread = [[abs(row[f'{name}_spread'][end] - row[name]) / unit
                           for row in shown] for end in (0, 1)]
                panel.errorbar(
                    [str(row['disk_gib']) for row in shown], values,
                    yerr=spread, fmt=f'o{style}', color=f'C{number}',
                    capsize=3,
                    label=f'{mode}{", writer" if writer else ""}')
        panel.set_xlabel('disk, GiB')
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
