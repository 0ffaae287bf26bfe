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

"""What an fsync costs a guest, by the kind of its disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import statistics
import time
from typing import Any

import click
import matplotlib
import rich.box
import rich.console
import rich.table

from lab.benchmarks import results
from lab import emulators
from lab import guest
from lab import pagecache
from lab import paths
from lab import progress
from lab import qemu
from lab import syncs

matplotlib.use('agg')

from matplotlib import pyplot  # noqa: E402

_SIZE_MIB = 1024
_DIRTY_MIB = 400
_MEMORY_MIB = 1024
#: Until a dirtier has dirtied its file once, also under TCG.
_DIRTIER_SECONDS = 4

#: In the guest's RAM.
_COUNTER = '/run/dirtied'

_DOCS = paths.ROOT / 'doc/source/admin'
_FIGURES = ('p50_us', 'p99_us', 'max_us', 'ops_per_s')
#: Of the process that dirties a file: while nobody fsyncs, and beside it.
_DIRTIED = ('dirtied_before_mib_per_s', 'dirtied_mib_per_s')
#: What ours are held against, and by which figures.
_RIVALS = {'pmem': ('pmem-before', 'pmem-stock', 'blk-writeback'),
           'pmem-driver': ('pmem', 'blk-writeback')}
_COMPARED = ('p50_us', 'p99_us', 'ops_per_s', 'dirtied_mib_per_s')


@dataclasses.dataclass(frozen=True)
class Mode:
    """A kind of disk."""

    title: str
    disk: Callable[[pathlib.Path], list[str]]
    stock: bool = False
    #: Whether the guest's driver is that of guest-image-elements.
    driver: bool = False
    #: A QEMU that was built before.
    built: str = ''

    def emulator(self) -> str:
        if self.built:
            return self.built
        return emulators.stock('10.0') if self.stock else emulators.ours()

    def guest(self, kernel: str) -> guest.Guest:
        return guest.build(kernel_package=kernel, with_driver=self.driver)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Who fsyncs, how often each, and beside whom."""

    title: str
    fsyncs: int
    processes: int = 1
    dirtier: str = ''
    call: str = 'fsync'


MODES = {
    'blk-writeback': Mode('virtio-blk, cache=writeback', qemu.virtio_blk),
    'blk-none': Mode('virtio-blk, cache=none',
                     functools.partial(qemu.virtio_blk, direct=True)),
    'pmem-stock': Mode("virtio-pmem, QEMU's own", qemu.pmem, stock=True),
    'pmem': Mode('virtio-pmem, our device', qemu.pmem),
    'pmem-driver': Mode('virtio-pmem, our device and driver', qemu.pmem,
                        driver=True),
}

WORKLOADS = {
    'alone': Workload('alone', 400),
    'write-dirtier': Workload(
        f'beside {_DIRTY_MIB} MiB written in a loop', 600,
        dirtier='write'),
    'mmap-dirtier': Workload(
        f'beside {_DIRTY_MIB} MiB stored by mmap in a loop', 600,
        dirtier='mmap'),
    'processes-64': Workload('64 processes', 10, processes=64),
    'fdatasync-64': Workload('64 processes, fdatasync', 20, processes=64,
                             call='fdatasync'),
}


@click.command()
@click.option('--rounds', default=5, show_default=True,
              type=click.IntRange(min=1), help='Boots of each kind of disk.')
@click.option('--quick', is_flag=True,
              help='Two rounds of fewer fsyncs: at most 5 minutes.')
@click.option('--kernel', metavar='PACKAGE', default=guest.KERNEL_PACKAGE,
              show_default=True, help="The guest's, as apt names it.")
@click.option('--mode', 'only', multiple=True, type=click.Choice([*MODES]),
              help='Only this disk; can be repeated.')
@click.option('--workload', 'wanted', multiple=True,
              type=click.Choice([*WORKLOADS]),
              help='Only this workload; can be repeated.')
@click.option('--before', metavar='EMULATOR', default='',
              type=click.Path(exists=True, dir_okay=False),
              help="Also our device in this QEMU, to compare with.")
@click.option('--docs', is_flag=True,
              help='Put the table and the plot into doc/ as well.')
def flush(rounds: int, quick: bool, kernel: str, only: tuple[str, ...],
          wanted: tuple[str, ...], before: str, docs: bool) -> None:
    """Time a guest's fsync on virtio-blk and on virtio-pmem.

    The test guest on the same image file and file system, from a disk of
    each kind in turn, all kinds in every round, in an order that changes;
    in each boot, 4 KiB are written and fsynced alone, beside a process that
    dirties a large file, and by 64 processes; and by 64 processes with
    fdatasync, which has the disk flush without a commit of the file system's
    journal. On virtio-pmem with the kernel's driver and with ours. The host
    has none of the image in its page cache when a guest starts. A first round
    is not timed but counts QEMU's sync calls by strace.

    Rows in .lab/bench/flush.json, medians of the rounds: mode, workload,
    p50_us, p99_us, max_us, ops_per_s, each of these with its spread from
    least to most; host_syncs_per_fsync. Beside a process that dirties, how
    fast it does so (dirtied_mib_per_s), and how fast it did before the
    fsyncs began (dirtied_before_mib_per_s). With our driver, flushes for each
    request to the host (flushes_per_request). In the rows of our device, its
    figures against those of the others in the same round, as ratios:
    against_pmem_stock, against_pmem, against_blk_writeback, and with --before
    against_pmem_before. The plot is .lab/bench/flush.png.
    """
    if quick:
        rounds = 2
    share = 4 if quick else 1
    modes = {name: mode for name, mode in MODES.items()
             if name in (only or MODES)}
    workloads = {key: workload for key, workload in WORKLOADS.items()
                 if key in (wanted or WORKLOADS)}
    if before:
        modes['pmem-before'] = dataclasses.replace(
            MODES['pmem'], title='virtio-pmem, the device before',
            built=before)
    if docs and (modes != MODES or workloads != WORKLOADS
                 or kernel != guest.KERNEL_PACKAGE):
        raise click.UsageError(
            '--docs needs all disks, all workloads and the default kernel')
    with _image(kernel) as image:
        for mode in modes.values():
            with progress.step(f'QEMU and guest for {mode.title}'):
                mode.emulator()
                mode.guest(kernel)
        _prepare(image, kernel)
        counted = {}
        for name, mode in modes.items():
            with (progress.step(f'counting syncs: {mode.title}'),
                  _boot(image, mode, kernel) as machine):
                for key, workload in workloads.items():
                    counted[name, key] = _count(
                        machine, image, workload, share)
        samples: dict[tuple[str, str], list[dict[str, float]]] = {}
        for number in range(rounds):
            order = list(modes)
            first = number % len(order)
            order = order[first:] + order[:first]
            for name in order:
                with (progress.step(f'round {number + 1} of {rounds}: '
                                    f'{modes[name].title}'),
                      _boot(image, modes[name], kernel) as machine):
                    for key, workload in workloads.items():
                        samples.setdefault((name, key), []).append(
                            _time(machine, workload, share))
    rows = [_row(name, key, samples[name, key], counted[name, key])
            for key in workloads for name in modes]
    for row in rows:
        if row['mode'] in _RIVALS:
            _compare(row, samples)
    results.save('flush', rows)
    plot = results.DIRECTORY / 'flush.png'
    _plot(rows, plot)
    _show('fsync in the guest', _HEADINGS, _cells(rows))
    _show('ours against others: ratio in each round', _VERDICT_HEADINGS,
          _verdicts(rows))
    progress.say(f'the plot is {plot}')
    if docs:
        shutil.copy(plot, _DOCS / 'flush.png')
        results.write_table(
            _DOCS / 'flush-table.inc', _HEADINGS, _cells(rows))
        results.write_table(
            _DOCS / 'flush-verdict.inc', _VERDICT_HEADINGS, _verdicts(rows))


@contextlib.contextmanager
def _image(kernel: str) -> Iterator[pathlib.Path]:
    """The guest's image, allocated in full, on our file system."""
    built = guest.build(kernel_package=kernel)
    results.DIRECTORY.mkdir(parents=True, exist_ok=True)
    image = results.DIRECTORY / 'flush.raw'
    try:
        shutil.copyfile(built.disk, image)
        with image.open('r+b') as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE_MIB << 20)
        yield image
    finally:
        image.unlink(missing_ok=True)


@contextlib.contextmanager
def _boot(image: pathlib.Path, mode: Mode,
          kernel: str) -> Iterator[qemu.Machine]:
    built = mode.guest(kernel)
    # Or it stays in the page cache in such pieces as the boot before this one
    # has read it in.
    pagecache.evict(image)
    with qemu.Machine(
            *qemu.direct_kernel(built.kernel, built.initrd,
                                guest.COMMAND_LINE),
            *mode.disk(image), memory_mib=_MEMORY_MIB,
            emulator=mode.emulator()) as machine:
        machine.agent.wait_ready()
        yield machine
        machine.agent.run('sync', check=True, timeout=300)


def _prepare(image: pathlib.Path, kernel: str) -> None:
    """Make the large file: all that follows overwrites what there is."""
    with (progress.step('making the file to dirty'),
          _boot(image, MODES['blk-writeback'], kernel) as machine):
        machine.agent.run(
            f'dd if=/dev/zero of=/root/dirty bs=1M count={_DIRTY_MIB}',
            check=True, timeout=300)


@contextlib.contextmanager
def _dirtier(machine: qemu.Machine, workload: Workload) -> Iterator[None]:
    if not workload.dirtier:
        yield
        return
    machine.agent.run(
        f'rm -f {_COUNTER}; probe dirty /root/dirty {_DIRTY_MIB} '
        f'{workload.dirtier} {_COUNTER} >/dev/null 2>&1 '
        '& echo $! >/run/dirtier', check=True)
    try:
        yield
    finally:
        machine.agent.run('kill -9 $(cat /run/dirtier); sync', timeout=300)


def _probe(machine: qemu.Machine, arguments: str) -> dict[str, int]:
    text = machine.agent.run(f'probe {arguments}', check=True,
                             timeout=600).stdout
    return {name: int(value)
            for name, value in re.findall(r'(\w+)=(\d+)', text)}


def _fsync(machine: qemu.Machine, workload: Workload,
           share: int) -> dict[str, int]:
    return _probe(machine, f'{workload.call} /root/fsync '
                  f'{max(workload.fsyncs // share, 2)} {workload.processes}')


def _time(machine: qemu.Machine, workload: Workload,
          share: int) -> dict[str, float]:
    rates = {}
    with _dirtier(machine, workload):
        if workload.dirtier:
            begun = _probe(machine, f'dirtied {_COUNTER}')
            time.sleep(_DIRTIER_SECONDS)
            before = _probe(machine, f'dirtied {_COUNTER}')
        sent = _sent(machine)
        seen = _fsync(machine, workload, share)
        if sent:
            flushes, requests = (
                now - then for now, then
                in zip(_sent(machine), sent, strict=True))
            rates['flushes_per_request'] = flushes / max(requests, 1)
        if workload.dirtier:
            after = _probe(machine, f'dirtied {_COUNTER}')
            rates |= zip(_DIRTIED, (_rate(begun, before),
                                    _rate(before, after)), strict=True)
    return {'p50_us': seen['p50_us'], 'p99_us': seen['p99_us'],
            'max_us': seen['max_us'],
            'ops_per_s': seen['fsyncs'] * 1e6 / seen['elapsed_us'], **rates}


def _sent(machine: qemu.Machine) -> list[int]:
    """Flushes and requests of our driver so far; empty with another one."""
    directory = '/sys/bus/virtio/drivers/virtio_pmem/virtio*/flush'
    return [int(word) for word in machine.agent.run(
        f'cat {directory}/flushes {directory}/requests').stdout.split()]


def _rate(first: dict[str, int], last: dict[str, int]) -> float:
    """MiB a second between two answers of ``probe dirtied``."""
    return ((last['bytes'] - first['bytes']) / (1 << 20) * 1e6
            / (last['at_us'] - first['at_us']))


def _count(machine: qemu.Machine, image: pathlib.Path, workload: Workload,
           share: int) -> float:
    """Sync calls of QEMU on the image for each fsync in the guest."""
    with _dirtier(machine, workload), syncs.watch(
            machine.pid, f'/{image.name}') as watched:
        if workload.dirtier:
            time.sleep(_DIRTIER_SECONDS)
        fsyncs = _fsync(machine, workload, share * 4)['fsyncs']
    return watched.succeeded / fsyncs


def _row(mode: str, workload: str, samples: list[dict[str, float]],
         host_syncs: float) -> dict[str, Any]:
    row: dict[str, Any] = {'mode': mode, 'workload': workload}
    for figure in (*_FIGURES, *_DIRTIED, 'flushes_per_request'):
        if figure not in samples[0]:
            continue
        values = [sample[figure] for sample in samples]
        row[figure] = round(statistics.median(values), 1)
        row[f'{figure}_spread'] = [round(min(values), 1),
                                   round(max(values), 1)]
    row['host_syncs_per_fsync'] = round(host_syncs, 2)
    row['rounds'] = len(samples)
    return row


def _compare(row: dict[str, Any],
             samples: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """Add a row's figures as ratios to the rivals' in the same round."""
    ours = samples[row['mode'], row['workload']]
    for rival in _RIVALS[row['mode']]:
        theirs = samples.get((rival, row['workload']))
        if theirs is None:
            continue
        row[f'against_{rival.replace("-", "_")}'] = {
            # A dirtier that is starved altogether has 0 MiB/s.
            figure: _median([one[figure] / max(other[figure], 1e-6)
                             for one, other
                             in zip(ours, theirs, strict=True)])
            for figure in _COMPARED if figure in ours[0]}


def _median(ratios: list[float]) -> dict[str, float]:
    return {'median': round(statistics.median(ratios), 3),
            'least': round(min(ratios), 3), 'most': round(max(ratios), 3)}


_HEADINGS = ('workload', 'disk', 'p50 ms', 'p99 ms', 'max ms', 'fsyncs/s',
             'host syncs per fsync', 'flushes per request', 'dirtied MiB/s')


def _cells(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The rows of a table: the median, and the spread in brackets."""
    for row in rows:
        cells = [row['workload'], row['mode']]
        for figure in _FIGURES:
            digits, unit = (0, 1) if figure == 'ops_per_s' else (2, 1000)
            cells.append(_spread(row, figure, digits, unit))
        cells.append(f'{row["host_syncs_per_fsync"]:.2f}')
        for figure, digits in (('flushes_per_request', 1),
                               ('dirtied_mib_per_s', 0)):
            cells.append(_spread(row, figure, digits, 1)
                         if figure in row else '-')
        yield cells


def _spread(row: dict[str, Any], figure: str, digits: int, unit: int) -> str:
    least, most = row[f'{figure}_spread']
    return (f'{row[figure] / unit:.{digits}f} '
            f'({least / unit:.{digits}f}-{most / unit:.{digits}f})')


_VERDICT_HEADINGS = ('workload', 'ours', 'against', 'p50', 'p99', 'fsyncs/s',
                     'dirtied')


def _verdicts(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Ratios: of a time, less than 1 is better; of all else, more."""
    for row in rows:
        for rival in _RIVALS.get(row['mode'], ()):
            ratios = row.get(f'against_{rival.replace("-", "_")}')
            if ratios is None:
                continue
            cells = [row['workload'], row['mode'], rival]
            for figure in _COMPARED:
                ratio = ratios.get(figure)
                cells.append(
                    f'{ratio["median"]:.2f} '
                    f'({ratio["least"]:.2f}-{ratio["most"]:.2f})'
                    if ratio else '-')
            yield cells


def _show(title: str, headings: Sequence[str],
          lines: Iterable[list[str]]) -> None:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE)
    for heading in headings:
        table.add_column(heading, no_wrap=heading in headings[:2])
    workload = None
    for cells in lines:
        if workload not in (None, cells[0]):
            table.add_section()
        workload = cells[0]
        table.add_row(*cells)
    rich.console.Console(width=140).print(table)


def _plot(rows: list[dict[str, Any]], file: pathlib.Path) -> None:
    """p50 as bars with its spread, p99 as points, a panel a workload."""
    workloads = list(dict.fromkeys(row['workload'] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(workloads), figsize=(3 * len(workloads), 4), sharey=True,
        squeeze=False, layout='constrained')
    for panel, key in zip(panels[0], workloads, strict=True):
        shown = [row for row in rows if row['workload'] == key]
        p50 = [row['p50_us'] / 1000 for row in shown]
        spread = [[abs(row['p50_us_spread'][end] - row['p50_us']) / 1000
                   for row in shown] for end in (0, 1)]
        names = [row['mode'] for row in shown]
        panel.bar(names, p50, yerr=spread, capsize=3,
                  color=[f'C{number}' for number in range(len(names))])
        panel.plot(names, [row['p99_us'] / 1000 for row in shown], 'k_',
                   markersize=12)
        panel.set_title(WORKLOADS[key].title, fontsize=9)
        panel.set_yscale('log')
        panel.tick_params(axis='x', rotation=40, labelsize=8)
        panel.grid(axis='y', alpha=0.3)
    panels[0][0].set_ylabel('fsync, ms: median (bar), 99th percentile (dash)')
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
