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

"""Flushes under every fault at once: ``python -m tests.paravirt.stress``."""

from collections.abc import Callable
import errno
import random
import re
import sys
import time

import click

from lab.guest import image
from lab import paths
from tests.paravirt import committing
from tests.paravirt import flushing

TASKS = 64

#: The console of a guest that has failed.
CONSOLE = paths.STATE / 'stress-console.txt'

#: What a kernel says when something is wrong with it or with a module.
#: Findings of lockdep and KASAN begin with one of the first two.
_COMPLAINTS = re.compile(
    r'WARNING:|BUG:|BUG kmalloc|Oops:|UBSAN:|blocked for more than|'
    r'unreferenced object|general protection|Redzone')


class Stress:
    """A guest, its tasks that flush, and the faults that they meet.

    :param count: how many flushes of all tasks must succeed
    :param say: called with the name of each fault
    """

    def __init__(self, running: flushing.Flushing, count: int,
                 say: Callable[[str], None]) -> None:
        self._running = running
        self._count = count
        self._say = say
        self.faults: dict[str, int] = {}

    def run(self) -> dict[str, int]:
        """Make faults until all tasks have ended; return what they report.

        :raises AgentTimeoutError: the driver cannot be unloaded, because a
            completion was lost
        :raises AssertionError: the kernel complains
        """
        running = self._running
        running.run(f"probe hammer '{flushing.ANY_PMEM}' {TASKS} "
                    f'{self._count} > /run/hammer 2>&1 &')
        faults: dict[str, tuple[Callable[[], None], int]] = {
            'slow': (self._slow, 2),
            'stop': (self._stop, 1),
            'error': (self._error, 1),
            'broken': (self._broken, 1),
            'bind': (running.bind_again, 1),
            'load': (running.load_again, 1),
            'suspend': (self._suspend, 1),
        }
        names: list[str] = []
        while not self._ended():
            if not names:
                # Every fault has its turn.
                names = [name for name, (_, weight) in faults.items()
                         for _ in range(weight)]
                random.shuffle(names)
            name = names.pop()
            self._say(f'{name}, after {running.flush("flushes")} flushes')
            faults[name][0]()
            self.faults[name] = self.faults.get(name, 0) + 1
            time.sleep(random.uniform(0, 2))
        self.assert_quiet()
        # Nothing uses the driver now, so nothing of it may be left.
        running.load_again()
        self.assert_quiet()
        return {key: int(value) for key, value in re.findall(
            r'(\w+)=(\d+)', running.run('cat /run/hammer'))}

    def assert_quiet(self) -> None:
        """Look for complaints in the kernel's log, and for leaks.

        :raises AssertionError: with what was found
        """
        running = self._running
        running.run('mount -t debugfs none /sys/kernel/debug 2>/dev/null; '
                    'leaks=/sys/kernel/debug/kmemleak; '
                    # kmemleak must see an object unreferenced twice.
                    'if [ -e $leaks ]; then echo scan > $leaks; sleep 6; '
                    'echo scan > $leaks; cat $leaks > /dev/kmsg; fi',
                    timeout=600)
        found = [line for line in running.log().splitlines()
                 if _COMPLAINTS.search(line)]
        if found:
            raise AssertionError('\n'.join(found) + '\n' + running.log())

    def _ended(self) -> bool:
        return 'ended=' in self._running.run('cat /run/hammer')

    def _mend(self) -> None:
        """Once the driver has failed, do what an operator would do."""
        self._running.wait('grep -qx 1 /sys/bus/virtio/drivers/virtio_pmem/'
                           'virtio*/flush/failed', timeout=120)
        self._running.bind_again()

    def _error(self) -> None:
        self._running.backing.fail(errno.EIO)
        if not self._ended():
            self._mend()
        self._running.backing.fail_always(0)

    def _broken(self) -> None:
        self._running.break_queue()
        # The driver may have added a request meanwhile, which mends the queue.
        time.sleep(1)
        if self._running.flush('failed'):
            self._running.bind_again()

    def _slow(self) -> None:
        self._running.backing.hold()
        time.sleep(random.uniform(0, 1))
        self._running.backing.release()

    def _stop(self) -> None:
        self._running.machine.qmp('stop')
        time.sleep(random.uniform(0, 0.5))
        self._running.machine.qmp('cont')

    def _suspend(self) -> None:
        self._running.suspend()
        self._running.resume()


def stress(kernel_package: str, count: int,
           say: Callable[[str], None]) -> tuple[dict[str, int],
                                                dict[str, int]]:
    """Make so many flushes on a device that forgets errors.

    :returns: what the tasks report, and how often each fault was made
    :raises AssertionError: something is wrong; with the kernel's log
    """
    debug = kernel_package == image.DEBUG_KERNEL
    with flushing.Flushing(
            kernel_package, stock=True, processors=2,
            memory_mib=1024 if debug else 256,
            command_line='' if debug else 'slub_debug=FZPU') as running:
        run = Stress(running, count, say)
        try:
            return run.run(), run.faults
        except Exception:
            CONSOLE.parent.mkdir(exist_ok=True)
            CONSOLE.write_text(running.machine.console())
            say(f'the guest\'s console is in {CONSOLE}')
            raise


@click.command()
@click.option('--flushes', default=100_000, show_default=True,
              type=click.IntRange(min=TASKS),
              help='How many flushes must succeed.')
@click.option('--kernel', default=image.DEBUG_KERNEL, show_default=True,
              type=click.Choice([image.DEBUG_KERNEL, *committing.KERNELS]),
              help='"debug" is one with KASAN, kmemleak and lockdep.')
@click.option('--seed', default=1, show_default=True,
              help='The seed of the faults.')
def main(flushes: int, kernel: str, seed: int) -> None:
    """Flush from 64 tasks under faults of all kinds, in random order.

    The faults are slow syncs, errors, a broken queue, a driver that is bound
    again or loaded again, a machine that is stopped, and suspends. At the end
    all tasks must have ended, and the kernel must not have complained.
    """
    random.seed(seed)
    package = (kernel if kernel == image.DEBUG_KERNEL
               else committing.package(kernel))
    started = time.monotonic()

    def say(text: str) -> None:
        print(f'[{time.monotonic() - started:7.1f} s] {text}', flush=True)

    seen, faults = stress(package, flushes, say)
    say(f'tasks: {seen}; faults: {faults}')
    if seen['ended'] != TASKS:
        sys.exit(f'{TASKS - seen["ended"]} tasks did not end well')


if __name__ == '__main__':
    main(prog_name='python -m tests.paravirt.stress')
