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

"""How a host takes memory from a guest that is stopped, or that works."""

import pathlib
import time

from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import host
from lab.benchmarks.density import how_many
from lab.benchmarks.density import modes
from lab.benchmarks import results
from lab.machine import qemu
from lab import wait

CLEAN_MIB = 500
_RAM_MIB = 1024
_TAKEN_MIB = 150
#: Of work before and after.
_BEFORE, _AFTER = 3, 8
#: For a balloon that moves, and for one that does not.
_BALLOON_SECONDS = 30
_FROZEN_BALLOON_SECONDS = 3

FIGURES = {
    'given_back_mib': f'of {CLEAN_MIB} MiB given back',
    'seconds': 'in s',
    'written_mib': 'written to swap',
    'taken_mib': f'of {_TAKEN_MIB} MiB taken from a guest that works',
    'taken_s': 'taken in s',
    'longest_ms': 'longest read, ms',
    'rate_after': 'reads a second afterwards',
}


def sample(name: str, image: pathlib.Path) -> results.Sample:
    """A guest with a clean cache is stopped; another one works."""
    return _frozen(name, image) | _running(name, image)


def _frozen(name: str, image: pathlib.Path) -> results.Sample:
    mode = modes.MODES[name]
    with fleet.Fleet(mode, None) as found:
        machine = found.boot(image, _RAM_MIB)
        machine.agent.run(f'dd if={disks.DATA} of=/dev/null bs=1M '
                          f'count={CLEAN_MIB}', check=True, timeout=600)
        if mode.ksm:
            host.wait_merged(30)
        machine.qmp('stop')
        before = found.charged_bytes(), host.swapped_out_bytes()
        started = time.monotonic()
        if _by_balloon(mode):
            machine.qmp('balloon', value=(_RAM_MIB - CLEAN_MIB) << 20)
            time.sleep(_FROZEN_BALLOON_SECONDS)
        found.group.reclaim(CLEAN_MIB << 20)
        seconds = time.monotonic() - started
        return {
            'given_back_mib': (before[0] - found.charged_bytes()) / (1 << 20),
            'seconds': seconds,
            'written_mib': (host.swapped_out_bytes() - before[1])
            / (1 << 20)}


def _running(name: str, image: pathlib.Path) -> results.Sample:
    mode = modes.MODES[name]
    with fleet.Fleet(mode, None) as found:
        machine = found.boot(image, how_many.RAM_MIB)
        # More than it works with, so that there is something to give.
        machine.agent.run(f'dd if={disks.DATA} of=/dev/null bs=1M', check=True,
                          timeout=600)
        fleet.start_work(machine, disks.DATA, how_many.HOT_MIB,
                         how_many.RATE)
        time.sleep(_BEFORE)
        before = found.charged_bytes()
        started = time.monotonic()
        if _by_balloon(mode):
            _inflate(machine, how_many.RAM_MIB - _TAKEN_MIB)
        else:
            found.group.reclaim(_TAKEN_MIB << 20)
        seconds = time.monotonic() - started
        taken = (before - found.charged_bytes()) / (1 << 20)
        time.sleep(_AFTER)
        whole = fleet.work([machine], int(seconds) + _AFTER + 1, None)
        after = fleet.work([machine], _AFTER // 2, None)
    return {'taken_mib': taken, 'taken_s': seconds,
            'longest_ms': whole.longest_ms, 'rate_after': after.rates[0]}


def _by_balloon(mode: modes.Mode) -> bool:
    """Whether nothing but the guest can give memory back."""
    return not mode.fake_dax and not mode.swap


def _inflate(machine: qemu.Machine, target_mib: int) -> None:
    machine.qmp('balloon', value=target_mib << 20)
    wait.until('the balloon to be there',
               lambda: machine.qmp('query-balloon')['actual']
               <= (target_mib + 8) << 20, _BALLOON_SECONDS, interval=0.02,
               state=lambda: machine.qmp('query-balloon'))
