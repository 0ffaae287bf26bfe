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

"""Where the figures go."""

from collections.abc import Iterable, Sequence
import json
import pathlib
from typing import Any

from lab import paths

DIRECTORY = paths.STATE / 'bench'


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a benchmark to ``.lab/bench/NAME.json``."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    (DIRECTORY / f'{name}.json').write_text(
        json.dumps(rows, indent=2) + '\n')


def write_table(file: pathlib.Path, headings: Sequence[str],
                rows: Iterable[Sequence[str]]) -> None:
    """Write a table for the documents, in reStructuredText."""
    lines = ['.. list-table::', '   :header-rows: 1', '']
    for cells in (headings, *rows):
        lines += [f'   {"*" if not number else " "} - {cell}'
                  for number, cell in enumerate(cells)]
    file.write_text('\n'.join(lines) + '\n')
