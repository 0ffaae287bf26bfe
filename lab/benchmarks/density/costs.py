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

"""What fake DAX costs: reads, writes, processors, and making a disk."""

import pathlib
import re
import shutil
import subprocess
import time

from lab.benchmarks.density import disks
from lab.benchmarks.density import fleet
from lab.benchmarks.density import modes
from lab.benchmarks import results
from lab.machine import pagecache
from lab.machine import qemu

_RAM_MIB = 1024
_READ_MIB = 256
_READS = 5000
#: Enough for a second or so.
_HOT_READS = 150000
_WRITES = 20000
#: Of the flavor of a server that is created.
_FLAVOR_MIB = 4096

FIGURES = {
    'boot_s': 'boot, s',
    'cold_mib_s': 'cold, in sequence, MiB/s',
    'cold_cpu_ms_mib': 'processor of it, ms a MiB',
    'cold_reads_s': 'cold, at random, a second',
    'hot_reads_s': 'hot, read(2), a second',
    'hot_mmap_s': 'hot, mmap, a second',
    'writes_s': 'writes at random, a second',
}
CREATION = {'create_s': 's to create', 'disk_mib': 'MiB of disk'}


def sample(name: str, image: pathlib.Path) -> results.Sample:
    mode = modes.COSTS[name]
    started = time.monotonic()
    with fleet.boot(mode, image, _RAM_MIB) as machine:
        found: results.Sample = {'boot_s': time.monotonic() - started}
        pagecache.evict(image)
        # The second part of the data, so that the first stays cold.
        processor = fleet.processor_seconds(machine)
        taken = _read_seconds(
            machine, f'skip={_READ_MIB} count={_READ_MIB}')
        found['cold_mib_s'] = _READ_MIB / taken
        found['cold_cpu_ms_mib'] = (
            (fleet.processor_seconds(machine) - processor) * 1000 / _READ_MIB)
        found['cold_reads_s'] = _reads(machine, _READS, 'read')
        machine.agent.run(f'dd if={disks.DATA} of=/dev/null bs=1M '
                          f'count={_READ_MIB}', check=True, timeout=600)
        for figure, count, how in (('hot_reads_s', _HOT_READS, 'read'),
                                   ('hot_mmap_s', _HOT_READS, 'mmap'),
                                   ('writes_s', _WRITES, 'write')):
            found[figure] = _reads(machine, count, how)
    return found


def _reads(machine: qemu.Machine, count: int, how: str) -> float:
    text = machine.agent.run(
        f'probe reads {disks.DATA} {_READ_MIB} {count} {how}', check=True,
        timeout=900).stdout
    found = re.search(r'elapsed_us=(\d+)', text)
    assert found
    return count * 1e6 / int(found[1])


def _read_seconds(machine: qemu.Machine, options: str) -> float:
    """Seconds in which the guest reads some of its data, by its own clock.

    The agent is asked only now and then whether a command has ended.

    :param options: of dd
    """
    before, after = machine.agent.run(
        f'cat /proc/uptime && dd if={disks.DATA} of=/dev/null bs=1M {options} '
        '2> /dev/null && cat /proc/uptime', check=True,
        timeout=900).stdout.splitlines()
    return float(after.split()[0]) - float(before.split()[0])


def creation(kind: str, base: pathlib.Path) -> results.Sample:
    """Make the disk of a server from a cached image, as Nova does.

    :param kind: ``raw``, copied and allocated as for fake DAX; or ``qcow2``,
        Nova's default, with the image as its backing file
    """
    image = results.DIRECTORY / f'density-created.{kind}'
    try:
        started = time.monotonic()
        if kind == 'raw':
            # ImageBackend.Flat copies; the project then allocates the rest.
            shutil.copyfile(base, image)
            subprocess.run(['fallocate', '-l', f'{_FLAVOR_MIB}M', image],
                           check=True)
        else:
            subprocess.run(
                ['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw', '-b',
                 base, image, f'{_FLAVOR_MIB}M'], check=True)
        return {'create_s': time.monotonic() - started,
                'disk_mib': image.stat().st_blocks * 512 / (1 << 20)}
    finally:
        image.unlink(missing_ok=True)
