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

"""A row of each part of servers that a user creates, to check the others.

The servers are in no cgroup, so what a host would have left of one is its
QEMU's anonymous memory, and how many fit is what that and the hot set make.
"""

from collections.abc import Iterator
import contextlib
import json
import time
from typing import Any

from lab.benchmarks.density import disks
from lab.benchmarks.density import host
from lab.benchmarks.density import how_many
from lab.benchmarks.density import one_guest
from lab.benchmarks import results
from lab.deploy import clients
from lab.deploy import lifecycle
from lab.deploy import servers
from lab import errors
from lab import guest
from lab.machine import pagecache
from lab import paths
from lab import progress
from lab import wait

VARIANT = 'openstack'
#: Extra specs of the flavors.
_FLAVORS: dict[str, dict[str, str]] = {
    'openstack-blk': {},
    'openstack-pmem': {'fakedax:disks': 'root',
                       'trait:CUSTOM_FAKEDAX': 'required'}}
_READ_MIB = 256
_PATIENCE = 600
_IDLE_SECONDS = 10

#: The figures of a sample by part. Figures of several parts have its name.
_FIGURES = {
    'one-guest': ('guest_cached_mib', 'anonymous_mib', 'mapped_mib',
                  'image_cached_mib'),
    'how-many': ('guests',),
    'frozen': ('given_back_mib', 'seconds', 'written_mib'),
    'after-work': ('guest_cached_mib', 'anonymous_mib'),
    'costs': ('boot_s', 'create_s', 'disk_mib'),
}


def rows(budget_mib: int) -> list[results.Row]:
    """The rows, of a server of each kind of flavor.

    :param budget_mib: of the host that "how many" is about
    """
    with errors.messages(), lifecycle.borrowed():
        cloud = clients.connect()
        image = servers.image(cloud, 'fakedax-bench', guest.build())
        found: list[results.Row] = []
        for mode, extra_specs in _FLAVORS.items():
            flavor = servers.flavor(
                cloud, f'fakedax.density.{mode}', ram=one_guest.RAM_MIB,
                extra_specs=extra_specs)
            with progress.step(f'openstack server create, {mode}'):
                samples = _samples(cloud, image, flavor, budget_mib)
            found += [
                {'part': part, 'variant': VARIANT, 'mode': mode, 'rounds': 1,
                 'ram_mib': one_guest.RAM_MIB,
                 **results.summary([samples[part]], figures, 2)}
                for part, figures in _FIGURES.items()]
    return found


def _samples(cloud: Any, image: Any, flavor: Any,
             budget_mib: int) -> dict[str, results.Sample]:
    """A sample of each part."""
    fake_dax = bool(flavor.extra_specs)
    started = time.monotonic()
    with _created(cloud, image, flavor) as server:
        created = time.monotonic()
        disk = server.file('disk')
        costs = {'create_s': created - started,
                 'disk_mib': disk.stat().st_blocks * 512 / (1 << 20)}
        with server.agent(_PATIENCE) as agent:
            costs['boot_s'] = time.monotonic() - created
            agent.run(f'probe write {disks.DATA} {_READ_MIB} 1 && sync && '
                      'echo 3 > /proc/sys/vm/drop_caches', check=True,
                      timeout=_PATIENCE)
            _evict(server, fake_dax)
            agent.run(f'dd if={disks.DATA} of=/dev/null bs=1M', check=True,
                      timeout=_PATIENCE)
            read = _memory(server, agent)
            frozen = _frozen(server, fake_dax)
            agent.run(f'rm {disks.DATA} && sync', check=True,
                      timeout=_PATIENCE)
            time.sleep(_IDLE_SECONDS)
            idle = _memory(server, agent)
    each = read['anonymous_mib'] + (how_many.HOT_MIB if fake_dax else 0)
    return {'one-guest': read, 'how-many': {'guests': budget_mib // each},
            'frozen': frozen, 'after-work': idle, 'costs': costs}


@contextlib.contextmanager
def _created(cloud: Any, image: Any, flavor: Any) -> Iterator[servers.Server]:
    """A server that is ACTIVE."""
    made = cloud.compute.create_server(
        name='fakedax-density', flavor_id=flavor.id, image_id=image.id,
        networks='none')
    try:
        cloud.compute.wait_for_server(made, wait=_PATIENCE, interval=0.2)
        yield servers.Server(cloud, made.id)
    finally:
        cloud.compute.delete_server(made.id)
        cloud.compute.wait_for_delete(made, interval=0.2)


def _memory(server: servers.Server, agent: Any) -> results.Sample:
    return one_guest.memory(agent, server.emulator().pid, server.file('disk'))


def _frozen(server: servers.Server, fake_dax: bool) -> results.Sample:
    """What the host gets back from a server that is paused."""
    cloud, pid = server.cloud, server.emulator().pid

    def taken() -> float:
        return one_guest.anonymous_mib(pid) + pagecache.cached_bytes(
            server.file('disk')) / (1 << 20)

    cloud.compute.pause_server(server.id)
    try:
        wait.until('the server to be PAUSED', lambda: server.show().status
                   == 'PAUSED', _PATIENCE, interval=0.2)
        before, written = taken(), host.swapped_out_bytes()
        started = time.monotonic()
        _evict(server, fake_dax)
        seconds = time.monotonic() - started
        return {'given_back_mib': before - taken(), 'seconds': seconds,
                'written_mib': (host.swapped_out_bytes() - written)
                / (1 << 20)}
    finally:
        cloud.compute.unpause_server(server.id)
        wait.until('the server to be ACTIVE', lambda: server.show().status
                   == 'ACTIVE', _PATIENCE, interval=0.2)


def _evict(server: servers.Server, fake_dax: bool) -> None:
    """Have the host give up its cache of a server's disk.

    As an operator does, by the project's command. That starts Python, which
    is in the time.
    """
    if not fake_dax:
        pagecache.evict(server.file('disk'))
        return
    node = server.host
    done = node.run(
        [paths.STATE / 'venv/bin/nova-fakedax', '--config-file',
         node.state / 'nova.conf', '--config-dir', node.drop_in, 'evict',
         server.id, '-f', 'json'], capture_output=True, text=True)
    if done.returncode or not json.loads(done.stdout):
        raise errors.LabError(f'nova-fakedax evict: {done.stderr}')
