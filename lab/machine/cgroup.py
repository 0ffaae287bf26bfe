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

"""A memory cgroup, of version 1 or 2, whichever has the controller here.

Linux charges a page to the group of the process that was first to touch it,
and never moves it. So what a process had before it joined is not the group's.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import os
import pathlib
import re
import subprocess
import threading
import uuid

import psutil

from lab import errors

_PSI = 'memory.pressure'
#: Bytes that are asked for at a time, that count as nothing, and how often
#: nothing has to come of it.
_PART = 32 << 20
_LITTLE = 1 << 20
_FRUITLESS = 3

_COUNT_SECONDS = 0.1

_LIMIT_SECONDS = 30


class CgroupError(errors.LabError):
    """This machine has no memory cgroups, or refuses one."""


class MemoryGroup:
    """A memory cgroup for the length of a ``with`` block.

    At the end its processes must have ended.

    :param limit: bytes of RAM that its processes and their page cache may
        take; without one, as much as there is
    :param swap: whether its memory may go to the machine's swap, if that has
        some
    :raises CgroupError: on entering, there can be none
    """

    def __init__(self, limit: int | None = None, swap: bool = False) -> None:
        self._name = f'{prefix_of(os.getpid())}{uuid.uuid4().hex[:8]}'
        self._limit = limit
        self._swap = swap

    def __enter__(self) -> 'MemoryGroup':
        first, second = _roots()
        self._second = not first
        if not first and not second:
            raise CgroupError('no cgroup file system is mounted')
        self._paths = [root / self._name for root in first + second]
        try:
            if self._second:
                (self._paths[0].parent / 'cgroup.subtree_control').write_text(
                    '+memory')
            for path in self._paths:
                path.mkdir()
            # A kernel without swap has no such file.
            if not self._swap and self._file(
                    'memory.swap.max', 'memory.swappiness').exists():
                self._write('memory.swap.max', 'memory.swappiness', 0)
            if self._limit is not None:
                self.set_limit(self._limit)
        except OSError as e:
            self.__exit__()
            raise CgroupError(f'no memory cgroup: {e}') from e
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._paths:
            if path.exists():
                path.rmdir()

    def add(self, pid: int) -> None:
        """Move a process; what it has had so far stays where it is."""
        for path in self._paths:
            (path / 'cgroup.procs').write_text(str(pid))

    def prefix(self) -> list[str]:
        """A command that executes another one, which follows, in the group."""
        return ['sh', '-c', 'for path in "$1" "$2"; do '
                'echo $$ > "$path/cgroup.procs"; done; shift 2; exec "$@"',
                'sh', str(self._paths[0]), str(self._paths[-1])]

    def set_limit(self, limit: int) -> None:
        """Bytes of RAM; the group gives back what it has above that.

        :raises OSError: it cannot, or not in half a minute: its processes take
            it again as fast
        """
        file = self._file('memory.max', 'memory.limit_in_bytes')
        # The kernel goes on for as long as anything comes of it, or until the
        # process that writes is killed.
        try:
            done = subprocess.run(
                ['sh', '-c', 'echo "$1" > "$2"', 'sh', str(limit), str(file)],
                stderr=subprocess.PIPE, text=True, timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired as e:
            raise TimeoutError(f'{file}: {limit} is too little') from e
        if done.returncode:
            raise OSError(done.stderr.strip())

    def usage(self) -> int:
        """The bytes of RAM that are charged to the group now."""
        return int(self._file('memory.current', 'memory.usage_in_bytes')
                   .read_text())

    def stat(self) -> dict[str, int]:
        """Counters of the kernel, under the names of its version."""
        return {name: int(value) for name, value in (
            line.split() for line in
            (self._paths[0] / 'memory.stat').read_text().splitlines())}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Keep Linux's counts of the group's pages fresh, as a host's are.

        Linux adds them up every two seconds, or when somebody reads them. By
        old counts it spares pages that it could write to swap, gives up, and
        kills a process while there still is swap (mem_cgroup_flush_stats and
        inactive_is_low of Linux 6.18).
        """
        ended = threading.Event()

        def count() -> None:
            while not ended.wait(_COUNT_SECONDS):
                self.stat()

        with futures.ThreadPoolExecutor(1) as pool:
            counting = pool.submit(count)
            try:
                yield
            finally:
                ended.set()
                counting.result()

    def killed(self) -> int:
        """How many of its processes the kernel ended for want of memory."""
        text = self._file('memory.events', 'memory.oom_control').read_text()
        found = re.search(r'^oom_kill (\d+)$', text, re.M)
        assert found
        return int(found[1])

    def reclaim(self, amount: int) -> None:
        """Have the kernel take back bytes, as many of these as it can.

        Asked for much, it gives up early where it has to write to swap. So
        what it leaves is asked for in small parts. The counts are read before
        each, as :meth:`counted` says.
        """
        target = max(self.usage() - amount, 0)
        self._reclaim(amount)
        fruitless = 0
        while (left := self.usage()) > target and fruitless < _FRUITLESS:
            self.stat()
            self._reclaim(min(left - target, _PART))
            fruitless = (0 if left - self.usage() >= _LITTLE
                         else fruitless + 1)

    def _reclaim(self, amount: int) -> None:
        if self._second:
            try:
                (self._paths[0] / 'memory.reclaim').write_text(str(amount))
            except BlockingIOError:
                # Less than that was there to take.
                pass
            return
        before = (self._paths[0] / 'memory.limit_in_bytes').read_text()
        try:
            self.set_limit(max(self.usage() - amount, 1 << 20))
        except OSError:
            # EBUSY, for the same reason.
            pass
        finally:
            self._write('', 'memory.limit_in_bytes', before.strip())

    def stalled_seconds(self) -> float | None:
        """How long some process has waited for memory so far.

        ``some`` of pressure stall information (accounting/psi.rst of Linux);
        None where the kernel does not have it.
        """
        file = self._paths[-1] / _PSI
        if not file.exists():
            return None
        found = re.search(r'^some .*total=(\d+)$', file.read_text(), re.M)
        assert found
        return int(found[1]) / 1e6

    def _file(self, second: str, first: str) -> pathlib.Path:
        return self._paths[0] / (second if self._second else first)

    def _write(self, second: str, first: str, value: object) -> None:
        self._file(second, first).write_text(str(value))


def prefix_of(pid: int) -> str:
    """What the names of a process's groups begin with."""
    return f'fakedax-{pid}-'


def left_by(pid: int) -> list[pathlib.Path]:
    """The directories of the groups that a process has made, if any."""
    return [path for roots in _roots() for root in roots
            for path in root.glob(f'{prefix_of(pid)}*')]


def _roots() -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Where memory is limited by version 1, and where version 2 is, if so."""
    mounts = psutil.disk_partitions(all=True)
    first = [pathlib.Path(part.mountpoint) for part in mounts
             if part.fstype == 'cgroup' and 'memory' in part.opts.split(',')]
    second = [pathlib.Path(part.mountpoint) for part in mounts
              if part.fstype == 'cgroup2']
    return first[:1], second[:1]
