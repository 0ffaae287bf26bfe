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

"""Progress that a person can follow: one line for each step."""

from collections.abc import Iterator
import contextlib
import sys
import time

_START = time.monotonic()


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Print ``what``, then how many seconds it took or that it failed.

    A terminal shows the line when the step begins, and completes it at the
    end. Elsewhere the line is printed at the end, in one piece.
    """
    tty = sys.stdout.isatty()
    if tty:
        print(f'{_elapsed()} {what} ...', end='', flush=True)
    started = time.monotonic()
    outcome = 'failed after'
    try:
        yield
        outcome = 'done in'
    finally:
        took = f'{outcome} {time.monotonic() - started:.1f} s'
        if tty:
            print(f' {took}', flush=True)
        else:
            print(f'{_elapsed()} {what}: {took}', flush=True)


def say(what: str) -> None:
    """Print a line between the steps."""
    print(f'{_elapsed()} {what}', flush=True)


def _elapsed() -> str:
    return f'[{time.monotonic() - _START:6.1f} s]'
