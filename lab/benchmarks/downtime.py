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

"""How long a guest is down when it moves with much that is not synced."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

import click
import rich.box
import rich.console
import rich.table

from lab.benchmarks import results
from lab import emulators
from lab import guest
from lab import pagecache
from lab import progress
from lab import qemu

#: MiB; the guest needs little.
_MEMORY_MIB = 384
#: Seconds in which a migration must end.
_TIMEOUT = 300

_FIGURES = ('downtime_ms', 'total_s')


@dataclasses.dataclass(frozen=True)
class Case:
    """What a guest has stored when it moves.

    :ivar disks: beside the root disk
    :ivar dirty_mib: stored to each of them and not flushed
    """

    title: str
    disks: int
    dirty_mib: int


CASES = {
    'four-disks': Case('four disks, 16 MiB dirty on each', 4, 16),
    '1-gib': Case('one disk, 1 GiB dirty', 1, 1024),
}

#: The mode that is our device in another QEMU.
_BEFORE = 'pmem-before'

#: How a disk is given to QEMU, and what the guest calls disk number n.
MODES: dict[str, tuple[Callable[[pathlib.Path, str], list[str]],
                       Callable[[int], str]]] = {
    'blk': (lambda image, name: qemu.virtio_blk(
        image, name, boot_index=-1), lambda number: f'vd{"abcdef"[number]}'),
    'pmem': (qemu.pmem, lambda number: f'pmem{number}'),
    _BEFORE: (qemu.pmem, lambda number: f'pmem{number}'),
}


@click.command()
@click.option('--rounds', default=5, show_default=True,
              type=click.IntRange(min=1), help='Moves of each kind.')
@click.option('--limit', default=300, show_default=True, metavar='MS',
              type=click.IntRange(min=1), help='The downtime limit.')
@click.option('--case', 'wanted', multiple=True, type=click.Choice([*CASES]),
              help='Only this case; can be repeated.')
@click.option('--before', metavar='EMULATOR', default='',
              type=click.Path(exists=True, dir_okay=False),
              help="Also our device in this QEMU, to compare with.")
def downtime(rounds: int, limit: int, wanted: tuple[str, ...],
             before: str) -> None:
    """Move a guest that has stored much and synced nothing.

    Without OpenStack, from one QEMU to another on this host, with the images
    on the same storage: on virtio-blk with the host's page cache, and on our
    device, in turn. What is dirty is so in the host's page cache: the guest
    has stored it past its own.

    Rows in .lab/bench/downtime.json, medians of the rounds, each with its
    spread: case, mode; downtime_ms, from the stop of the guest at the source
    until it runs at the destination; total_s, of the whole move. In the rows
    of the others, against_blk: the ratios to virtio-blk in each round.
    """
    used = {mode: before if mode == _BEFORE else emulators.ours()
            for mode in MODES if before or mode != _BEFORE}
    built = guest.build()
    cases = {name: case for name, case in CASES.items()
             if name in (wanted or CASES)}
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name, case in cases.items():
        with _images(built, case) as images:
            for number in range(rounds):
                modes = list(used)
                for mode in modes if number % 2 else modes[::-1]:
                    with progress.step(f'{case.title}: {mode}, round '
                                       f'{number + 1} of {rounds}'):
                        samples.setdefault((name, mode), []).append(_move(
                            used[mode], built, images, mode, case, limit))
    rows = [_row(name, mode, samples) for name in cases for mode in used]
    results.save('downtime', rows)
    _show(rows)


@contextlib.contextmanager
def _images(built: guest.Guest, case: Case) -> Iterator[list[pathlib.Path]]:
    results.DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
            prefix='downtime-', dir=results.DIRECTORY) as directory:
        root = pathlib.Path(directory) / 'root'
        shutil.copyfile(built.disk, root)
        images = [root]
        for number in range(case.disks):
            image = pathlib.Path(directory) / f'disk{number}'
            with image.open('wb') as file:
                for _ in range(case.dirty_mib + 48):
                    file.write(b'\1' * (1 << 20))
            images.append(image)
        yield images


def _move(emulator: str, built: guest.Guest, images: list[pathlib.Path],
          mode: str, case: Case, limit: int) -> dict[str, float]:
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
            # As libvirt does: what limits is the storage.
            source.qmp('migrate-set-parameters', max_bandwidth=1 << 40,
                       downtime_limit=limit)
            source.agent.run('sync', check=True, timeout=_TIMEOUT)
            for number in range(1, len(images)):
                source.agent.run(
                    f'dd if=/dev/zero of=/dev/{name(number)} bs=1M '
                    f'count={case.dirty_mib} oflag=direct', check=True,
                    timeout=_TIMEOUT)
            source.qmp('migrate', uri=uri)
            info = _wait(source)
            stopped = _when(source, 'STOP')
            return {
                'downtime_ms': (_when(destination, 'RESUME') - stopped) * 1e3,
                'total_s': info['total-time'] / 1000,
            }


def _wait(source: qemu.Machine) -> dict[str, Any]:
    deadline = time.monotonic() + _TIMEOUT
    while True:
        info: dict[str, Any] = source.qmp('query-migrate')
        if info['status'] == 'completed':
            return info
        if info['status'] == 'failed' or time.monotonic() > deadline:
            raise click.ClickException(f'the migration: {info}')
        time.sleep(0.02)


def _when(machine: qemu.Machine, event: str) -> float:
    """The time of the last event of that name, which may have to come yet."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        times = [seen['timestamp'] for seen in machine.events()
                 if seen['event'] == event]
        if times:
            return float(times[-1]['seconds']
                         + times[-1]['microseconds'] / 1e6)
        time.sleep(0.02)
    raise click.ClickException(f'QEMU has not told of {event}')


def _row(name: str, mode: str, samples: dict[tuple[str, str], list[
        dict[str, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {'case': name, 'mode': mode}
    ours = samples[name, mode]
    for figure in _FIGURES:
        row |= _spread(figure, [sample[figure] for sample in ours])
    row['rounds'] = len(ours)
    if mode != 'blk':
        row['against_blk'] = {
            figure: _spread('ratio', [
                one[figure] / other[figure]
                for one, other in zip(ours, samples[name, 'blk'],
                                      strict=True)])
            for figure in _FIGURES}
    return row


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    return {name: round(statistics.median(values), 3),
            f'{name}_spread': [round(min(values), 3), round(max(values), 3)]}


def _show(rows: list[dict[str, Any]]) -> None:
    table = rich.table.Table(title='A move with unsynced data',
                             box=rich.box.SIMPLE)
    for heading in ('case', 'disks', 'down, ms', 'total, s',
                    'down against blk'):
        table.add_column(heading)
    for row in rows:
        ratio = row.get('against_blk', {}).get('downtime_ms')
        table.add_row(
            CASES[row['case']].title, row['mode'],
            _text(row, 'downtime_ms', 0), _text(row, 'total_s', 2),
            _text(ratio, 'ratio', 2) if ratio else '-')
    rich.console.Console(width=110).print(table)


def _text(row: dict[str, Any], figure: str, digits: int) -> str:
    least, most = row[f'{figure}_spread']
    return (f'{row[figure]:.{digits}f} '
            f'({least:.{digits}f}-{most:.{digits}f})')
