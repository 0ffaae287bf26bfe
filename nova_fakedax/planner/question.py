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

"""Guests as an operator describes them, in text."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import typing as ty

from nova_fakedax.planner import guest
from nova_fakedax.planner import lru

#: The name whose fields are those of all guests that nothing is said about.
ANY = '*'


@dataclasses.dataclass(frozen=True)
class Field:
    """A field whose value is a number.

    :ivar relative: whether it can be a share of the RAM, as 25%
    """

    least: float
    most: float = math.inf
    default: float | None = None
    relative: bool = False

    def parse(self, name: str, text: str, ram: float | None = None) -> float:
        """:raises ValueError: names the value and what is allowed"""
        of, number = 1.0, text
        if self.relative and ram and text.endswith('%'):
            of, number = ram / 100, text[:-1]
        try:
            value = float(number) * of
        except ValueError:
            value = math.nan
        if not self.least <= value <= self.most or math.isinf(value):
            raise ValueError(f"{name}: '{text}'; allowed: {self}")
        return value

    def __str__(self) -> str:
        bounds = (f'a number of at least {self.least:g}'
                  if math.isinf(self.most)
                  else f'a number from {self.least:g} to {self.most:g}')
        return f'{bounds}, or a share of ram, as 25%' * self.relative or bounds


#: The fields of a guest, besides ``name`` and ``hot``; units as of
#: ``guest.Guest`` and ``lru.Spells``.
FIELDS: Mapping[str, Field] = {
    'ram': Field(1),
    'count': Field(1e-6, default=1),
    'programs': Field(1, relative=True),
    'touched': Field(0, relative=True, default=math.inf),
    'qemu': Field(1, default=guest.QEMU_MIB),
    'idle': Field(0, relative=True, default=0),
    'cpus': Field(0, default=0),
    'busy': Field(1e-6, 1, default=1),
    'spell': Field(1e-3, default=lru.ALWAYS.seconds),
    'work': Field(0, 1, default=1),
}

Description = Mapping[str, str]


def describe(text: str) -> dict[str, str]:
    """Read ``name=web,ram=2048,programs=300,hot=400@50+1000@5``.

    :raises ValueError: names what is not a field, and what is allowed
    """
    found: dict[str, str] = {}
    for part in text.split(','):
        name, equals, value = part.partition('=')
        if not equals or name in found:
            raise ValueError(f"'{part}' in '{text}'; allowed: FIELD=VALUE, "
                             f'each field once')
        found[name] = value.strip()
    return checked(found)


def checked(fields: Mapping[ty.Any, ty.Any]) -> dict[str, str]:
    """The fields of a guest, as text.

    :raises ValueError: names what is not a field, and what is allowed
    """
    for name in fields:
        if name not in FIELDS and name not in ('name', 'hot'):
            raise ValueError(f"guest: '{name}' is no field; allowed: "
                             f"{', '.join(('name', 'hot', *FIELDS))}")
    if not fields.get('name'):
        raise ValueError(f'guest: {dict(fields)} has no name')
    return {name: str(value) for name, value in fields.items()}


def guests(
    descriptions: Sequence[Description],
) -> list[tuple[guest.Guest, float]]:
    """Guests, and how many there are for so many of the others.

    :raises ValueError: names the guest, the value and what is allowed
    """
    names = [fields['name'] for fields in descriptions]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"guest '{name}' is described more than once")
    return [_guest(fields) for fields in descriptions]


def known(
    flavors: Sequence[Description], descriptions: Sequence[Description],
) -> list[Description]:
    """Flavors of a cloud, with what is said about guests of the name.

    :raises ValueError: names flavors about which nothing is said, and names
        that no flavor has
    """
    by_name = {fields['name']: fields for fields in descriptions}
    names = {fields['name'] for fields in flavors}
    unknown = sorted(by_name.keys() - names - {ANY})
    if unknown:
        raise ValueError(
            f"no active server has the flavor '{unknown[0]}'; allowed: "
            f"{', '.join(sorted(names))}, or {ANY} for all others")
    unsaid = sorted(name for name in names if name not in by_name)
    if unsaid and ANY not in by_name:
        raise ValueError(
            f"nothing says what guests of these flavors use: "
            f"{', '.join(unsaid)}; describe each, or {ANY} for all others")
    return [{**by_name.get(fields['name'], by_name.get(ANY, {})), **fields}
            for fields in flavors]


def _guest(fields: Description) -> tuple[guest.Guest, float]:
    name = fields['name']
    values: dict[str, float] = {}
    for field, of in FIELDS.items():
        what = f"guest '{name}': {field}"
        if field in fields:
            values[field] = of.parse(what, fields[field], values.get('ram'))
        elif of.default is None:
            raise ValueError(f'{what} is missing; allowed: {of}')
        else:
            values[field] = of.default
    return guest.Guest(
        name, values['ram'], values['programs'],
        _strata(name, fields.get('hot', ''), values['ram']),
        values['touched'], values['qemu'], values['idle'], values['cpus'],
        lru.Spells(values['busy'], values['spell']),
        values['work']), values['count']


def _strata(name: str, text: str, ram: float) -> tuple[lru.Stratum, ...]:
    strata = []
    for part in filter(None, text.split('+')):
        size, _at, reads = part.partition('@')
        what = f"guest '{name}': hot, '{part}' (SIZE@READS)"
        strata.append(lru.Stratum(
            Field(1e-2, relative=True).parse(f'{what}, size', size, ram),
            Field(1e-6).parse(f'{what}, reads a second', reads)))
    return tuple(strata)
