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

"""How long a whole distribution takes to boot, and the RAM it then uses."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
import statistics
import subprocess
import tempfile
import time
from typing import Any

import click
import rich.box
import rich.console
import rich.table

from lab.benchmarks import results
from lab import paths
from lab import progress
from lab import qemu

_DISK_MIB = 4096
_MEMORY_MIB = 1024
_PATIENCE = 900
_DOCS = paths.ROOT / 'doc/source/user'


@dataclasses.dataclass(frozen=True)
class Mode:
    """A kind of root disk."""

    title: str
    disk: Callable[[pathlib.Path], list[str]]


MODES = {
    'blk': Mode('virtio-blk, cache=writeback', qemu.virtio_blk),
    'pmem': Mode('virtio-pmem with its boot view', lambda image: [
        *qemu.boot_view(image), *qemu.pmem(image)]),
}

#: Of a row, with their headings in the table.
_FIGURES = {
    'answers_s': 'QEMU to agent, s',
    'multi_user_s': 'kernel to multi-user, s',
    'used_mib': 'RAM not free, MiB',
    'cached_mib': 'of it page cache, MiB',
    'descriptors_mib': 'of it page descriptors, MiB',
    'needed_mib': 'RAM not available, MiB',
}
_HEADINGS = ('disk', *_FIGURES.values())


@click.command()
@click.option('--rounds', default=3, show_default=True,
              type=click.IntRange(min=1), help='Boots of each kind of disk.')
@click.option('--docs', is_flag=True,
              help='Put the table into doc/ as well.')
def boot(rounds: int, docs: bool) -> None:
    """Time boots of the image of guest-image-elements.

    The same image, by SeaBIOS, with 1 GiB of RAM, from an ordinary disk and
    from fake DAX in turn, in an order that changes; a copy that was booted
    once before, so that it has grown and has its keys. RAM is read once
    multi-user.target is reached.

    Rows in .lab/bench/boot.json, medians of the rounds with their spread:
    mode and the figures of the table.
    """
    with tempfile.TemporaryDirectory(prefix='boot-') as directory:
        with progress.step('the image'):
            image = _image(pathlib.Path(directory))
            _boot(image, MODES['blk'])
        samples: dict[str, list[dict[str, float]]] = {}
        for number in range(rounds):
            order = list(MODES)[::-1 if number % 2 else 1]
            for name in order:
                with progress.step(f'round {number + 1} of {rounds}: '
                                   f'{MODES[name].title}'):
                    samples.setdefault(name, []).append(
                        _boot(image, MODES[name]))
    rows = [_row(name, samples[name]) for name in MODES]
    results.save('boot', rows)
    _show(rows)
    if docs:
        results.write_table(_DOCS / 'boot-table.inc', _HEADINGS, _cells(rows))


def _image(directory: pathlib.Path) -> pathlib.Path:
    built = subprocess.run(
        [paths.ROOT / 'guest-image-elements/build'], check=True,
        stdout=subprocess.PIPE, text=True).stdout.strip()
    image = directory / 'disk'
    subprocess.run(['cp', '--sparse=always', built, image], check=True)
    os.truncate(image, _DISK_MIB << 20)
    return image


def _boot(image: pathlib.Path, mode: Mode) -> dict[str, float]:
    started = time.monotonic()
    with qemu.Machine(*mode.disk(image), memory_mib=_MEMORY_MIB) as machine:
        machine.agent.wait_ready(_PATIENCE)
        answers = time.monotonic() - started

        def run(command: str) -> str:
            return machine.agent.run(
                command, check=True, timeout=_PATIENCE).stdout

        # "start" waits for a unit that is starting.
        run('systemctl start multi-user.target')
        reached = int(run('systemctl show --property '
                          'ActiveEnterTimestampMonotonic --value '
                          'multi-user.target'))
        memory = {name: int(kib) / 1024 for name, kib in re.findall(
            r'(?m)^(\w+): +(\d+) kB$', run('cat /proc/meminfo'))}
        pmem = sum(int(sectors) for sectors in run(
            'cat /sys/block/pmem*/size 2>/dev/null || true').split())
        machine.qmp('system_powerdown')
        machine.wait_exit(_PATIENCE)
    return {
        'answers_s': answers, 'multi_user_s': reached / 1e6,
        # What the machine was given: MemTotal is less descriptors already.
        'used_mib': _MEMORY_MIB - memory['MemFree'],
        'cached_mib': memory['Cached'] + memory['Buffers'],
        'descriptors_mib': pmem * 512 / 64 / (1 << 20),
        'needed_mib': _MEMORY_MIB - memory['MemAvailable']}


def _row(mode: str, samples: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {'mode': mode, 'rounds': len(samples)}
    for figure in _FIGURES:
        values = [sample[figure] for sample in samples]
        row[figure] = round(statistics.median(values), 1)
        row[f'{figure}_spread'] = [round(min(values), 1),
                                   round(max(values), 1)]
    return row


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[MODES[row['mode']].title, *(
        f'{row[figure]:.1f} ({row[f"{figure}_spread"][0]:.1f}-'
        f'{row[f"{figure}_spread"][1]:.1f})' for figure in _FIGURES)]
        for row in rows]


def _show(rows: list[dict[str, Any]]) -> None:
    table = rich.table.Table(title='a boot of the guest image',
                             box=rich.box.SIMPLE)
    for heading in _HEADINGS:
        table.add_column(heading)
    for cells in _cells(rows):
        table.add_row(*cells)
    rich.console.Console(width=160).print(table)
