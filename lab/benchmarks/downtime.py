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

"""How long a guest that has much unsynced data is paused when it moves."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import pathlib
import tempfile
from typing import Any

import click

from lab.benchmarks import results
from lab import errors
from lab import guest
from lab.machine import emulators
from lab.machine import pagecache
from lab.machine import qemu
from lab import progress
from lab import wait

#: MiB; the guest needs little.
_MEMORY_MIB = 384
#: Seconds in which a migration must end.
_TIMEOUT = 300

_FIGURES = ('downtime_ms', 'total_s')


@dataclasses.dataclass(frozen=True)
class Case:
    """What a guest has stored when it moves.

    :ivar disks: how many, without the root disk
    :ivar dirty_mib: MiB stored to each of them and not flushed
    """

    title: str
    disks: int
    dirty_mib: int


CASES = {
    'four-disks': Case('four disks, 16 MiB dirty on each', 4, 16),
    '1-gib': Case('one disk, 1 GiB dirty', 1, 1024),
}

#: The mode with our device in the QEMU of --before.
_BEFORE = 'pmem-before'

#: QEMU's options for a disk, and the guest's name for disk number n.
MODES: dict[str, tuple[Callable[[pathlib.Path, str], list[str]],
                       Callable[[int], str]]] = {
    'blk': (lambda image, name: qemu.virtio_blk(
        image, name, boot_index=-1), lambda number: f'vd{"abcdef"[number]}'),
    'pmem': (qemu.pmem, lambda number: f'pmem{number}'),
    _BEFORE: (qemu.pmem, lambda number: f'pmem{number}'),
}


@click.command()
@click.option('--rounds', default=5, show_default=True,
              type=click.IntRange(min=1), help='Migrations of each kind.')
@click.option('--limit', default=300, show_default=True, metavar='MS',
              type=click.IntRange(min=1), help='The downtime limit.')
@click.option('--case', 'wanted', multiple=True, type=click.Choice([*CASES]),
              help='Only this case; can be repeated.')
@click.option('--before', metavar='EMULATOR',
              type=click.Path(exists=True, dir_okay=False),
              help="Also our device in this QEMU, to compare with.")
def downtime(rounds: int, limit: int, wanted: tuple[str, ...],
             before: str | None) -> None:
    """Migrate a guest that has stored much data and synced none of it.

    Without OpenStack, from one QEMU to another on this host, with the images
    on the same storage: in turn on virtio-blk with the host's page cache and
    on our device. The data is dirty in the host's page cache; the guest
    bypasses its own.

    Rows in .lab/bench/downtime.json, medians of the rounds with their
    spread: case; mode; downtime_ms, from the stop of the guest on the source
    until it runs on the destination; total_s, of the whole migration. In the
    rows of other modes than blk, against_blk: the ratios to virtio-blk in
    the same round.
    """
    used = {mode: emulators.project() for mode in MODES if mode != _BEFORE}
    if before:
        used[_BEFORE] = before
    built = guest.build()
    cases = {name: case for name, case in CASES.items()
             if name in (wanted or CASES)}
    samples: dict[tuple[str, str], list[results.Sample]] = {}
    for name, case in cases.items():
        with _images(built, case) as images:
            for number in range(rounds):
                for mode in results.in_turn(used, number):
                    with progress.step(f'{case.title}: {mode}, round '
                                       f'{number + 1} of {rounds}'):
                        samples.setdefault((name, mode), []).append(_move(
                            used[mode], built, images, mode, case, limit))
    rows = [_row(name, mode, samples) for name in cases for mode in used]
    results.save('downtime', rows)
    results.show('A move with unsynced data', _HEADINGS, _cells(rows),
                 width=110)


@contextlib.contextmanager
def _images(built: guest.Guest, case: Case) -> Iterator[list[pathlib.Path]]:
    results.DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
            prefix='downtime-', dir=results.DIRECTORY) as directory:
        root = pathlib.Path(directory) / 'root'
        built.copy_disk(root)
        images = [root]
        for number in range(case.disks):
            image = pathlib.Path(directory) / f'disk{number}'
            with image.open('wb') as file:
                for _ in range(case.dirty_mib + 48):
                    file.write(b'\1' * (1 << 20))
            images.append(image)
        yield images


def _move(emulator: str, built: guest.Guest, images: list[pathlib.Path],
          mode: str, case: Case, limit: int) -> results.Sample:
    disk, name = MODES[mode]
    for image in images:
        pagecache.evict(image)
    options = [*qemu.direct_kernel(built.kernel, built.initrd,
                                   guest.COMMAND_LINE)]
    for number, image in enumerate(images):
        options += disk(image, f'disk{number}')

    def machine(*more: str) -> qemu.Machine:
        return qemu.Machine(*options, *more, memory_mib=_MEMORY_MIB,
                            emulator=emulator)

    with tempfile.TemporaryDirectory(prefix='move-') as directory:
        uri = f'unix:{directory}/socket'
        with machine() as source, machine('-incoming', uri) as destination:
            source.agent.wait_ready()
            source.qmp('migrate-set-capabilities', capabilities=[
                {'capability': 'return-path', 'state': True}])
            # As libvirt does: only the storage limits.
            source.qmp('migrate-set-parameters', max_bandwidth=1 << 40,
                       downtime_limit=limit)
            source.agent.run('sync', check=True, timeout=_TIMEOUT)
            for number in range(1, len(images)):
                source.agent.run(
                    f'dd if=/dev/zero of=/dev/{name(number)} bs=1M '
                    f'count={case.dirty_mib} oflag=direct', check=True,
                    timeout=_TIMEOUT)
            source.qmp('migrate', uri=uri)
            total_ms = _total_ms(source)
            stopped = _when(source, 'STOP')
            return {
                'downtime_ms': (_when(destination, 'RESUME') - stopped) * 1e3,
                'total_s': total_ms / 1000,
            }


def _total_ms(source: qemu.Machine) -> float:
    """Wait until the migration completes; how long QEMU says it took."""
    info: dict[str, Any] = {}

    def completed() -> bool:
        info.update(source.qmp('query-migrate'))
        if info['status'] == 'failed':
            raise errors.LabError(f'the migration failed: {info}')
        return bool(info['status'] == 'completed')

    wait.until('the migration to complete', completed, _TIMEOUT,
               interval=0.02, state=lambda: info)
    return float(info['total-time'])


def _when(machine: qemu.Machine, event: str) -> float:
    """Wait for an event; when the last one of this name was, in seconds."""
    times = wait.until(
        f"QEMU's event {event}",
        lambda: [seen['timestamp'] for seen in machine.events()
                 if seen['event'] == event], 30, interval=0.02)
    return float(times[-1]['seconds'] + times[-1]['microseconds'] / 1e6)


def _row(name: str, mode: str, samples: dict[
        tuple[str, str], list[results.Sample]]) -> results.Row:
    measured = samples[name, mode]
    row = {'case': name, 'mode': mode,
           **results.summary(measured, _FIGURES, 3),
           'rounds': len(measured)}
    if mode != 'blk':
        row['against_blk'] = {
            figure: results.spread('ratio', results.ratios(
                measured, samples[name, 'blk'], figure), 3)
            for figure in _FIGURES}
    return row


_HEADINGS = ('case', 'disks', 'down, ms', 'total, s', 'down against blk')


def _cells(rows: list[results.Row]) -> list[list[str]]:
    return [[CASES[row['case']].title, row['mode'],
             results.cell(row, 'downtime_ms', 0),
             results.cell(row, 'total_s', 2),
             results.cell(row.get('against_blk', {}).get('downtime_ms', {}),
                          'ratio', 2)]
            for row in rows]
