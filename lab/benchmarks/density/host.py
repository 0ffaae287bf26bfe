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

"""What the host does for its guests: KSM, swap, and what it says of them.

KSM and swap are settings of the machine. Whatever is turned on here is turned
off again, by name.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import mmap
import os
import pathlib
import random
import subprocess
import time

from lab.benchmarks import results
from lab import errors

_KSM = pathlib.Path('/sys/kernel/mm/ksm')
#: Fast enough to be done in seconds, as if it had had hours.
_KSM_SETTINGS = {'pages_to_scan': '5000', 'sleep_millisecs': '20', 'run': '1'}
_ZRAM = pathlib.Path('/sys/class/zram-control')
SWAP_MIB = 12288
_PAGE = 4096
#: Of storage that may have seeks.
_STORAGE_READS = 2000


class HostError(errors.LabError):
    """The kernel of this machine lacks something."""


class Swap:
    """Swap space that is in use."""

    def memory_bytes(self) -> int:
        """RAM that the swapped pages take, which no cgroup is charged for."""
        return 0


class _Zram(Swap):

    def __init__(self, name: str) -> None:
        self._stat = pathlib.Path(f'/sys/block/{name}/mm_stat')

    def memory_bytes(self) -> int:
        # mem_used_total (admin-guide/blockdev/zram.rst of Linux)
        return int(self._stat.read_text().split()[2])


@contextlib.contextmanager
def swap(kind: str) -> Iterator[Swap]:
    """Swap of that kind, or none.

    :param kind: ``zram``, ``file`` or nothing
    :raises HostError: the kernel has no zram
    """
    if not kind:
        yield Swap()
    elif kind == 'file':
        results.DIRECTORY.mkdir(parents=True, exist_ok=True)
        file = results.DIRECTORY / 'density.swap'
        try:
            file.touch(0o600)
            with file.open('r+b') as opened:
                os.posix_fallocate(opened.fileno(), 0, SWAP_MIB << 20)
            with _used(file):
                yield Swap()
        finally:
            file.unlink(missing_ok=True)
    else:
        if not _ZRAM.exists():
            raise HostError('this kernel has no zram')
        number = (_ZRAM / 'hot_add').read_text().strip()
        try:
            pathlib.Path(f'/sys/block/zram{number}/disksize').write_text(
                f'{SWAP_MIB}M')
            with _used(pathlib.Path(f'/dev/zram{number}')):
                yield _Zram(f'zram{number}')
        finally:
            (_ZRAM / 'hot_remove').write_text(number)


@contextlib.contextmanager
def _used(device: pathlib.Path) -> Iterator[None]:
    subprocess.run(['mkswap', device], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    subprocess.run(['swapon', device], check=True)
    try:
        yield
    finally:
        subprocess.run(['swapoff', device], check=True)


@contextlib.contextmanager
def ksm(wanted: bool) -> Iterator[None]:
    """Merge pages that are the same, of QEMUs that started meanwhile.

    :raises HostError: the kernel has no KSM
    """
    if not wanted:
        yield
        return
    if not _KSM.exists():
        raise HostError('this kernel has no KSM')
    before = {name: (_KSM / name).read_text() for name in _KSM_SETTINGS}
    try:
        for name, value in _KSM_SETTINGS.items():
            (_KSM / name).write_text(value)
        yield
    finally:
        # 2: also take apart what it has merged (admin-guide/mm/ksm.rst).
        (_KSM / 'run').write_text('2')
        for name, value in before.items():
            (_KSM / name).write_text(value)


def wait_merged(seconds: float) -> None:
    """Wait until KSM has looked at everything twice, or for so long."""
    scans = _KSM / 'full_scans'
    end, first = time.monotonic() + seconds, int(scans.read_text())
    while int(scans.read_text()) < first + 2 and time.monotonic() < end:
        time.sleep(0.2)


def swapped_out_bytes() -> int:
    """What this machine has written to swap so far."""
    for line in pathlib.Path('/proc/vmstat').read_text().splitlines():
        name, value = line.split()
        if name == 'pswpout':
            return int(value) * os.sysconf('SC_PAGE_SIZE')
    return 0


def storage(image: pathlib.Path) -> results.Row:
    """How fast the storage is that misses are read from.

    ``miss_ms``: of 4 KiB at random, one at a time; ``storage_reads_per_s``: of
    these, eight at a time; ``storage_mib_per_s``: of MiB in sequence.

    :param image: a file without holes worth mentioning
    """
    size = image.stat().st_size
    offsets = random.Random(1).choices(range(size // _PAGE), k=_STORAGE_READS)
    one, eight = (_read_seconds(image, offsets, processes)
                  for processes in (1, 8))
    whole = _read_seconds(image, range(min(size, 256 << 20) >> 20), 1, 1 << 20)
    return {'miss_ms': round(one * 1000 / len(offsets), 3),
            'storage_reads_per_s': round(len(offsets) / eight),
            'storage_mib_per_s': round((min(size, 256 << 20) >> 20) / whole)}


def _read_seconds(image: pathlib.Path, blocks: Sequence[int], processes: int,
                  size: int = _PAGE) -> float:
    """Read blocks past the page cache, some at a time."""
    descriptor = os.open(image, os.O_RDONLY | os.O_DIRECT)

    def read(mine: Sequence[int]) -> None:
        # Its memory begins at a page, as O_DIRECT needs.
        with mmap.mmap(-1, size) as buffer:
            for block in mine:
                os.preadv(descriptor, [buffer], block * size)

    try:
        with futures.ThreadPoolExecutor(processes) as pool:
            started = time.monotonic()
            list(pool.map(read, [blocks[first::processes]
                                 for first in range(processes)]))
            return time.monotonic() - started
    finally:
        os.close(descriptor)


def description() -> results.Row:
    """What figures depend on: kernel, processors, readahead of images."""
    return {'kernel': os.uname().release, 'cpus': os.cpu_count(),
            'read_ahead_kib': read_ahead_kib(results.DIRECTORY)}


def read_ahead_kib(directory: pathlib.Path) -> int | None:
    """The readahead of the device that a directory's file system is on."""
    directory.mkdir(parents=True, exist_ok=True)
    device = directory.stat().st_dev
    file = pathlib.Path(f'/sys/class/bdi/{os.major(device)}:'
                        f'{os.minor(device)}/read_ahead_kb')
    return int(file.read_text()) if file.exists() else None
