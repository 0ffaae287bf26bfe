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

"""How long a whole distribution takes to boot, and its RAM after that."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import pathlib
import re
import subprocess
import time

import click

from lab.benchmarks import images
from lab.benchmarks import results
from lab.machine import emulators
from lab.machine import pagecache
from lab.machine import qemu
from lab import paths
from lab import progress

_MEMORY_MIB = 1024
#: Of page descriptors for each GiB of disk.
_MEMMAP_MIB = 16
_PATIENCE = 900
_DOCS = paths.ROOT / 'doc/source/user'


@dataclasses.dataclass(frozen=True)
class Mode:
    """A kind of root disk."""

    title: str
    disk: Callable[[pathlib.Path], list[str]]
    #: Whether the image has the guest's page descriptors in front.
    memmap: bool = False


def _pmem(image: pathlib.Path) -> list[str]:
    return [*qemu.boot_view(image), *qemu.pmem(image)]


MODES = {
    'blk': Mode('virtio-blk, cache=writeback', qemu.virtio_blk),
    'pmem': Mode('virtio-pmem with its boot view', _pmem, memmap=True),
    'pmem-memmap-guest': Mode(
        "virtio-pmem with its boot view, memmap in the guest's RAM", _pmem),
}

#: Of a row, with their headings in the table.
_FIGURES = {
    'answers_s': 'QEMU to agent, s',
    'multi_user_s': 'kernel to multi-user, s',
    'used_mib': 'RAM not free, MiB',
    'cached_mib': 'of it page cache, MiB',
    'needed_mib': 'RAM not available, MiB',
    'dirtied_mib': 'dirtied on the host, MiB',
}
_HEADINGS = ('GiB', 'disk', *_FIGURES.values(), 'QEMU to agent, ratio')

_SIZES = (4, 32, 100)


@click.command()
@click.option('--rounds', default=3, show_default=True,
              type=click.IntRange(min=1), help='Boots of each kind of disk.')
@click.option('--size', 'sizes', multiple=True, metavar='GIB',
              type=click.IntRange(min=3, max=200),
              help='Only disks of this size; can be repeated.  [default: '
                   f'{", ".join(map(str, _SIZES))}]')
@click.option('--mode', 'only', multiple=True, type=click.Choice([*MODES]),
              help='Only this disk; can be repeated.')
@click.option('--docs', is_flag=True,
              help='Put the table into doc/ as well.')
def boot(rounds: int, sizes: tuple[int, ...], only: tuple[str, ...],
         docs: bool) -> None:
    """Time boots of the image of guest-image-elements.

    Boots the same image with SeaBIOS and 1 GiB of RAM from an ordinary disk
    and from fake DAX in turn; another kind is first in each round. The image
    was booted once before, so its root has grown and it has its keys; the
    host has none of it in its page cache when a guest starts. RAM, and what
    QEMU and the guest have dirtied of the image, are read when
    multi-user.target is reached. A memmap that would take over half of the
    RAM is left out.

    Rows in .lab/bench/boot.json: mode, disk_gib, and the figures of the table
    as medians of the rounds with their spread. In the rows of fake DAX,
    against_blk: the ratio of answers_s to the ordinary disk's in the same
    round.
    """
    modes = {name: mode for name, mode in MODES.items()
             if name in (only or MODES)}
    if docs and (only or sizes):
        raise click.UsageError('--docs needs all disks and the default sizes')
    rows: list[results.Row] = []
    for gib in sizes or _SIZES:
        if found := {name: mode for name, mode in modes.items()
                     if name != 'pmem-memmap-guest' or _holds(gib)}:
            rows += _rows(found, gib, rounds)
        # What is there if the next size fails.
        results.save('boot', rows)
    if not rows:
        raise click.UsageError(
            f"the guest's RAM of {_MEMORY_MIB} MiB does not hold that memmap")
    results.show('a boot of the guest image', _HEADINGS, _cells(rows),
                 width=180, groups=1)
    if docs:
        results.write_table(_DOCS / 'boot-table.inc', _HEADINGS, _cells(rows))


def _holds(disk_gib: int) -> bool:
    """Whether the guest's RAM holds the memmap, and a guest."""
    return disk_gib * _MEMMAP_MIB <= _MEMORY_MIB // 2


def _rows(modes: Mapping[str, Mode], disk_gib: int,
          rounds: int) -> list[results.Row]:
    samples: dict[str, list[results.Sample]] = {}
    with _images({mode.memmap: mode for mode in modes.values()},
                 disk_gib) as found:
        for number in range(rounds):
            for name in results.in_turn(modes, number):
                with progress.step(f'round {number + 1} of {rounds}: '
                                   f'{modes[name].title}, {disk_gib} GiB'):
                    samples.setdefault(name, []).append(
                        _boot(found[modes[name].memmap], modes[name]))
    return [_row(name, disk_gib, samples) for name in modes]


def _row(name: str, disk_gib: int,
         samples: Mapping[str, list[results.Sample]]) -> results.Row:
    row: results.Row = {
        'mode': name, 'disk_gib': disk_gib, 'rounds': len(samples[name])
    } | results.summary(samples[name], _FIGURES, 1)
    if name != 'blk' and 'blk' in samples:
        row['against_blk'] = results.spread('ratio', results.ratios(
            samples[name], samples['blk'], 'answers_s'), 2)
    return row


@contextlib.contextmanager
def _images(kinds: Mapping[bool, Mode],
            disk_gib: int) -> Iterator[dict[bool, pathlib.Path]]:
    """Images with and without a memmap, booted once."""
    with progress.step('the image'):
        emulators.project()
        built = subprocess.run(
            [paths.ROOT / 'guest-image-elements/build'], check=True,
            stdout=subprocess.PIPE, text=True).stdout.strip()
    with contextlib.ExitStack() as stack:
        found = {}
        for memmap, mode in kinds.items():
            found[memmap] = stack.enter_context(images.sparse(
                f'boot-{"memmap" if memmap else "plain"}', disk_gib << 10,
                memmap=memmap, content=pathlib.Path(built)))
            with progress.step(f'the first boot: {mode.title}'):
                _boot(found[memmap], mode)
        yield found


def _boot(image: pathlib.Path, mode: Mode) -> results.Sample:
    pagecache.evict(image)
    started = time.monotonic()
    with qemu.Machine(*mode.disk(image), memory_mib=_MEMORY_MIB,
                      emulator=emulators.project()) as machine:
        machine.agent.wait_ready(_PATIENCE)
        answers = time.monotonic() - started

        def run(command: str) -> str:
            return machine.agent.run(
                command, check=True, timeout=_PATIENCE).stdout

        # If it is starting, "start" waits for it.
        run('systemctl start multi-user.target')
        reached = int(run('systemctl show --property '
                          'ActiveEnterTimestampMonotonic --value '
                          'multi-user.target'))
        memory = {name: int(kib) / 1024 for name, kib in re.findall(
            r'(?m)^(\w+): +(\d+) kB$', run('cat /proc/meminfo'))}
        dirtied = machine.counter('io', 'write_bytes')
        machine.power_off(_PATIENCE)
    return {
        'answers_s': answers, 'multi_user_s': reached / 1e6,
        # Of the whole RAM: MemTotal does not count page descriptors.
        'used_mib': _MEMORY_MIB - memory['MemFree'],
        'cached_mib': memory['Cached'] + memory['Buffers'],
        'needed_mib': _MEMORY_MIB - memory['MemAvailable'],
        'dirtied_mib': dirtied / (1 << 20)}


def _cells(rows: list[results.Row]) -> list[list[str]]:
    return [[str(row['disk_gib']), MODES[row['mode']].title,
             *(results.cell(row, figure, 1) for figure in _FIGURES),
             results.cell(row.get('against_blk', {}), 'ratio', 2)]
            for row in rows]
