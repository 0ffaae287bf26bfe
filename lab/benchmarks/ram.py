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

"""What a disk costs of a host's memory and of a guest's."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import dataclasses
import pathlib
import shutil
import statistics
import time

import click

from lab.benchmarks import images
from lab.benchmarks import plots
from lab.benchmarks import results
from lab import errors
from lab import guest
from lab.machine import emulators
from lab.machine import pagecache
from lab.machine import qemu
from lab import paths
from lab import progress

#: GiB.
_SIZES = (1, 8, 32)
#: Of the guest's file that is read.
_READ_MIB = 512
_HOT_MIB = 200
#: Four for each block, so that 98 of 100 blocks are read.
_HOT_READS = _HOT_MIB * 256 * 4
#: A thousandth, for the guest's own programs, which share its cache.
_MISSES = _HOT_READS // 1000
#: Of the smallest RAM.
_STEP_MIB = 16
_MOST_MIB = 4096
#: Seconds in which a guest with little RAM must boot.
_PATIENCE = 120

#: The kernel ends QEMU where it panics.
_ARGUMENTS = 'panic=-1'
#: As Nova has it, unless statistics of memory are turned off.
_BALLOON = ('-device', 'virtio-balloon-pci,free-page-reporting=on')
#: Linux reports pages 2 s after they were freed (mm/page_reporting.c).
_REPORTING_SECONDS = 5
#: 32 MiB of translated code; without a size, what a guest has used of it would
#: be counted as its memory.
_ACCELERATOR = 'tcg,tb-size=32'
#: prctl(2).
_PR_SET_THP_DISABLE = 41

_DOCS = paths.ROOT / 'doc/source/admin'
_DATA = '/root/data'


@dataclasses.dataclass(frozen=True)
class Mode:
    """A kind of disk.

    :ivar memmap: whether the image has the guest's page descriptors in front
    :ivar ram_mib: about the smallest RAM that boots, by the disk's GiB; only
        how long the search for it takes depends on this
    """

    title: str
    disk: Callable[[pathlib.Path], list[str]]
    memmap: bool = False
    ram_mib: Callable[[int], int] = lambda gib: 96


MODES = {
    'blk-writeback': Mode('virtio-blk, cache=writeback', qemu.virtio_blk),
    'pmem': Mode('virtio-pmem, memmap on the device', qemu.pmem, memmap=True),
    'pmem-memmap-guest': Mode(
        "virtio-pmem, memmap in the guest's RAM", qemu.pmem,
        ram_mib=lambda gib: 96 + 16 * gib),
}

#: Of a row, with their headings in the table.
_FIGURES = {
    'unreclaimable_boot_mib': 'unreclaimable, booted',
    'unreclaimable_mib': f'unreclaimable, {_READ_MIB} MiB read',
    'mem_total_mib': 'MemTotal',
    'mem_available_mib': 'MemAvailable',
    'image_cached_mib': 'image cached, booted',
    'dirtied_mib': 'dirtied by the boot',
    'boot_s': 'boot, s',
    'smallest_boot_mib': 'smallest RAM that boots',
    'smallest_hot_mib': f'smallest RAM for {_HOT_MIB} MiB hot',
}
_HEADINGS = ('disk GiB', 'kind', *_FIGURES.values(),
             'unreclaimable against virtio-blk')


@click.command()
@click.option('--rounds', default=3, show_default=True,
              type=click.IntRange(min=1), help='Boots of each kind of disk.')
@click.option('--quick', is_flag=True,
              help='One round, disks of 1 and 32 GiB, and the smallest RAM '
                   'only for the larger one: at most 5 minutes.')
@click.option('--size', 'sizes', multiple=True, metavar='GIB',
              type=click.IntRange(min=1, max=200),
              help='Only disks of this size; can be repeated.  [default: '
                   f'{", ".join(map(str, _SIZES))}]')
@click.option('--ram', 'ram_mib', default=1024, show_default=True,
              metavar='MIB', type=click.IntRange(min=256),
              help="The guest's RAM, except in the search for the smallest.")
@click.option('--mode', 'only', multiple=True, type=click.Choice([*MODES]),
              help='Only this disk; can be repeated.')
@click.option('--search/--no-search', default=True,
              help='Whether to look for the smallest RAM.')
@click.option('--docs', is_flag=True,
              help='Put the table and the plot into doc/ as well.')
def ram(rounds: int, quick: bool, sizes: tuple[int, ...], ram_mib: int,
        only: tuple[str, ...], search: bool, docs: bool) -> None:
    """Read what memory a guest takes, by the kind and size of its disk.

    In every round the test guest boots from a disk of each kind, another one
    first in each; its image is a sparse file of which the host has nothing in
    its page cache. Then the guest reads a file of 512 MiB.

    QEMU has a balloon with free page reporting, as Nova's guests have, and no
    transparent huge pages: whether the host has any free is chance.

    \b
    unreclaimable    QEMU's anonymous memory ("Anonymous" and "Swap" of
                     /proc/PID/smaps_rollup): what the host cannot take back
                     without swap. About 80 MiB of it are QEMU itself under
                     TCG. The image is not in it, mapped or not: the host can
                     write its pages back and drop them.
    MemTotal, MemAvailable
                     the guest's, after its boot
    image cached     what the host's page cache has of the image then
    dirtied          "write_bytes" of /proc/PID/io then: what QEMU and the
                     guest have dirtied of the image. With the memmap on the
                     device the kernel writes it at each boot.
    boot             from the start of QEMU until the guest's agent answers
    smallest RAM     in steps of 16 MiB: that boots; and that in addition
                     serves a hot set. The guest reads a file of 200 MiB, then
                     204800 blocks of 4 KiB of it at random, twice; the second
                     time at most 204 may be misses. A miss is a block that the
                     guest reads from its disk, whether the host has it cached
                     or not, or a major fault of QEMU, which is a page of the
                     image that the host reads from storage.

    Rows in .lab/bench/ram.json, medians of the rounds with their spread: mode,
    disk_gib, ram_mib (--ram), unreclaimable_mib (after reading),
    unreclaimable_boot_mib, mem_total_mib, mem_available_mib,
    image_cached_mib, dirtied_mib, boot_s, smallest_boot_mib,
    smallest_hot_mib; in rows of other modes than blk-writeback,
    against_blk_writeback: the ratio of unreclaimable_mib to that of
    virtio-blk in the same round. The plot is .lab/bench/ram.png.
    """
    modes = [name for name in MODES if name in (only or MODES)]
    if docs and (only or sizes or quick or not search):
        raise click.UsageError('--docs needs all disks and all figures')
    if quick:
        rounds = 1
        sizes = sizes or (_SIZES[0], _SIZES[-1])
    sizes = sizes or _SIZES
    searched = {max(sizes)} if quick else set(sizes)
    _avoid_huge_pages()
    with progress.step('QEMU and guest'):
        emulators.project()
        guest.build()
    rows = []
    for gib in sizes:
        samples: dict[str, list[results.Sample]] = {}
        with _images(modes, gib) as found:
            for number in range(rounds):
                for name in results.in_turn(modes, number):
                    earlier = samples.setdefault(name, [])
                    with progress.step(f'{gib} GiB, {name}, round '
                                       f'{number + 1} of {rounds}'):
                        sample = _measure(MODES[name], found[name], ram_mib)
                        if search and gib in searched:
                            sample |= _search(
                                MODES[name], found[name], gib,
                                earlier[-1] if earlier else None)
                    earlier.append(sample)
        rows += [_row(name, gib, ram_mib, samples) for name in modes]
        # What is there if the next size fails.
        results.save('ram', rows)
    plot = results.DIRECTORY / 'ram.png'
    _plot(rows, plot)
    results.show(f'memory with {ram_mib} MiB of RAM, MiB', _HEADINGS,
                 _cells(rows), width=200, whole=2, groups=1)
    progress.say(f'the plot is {plot}')
    if docs:
        shutil.copy(plot, _DOCS / 'ram.png')
        results.write_table(_DOCS / 'ram-table.inc', _HEADINGS, _cells(rows))


def _avoid_huge_pages() -> None:
    """For this process and those that it starts."""
    if ctypes.CDLL(None, use_errno=True).prctl(
            _PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), 'prctl')


@contextlib.contextmanager
def _images(modes: Sequence[str],
            gib: int) -> Iterator[dict[str, pathlib.Path]]:
    """An image for each mode, on the file system of .lab/.

    Modes whose images are laid out alike share one.
    """
    with contextlib.ExitStack() as stack:
        made: dict[bool, pathlib.Path] = {}
        for name in modes:
            mode = MODES[name]
            if mode.memmap in made:
                continue
            image = stack.enter_context(images.sparse(
                f'ram-{name}', gib << 10, memmap=mode.memmap))
            with (progress.step(f'an image of {gib} GiB for {name}'),
                  _boot(mode, image, 1024) as machine):
                machine.agent.run(
                    f'dd if=/dev/zero of={_DATA} bs=1M count={_READ_MIB} && '
                    'sync', check=True, timeout=600)
            made[mode.memmap] = image
        yield {name: made[MODES[name].memmap] for name in modes}


@contextlib.contextmanager
def _boot(mode: Mode, image: pathlib.Path, ram_mib: int,
          patience: float = 600) -> Iterator[qemu.Machine]:
    """A guest that has booted.

    :param patience: seconds
    :raises errors.LabError: it does not boot
    """
    built = guest.build()
    with qemu.Machine(
            *qemu.direct_kernel(built.kernel, built.initrd,
                                f'{guest.COMMAND_LINE} {_ARGUMENTS}'),
            '-no-reboot', *mode.disk(image), *_BALLOON, memory_mib=ram_mib,
            emulator=emulators.project(),
            accelerator=_ACCELERATOR) as machine:
        machine.wait_console('^GUEST-(READY|FAILED)', patience)
        machine.agent.wait_ready(patience)
        yield machine


def _measure(mode: Mode, image: pathlib.Path, ram_mib: int) -> results.Sample:
    pagecache.evict(image)
    started = time.monotonic()
    with _boot(mode, image, ram_mib) as machine:
        sample: results.Sample = {
            'boot_s': time.monotonic() - started,
            'dirtied_mib': machine.counter('io', 'write_bytes') / (1 << 20),
            'unreclaimable_boot_mib': _unreclaimable_mib(machine),
            'image_cached_mib': pagecache.cached_bytes(image) / (1 << 20)}
        for figure, name in (('mem_total_mib', 'MemTotal'),
                             ('mem_available_mib', 'MemAvailable')):
            line = machine.agent.run(
                f'grep ^{name}: /proc/meminfo', check=True).stdout
            sample[figure] = int(line.split()[1]) / 1024
        machine.agent.run(f'dd if={_DATA} of=/dev/null bs=1M', check=True,
                          timeout=600)
        sample['unreclaimable_mib'] = _unreclaimable_mib(machine)
    return sample


def _unreclaimable_mib(machine: qemu.Machine) -> float:
    time.sleep(_REPORTING_SECONDS)
    return sum(machine.counter('smaps_rollup', name)
               for name in ('Anonymous', 'Swap')) / 1024


def _search(mode: Mode, image: pathlib.Path, gib: int,
            earlier: results.Sample | None) -> results.Sample:
    """The smallest RAM, begun where an earlier round has found it."""
    if earlier:
        boot = smallest(lambda mib: _boots(mode, image, mib),
                        int(earlier['smallest_boot_mib']))
        guess = int(earlier['smallest_hot_mib'])
    else:
        boot = smallest(lambda mib: _boots(mode, image, mib),
                        mode.ram_mib(gib))
        guess = boot + (_HOT_MIB if mode.disk is qemu.virtio_blk else 0)
    return {'smallest_boot_mib': boot,
            'smallest_hot_mib': smallest(
                lambda mib: _serves(mode, image, mib), guess, boot)}


def smallest(holds: Callable[[int], bool], guess: int,
             least: int = _STEP_MIB) -> int:
    """The smallest multiple of 16 MiB for which something holds.

    It must hold for all larger ones too.

    :param guess: where to begin; with a good guess two trials are enough
    :param least: known to be small enough
    :raises LabError: it does not hold for 4 GiB
    """
    fails, found, stride = least - _STEP_MIB, 0, _STEP_MIB
    size = max(guess // _STEP_MIB * _STEP_MIB, least)
    while not found or found - fails > _STEP_MIB:
        if holds(size):
            found = size
        elif size >= _MOST_MIB:
            raise errors.LabError(f'{size} MiB of RAM are not enough')
        else:
            fails = size
        if not found:
            size, stride = min(size + stride, _MOST_MIB), stride * 2
        elif fails < least:
            size, stride = max(found - stride, least), stride * 2
        else:
            size = (found + fails) // (2 * _STEP_MIB) * _STEP_MIB
    return found


def _boots(mode: Mode, image: pathlib.Path, ram_mib: int) -> bool:
    with (contextlib.suppress(errors.LabError),
          _boot(mode, image, ram_mib, _PATIENCE)):
        return True
    return False


def _serves(mode: Mode, image: pathlib.Path, ram_mib: int) -> bool:
    with (contextlib.suppress(errors.LabError),
          _boot(mode, image, ram_mib, _PATIENCE) as machine):
        reads = f'probe reads {_DATA} {_HOT_MIB} {_HOT_READS}'
        machine.agent.run(
            f'dd if={_DATA} of=/dev/null bs=1M count={_HOT_MIB} && {reads}',
            check=True, timeout=600)
        before = _misses(machine)
        machine.agent.run(reads, check=True, timeout=600)
        return _misses(machine) - before <= _MISSES
    return False


def _misses(machine: qemu.Machine) -> int:
    """Blocks that the guest, and pages that the host has read so far."""
    # Field 3 of a disk's stat: sectors read (Documentation/block/stat.rst).
    sectors = machine.agent.run(
        "cat /sys/block/vd*/stat /sys/block/pmem*/stat 2>/dev/null | "
        "awk '{ sum += $3 } END { print sum }'", check=True).stdout
    # Field 12: majflt (proc_pid_stat(5)); field 2 may have blanks.
    fields = pathlib.Path(f'/proc/{machine.pid}/stat').read_text()
    return int(sectors) // 8 + int(fields.rpartition(')')[2].split()[9])


def _row(name: str, gib: int, ram_mib: int,
         samples: dict[str, list[results.Sample]]) -> results.Row:
    row = {'mode': name, 'disk_gib': gib, 'ram_mib': ram_mib,
           **results.summary(samples[name], _FIGURES, 1),
           'rounds': len(samples[name])}
    rival = samples.get('blk-writeback')
    if rival and name != 'blk-writeback':
        ratios = results.ratios(samples[name], rival, 'unreclaimable_mib')
        row['against_blk_writeback'] = {
            'median': round(statistics.median(ratios), 3),
            'least': round(min(ratios), 3), 'most': round(max(ratios), 3)}
    return row


def _cells(rows: list[results.Row]) -> Iterator[list[str]]:
    for row in rows:
        ratio = row.get('against_blk_writeback')
        yield [str(row['disk_gib']), row['mode'],
               *(results.cell(row, figure, int(figure == 'boot_s'))
                 for figure in _FIGURES),
               f'{ratio["median"]:.2f} '
               f'({ratio["least"]:.2f}-{ratio["most"]:.2f})'
               if ratio else '-']


def _plot(rows: list[results.Row], file: pathlib.Path) -> None:
    """By the size of the disk, a bar for each kind."""
    shown = ('unreclaimable_mib', 'mem_available_mib', 'smallest_boot_mib',
             'smallest_hot_mib')
    with plots.panels(file, len(shown), width=3.2 * len(shown),
                      height=3.6) as panels:
        for panel, figure in zip(panels, shown, strict=True):
            for number, mode in enumerate(MODES):
                mine = [row for row in rows
                        if row['mode'] == mode and figure in row]
                values, spread = plots.bars(mine, figure)
                panel.errorbar([str(row['disk_gib']) for row in mine], values,
                               yerr=spread, fmt='o-', color=f'C{number}',
                               capsize=3, label=mode)
            panel.set_title(_FIGURES[figure], fontsize=9)
            panel.set_xlabel('disk, GiB')
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel('MiB')
        panels[0].legend(fontsize=8)
