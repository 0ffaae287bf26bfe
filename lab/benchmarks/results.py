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

"""Figures of a benchmark: from samples to rows, and where rows go.

A sample is what one round measured of one kind: figure to value. A row sums
up the samples of all rounds: a figure has its median, and the least and most
as the list ``FIGURE_spread``.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import pathlib
import statistics
from typing import Any

import rich.box
import rich.console
import rich.table

from lab import paths

DIRECTORY = paths.STATE / 'bench'

Sample = dict[str, float]
Row = dict[str, Any]


def in_turn(kinds: Iterable[str], number: int) -> list[str]:
    """The kinds in the order of this round: another one begins each time.

    :param number: of the round, from 0
    """
    order = list(kinds)
    first = number % len(order)
    return order[first:] + order[:first]


def spread(figure: str, values: Sequence[float], digits: int) -> Row:
    """The median of a figure, and its least and most value.

    :param digits: after the decimal point
    """
    return {figure: round(statistics.median(values), digits),
            f'{figure}_spread': [round(min(values), digits),
                                 round(max(values), digits)]}


def summary(samples: Sequence[Sample], figures: Iterable[str],
            digits: int) -> Row:
    """The spread of each of these figures that the samples have."""
    row: Row = {}
    for figure in figures:
        if figure in samples[0]:
            row |= spread(
                figure, [sample[figure] for sample in samples], digits)
    return row


def ratios(samples: Sequence[Sample], rivals: Sequence[Sample],
           figure: str) -> list[float]:
    """A figure as a ratio to the rival's in the same round."""
    # A starved rival has 0.
    return [one[figure] / max(other[figure], 1e-6)
            for one, other in zip(samples, rivals, strict=True)]


def cell(row: Mapping[str, Any], figure: str, digits: int,
         unit: float = 1) -> str:
    """``median (least-most)`` of a figure, ``-`` if the row lacks it.

    :param unit: divides the values
    """
    if figure not in row:
        return '-'
    least, most = row[f'{figure}_spread']
    return (f'{row[figure] / unit:.{digits}f} '
            f'({least / unit:.{digits}f}-{most / unit:.{digits}f})')


def save(name: str, rows: Sequence[Row]) -> None:
    """Write the rows of a benchmark to ``.lab/bench/NAME.json``."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    (DIRECTORY / f'{name}.json').write_text(
        json.dumps(rows, indent=2) + '\n')


def load(name: str) -> list[Row]:
    """The rows that :func:`save` has written; none if it has not."""
    file = DIRECTORY / f'{name}.json'
    if not file.exists():
        return []
    rows: list[Row] = json.loads(file.read_text())
    return rows


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]],
         *, width: int = 100, whole: int = 0, groups: int = 0) -> None:
    """Print a table.

    :param width: columns of the terminal
    :param whole: how many of the first columns are never wrapped
    :param groups: how many of the first cells name a group; groups are set
        apart
    """
    table = rich.table.Table(title=title, box=rich.box.SIMPLE)
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number < whole)
    group: Sequence[str] | None = None
    for cells in rows:
        if group is not None and group != cells[:groups]:
            table.add_section()
        group = cells[:groups]
        table.add_row(*cells)
    rich.console.Console(width=width).print(table)


def write_table(file: pathlib.Path, headings: Sequence[str],
                rows: Iterable[Sequence[str]]) -> None:
    """Write a table for the documents, in reStructuredText."""
    lines = ['.. list-table::', '   :header-rows: 1', '']
    for cells in (headings, *rows):
        lines += [f'   {"*" if not number else " "} - {text}'
                  for number, text in enumerate(cells)]
    file.write_text('\n'.join(lines) + '\n')
