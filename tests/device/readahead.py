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

"""What readahead is worth, of an image that does not fit into memory.

Run as a program, it prints the figures of SPEC.rst, Readahead: for each value
of the property read-ahead, how fast the device reads an image in the directory
that it is given, and how many of the reads had to wait. The file system has
the readahead of its block device, so measure with more than one.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import itertools
import math
import pathlib
import random
import sys
import tempfile
import time

from lab.benchmarks.density import host
from lab.machine import cgroup
from lab.machine import emulators
from lab.machine import pagecache
from tests.device import base
from tests.device import emulator

SIZE = 200 * base.MIB
MEMORY = 128 * base.MIB
PAGES = SIZE // base.PAGE
#: How long reads are measured, and before that not: the device looks once a
#: second.
SECONDS = 5.0
EXPONENT = 1.2
#: Reads that are sent to QEMU at a time.
BATCH = 100


def sequential() -> Iterator[int]:
    return iter(range(PAGES))


def uniform() -> Iterator[int]:
    chance = random.Random(1)
    while True:
        yield chance.randrange(PAGES)


def zipf() -> Iterator[int]:
    """A few hot pages among many, all over the image."""
    chance = random.Random(1)
    pages = list(range(PAGES))
    chance.shuffle(pages)
    weights = list(itertools.accumulate(
        rank ** -EXPONENT for rank in range(1, PAGES + 1)))
    while True:
        yield from chance.choices(pages, cum_weights=weights, k=BATCH)


def major_faults(pid: int) -> int:
    """Field 12 of proc_pid_stat(5)."""
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    return int(stat.rpartition(')')[2].split()[9])


class Guest:
    """A device whose image is not cached, and who reads it."""

    def __init__(self, image: pathlib.Path, sockets: str, read_ahead: str,
                 group: cgroup.MemoryGroup) -> None:
        self._vm = emulator.Emulator(
            emulators.project(), pathlib.Path(sockets), 'qemu', [
                '-object', 'memory-backend-file,id=mem0,share=on,'
                f'mem-path={image},size={SIZE}',
                '-m', '128M,maxmem=1G', '-machine', base.Q35, '-device',
                'virtio-pmem-pci,memdev=mem0,id=pmem0,'
                f'read-ahead={read_ahead}'])
        group.add(self._vm.process.pid)
        (info,) = self._vm.qmp.cmd('query-memory-devices')
        self._address = info['data']['memaddr']

    def read(self, pages: Iterator[int], seconds: float) -> str:
        """Read a byte of each page, for so long; return the figures."""
        faults = major_faults(self._vm.process.pid)
        start = time.monotonic()
        reads = 0
        while time.monotonic() - start < seconds:
            batch = list(itertools.islice(pages, BATCH))
            if not batch:
                break
            self._vm.qtest.commands([
                f'readb {self._address + page * base.PAGE:#x}'
                for page in batch])
            reads += len(batch)
        took = time.monotonic() - start
        faults = major_faults(self._vm.process.pid) - faults
        return (f'{reads} reads in {took:.2f} s, {reads / took:.0f} a second, '
                f'{faults / reads:.1%} waited')

    def close(self) -> None:
        self._vm.close()


def measure(image: pathlib.Path, read_ahead: str,
            pattern: Callable[[], Iterator[int]]) -> None:
    pagecache.evict(image)
    with (tempfile.TemporaryDirectory() as sockets,
          cgroup.MemoryGroup(MEMORY) as group,
          contextlib.closing(Guest(image, sockets, read_ahead,
                                   group)) as guest):
        if pattern is sequential:
            said = guest.read(sequential(), math.inf)
        else:
            guest.read(sequential(), math.inf)
            pages = pattern()
            guest.read(pages, SECONDS)
            said = guest.read(pages, SECONDS)
    print(f'{pattern.__name__:10} {read_ahead:4} {said}', flush=True)


def main(where: str) -> None:
    with tempfile.TemporaryDirectory(dir=where) as name:
        image = pathlib.Path(name) / 'image'
        image.write_bytes(b'A' * SIZE)
        print(f'readahead {host.read_ahead_kib(image.parent)} KiB')
        for pattern in sequential, uniform, zipf:
            for read_ahead in 'on', 'auto', 'off':
                measure(image, read_ahead, pattern)


if __name__ == '__main__':
    main(*sys.argv[1:])
