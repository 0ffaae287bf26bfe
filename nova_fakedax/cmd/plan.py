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

"""How many guests fit on hosts, with ordinary disks and on fake DAX."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
import typing as ty

import yaml

from nova_fakedax.cmd import common
from nova_fakedax.planner import cloud
from nova_fakedax.planner import density
from nova_fakedax.planner import fleet
from nova_fakedax.planner import guest
from nova_fakedax.planner import host
from nova_fakedax.planner import lru
from nova_fakedax.planner import question

COLUMNS = ('Disks', 'Flavor', 'Guests', 'A host', 'Ratio', 'Misses %',
           'Lost %', 'RAM ratio', 'Limit')
CHECK_COLUMNS = ('Variant', 'Mode', 'RAM MiB', 'Figure', 'Planned',
                 'Measured', 'Difference %', 'Close')


@dataclasses.dataclass(frozen=True)
class _Option:
    """A number, as an option and as a key of the file.

    :ivar whole: whether it is a count
    """

    field: question.Field
    metavar: str
    help: str
    whole: bool = False

    def parse(self, name: str, text: str) -> float:
        """:raises ValueError: names the value and what is allowed"""
        value = self.field.parse(name, text)
        if self.whole and value != int(value):
            raise ValueError(f"{name}: '{text}'; allowed: a whole number")
        return value


_OPTIONS: Mapping[str, _Option] = {
    'hosts': _Option(
        question.Field(1, 1e5, default=1), 'N',
        'How many hosts there are.', whole=True),
    'host-memory': _Option(
        question.Field(0.1), 'GIB', 'Memory of each host.'),
    'reserved': _Option(
        question.Field(0, default=0.5), 'GIB',
        'Of that, what guests must leave: for the host, and for its other '
        "programs. The default is that of Nova's reserved_host_memory_mb."),
    'cpus': _Option(
        question.Field(0.01, default=math.inf), 'N',
        'CPUs of each host for guests, as their "cpus" count them.'),
    'miss-cpu-ms': _Option(
        question.Field(0, default=0), 'MS',
        'What each page that is read from the storage or from swap takes of a '
        'CPU, making room for it included.'),
    'miss-ms': _Option(
        question.Field(1e-3, default=0.2), 'MS',
        'What one miss takes when a host reads it from its storage, '
        'read-ahead included.'),
    'storage-reads': _Option(
        question.Field(1, default=20000), 'N',
        "Reads a second that each host's storage does at most."),
    'storage-mib': _Option(
        question.Field(1, default=500), 'MIB',
        "MiB a second that each host's storage reads at most."),
    'read-ahead': _Option(
        question.Field(lru.PAGE_KIB, default=lru.PAGE_KIB), 'KIB',
        'What a host reads for a miss of a guest on fake DAX. A page, as this '
        "project's device turns readahead off where memory is short "
        '(read-ahead=auto); with another device, and before Linux 6.5, '
        'read_ahead_kb of the block device, often 128.'),
    'lost': _Option(
        question.Field(0, 99, default=5), 'PERCENT',
        'Of the reads that a guest wants, how many it may lose by waiting.'),
    'misses': _Option(
        question.Field(0, 100, default=5), 'PERCENT',
        'Of the reads of a guest, how many may come from the storage because '
        "the host's memory is full."),
    'swap': _Option(
        question.Field(0, default=0), 'GIB',
        'Swap of each host: more rows, for guests on a host with it.'),
    'swap-left': _Option(
        question.Field(0, 0.99, default=0), 'SHARE',
        'What stays in memory of what is in swap: 0 for a disk, 0.33 for '
        'zram that compresses 3 to 1.'),
    'swap-ms': _Option(
        question.Field(0, default=math.inf), 'MS',
        'What a read from swap takes, if that is not on the storage.'),
}


class Plan(common.HostLister):
    """Say how many guests fit on hosts, and how well they work there.

    With ordinary disks, and on fake DAX. It is a model: what it assumes is
    printed to the standard error. "Misses" are reads of guests that a host
    reads from its storage, "Lost" is what the guest that is worst off loses
    of its reads, and "Limit" why one more guest does not fit. Nova places so
    many only if ram_allocation_ratio is at least "RAM ratio".

    It asks nothing of this host.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        for name, option in _OPTIONS.items():
            default = option.field.default
            known = default is not None and math.isfinite(default)
            parser.add_argument(
                f'--{name}', metavar=option.metavar, type=_number(name),
                help=option.help + (f' [default: {default:g}]' if known
                                    else ''))
        parser.add_argument(
            '--guest', action='append', dest='guests', default=[],
            type=_description, metavar='FIELD=VALUE,...',
            help='Guests of a flavor; can be repeated. name; ram, MiB; '
                 'programs, MiB that kernel and programs allocate; hot, file '
                 'data that is read again and again: SIZE@READS, MiB and '
                 'reads of 4 KiB a second, +SIZE@READS for more; count, how '
                 'many for so many of the others [1]; touched, MiB of file '
                 'data read or written since the start [more than the RAM '
                 'takes]; busy, the share of the time [1], spell, seconds at '
                 'a time [60]; work, the share of that time in which it has '
                 'something to do besides waiting for its disk [1]; cpus [0]; '
                 'qemu, MiB [50]; idle, MiB of QEMU and programs that nobody '
                 'uses, for swap [0]. Sizes can be shares of ram, as 25%%.')
        parser.add_argument(
            '--file', metavar='FILE',
            help='Options, as YAML: their names as keys, and "guests", a list '
                 'of fields. What is on the command line counts more.')
        parser.add_argument(
            '--cloud', metavar='NAME', nargs='?', const='', default=None,
            help='Take hosts, flavors and how many servers each has from the '
                 'API of this cloud of clouds.yaml, or of OS_CLOUD and other '
                 'OS_ variables. --guest says by name what guests of a '
                 'flavor use; name=* is for all others.')
        parser.add_argument(
            '--check', metavar='FILE',
            help='Instead: plan the rows of a density.json of "lab/bench '
                 'density", and compare. The exit status is 1 if one is off '
                 f'by more than {density.TOLERANCE:.0%}.'.replace('%', '%%'))
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace,
    ) -> tuple[tuple[str, ...], list[tuple[ty.Any, ...]]]:
        try:
            if parsed_args.check is not None:
                return CHECK_COLUMNS, self._check(parsed_args.check)
            return COLUMNS, self._plan(parsed_args)
        except (ValueError, cloud.CloudError) as exc:
            raise RuntimeError(str(exc)) from exc

    def _plan(
        self, parsed_args: argparse.Namespace,
    ) -> list[tuple[ty.Any, ...]]:
        values, descriptions = _given(parsed_args)
        memory, flavors = _hosts_and_guests(
            parsed_args.cloud, values, descriptions)
        guests = question.guests(flavors)
        options: dict[str, ty.Any] = {
            name: values.get(name, option.field.default)
            for name, option in _OPTIONS.items()}
        hosts = [host.Host(mib - options['reserved'] * 1024, host.Storage(
            options['miss-ms'] / 1000, options['storage-reads'],
            options['storage-mib']), options['cpus'],
            options['miss-cpu-ms'] / 1000) for mib in memory]
        rows: list[tuple[ty.Any, ...]] = []
        ordinary: list[int] = []
        for title, disk, swap in _kinds(options):
            mix = [fleet.Share(guest.load(
                of, disk, options['read-ahead'], swap), count)
                for of, count in guests]
            full = fleet.fill(hosts, mix, host.Limits(
                options['lost'] / 100, options['misses'] / 100))
            counts = [full.count(number) for number in range(len(mix))]
            ordinary = ordinary or counts
            rows += _rows(title, mix, full, ordinary)
        for line in _assumptions(options, [of for of, _count in guests],
                                 memory):
            self.app.stderr.write(f'{line}\n')
        return rows

    def _check(self, path: str) -> list[tuple[ty.Any, ...]]:
        try:
            with open(path) as file:
                rows = json.load(file)
            found = density.compare(rows)
        except OSError as exc:
            raise ValueError(f'{path}: {exc.strerror}') from exc
        except (AttributeError, TypeError, ValueError) as exc:
            raise ValueError(
                f'{path} is no density.json of lab/bench: {exc}') from exc
        if not found:
            raise ValueError(f"{path}: no row has the part '{density.PART}'")
        self.failed = not all(comparison.close for comparison in found)
        return [(of.row['variant'], of.row['mode'], of.row['ram_mib'], of.key,
                 of.planned, f'{of.measured:g}' + ' or more' * of.at_least,
                 _percent(of.difference), 'yes' if of.close else 'no')
                for of in found]


def _number(name: str) -> ty.Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            return _OPTIONS[name].parse(name, text)
        except ValueError as exc:
            # argparse names the option.
            raise argparse.ArgumentTypeError(
                str(exc).removeprefix(f'{name}: ')) from exc
    return parse


def _description(text: str) -> dict[str, str]:
    try:
        return question.describe(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _given(
    parsed_args: argparse.Namespace,
) -> tuple[dict[str, float], list[question.Description]]:
    """Numbers by the options' names, and guests.

    :raises ValueError: something in the file is not allowed
    """
    values: dict[str, float] = {}
    guests: list[question.Description] = []
    if parsed_args.file is not None:
        try:
            values, guests = _read(parsed_args.file)
        except OSError as exc:
            raise ValueError(f'{parsed_args.file}: {exc.strerror}') from exc
        except (yaml.YAMLError, ValueError) as exc:
            raise ValueError(f'{parsed_args.file}: {exc}') from exc
    for name in _OPTIONS:
        value = getattr(parsed_args, name.replace('-', '_'))
        if value is not None:
            values[name] = value
    named = {fields['name'] for fields in parsed_args.guests}
    return values, parsed_args.guests + [
        fields for fields in guests if fields['name'] not in named]


def _read(
    path: str,
) -> tuple[dict[str, float], list[question.Description]]:
    with open(path) as file:
        found = yaml.safe_load(file)
    if not isinstance(found, dict):
        raise ValueError('not keys and values; allowed: '
                         f"{', '.join((*_OPTIONS, 'guests'))}")
    guests = found.pop('guests', [])
    if not isinstance(guests, list) or not all(
            isinstance(fields, dict) for fields in guests):
        raise ValueError('guests is no list of fields and values')
    values = {}
    for key, value in found.items():
        if key not in _OPTIONS:
            raise ValueError(f"'{key}' is no key; allowed: "
                             f"{', '.join((*_OPTIONS, 'guests'))}")
        values[key] = _OPTIONS[key].parse(key, str(value))
    return values, [question.checked(fields) for fields in guests]


def _hosts_and_guests(
    name: str | None, values: Mapping[str, float],
    guests: Sequence[question.Description],
) -> tuple[list[float], Sequence[question.Description]]:
    """Each host's MiB, and the guests.

    :raises ValueError: they are not given
    """
    if name is None:
        if 'host-memory' not in values:
            raise ValueError('--host-memory or --cloud must say how much '
                             'memory a host has')
        if not guests:
            raise ValueError('--guest, --file or --cloud must say which '
                             'guests there are')
        return [values['host-memory'] * 1024] * int(
            values.get('hosts', 1)), guests
    for option in 'hosts', 'host-memory':
        if option in values:
            raise ValueError(f'--{option} is incompatible with --cloud, '
                             f'which has the hosts')
    found = cloud.read(name or None)
    if not found.hosts:
        raise ValueError('the cloud has no host of type QEMU or KVM that is '
                         'up and enabled')
    if not found.flavors:
        raise ValueError('the cloud has no active server')
    return list(found.hosts), question.known(
        [{'name': flavor.name, 'ram': str(flavor.ram),
          'count': str(flavor.count)} for flavor in found.flavors], guests)


def _kinds(
    options: Mapping[str, ty.Any],
) -> Iterator[tuple[str, guest.Disk, lru.Swap | None]]:
    yield guest.Disk.WRITEBACK.value, guest.Disk.WRITEBACK, None
    yield guest.Disk.NONE.value, guest.Disk.NONE, None
    yield guest.Disk.FAKE_DAX.value, guest.Disk.FAKE_DAX, None
    if options['swap']:
        swap = lru.Swap(options['swap'] * 1024, options['swap-left'],
                        options['swap-ms'] / 1000
                        if math.isfinite(options['swap-ms']) else None)
        for disk in guest.Disk:
            yield f'{disk.value}, swap', disk, swap


def _rows(
    title: str, mix: Sequence[fleet.Share], full: fleet.Fleet,
    ordinary: Sequence[int],
) -> Iterator[tuple[ty.Any, ...]]:
    """A row for each flavor, and one for all if there are several."""
    groups = [(share.load.guest.name, [number])
              for number, share in enumerate(mix)]
    if len(mix) > 1:
        groups.append(('all', list(range(len(mix)))))
    hosts = len(full.placed)
    ram = sum(share.load.guest.ram * full.count(number)
              for number, share in enumerate(mix))
    memory = sum(placed.where.memory for placed in full.placed)
    for name, numbers in groups:
        count = sum(full.count(number) for number in numbers)
        rival = sum(ordinary[number] for number in numbers)
        # Each with the reads that its guests want, all together.
        services = [(of, guests * mix[number].load.guest.reads
                     * mix[number].load.guest.spells.share)
                    for number in numbers
                    for of, guests in full.services(number)]
        reads = sum(wanted for _of, wanted in services)
        misses = sum(of.misses * wanted for of, wanted in services)
        yield (title, name, count, round(count / hosts, 1),
               round(count / rival, 2) if rival else '-',
               _percent(misses / reads) if reads else 0.0,
               _percent(max((of.lost for of, _wanted in services),
                            default=0.0)),
               round(ram / memory, 2), full.limit.value)


def _percent(share: float) -> ty.Any:
    return round(share * 100, 1) if math.isfinite(share) else '-'


def _miss(read_ahead_kib: float) -> str:
    """What the host reads for a miss on fake DAX."""
    if read_ahead_kib > lru.PAGE_KIB:
        return (f'A miss reads {read_ahead_kib:g} KiB, all of it as hot as '
                'what was missed: the device does not turn readahead off.')
    return (f'A miss reads {read_ahead_kib:g} KiB: the device turns readahead '
            'off where memory is short (read-ahead=auto, Linux 6.5 or later).')


def _assumptions(
    options: Mapping[str, ty.Any], guests: Sequence[guest.Guest],
    memory: Sequence[float],
) -> Iterator[str]:
    """What the answer rests on."""
    yield 'Assumed:'
    yield (f'- {len(memory)} hosts with {sum(memory) / 1024:g} GiB, of each '
           f'{options["reserved"]:g} GiB reserved; storage of each: '
           f'{options["miss-ms"]:g} ms a miss, at most '
           f'{options["storage-reads"]:g} reads and '
           f'{options["storage-mib"]:g} MiB a second. Measure yours.')
    for of in guests:
        hot = ' and '.join(f'{stratum.mib:g} MiB, {stratum.reads:g} times a '
                           'second' for stratum in of.hot) or 'nothing'
        yield (f'- {of.name}: {of.ram:g} MiB of RAM, {of.qemu:g} MiB QEMU '
               f'itself; kernel and programs take {of.programs:g} MiB; reads '
               f'again and again: {hot}; '
               + ('always busy' if of.spells.share == 1 else
                  f'busy {of.spells.share:.0%} of the time, '
                  f'{of.spells.seconds:g} s at a time')
               + (f'; uses {of.cpus:g} CPUs' if of.cpus else '') + '.')
    yield ('- Ordinary disks: all RAM of a guest is in use, by programs or as '
           'its page cache, unless "touched" says less. Balloon and free page '
           'reporting give back what programs free, not the cache.')
    yield ('- Fake DAX: a guest takes what QEMU, its kernel and its programs '
           'take; the memmap is on the device. File data is in the cache of '
           'the host, least recently used first out. '
           + _miss(options['read-ahead']))
    yield ('- A guest has one read under way at a time. Each has an image of '
           'its own. Writes, huge pages and KSM are left out.')
