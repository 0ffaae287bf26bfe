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

"""How long it takes to create a server."""

import statistics
import time
from typing import Any

import click

from lab.benchmarks import results
from lab.deploy import clients
from lab.deploy import lifecycle
from lab.deploy import servers
from lab import errors
from lab import guest
from lab import progress
from lab import wait

_POLL_SECONDS = 0.05
#: That a server may take.
_PATIENCE = 600


@click.command()
@click.option('--rounds', default=7, show_default=True,
              type=click.IntRange(min=1), help='Servers of each kind.')
def spawn(rounds: int) -> None:
    """Time server create: fake DAX against an ordinary raw flavor.

    The same image, from the request until the server is ACTIVE; the two
    kinds in turn, each of them first in every other round. The first server
    of each kind does not count. Rows in .lab/bench/spawn.json: mode, round,
    seconds.
    """
    with errors.messages(), lifecycle.borrowed():
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
            for mode in results.in_turn(flavors, number):
                seconds = _spawn(cloud, flavors[mode], image)
                if number:
                    rows.append({'mode': mode, 'round': number,
                                 'seconds': round(seconds, 3)})
                    progress.say(f'round {number} of {rounds}, {mode}: '
                                 f'{seconds:.2f} s')
    results.save('spawn', rows)
    _show(rows)


def _spawn(cloud: Any, flavor: Any, image: Any) -> float:
    """Create a server and delete it.

    :returns: seconds from the request until it is ACTIVE
    """
    started = time.monotonic()
    server = cloud.compute.create_server(
        name='fakedax-bench', flavor_id=flavor.id, image_id=image.id,
        networks='none')
    try:
        wait.until('a server to be ACTIVE', lambda: _active(cloud, server),
                   _PATIENCE, interval=_POLL_SECONDS)
        return time.monotonic() - started
    finally:
        cloud.compute.delete_server(server.id)
        cloud.compute.wait_for_delete(server, interval=0.2)


def _active(cloud: Any, server: Any) -> bool:
    shown = cloud.compute.get_server(server.id)
    if shown.status == 'ERROR':
        raise errors.LabError(f'a server failed: {shown.fault}')
    return bool(shown.status == 'ACTIVE')


def _show(rows: list[results.Row]) -> None:
    times = {mode: {row['round']: row['seconds'] for row in rows
                    if row['mode'] == mode} for mode in ('blk', 'pmem')}
    ratios = [times['pmem'][number] / times['blk'][number]
              for number in times['blk']]
    results.show('openstack server create', ('', 'min', 'median', 'max'), [
        [name, *(f'{each(values):.2f}{unit}'
                 for each in (min, statistics.median, max))]
        for name, values, unit in (
            ('ordinary raw flavor', list(times['blk'].values()), ' s'),
            ('fake DAX', list(times['pmem'].values()), ' s'),
            ('ratio, round by round', ratios, ''))])
