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

"""``lab/bench``: the benchmarks."""

import signal

import click

from lab.benchmarks import boot
from lab.benchmarks import density
from lab.benchmarks import downtime
from lab.benchmarks import flush
from lab.benchmarks import migrate
from lab.benchmarks import ram
from lab.benchmarks import spawn


@click.group(context_settings={'help_option_names': ['-h', '--help']})
def main() -> None:
    """Benchmarks, each of which compares kinds of disk in one run.

    Figures go to .lab/bench/. Look at the ratios: absolute times say little
    on a shared machine. A benchmark that needs the lab's cloud starts it if
    it is down, and leaves it as it was.
    """
    # A benchmark that is told to end takes down what it has started, also
    # where a shell has started it in the background, without SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_interrupt)


def _raise_interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


main.add_command(boot.boot)
main.add_command(density.density)
main.add_command(downtime.downtime)
main.add_command(flush.flush)
main.add_command(migrate.migrate)
main.add_command(ram.ram)
main.add_command(spawn.spawn)


if __name__ == '__main__':
    main(prog_name='lab/bench')
