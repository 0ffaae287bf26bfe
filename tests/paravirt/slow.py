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

"""Many tasks that flush to a slow disk: ``python -m tests.paravirt.slow``."""

import time

import click
import rich.box
import rich.console
import rich.table

from tests.paravirt import committing
from tests.paravirt import flushing

TASKS = 64


def slow(kernel: str, driver: str, count: int, seconds: float
         ) -> tuple[float, float]:
    """Flush from 64 tasks, on a host whose syncs take a while.

    :param count: the number of flushes of all tasks
    :param seconds: how long each sync takes
    :returns: flushes per second, and syncs of the host per flush
    """
    with flushing.Flushing(
            committing.package(kernel),
            with_driver=committing.DRIVERS[driver]) as running:
        running.backing.delay(seconds)
        before = len(running.backing.ended)
        started = time.monotonic()
        running.run(f'probe hammer {flushing.PMEM} {TASKS} {count}',
                    timeout=600)
        took = time.monotonic() - started
        syncs = len(running.backing.ended) - before
        running.backing.delay(0)
    return count / took, syncs / count


@click.command()
@click.option('--sync-ms', default=100, show_default=True,
              type=click.IntRange(min=0), help='How long each sync takes.')
@click.option('--flushes', default=320, show_default=True,
              type=click.IntRange(min=TASKS),
              help='How many flushes all tasks make together.')
def main(sync_ms: int, flushes: int) -> None:
    """Time 64 tasks that flush, with either driver.

    Each task writes a block of the disk and flushes it, with fdatasync(2) or
    with O_DSYNC. The syncs of the host take a fixed time.
    """
    table = rich.table.Table(
        'kernel', 'driver', 'flushes per second', 'syncs per flush',
        box=rich.box.SIMPLE)
    for kernel in committing.KERNELS:
        for driver in committing.DRIVERS:
            rate, syncs = slow(kernel, driver, flushes, sync_ms / 1000)
            table.add_row(kernel, driver, f'{rate:.1f}', f'{syncs:.2f}')
    rich.console.Console().print(table)


if __name__ == '__main__':
    main(prog_name='python -m tests.paravirt.slow')
