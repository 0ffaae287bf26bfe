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
import pathlib
import shutil
import threading
import time
from typing import Any

import click
import libvirt

from lab.benchmarks import plots
from lab.benchmarks import results
from lab.deploy import clients
from lab.deploy import host
from lab.deploy import lifecycle
from lab.deploy import servers
from lab import errors
from lab import guest
from lab import paths
from lab import progress

MODES: dict[str, dict[str, str]] = {
    'blk': {},
    'pmem': {'fakedax:disks': 'root', 'trait:CUSTOM_FAKEDAX': 'required'},
    'pmem-memmap-guest': {
        'fakedax:disks': 'root', 'trait:CUSTOM_FAKEDAX': 'required',
        'fakedax:memmap': 'guest'},
}
DISKS_GIB = (1, 8, 32)

#: MiB. With the memmap in the guest, 32 GiB of disk take 512 MiB of this, and
#: that migrates. The other kinds get the same RAM, to be comparable.
_RAM_MIB = 1024
_CHURN_MIB = 16
_TICKS = '/dev/ticks'

_FIGURES = ('total_s', 'bytes', 'downtime_guest_ms', 'downtime_qemu_ms',
            'longest_tick_ms', 'request_s')
_DOCS = paths.ROOT / 'doc/source/admin'


@click.command()
@click.option('--rounds', default=3, show_default=True,
              type=click.IntRange(min=1),
              help='Migrations of each server, without and with the writer.')
@click.option('--disk', 'disks', multiple=True, type=click.IntRange(min=1),
              default=DISKS_GIB, show_default=True,
              help='GiB of the root disk; can be repeated.')
@click.option('--docs', is_flag=True,
              help='Put the table and the plot into doc/ as well.')
def migrate(rounds: int, disks: tuple[int, ...], docs: bool) -> None:
    """Live-migrate servers on virtio-blk and on fake DAX.

    The same image and shared storage. On fake DAX the guest's struct pages of
    the disk are on the disk, or in its RAM and so among what migrates. For
    each size of disk there is a server of each kind; they migrate in turn,
    first idle and then with a process that writes, fsyncs and reads back.

    Rows in .lab/bench/migrate.json, medians of the rounds with their spread:
    mode, disk_gib, writer; total_s and bytes as QEMU counts them;
    downtime_guest_ms, from the stop of the guest on the source until it runs
    on the destination; downtime_qemu_ms, QEMU's own figure; longest_tick_ms,
    how long a sleep of 1 ms took at most by the guest's clock; request_s,
    from the user's request until the migration has completed.
    """
    samples: dict[tuple[str, int, bool], list[results.Sample]] = {}
    with errors.messages(), lifecycle.borrowed(), _Switchovers() as seen:
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
                        for mode in results.in_turn(MODES, number):
                            sample = _move(made[mode], seen)
                            samples.setdefault(
                                (mode, disk, writer), []).append(sample)
                            progress.say(
                                f'{disk} GiB, {mode}'
                                f'{", writer" if writer else ""}: '
                                f'{sample["total_s"]:.2f} s, down '
                                f'{sample["downtime_guest_ms"]:.0f} ms')
    rows = [{'mode': mode, 'disk_gib': disk, 'writer': writer,
             **results.summary(samples[mode, disk, writer], _FIGURES, 2),
             'rounds': rounds}
            for disk in disks for writer in (False, True) for mode in MODES]
    results.save('migrate', rows)
    plot = results.DIRECTORY / 'migrate.png'
    _plot(rows, plot)
    results.show('Live migration', _HEADINGS, _cells(rows), width=130,
                 whole=len(_HEADINGS), groups=2)
    progress.say(f'the plot is {plot}')
    if docs:
        shutil.copy(plot, _DOCS / 'migrate.png')
        results.write_table(
            _DOCS / 'migrate-table.inc', _HEADINGS, _cells(rows))


class _Switchovers:
    """When guests stop and run, by the events of libvirt on both hosts.

    Not by the guest's clock, which does not run in between.
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
        # Without a timeout the loop would wait forever for a next event.
        libvirt.virEventAddTimeout(100, lambda *_: None, None)
        while not self._ended.is_set():
            libvirt.virEventRunDefaultImpl()

    def _note(self, _connection: Any, domain: Any, event: int, detail: int,
              _opaque: object) -> None:
        # The first stop and the last start: the guest may also stop on the
        # destination before it runs there.
        key = (domain.UUIDString(), event)
        now = time.monotonic()
        if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            self._times[key] = now
        elif event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            self._times.setdefault(key, now)

    def forget(self, server: servers.Server) -> None:
        """Forget earlier migrations of a server."""
        for event in (libvirt.VIR_DOMAIN_EVENT_SUSPENDED,
                      libvirt.VIR_DOMAIN_EVENT_RESUMED):
            self._times.pop((server.id, event), None)

    def downtime(self, server: servers.Server) -> float:
        """Seconds of the migration since forget()."""
        return (self._times[server.id, libvirt.VIR_DOMAIN_EVENT_RESUMED]
                - self._times[server.id, libvirt.VIR_DOMAIN_EVENT_SUSPENDED])


@contextlib.contextmanager
def _server(cloud: Any, image: Any, mode: str,
            disk: int) -> Iterator[servers.Server]:
    """A server that runs a ticker, for the length of a block."""
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


def _move(server: servers.Server, seen: _Switchovers) -> results.Sample:
    with server.agent() as agent:
        agent.run(f'echo >{_TICKS}', check=True)
    seen.forget(server)
    started = time.monotonic()
    status = server.live_migrate()
    if status != 'completed':
        raise errors.LabError(f'a migration ended with status {status}')
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


_HEADINGS = ('disk', 'writer', 'kind', 'total s', 'MiB sent', 'guest down ms',
             'QEMU downtime ms', 'down against blk')


def _cells(rows: list[results.Row]) -> Iterator[list[str]]:
    down = {(row['disk_gib'], row['writer']): row['downtime_guest_ms']
            for row in rows if row['mode'] == 'blk'}
    for row in rows:
        ratio = (row['downtime_guest_ms']
                 / down[row['disk_gib'], row['writer']])
        yield [f'{row["disk_gib"]} GiB', 'yes' if row['writer'] else 'no',
               row['mode'],
               results.cell(row, 'total_s', 2),
               results.cell(row, 'bytes', 1, 1 << 20),
               results.cell(row, 'downtime_guest_ms', 0),
               results.cell(row, 'downtime_qemu_ms', 0),
               f'{ratio:.2f}']


def _plot(rows: list[results.Row], file: pathlib.Path) -> None:
    """Bytes and downtime by the size of the disk, one line for each kind."""
    with plots.panels(file, 3, width=12, height=3.6) as panels:
        for panel, (name, unit, label) in zip(panels, (
                ('bytes', 1 << 20, 'MiB sent'), ('total_s', 1, 'total, s'),
                ('downtime_guest_ms', 1, 'guest down, ms')), strict=True):
            for number, mode in enumerate(MODES):
                for writer, style in ((False, '-'), (True, '--')):
                    shown = [row for row in rows if row['mode'] == mode
                             and row['writer'] == writer]
                    values, spread = plots.bars(shown, name, unit)
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
