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

"""What a guest still takes when its work is done and it is idle again."""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import pathlib
import subprocess
import time

from lab.benchmarks.density import fleet
from lab.benchmarks.density import modes
from lab.benchmarks.density import one_guest
from lab.benchmarks import images
from lab.benchmarks import results
from lab.machine import pagecache
from lab.machine import qemu
from lab import paths

_RAM_MIB = 1024
_DISK_MIB = 4096
_PATIENCE = 1800
_IDLE_SECONDS = 120
#: What a package upgrade does: look at the files there are, and make the
#: initramfs for the kernel again.
_WORK = 'dpkg --verify > /dev/null; update-initramfs -u -k all'

FIGURES = {
    'guest_cached_mib': "guest's page cache",
    'anonymous_mib': "QEMU's anonymous",
    'total_mib': 'all of it',
    'left_mib': 'left after the host took all it could',
    'written_mib': 'written to take it',
}


def samples(names: Sequence[str]) -> dict[str, results.Sample]:
    """The figures of one guest for each mode, side by side.

    How much memory they take does not depend on how long the work takes.
    """
    built = subprocess.run(
        [paths.ROOT / 'guest-image-elements/build'], check=True,
        stdout=subprocess.PIPE, text=True).stdout.strip()
    with contextlib.ExitStack() as stack:
        made = {name: stack.enter_context(images.sparse(
            f'density-work-{name}', _DISK_MIB,
            memmap=modes.MODES[name].memmap, content=pathlib.Path(built)))
            for name in names}
        with futures.ThreadPoolExecutor(max(len(names), 1)) as pool:
            return dict(zip(names, pool.map(
                lambda name: _sample(name, made[name]), names), strict=True))


def _sample(name: str, image: pathlib.Path) -> results.Sample:
    mode = modes.MODES[name]
    pagecache.evict(image)
    view = qemu.boot_view(image) if mode.fake_dax else []
    with (fleet.Fleet(mode, None, late_swap=True) as found,
          qemu.Machine(*view, *mode.options(image), memory_mib=_RAM_MIB,
                       emulator=mode.emulator(),
                       accelerator=fleet.Accelerator.option(),
                       prefix=found.group.prefix()) as machine):
        machine.agent.wait_ready(_PATIENCE)
        machine.agent.run(_WORK, check=True, timeout=_PATIENCE)
        time.sleep(_IDLE_SECONDS)
        return one_guest.memory(machine.agent, machine.pid, image) | {
            'total_mib': found.group.usage() / (1 << 20)} | found.take_all()
