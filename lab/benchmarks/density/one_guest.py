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

"""Where the memory of one guest is, by its working set."""

from collections.abc import Sequence
from concurrent import futures
import pathlib
import re
import time

from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import host
from lab.benchmarks.density import modes
from lab.benchmarks import results
from lab.machine import agent
from lab.machine import pagecache
from lab.machine import qemu

RAM_MIB = 512
#: From a small one to twice the RAM.
WORKING_SETS = (64, 256, 512, 1024)
#: Reads at random of each, at most.
_READS = 1 << 15

FIGURES = {
    'guest_cached_mib': "guest's page cache",
    'anonymous_mib': "QEMU's anonymous",
    'mapped_mib': 'image, mapped',
    'image_cached_mib': 'image, cached by the host',
    'total_mib': 'all of it',
    'left_mib': 'left after the host took all it could',
    'written_mib': 'written to take it',
}

#: Linux reports pages 2 s after they were freed (mm/page_reporting.c).
_REPORTING_SECONDS = 5


def side_by_side(names: Sequence[str]) -> list[list[str]]:
    """Modes that can be measured at once, for these figures are no speeds.

    Three at a time. KSM is the whole machine's, so such modes are alone.
    """
    alone = [name for name in names if modes.MODES[name].ksm]
    together = [name for name in names if name not in alone]
    return [[name] for name in alone] + [
        together[at:at + 3] for at in range(0, len(together), 3)]


def samples(names: Sequence[str], made: disks.Disks,
            working_sets: tuple[int, ...]
            ) -> dict[str, dict[int, results.Sample]]:
    """The figures of modes, measured side by side."""
    images = [made.image(modes.MODES[name], number)
              for number, name in enumerate(names)]
    with futures.ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(
            lambda name, image: _sample(name, image, working_sets),
            names, images), strict=True))


def _sample(name: str, image: pathlib.Path,
            working_sets: tuple[int, ...]) -> dict[int, results.Sample]:
    """The figures of one guest after it has read so many MiB, twice.

    In one boot, from the smallest working set on. What is left is measured
    after the last.
    """
    mode = modes.MODES[name]
    samples: dict[int, results.Sample] = {}
    with fleet.Fleet(mode, None, late_swap=True) as found:
        machine = found.boot(image, RAM_MIB)
        for mib in working_sets:
            machine.agent.run(
                f'dd if={disks.DATA} of=/dev/null bs=1M count={mib} && '
                f'probe reads {disks.DATA} {mib} {min(mib * 256, _READS)}',
                check=True, timeout=900)
            time.sleep(_REPORTING_SECONDS)
            if mode.ksm:
                host.wait_merged(30)
            samples[mib] = memory(machine.agent, machine.pid, image) | {
                'total_mib': found.group.usage() / (1 << 20)}
        samples[working_sets[-1]] |= found.take_all()
    return samples


def memory(found: agent.Agent, pid: int,
           image: pathlib.Path) -> results.Sample:
    """What a guest and its QEMU have in RAM, in MiB.

    :param found: of the guest
    :param pid: of QEMU
    """
    kib = dict(re.findall(r'(?m)^(\w+): +(\d+) kB', found.run(
        'cat /proc/meminfo', check=True, timeout=300).stdout))
    anonymous = anonymous_mib(pid)
    return {
        'guest_cached_mib': (int(kib['Cached']) + int(kib['Buffers'])) / 1024,
        'anonymous_mib': anonymous,
        'mapped_mib': qemu.counter(pid, 'smaps_rollup', 'Rss') / 1024
        - anonymous,
        'image_cached_mib': pagecache.cached_bytes(image) / (1 << 20)}


def anonymous_mib(pid: int) -> float:
    """What the host cannot take back of a QEMU without swap."""
    return qemu.counter(pid, 'smaps_rollup', 'Anonymous') / 1024
