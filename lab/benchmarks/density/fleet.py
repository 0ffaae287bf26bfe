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

"""Guests of one host: their memory, and the work that they do."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import statistics
import threading
from typing import TypeVar

import psutil

from lab.benchmarks.density import host
from lab.benchmarks.density import modes
from lab.benchmarks import results
from lab import errors
from lab import guest
from lab.machine import cgroup
from lab.machine import pagecache
from lab.machine import qemu

#: The kernel ends QEMU where it panics.
_ARGUMENTS = 'panic=-1'
#: TCG with 32 MiB of translated code; without a size, what a guest has used of
#: it would be counted as its memory.
_ACCELERATORS = {False: 'tcg,tb-size=32', True: 'kvm'}
#: prctl(2).
_PR_SET_THP_DISABLE = 41
_LOG = '/run/work'
_STOP_WORK = 'kill $(cat /run/worker); rm -f /run/worker'
#: Seconds until a guest has booted, however busy its host is.
_PATIENCE = 300
#: Seconds until it answers; if it takes longer, it has done nothing.
_ANSWER_SECONDS = 30
#: Guests that boot, or read their data, at a time. More of them get no more of
#: the processors, and each takes longer.
_AT_ONCE = 2 * (os.cpu_count() or 1)
#: Swap is the whole machine's: one fleet at a time is asked for all it has.
_TAKING = threading.Lock()

_Item = TypeVar('_Item')


class Accelerator:
    """How the vCPUs of all guests run."""

    kvm = False

    @classmethod
    def option(cls) -> str:
        """The value of QEMU's ``-accel``."""
        return _ACCELERATORS[cls.kvm]


def avoid_huge_pages() -> None:
    """For this process and those that it starts.

    Whether the host has any free is chance.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(
            _PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), 'prctl')


@contextlib.contextmanager
def boot(mode: modes.Mode, image: pathlib.Path, ram_mib: int,
         group: cgroup.MemoryGroup | None = None,
         extra: Sequence[str] = (),
         seconds: float = _PATIENCE) -> Iterator[qemu.Machine]:
    """A guest that has booted, from an image that is not cached.

    :param seconds: that the boot may take
    :raises errors.LabError: it does not boot
    """
    built = guest.build()
    pagecache.evict(image)
    with qemu.Machine(
            *qemu.direct_kernel(built.kernel, built.initrd,
                                f'{guest.COMMAND_LINE} {_ARGUMENTS}'),
            '-no-reboot', *mode.options(image), *extra, memory_mib=ram_mib,
            emulator=mode.emulator(), accelerator=Accelerator.option(),
            prefix=group.prefix() if group else ()) as machine:
        machine.wait_console('^GUEST-(READY|FAILED)', seconds)
        machine.agent.wait_ready(seconds)
        yield machine


def processor_seconds(machine: qemu.Machine) -> float:
    """Of QEMU, its guest included."""
    times = psutil.Process(machine.pid).cpu_times()
    return float(times.user + times.system)


@dataclasses.dataclass(frozen=True)
class Work:
    """What guests did for some seconds.

    :ivar rates: reads a second of each that had to work
    :ivar p99_ms: of a read, in the guest in the middle
    :ivar longest_ms: of all reads of all guests
    :ivar stalled: the share of the time in which some process waited for
        memory; None if the kernel does not tell
    """

    rates: list[float]
    p99_ms: float
    longest_ms: float
    stalled: float | None


def start_work(machine: qemu.Machine, data: str, mib: int,
               rate: int) -> None:
    """Have a guest read at random from the first MiB of a file."""
    machine.agent.run(
        f'{_STOP_WORK}; rm -f {_LOG}; '
        f'setsid probe work {data} {mib} {rate} {_LOG} '
        '< /dev/null > /dev/null 2>&1 & echo $! > /run/worker', check=True,
        timeout=_ANSWER_SECONDS)


def rest(machines: Sequence[qemu.Machine]) -> None:
    """Stop the work of all, but for those that do not answer."""
    def stop(machine: qemu.Machine) -> None:
        with contextlib.suppress(errors.LabError):
            machine.agent.run(_STOP_WORK, timeout=_ANSWER_SECONDS)

    with futures.ThreadPoolExecutor(max(len(machines), 1)) as pool:
        list(pool.map(stop, [machine for machine in machines
                             if machine.runs]))


def done_work(machine: qemu.Machine, seconds: int) -> list[list[int]]:
    """Reads a second, p99 and the longest in us, of the last seconds.

    Fewer than ``seconds`` where a read took longer than one.
    """
    text = machine.agent.run(f'tail -n {seconds} {_LOG}', check=True,
                             timeout=_ANSWER_SECONDS).stdout
    return [[int(word) for word in line.split()]
            for line in text.splitlines()]


@dataclasses.dataclass(frozen=True)
class Guest:
    """A guest that runs.

    :ivar end: ends it
    """

    image: pathlib.Path
    machine: qemu.Machine
    end: contextlib.ExitStack


def for_each(function: Callable[[_Item], None],
             items: Sequence[_Item]) -> list[errors.LabError]:
    """Call a function for some items at a time, until it fails for one.

    What a call may take does not grow with the number of items, then.

    :returns: why it failed, for those that were at the same time as well
    """
    failed: list[errors.LabError] = []

    def call(item: _Item) -> None:
        if failed:
            return
        try:
            function(item)
        except errors.LabError as e:
            failed.append(e)

    with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(call, items))
    return failed


class Fleet:
    """Guests of one kind on a host with so much memory.

    :param budget_mib: RAM for guests and their page cache, compressed pages
        included
    :param boot_seconds: that the boot of a guest may take
    :param late_swap: whether the machine has swap only while :meth:`take_all`
        takes what is there, so that fleets can be measured side by side
    """

    def __init__(self, mode: modes.Mode, budget_mib: int | None,
                 boot_seconds: float = _PATIENCE,
                 late_swap: bool = False) -> None:
        self._mode = mode
        self._late_swap = late_swap
        self._boot_seconds = boot_seconds
        self._budget = None if budget_mib is None else budget_mib << 20
        self.guests: list[Guest] = []

    def __enter__(self) -> 'Fleet':
        with contextlib.ExitStack() as stack:
            self._swap = stack.enter_context(host.swap(
                '' if self._late_swap else self._mode.swap))
            stack.enter_context(host.ksm(self._mode.ksm))
            self.group = stack.enter_context(
                cgroup.MemoryGroup(self._budget, bool(self._mode.swap)))
            stack.enter_context(self.group.counted())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for each in list(self.guests):
            self.take_away(each)
        self._stack.close()

    def add(self, found: Sequence[pathlib.Path],
            ram_mib: int) -> list[errors.LabError]:
        """Boot guests; return why one of them did not.

        Those after it are not started.
        """
        return for_each(lambda image: self._add(image, ram_mib), found)

    def _add(self, image: pathlib.Path, ram_mib: int) -> None:
        with contextlib.ExitStack() as stack:
            machine = stack.enter_context(
                boot(self._mode, image, ram_mib, self.group,
                     seconds=self._boot_seconds))
            self.guests.append(Guest(image, machine, stack.pop_all()))

    def boot(self, image: pathlib.Path, ram_mib: int) -> qemu.Machine:
        """The only guest of a fleet.

        :raises errors.LabError: it does not boot; says why
        """
        for error in self.add([image], ram_mib):
            raise error
        return self.guests[0].machine

    def take_away(self, one: Guest) -> None:
        self.guests.remove(one)
        one.end.close()

    def killed(self) -> list[Guest]:
        """The guests that the kernel has ended, for want of memory."""
        return [each for each in self.guests if not each.machine.runs]

    def charged_bytes(self) -> int:
        """RAM that guests and their page cache take, compressed pages too."""
        return self.group.usage() + self._swap.memory_bytes()

    def take_all(self) -> results.Sample:
        """What is left when the host has taken back all it can, in MiB.

        ``left_mib``: of RAM, compressed pages included; ``written_mib``: to
        swap.
        """
        kind = self._mode.swap if self._late_swap else ''
        with _TAKING, host.swap(kind) as swap:
            before = host.swapped_out_bytes()
            self.group.reclaim(self.group.usage())
            return {'left_mib': (self.charged_bytes() + swap.memory_bytes())
                    / (1 << 20),
                    'written_mib': (host.swapped_out_bytes() - before)
                    / (1 << 20)}

    def balance(self) -> bool:
        """Charge the guests for what their swapped pages take of RAM.

        :returns: whether they can do with what is left
        """
        if self._budget is None or not self._swap.memory_bytes():
            return True
        try:
            self.group.set_limit(
                max(self._budget - self._swap.memory_bytes(), 64 << 20))
        except OSError:
            return False
        return True


def work(machines: Sequence[qemu.Machine], seconds: int,
         stalled: float | None) -> Work:
    """What machines have done in the last seconds.

    :param stalled: seconds in which some process has waited meanwhile
    """
    with futures.ThreadPoolExecutor(max(len(machines), 1)) as pool:
        found = list(pool.map(lambda machine: _done(machine, seconds),
                              machines))
    return Work(
        rates=[sum(line[0] for line in lines) / seconds for lines in found],
        p99_ms=statistics.median(
            max((line[1] for line in lines), default=seconds * 10 ** 6)
            for lines in found) / 1000,
        longest_ms=max(max((line[2] for line in lines),
                           default=seconds * 10 ** 6)
                       for lines in found) / 1000,
        stalled=None if stalled is None else min(stalled / seconds, 1))


def _done(machine: qemu.Machine, seconds: int) -> list[list[int]]:
    try:
        return done_work(machine, seconds)
    except errors.LabError:
        return []
