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

"""The command, and which parts run in which order."""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import itertools
import os
import pathlib
import subprocess

import click

from lab.benchmarks.density import after_work
from lab.benchmarks.density import costs
from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import frozen
from lab.benchmarks.density import host
from lab.benchmarks.density import how_many
from lab.benchmarks.density import modes
from lab.benchmarks.density import one_guest
from lab.benchmarks.density import openstack
from lab.benchmarks.density import report
from lab.benchmarks import results
from lab import errors
from lab import guest
from lab import progress

PARTS = ('one-guest', 'how-many', 'frozen', 'after-work', 'costs')
#: Whose guests do real work; that takes minutes.
_AFTER_WORK = ('blk-none-fpr', 'blk-none-zram', 'blk-none-swap', 'pmem-fpr',
               'pmem-zram')
_BUDGET_MIB = 2048
_MOST = 48


class _Run:
    """What was chosen, and the rows so far."""

    def __init__(self, names: Sequence[str], rounds: int, fleet_rounds: int,
                 budget_mib: int, most: int, quick: bool) -> None:
        self._names = names
        self._rounds = rounds
        self._fleet_rounds = fleet_rounds
        self._budget_mib = budget_mib
        self._most = most
        self._quick = quick
        # A smoke test keeps the rows of a full run.
        self.name = 'density-quick' if quick else 'density'
        self.about = host.description() | {
            'emulator': _emulator(), 'kvm': fleet.Accelerator.kvm,
            'modes': [*names], 'budget_mib': budget_mib, 'most': most,
            'of_rounds': rounds}
        self.rows: list[results.Row] = []

    def resume(self) -> None:
        """Keep what an earlier run of the same kind has measured.

        :raises click.UsageError: it was of another kind
        """
        for row in results.load(self.name):
            for key, value in self.about.items():
                if row.get(key) != value:
                    raise click.UsageError(
                        f'--resume: {key} was {row.get(key)} in '
                        f'{self.name}.json and is {value}')
            self.rows.append(row)

    def part(self, name: str) -> None:
        if name == 'how-many':
            self._how_many()
        elif not self._has(name):
            with contextlib.ExitStack() as stack:
                self._add(getattr(self, '_' + name.replace('-', '_'))(stack))

    def _has(self, part: str, variant: str | None = None) -> bool:
        return any((row['part'], row.get('variant')) == (part, variant)
                   for row in self.rows)

    def _add(self, rows: Iterable[results.Row]) -> None:
        self.rows += [self.about | row for row in rows]
        # What is there if the next one fails.
        results.save(self.name, self.rows)

    def _in_turn(self, part: str, names: Sequence[str],
                 measure: Callable[[str], results.Sample],
                 figures: Sequence[str], digits: int) -> list[results.Row]:
        """Measure in rounds; rows with the spread of all rounds."""
        samples: dict[str, list[results.Sample]] = {}
        for number in range(self._rounds):
            for name in results.in_turn(names, number):
                with progress.step(f'{part}, {name}, round {number + 1} of '
                                   f'{self._rounds}'):
                    samples.setdefault(name, []).append(measure(name))
        return [{'part': part, 'mode': name, 'rounds': self._rounds,
                 **results.summary(samples[name], figures, digits)}
                for name in names]

    def _one_guest(self, stack: contextlib.ExitStack) -> list[results.Row]:
        sets: tuple[int, ...] = one_guest.WORKING_SETS
        if self._quick:
            sets = sets[:2]
        made = disks.Disks(sets[-1], stack)
        samples: dict[str, dict[int, results.Sample]] = {}
        # The rounds of these figures of memory hardly differ: one is enough.
        for group in one_guest.side_by_side(self._names):
            with progress.step(f'one-guest, {" and ".join(group)}'):
                samples |= one_guest.samples(group, made, sets)
        return [{'part': 'one-guest', 'mode': name, 'working_set_mib': mib,
                 'ram_mib': one_guest.RAM_MIB, 'rounds': 1,
                 **results.summary([samples[name][mib]],
                                   one_guest.FIGURES, 1)}
                for name in self._names for mib in sets]

    def _how_many(self) -> None:
        variants = [name for name in (
            ('cut',) if self._quick else how_many.VARIANTS)
            if not self._has('how-many', name)]
        if not variants:
            return
        # Variants with as much data are next to each other, and share images.
        for data_mib, same in itertools.groupby(
                variants, lambda name: how_many.VARIANTS[name].hot_mib + 56):
            with contextlib.ExitStack() as stack:
                made = disks.Disks(data_mib, stack)
                with progress.step('how fast the storage is'):
                    storage = host.storage(made.image(modes.MODES['pmem']))
                for variant in same:
                    self._add(self._fleets(variant, made, storage))

    def _fleets(self, variant: str, made: disks.Disks,
                storage: results.Row) -> list[results.Row]:
        chosen = how_many.VARIANTS[variant]
        names = [name for name in self._names if name in chosen.modes]
        rounds = self._fleet_rounds
        runs: dict[str, list[list[how_many.Point]]] = {}
        for number in range(rounds):
            for name in results.in_turn(names, number):
                with progress.step(f'how-many, {variant}, {name}, round '
                                   f'{number + 1} of {rounds}'):
                    runs.setdefault(name, []).append(how_many.search(
                        name, variant, made, self._budget_mib, self._most,
                        self.about | storage))
                progress.say('    ' + how_many.sentence(runs[name][-1]))
        return [how_many.row(name, variant, self._budget_mib, self._most,
                             runs[name]) | storage for name in names]

    def _frozen(self, stack: contextlib.ExitStack) -> list[results.Row]:
        made = disks.Disks(frozen.CLEAN_MIB, stack)
        return self._in_turn(
            'frozen', [name for name in self._names if name in modes.FROZEN],
            lambda name: frozen.sample(name, made.image(modes.MODES[name])),
            [*frozen.FIGURES], 3)

    def _after_work(self, _stack: contextlib.ExitStack) -> list[results.Row]:
        names = [name for name in self._names if name in _AFTER_WORK]
        with progress.step(f'after-work, {", ".join(names)}'):
            samples = after_work.samples(names)
        return [{'part': 'after-work', 'mode': name, 'rounds': 1,
                 **results.summary([samples[name]], after_work.FIGURES, 1)}
                for name in names]

    def _costs(self, stack: contextlib.ExitStack) -> list[results.Row]:
        made = disks.Disks(512, stack)
        names = ('blk-writeback', 'pmem') if self._quick else modes.COSTS
        rows = self._in_turn(
            'costs', [*names],
            lambda name: costs.sample(name, made.image(modes.COSTS[name])),
            [*costs.FIGURES], 2)
        base = made.image(modes.MODES['blk-writeback'])
        return rows + self._in_turn(
            'costs', ['raw', 'qcow2'],
            lambda kind: costs.creation(kind, base), [*costs.CREATION], 2)


@click.command()
@click.option('--rounds', default=2, show_default=True,
              type=click.IntRange(min=1),
              help='Of frozen and costs.')
@click.option('--fleet-rounds', default=1, show_default=True,
              type=click.IntRange(min=1),
              help='Of how-many; one takes one to one and a half hours.')
@click.option('--quick', is_flag=True,
              help='One round of three modes, with a budget of 1 GiB and '
                   'guests of the variant "cut", and without after-work: to '
                   'see that it works.')
@click.option('--part', 'parts', multiple=True, type=click.Choice(PARTS),
              help='Only this one; can be repeated.')
@click.option('--mode', 'only', multiple=True,
              type=click.Choice([*modes.MODES]),
              help='Only this one, but for the costs; can be repeated.')
@click.option('--budget', 'budget_mib', default=_BUDGET_MIB,
              show_default=True, metavar='MIB',
              type=click.IntRange(min=512),
              help='The memory of the host in how-many.')
@click.option('--most', default=_MOST, show_default=True,
              type=click.IntRange(min=2), help='Guests in how-many.')
@click.option('--openstack', 'by_openstack', is_flag=True,
              help="Only this: a row of each part of servers that are created "
                   "in the lab's cloud, to check the others. In "
                   "density-openstack.json.")
@click.option('--kvm', is_flag=True,
              help='Run the vCPUs by KVM, not TCG.')
@click.option('--resume', is_flag=True,
              help='Keep the parts, and the variants of how-many, that '
                   'density.json has. The other options, the emulator and '
                   'the kernel must be the same.')
@click.option('--docs', is_flag=True,
              help='Put the tables and plots into doc/ as well.')
def density(rounds: int, fleet_rounds: int, quick: bool,
            parts: tuple[str, ...], only: tuple[str, ...], budget_mib: int,
            most: int, by_openstack: bool, kvm: bool, resume: bool,
            docs: bool) -> None:
    """Show how many guests fit into a host, by the kind of their disk.

    All guests of a measurement are in one memory cgroup, which is the host.
    Nobody else's memory counts. Modes: virtio-blk with the host's cache
    (writeback) and without it (none); both with free page reporting, as Nova
    has it; the latter with KSM, with zram and with a swap file; QEMU's own
    virtio-pmem; this project's, also with free page reporting and with zram.
    Needs about 30 GB of disk. KSM and swap are turned on for the whole machine
    while their modes run, and off again.

    \b
    one-guest   512 MiB of RAM; the guest reads 64 MiB to 1 GiB of a file, in
                sequence and then at random. What is left: the memory of the
                cgroup after it was asked to give back all.
    how-many    guests are added until one is killed, one does not boot or
                read its hot set in 45 s, one reads less than half as often as
                a lone one, or some process waits for memory for more than
                20 % of the time (PSI). The others rest while one boots and
                reads. Each reads 4 KiB at random in 200 MiB, 100 times a
                second. "guests_95" is the most at which no more
                than 5 % of the reads are lost.
                cut    the RAM that the mode needs for the hot set
                mixed  512 MiB; all have read their set, three work at a time
                same   512 MiB of RAM each
                least  112 MiB or less: guests cache next to nothing
                large  as cut, but a hot set of 500 MiB, read 25 times a second
    frozen      the vCPUs are stopped, 500 MiB of clean cache: what the host
                takes back, in what time, and what it writes to do so. And
                150 MiB from a guest that works: by the balloon where only the
                guest can give it.
    after-work  a guest of Debian checks its packages and makes its initramfs,
                as in an upgrade, and is idle for two minutes
    costs       speeds, hot and cold; the time and space of a new disk

    Rows in .lab/bench/density.json (--quick: density-quick.json): part,
    variant, mode, parameters, medians of the rounds with their spread; kernel
    and readahead of the host. Those of how-many are what "nova-fakedax plan
    --check" reads. Plots are next to it.
    A part is written when it is done, and a run that was cut off goes on with
    --resume.
    """
    if by_openstack:
        if quick or parts or only or kvm or resume:
            raise click.UsageError('--openstack takes no option but --budget '
                                   'and --docs')
        _openstack(budget_mib, docs)
        return
    names = [name for name in (modes.QUICK if quick else modes.MODES)
             if name in (only or modes.MODES)]
    if not names:
        raise click.UsageError(
            f'--quick has only these modes: {", ".join(modes.QUICK)}')
    if docs and (only or quick or parts):
        raise click.UsageError('--docs needs all parts and modes')
    if quick:
        rounds = fleet_rounds = 1
        budget_mib, most = min(budget_mib, 1024), min(most, 6)
    parts = parts or tuple(part for part in PARTS
                           if not quick or part != 'after-work')
    if kvm and not os.access('/dev/kvm', os.R_OK | os.W_OK):
        raise errors.LabError('--kvm: /dev/kvm is not usable here')
    fleet.Accelerator.kvm = kvm
    fleet.avoid_huge_pages()
    with progress.step('QEMU and guest'):
        guest.build()
        for name in names:
            modes.MODES[name].emulator()
    run = _Run(names, rounds, fleet_rounds, budget_mib, most, quick)
    if resume:
        run.resume()
    for part in PARTS:
        if part in parts:
            run.part(part)
            report.show(run.rows, part)
    for plot in report.plot(run.rows, run.name):
        progress.say(f'plot: {plot}')
    if docs:
        report.write_docs(run.rows, _versions())


def _openstack(budget_mib: int, docs: bool) -> None:
    rows = openstack.rows(budget_mib)
    results.save('density-openstack', rows)
    report.show_openstack(rows)
    if docs:
        report.write_openstack(rows)


def _emulator() -> str:
    """The key of the emulator's build: its version and what it is made of."""
    path = pathlib.Path(modes.MODES['pmem'].emulator())
    return next(part for part in reversed(path.parts) if part[0].isdigit())


def _versions() -> str:
    """What the figures were measured on."""
    done = subprocess.run([modes.MODES['pmem'].emulator(), '--version'],
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise errors.LabError('the emulator does not say its version')
    found = host.description()
    accelerator = 'KVM' if fleet.Accelerator.kvm else 'TCG'
    return (f'{done.stdout.splitlines()[0]}, {accelerator}; Linux '
            f'{found["kernel"]}, {found["cpus"]} processors, readahead of the '
            f'images {found["read_ahead_kib"]} KiB')
