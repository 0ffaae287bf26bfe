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

"""Tables and plots of the rows."""

from collections.abc import Sequence
import pathlib
import shutil

from lab.benchmarks.density import after_work
from lab.benchmarks.density import costs
from lab.benchmarks.density import frozen
from lab.benchmarks.density import how_many
from lab.benchmarks.density import one_guest
from lab.benchmarks import plots
from lab.benchmarks import results
from lab import paths

_DOCS = paths.ROOT / 'doc/source/performance'
_MARKERS = 'osv^<>DPX*h'

#: Of each part: what is before the figures, and the figures.
_COLUMNS: dict[str, tuple[dict[str, str], dict[str, str], int]] = {
    'one-guest': ({'mode': 'mode', 'working_set_mib': 'working set'},
                  one_guest.FIGURES, 0),
    'how-many': ({'variant': 'guests', 'mode': 'mode', 'ram_mib': 'RAM',
                  'stopped_by': 'ended by'},
                 {'guests': 'fit', 'guests_95': 'fit, 5 % lost at most'}, 0),
    'frozen': ({'mode': 'mode'}, frozen.FIGURES, 2),
    'after-work': ({'mode': 'mode'}, after_work.FIGURES, 0),
    'costs': ({'mode': 'mode'}, costs.FIGURES | costs.CREATION, 1),
}


def table(rows: Sequence[results.Row], part: str
          ) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a part."""
    names, figures, digits = _COLUMNS[part]
    mine = [row for row in rows if row['part'] == part]
    return ([*names.values(), *figures.values()],
            [[*(str(row.get(name, '-')) for name in names),
              *(results.cell(row, figure, digits) for figure in figures)]
             for row in mine])


def show(rows: Sequence[results.Row], part: str) -> None:
    headings, cells = table(rows, part)
    results.show(f'{part}, MiB', headings, cells, width=180, whole=2,
                 groups=1)


def write_docs(rows: Sequence[results.Row], versions: str) -> None:
    """The tables and plots that the page has."""
    _DOCS.mkdir(exist_ok=True)
    for part in _COLUMNS:
        results.write_table(_DOCS / f'{part}-table.inc', *table(rows, part))
    (_DOCS / 'versions.inc').write_text(f'{versions}.\n')
    for file in plot(rows, 'density'):
        shutil.copy(file, _DOCS / file.name)


#: Of the figures of servers, what the tables of the parts call otherwise.
_SERVERS = {'given_back_mib': 'given back while it is paused'}


def show_openstack(rows: Sequence[results.Row]) -> None:
    """The rows of servers, a figure a line."""
    results.show('openstack server create', *_openstack(rows), whole=2,
                 groups=1)


def write_openstack(rows: Sequence[results.Row]) -> None:
    results.write_table(_DOCS / 'openstack-table.inc', *_openstack(rows))


def _openstack(rows: Sequence[results.Row]
               ) -> tuple[list[str], list[list[str]]]:
    modes = list(dict.fromkeys(row['mode'] for row in rows))
    by_part = {(row['part'], row['mode']): row for row in rows}
    return (['part', 'figure', *modes], [
        [part, _SERVERS.get(figure, heading.strip()), *(
            f'{by_part[part, mode][figure]:.1f}' for mode in modes)]
        for part, (_names, figures, _digits) in _COLUMNS.items()
        for figure, heading in figures.items()
        if figure in by_part[part, modes[0]]])


def plot(rows: Sequence[results.Row], name: str) -> list[pathlib.Path]:
    """A plot of each part that has one; without colour it reads as well.

    :param name: the first word of the files' names
    """
    made = []
    for part, draw in (('one-guest', _plot_one_guest),
                       ('how-many', _plot_how_many),
                       ('frozen', _plot_frozen)):
        mine = [row for row in rows if row['part'] == part]
        if mine:
            file = results.DIRECTORY / f'{name}-{part}.png'
            draw(mine, file)
            made.append(file)
    return made


def _modes(rows: Sequence[results.Row]) -> list[str]:
    return list(dict.fromkeys(row['mode'] for row in rows))


def _plot_one_guest(rows: Sequence[results.Row], file: pathlib.Path) -> None:
    with plots.panels(file, 2, width=11, height=4.2) as panels:
        for panel, figure in zip(panels, ('anonymous_mib', 'total_mib'),
                                 strict=True):
            for number, mode in enumerate(_modes(rows)):
                mine = [row for row in rows if row['mode'] == mode]
                values, spread = plots.bars(mine, figure)
                panel.errorbar([row['working_set_mib'] for row in mine],
                               values, yerr=spread, color=f'C{number}',
                               marker=_MARKERS[number], capsize=2, label=mode)
            panel.set_title(one_guest.FIGURES[figure], fontsize=9)
            panel.set_xlabel('working set, MiB')
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel('MiB')
        panels[0].legend(fontsize=7)


def _plot_how_many(rows: Sequence[results.Row], file: pathlib.Path) -> None:
    variants = list(dict.fromkeys(row['variant'] for row in rows))
    with plots.panels(file, len(variants), width=4.2 * len(variants),
                      height=4.2, sharey=True) as panels:
        for panel, variant in zip(panels, variants, strict=True):
            mine = [row for row in rows if row['variant'] == variant]
            values, spread = plots.bars(mine, 'guests_95')
            for number, row in enumerate(mine):
                panel.bar(number, values[number], color='lightgrey'
                          if 'pmem' not in row['mode'] else 'white',
                          edgecolor='black',
                          hatch='' if 'pmem' not in row['mode'] else '//',
                          yerr=[[spread[0][number]], [spread[1][number]]],
                          capsize=3)
            panel.set_xticks(range(len(mine)), [row['mode'] for row in mine],
                             rotation=75, fontsize=7)
            panel.set_title(how_many.VARIANTS[variant].title, fontsize=9)
            panel.grid(axis='y', alpha=0.3)
        panels[0].set_ylabel('guests, 5 % of the work lost at most')


def _plot_frozen(rows: Sequence[results.Row], file: pathlib.Path) -> None:
    shown = ('given_back_mib', 'seconds', 'written_mib')
    with plots.panels(file, len(shown), width=11, height=4) as panels:
        for panel, figure in zip(panels, shown, strict=True):
            values, spread = plots.bars(rows, figure)
            panel.bar(range(len(rows)), values, yerr=spread, capsize=3,
                      color=['white' if 'pmem' in row['mode'] else 'lightgrey'
                             for row in rows], edgecolor='black')
            panel.set_xticks(range(len(rows)), [row['mode'] for row in rows],
                             rotation=75, fontsize=7)
            panel.set_title(frozen.FIGURES[figure], fontsize=9)
            panel.grid(axis='y', alpha=0.3)
