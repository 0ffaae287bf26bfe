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

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import statistics
import time

import click

from lab.benchmarks import images
from lab.benchmarks import plots
from lab.benchmarks import results
from lab import guest
from lab.machine import emulators
from lab.machine import loop
from lab.machine import pagecache
from lab.machine import qemu
from lab.machine import syncs
from lab import paths
from lab import progress
from nova_fakedax import layout

#: GiB of the disk that the files of the benchmark can reach.
_ALLOCATED_GIB = 3
_DIRTY_MIB = 400
_MEMORY_MIB = 1024
#: In which a dirtier has dirtied its file once, also under TCG.
_DIRTIER_SECONDS = 4

#: In the guest's RAM.
_COUNTER = '/run/dirtied'

_DOCS = paths.ROOT / 'doc/source/admin'
#: Of the process that dirties a file: without fsyncs, and next to them.
_DIRTIED = ('dirtied_before_mib_per_s', 'dirtied_mib_per_s')
#: All figures of a sample, not all of which every workload and mode has.
_MEASURED = ('p50_us', 'p99_us', 'max_us', 'ops_per_s', *_DIRTIED,
             'flushes_per_request', 'dirtied_kib_per_fsync')
#: What our device and driver are compared with, and by which figures.
_RIVALS = {'pmem': ('pmem-before', 'pmem-stock', 'blk-writeback',
                    'pmem-memmap-guest'),
           'pmem-block': ('pmem', 'blk-writeback'),
           'pmem-driver': ('pmem', 'blk-writeback')}
_COMPARED = ('p50_us', 'p99_us', 'ops_per_s', 'dirtied_mib_per_s')


@dataclasses.dataclass(frozen=True)
class Mode:
    """A kind of disk."""

    title: str
    disk: Callable[[pathlib.Path], list[str]]
    stock: bool = False
    #: Whether the guest has the driver of guest-image-elements.
    driver: bool = False
    #: Whether the image has the guest's page descriptors in front.
    memmap: bool = False
    #: Whether it is a block device of the image, as a volume may be.
    block: bool = False
    #: A QEMU that was built before.
    built: str = ''

    def emulator(self) -> str:
        if self.built:
            return self.built
        return emulators.stock('10.0') if self.stock else emulators.project()

    def memory_mib(self, disk: pathlib.Path) -> int:
        """The guest's RAM: as much for itself with every disk."""
        if self.memmap or self.disk is not qemu.pmem:
            return _MEMORY_MIB
        # 64 bytes for each page of 4096.
        return _MEMORY_MIB + (loop.size(disk) >> 26)

    def guest(self, kernel: str) -> guest.Guest:
        return guest.build(kernel_package=kernel, with_driver=self.driver)


@dataclasses.dataclass(frozen=True)
class Workload:
    """How many processes fsync, how often each, and next to which."""

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
    'pmem': Mode('virtio-pmem, our device', qemu.pmem, memmap=True),
    'pmem-memmap-guest': Mode(
        "virtio-pmem, our device, memmap in the guest's RAM", qemu.pmem),
    'pmem-block': Mode('virtio-pmem, our device, on a block device',
                       qemu.pmem, memmap=True, block=True),
    'pmem-driver': Mode('virtio-pmem, our device and driver', qemu.pmem,
                        driver=True, memmap=True),
}

WORKLOADS = {
    'alone': Workload('alone', 400),
    'write-dirtier': Workload(
        f'next to {_DIRTY_MIB} MiB written in a loop', 600,
        dirtier='write'),
    'mmap-dirtier': Workload(
        f'next to {_DIRTY_MIB} MiB stored by mmap in a loop', 600,
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
@click.option('--size', 'disk_gib', metavar='GIB', default=1,
              show_default=True, type=click.IntRange(min=1, max=200),
              help='Of the disks.')
@click.option('--kernel', metavar='PACKAGE', default=guest.KERNEL_PACKAGE,
              show_default=True, help="The guest's, as apt names it.")
@click.option('--mode', 'only', multiple=True, type=click.Choice([*MODES]),
              help='Only this disk; can be repeated.')
@click.option('--workload', 'wanted', multiple=True,
              type=click.Choice([*WORKLOADS]),
              help='Only this workload; can be repeated.')
@click.option('--before', metavar='EMULATOR',
              type=click.Path(exists=True, dir_okay=False),
              help="Also our device in this QEMU, to compare with.")
@click.option('--docs', is_flag=True,
              help='Put the table and the plot into doc/ as well.')
def flush(rounds: int, quick: bool, disk_gib: int, kernel: str,
          only: tuple[str, ...], wanted: tuple[str, ...], before: str | None,
          docs: bool) -> None:
    """Time a guest's fsync on virtio-blk and on virtio-pmem.

    Every round boots the test guest from a disk of each kind, another one
    first in each. All have the same file system, in images of the same
    content; those of our device have the memmap (the guest's page
    descriptors) in front, except for pmem-memmap-guest. pmem-block is a loop
    device of the image, which is read and written past the page cache of the
    file, as a volume of a block backend. In each boot, 4 KiB
    are written and fsynced: by one process alone, by one next to a process
    that dirties a large file, by 64 processes, and by 64 processes with
    fdatasync, which flushes the disk without a commit of the file system's
    journal. virtio-pmem runs with the kernel's driver and with our driver.
    The host has none of the image in its page cache when a guest starts. A
    first round is not timed; strace counts QEMU's sync calls in it.

    Rows in .lab/bench/flush.json, medians of the rounds: mode, workload,
    disk_gib, p50_us, p99_us, max_us, ops_per_s, each of these with its
    spread from least to most; host_syncs_per_fsync; dirtied_kib_per_fsync,
    what QEMU has made dirty of the image (write_bytes of /proc/PID/io) by
    fsync. Next to a process that dirties a file, its speed
    (dirtied_mib_per_s), and its speed before the fsyncs began
    (dirtied_before_mib_per_s). With our driver, flushes for each request to
    the host (flushes_per_request). In the rows of our device, the ratios of
    its figures to those of other kinds in the same round:
    against_pmem_stock, against_pmem, against_blk_writeback,
    against_pmem_memmap_guest, and with --before against_pmem_before. The
    plot is .lab/bench/flush.png.
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
            MODES['pmem'], title='virtio-pmem, our device in --before',
            built=before)
    if docs and (modes != MODES or workloads != WORKLOADS or disk_gib != 1
                 or kernel != guest.KERNEL_PACKAGE):
        raise click.UsageError(
            '--docs needs all disks, all workloads, the default size and '
            'kernel')
    with _images(kernel, disk_gib,
                 {mode.memmap for mode in modes.values()}) as found:
        for mode in modes.values():
            with progress.step(f'QEMU and guest for {mode.title}'):
                mode.emulator()
                mode.guest(kernel)
        for memmap, image in found.items():
            _prepare(image, kernel, memmap)
        counted = {}
        for name, mode in modes.items():
            with (progress.step(f'counting syncs: {mode.title}'),
                  _disk(found[mode.memmap], mode) as disk,
                  _boot(disk, mode, kernel) as machine):
                for key, workload in workloads.items():
                    counted[name, key] = _count(
                        machine, disk, workload, share)
        samples: dict[tuple[str, str], list[results.Sample]] = {}
        for number in range(rounds):
            for name in results.in_turn(modes, number):
                mode = modes[name]
                with (progress.step(f'round {number + 1} of {rounds}: '
                                    f'{mode.title}'),
                      _disk(found[mode.memmap], mode) as disk,
                      _boot(disk, mode, kernel) as machine):
                    for key, workload in workloads.items():
                        samples.setdefault((name, key), []).append(
                            _time(machine, workload, share))
    rows = [{'mode': name, 'workload': key, 'disk_gib': disk_gib,
             **results.summary(samples[name, key], _MEASURED, 1),
             'host_syncs_per_fsync': round(counted[name, key], 2),
             'rounds': rounds}
            for key in workloads for name in modes]
    for row in rows:
        if row['mode'] in _RIVALS:
            _compare(row, samples)
    results.save('flush', rows)
    plot = results.DIRECTORY / 'flush.png'
    _plot(rows, plot)
    results.show('fsync in the guest', _HEADINGS, _cells(rows), width=140,
                 whole=2, groups=1)
    results.show('our device against others: ratio in each round',
                 _VERDICT_HEADINGS, _verdicts(rows), width=140, whole=2,
                 groups=1)
    progress.say(f'the plot is {plot}')
    if docs:
        shutil.copy(plot, _DOCS / 'flush.png')
        results.write_table(
            _DOCS / 'flush-table.inc', _HEADINGS, _cells(rows))
        results.write_table(
            _DOCS / 'flush-verdict.inc', _VERDICT_HEADINGS, _verdicts(rows))


@contextlib.contextmanager
def _images(kernel: str, disk_gib: int,
            kinds: Iterable[bool]) -> Iterator[dict[bool, pathlib.Path]]:
    """Images with and without a memmap, allocated where they are used."""
    with contextlib.ExitStack() as stack:
        found = {}
        for memmap in kinds:
            image = stack.enter_context(images.sparse(
                f'flush-{"memmap" if memmap else "plain"}', disk_gib << 10,
                memmap=memmap,
                content=guest.build(kernel_package=kernel).disk))
            used = layout.read(str(image)).offset + (_ALLOCATED_GIB << 30)
            with image.open('r+b') as file:
                os.posix_fallocate(
                    file.fileno(), 0, min(used, image.stat().st_size))
            found[memmap] = image
        yield found


@contextlib.contextmanager
def _disk(image: pathlib.Path, mode: Mode) -> Iterator[pathlib.Path]:
    """What QEMU opens: the image, or a block device of it."""
    if not mode.block:
        yield image
        return
    # Linux would look for pages of the file at each direct read and write.
    pagecache.evict(image)
    with loop.device(image) as node:
        yield node


@contextlib.contextmanager
def _boot(disk: pathlib.Path, mode: Mode,
          kernel: str) -> Iterator[qemu.Machine]:
    built = mode.guest(kernel)
    # Otherwise the page cache has the pieces that the last boot has read.
    pagecache.evict(disk)
    with qemu.Machine(
            *qemu.direct_kernel(built.kernel, built.initrd,
                                guest.COMMAND_LINE),
            *mode.disk(disk), memory_mib=mode.memory_mib(disk),
            emulator=mode.emulator()) as machine:
        machine.agent.wait_ready()
        yield machine
        machine.agent.run('sync', check=True, timeout=300)


def _prepare(image: pathlib.Path, kernel: str, memmap: bool) -> None:
    """Make the large file, which everything after this overwrites."""
    mode = MODES['pmem' if memmap else 'blk-writeback']
    with (progress.step('making the file to dirty'),
          _boot(image, mode, kernel) as machine):
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
          share: int) -> results.Sample:
    rates: results.Sample = {}
    with _dirtier(machine, workload):
        if workload.dirtier:
            begun = _probe(machine, f'dirtied {_COUNTER}')
            time.sleep(_DIRTIER_SECONDS)
            before = _probe(machine, f'dirtied {_COUNTER}')
        sent = _sent(machine)
        dirtied = machine.counter('io', 'write_bytes')
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
        dirtied = machine.counter('io', 'write_bytes') - dirtied
        rates['dirtied_kib_per_fsync'] = dirtied / 1024 / seen['fsyncs']
    return {'p50_us': seen['p50_us'], 'p99_us': seen['p99_us'],
            'max_us': seen['max_us'],
            'ops_per_s': seen['fsyncs'] * 1e6 / seen['elapsed_us'], **rates}


def _sent(machine: qemu.Machine) -> list[int]:
    """Flushes and requests of our driver so far; empty with another."""
    directory = '/sys/bus/virtio/drivers/virtio_pmem/virtio*/flush'
    return [int(word) for word in machine.agent.run(
        f'cat {directory}/flushes {directory}/requests').stdout.split()]


def _rate(first: dict[str, int], last: dict[str, int]) -> float:
    """MiB a second between two answers of ``probe dirtied``."""
    return ((last['bytes'] - first['bytes']) / (1 << 20) * 1e6
            / (last['at_us'] - first['at_us']))


def _count(machine: qemu.Machine, disk: pathlib.Path, workload: Workload,
           share: int) -> float:
    """Sync calls of QEMU on the disk for each fsync in the guest."""
    with _dirtier(machine, workload), syncs.watch(
            machine.pid, f'/{disk.name}') as watched:
        if workload.dirtier:
            time.sleep(_DIRTIER_SECONDS)
        fsyncs = _fsync(machine, workload, share * 4)['fsyncs']
    return watched.succeeded / fsyncs


def _compare(row: results.Row,
             samples: dict[tuple[str, str], list[results.Sample]]) -> None:
    """Add the ratios of a row's figures to those of its rivals."""
    measured = samples[row['mode'], row['workload']]
    for rival in _RIVALS[row['mode']]:
        theirs = samples.get((rival, row['workload']))
        if theirs is None:
            continue
        row[f'against_{rival.replace("-", "_")}'] = {
            figure: _median(results.ratios(measured, theirs, figure))
            for figure in _COMPARED if figure in measured[0]}


def _median(ratios: list[float]) -> dict[str, float]:
    return {'median': round(statistics.median(ratios), 3),
            'least': round(min(ratios), 3), 'most': round(max(ratios), 3)}


_HEADINGS = ('workload', 'disk', 'p50 ms', 'p99 ms', 'max ms', 'fsyncs/s',
             'host syncs per fsync', 'dirtied KiB per fsync',
             'flushes per request', 'dirtied MiB/s')


def _cells(rows: list[results.Row]) -> Iterator[list[str]]:
    for row in rows:
        yield [row['workload'], row['mode'],
               *(results.cell(row, figure, 2, 1000)
                 for figure in ('p50_us', 'p99_us', 'max_us')),
               results.cell(row, 'ops_per_s', 0),
               f'{row["host_syncs_per_fsync"]:.2f}',
               results.cell(row, 'dirtied_kib_per_fsync', 0),
               results.cell(row, 'flushes_per_request', 1),
               results.cell(row, 'dirtied_mib_per_s', 0)]


_VERDICT_HEADINGS = ('workload', 'disk', 'against', 'p50', 'p99', 'fsyncs/s',
                     'dirtied')


def _verdicts(rows: list[results.Row]) -> Iterator[list[str]]:
    """Ratios: less than 1 is better for times, more than 1 for rates."""
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


def _plot(rows: list[results.Row], file: pathlib.Path) -> None:
    """p50 as bars with its spread, p99 as dashes, a panel for a workload."""
    workloads = list(dict.fromkeys(row['workload'] for row in rows))
    with plots.panels(file, len(workloads), width=3 * len(workloads),
                      height=4, sharey=True) as panels:
        for panel, key in zip(panels, workloads, strict=True):
            shown = [row for row in rows if row['workload'] == key]
            names = [row['mode'] for row in shown]
            p50, spread = plots.bars(shown, 'p50_us', 1000)
            panel.bar(names, p50, yerr=spread, capsize=3,
                      color=[f'C{number}' for number in range(len(names))])
            panel.plot(names, [row['p99_us'] / 1000 for row in shown], 'k_',
                       markersize=12)
            panel.set_title(WORKLOADS[key].title, fontsize=9)
            panel.set_yscale('log')
            panel.tick_params(axis='x', rotation=40, labelsize=8)
            panel.grid(axis='y', alpha=0.3)
        panels[0].set_ylabel(
            'fsync, ms: median (bar), 99th percentile (dash)')
