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

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
import time

import click

from lab.benchmarks import results
from lab.machine import qemu
from lab import paths
from lab import progress

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

    Boots the same image with SeaBIOS and 1 GiB of RAM from an ordinary disk
    and from fake DAX in turn; another kind is first in each round. The image
    was booted once before, so its root has grown and it has its keys. RAM is
    read when multi-user.target is reached.

    Rows in .lab/bench/boot.json: mode, and the figures of the table as
    medians of the rounds with their spread.
    """
    with tempfile.TemporaryDirectory(prefix='boot-') as directory:
        with progress.step('the image'):
            image = _image(pathlib.Path(directory))
            _boot(image, MODES['blk'])
        samples: dict[str, list[results.Sample]] = {}
        for number in range(rounds):
            for name in results.in_turn(MODES, number):
                with progress.step(f'round {number + 1} of {rounds}: '
                                   f'{MODES[name].title}'):
                    samples.setdefault(name, []).append(
                        _boot(image, MODES[name]))
    rows = [{'mode': name, 'rounds': rounds}
            | results.summary(samples[name], _FIGURES, 1) for name in MODES]
    results.save('boot', rows)
    results.show('a boot of the guest image', _HEADINGS, _cells(rows),
                 width=160)
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


def _boot(image: pathlib.Path, mode: Mode) -> results.Sample:
    started = time.monotonic()
    with qemu.Machine(*mode.disk(image), memory_mib=_MEMORY_MIB) as machine:
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
        pmem = sum(int(sectors) for sectors in run(
            'cat /sys/block/pmem*/size 2>/dev/null || true').split())
        machine.qmp('system_powerdown')
        machine.wait_exit(_PATIENCE)
    return {
        'answers_s': answers, 'multi_user_s': reached / 1e6,
        # Of the whole RAM: MemTotal does not count the descriptors.
        'used_mib': _MEMORY_MIB - memory['MemFree'],
        'cached_mib': memory['Cached'] + memory['Buffers'],
        'descriptors_mib': pmem * 512 / 64 / (1 << 20),
        'needed_mib': _MEMORY_MIB - memory['MemAvailable']}


def _cells(rows: list[results.Row]) -> list[list[str]]:
    return [[MODES[row['mode']].title,
             *(results.cell(row, figure, 1) for figure in _FIGURES)]
            for row in rows]
