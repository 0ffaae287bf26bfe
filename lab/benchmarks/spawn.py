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

"""How long a server takes to be created."""

import statistics
import time
from typing import Any

import click
import rich.box
import rich.console
import rich.table

from lab.benchmarks import results
from lab import clients
from lab import cloud as lab_cloud
from lab import guest
from lab import lifecycle
from lab import progress
from lab import servers

_POLL_SECONDS = 0.05


@click.command()
@click.option('--rounds', default=7, show_default=True,
              type=click.IntRange(min=1), help='Servers of each kind.')
def spawn(rounds: int) -> None:
    """Time server create: fake DAX against an ordinary raw flavor.

    The same image, from the request until the server is ACTIVE; the two
    kinds in turn, each first in every other round, after one of each that
    is not counted. Rows in .lab/bench/spawn.json: mode, round, seconds.
    """
    with lab_cloud.messages(), lifecycle.borrowed():
        cloud = clients.connect()
        image = servers.image(cloud, 'fakedax-bench', guest.build())
        flavors = {
            'blk': servers.flavor(cloud, 'fakedax.bench.blk'),
            'pmem': servers.flavor(
                cloud, 'fakedax.bench.pmem', extra_specs={
                    'fakedax:disks': 'root',
                    'trait:CUSTOM_FAKEDAX': 'required'})}
        rows = []
        for number in range(rounds + 1):
            modes = list(flavors)
            for mode in modes if number % 2 else reversed(modes):
                seconds = _spawn(cloud, flavors[mode], image)
                if number:
                    rows.append({'mode': mode, 'round': number,
                                 'seconds': round(seconds, 3)})
                    progress.say(f'round {number} of {rounds}, {mode}: '
                                 f'{seconds:.2f} s')
    results.save('spawn', rows)
    _show_spawn(rows)


def _spawn(cloud: Any, flavor: Any, image: Any) -> float:
    """Create a server and delete it.

    :returns: seconds from the request until it is ACTIVE
    """
    started = time.monotonic()
    server = cloud.compute.create_server(
        name='fakedax-bench', flavor_id=flavor.id, image_id=image.id,
        networks='none')
    try:
        while server.status != 'ACTIVE':
            if server.status == 'ERROR':
                raise click.ClickException(f'a server failed: {server.fault}')
            time.sleep(_POLL_SECONDS)
            server = cloud.compute.get_server(server.id)
        return time.monotonic() - started
    finally:
        cloud.compute.delete_server(server.id)
        cloud.compute.wait_for_delete(server, interval=0.2)


def _show_spawn(rows: list[dict[str, Any]]) -> None:
    times = {mode: {row['round']: row['seconds'] for row in rows
                    if row['mode'] == mode} for mode in ('blk', 'pmem')}
    table = rich.table.Table(
        title='openstack server create', box=rich.box.SIMPLE)
    for heading in ('', 'min', 'median', 'max'):
        table.add_column(heading, justify='right' if heading else 'left')
    ratios = [times['pmem'][number] / times['blk'][number]
              for number in times['blk']]
    for name, values, unit in (
            ('ordinary raw flavor', list(times['blk'].values()), ' s'),
            ('fake DAX', list(times['pmem'].values()), ' s'),
            ('ratio, round by round', ratios, '')):
        table.add_row(name, *(
            f'{each(values):.2f}{unit}'
            for each in (min, statistics.median, max)))
    rich.console.Console(width=100).print(table)
