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

"""Plots of the rows of a benchmark."""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
from typing import Any

import matplotlib

from lab.benchmarks import results

# There is no display.
matplotlib.use('agg')

from matplotlib import axes  # noqa: E402
from matplotlib import pyplot  # noqa: E402


@contextlib.contextmanager
def panels(file: pathlib.Path, count: int, *, width: float, height: float,
           **options: Any) -> Iterator[list[axes.Axes]]:
    """Panels side by side, saved to ``file`` at the end of the block.

    :param width: of the whole plot, in inches, as is the height
    :param options: further ones of matplotlib's subplots()
    """
    figure, grid = pyplot.subplots(
        1, count, figsize=(width, height), squeeze=False,
        layout='constrained', **options)
    yield list(grid[0])
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def bars(rows: Sequence[results.Row], figure: str, unit: float = 1,
         ) -> tuple[list[float], list[list[float]]]:
    """Medians of a figure, and how far down and up its values spread.

    :param unit: divides the values
    :returns: as matplotlib takes them, the second for ``yerr``
    """
    return ([row[figure] / unit for row in rows],
            [[abs(row[f'{figure}_spread'][end] - row[figure]) / unit
              for row in rows] for end in (0, 1)])
