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

"""Build the test guest: ``python -m lab.guest [--output DIR]``."""

import pathlib

import click

from lab import guest
from lab.guest import image
from lab.guest import tools


@click.command()
@click.option('--output', metavar='DIR',
              type=click.Path(file_okay=False, path_type=pathlib.Path),
              help='Copy kernel, initrd and disk there.')
@click.option('--size', metavar='MIB', type=int, default=image.SIZE_MIB,
              show_default=True, help='Size of the disk image.')
def main(output: pathlib.Path | None, size: int) -> None:
    """Build the test guest unless the cache has it; print its files."""
    built = guest.build(size)
    for path in (built.kernel, built.initrd, built.disk):
        if output:
            output.mkdir(parents=True, exist_ok=True)
            # Python's copy would fill the holes of the disk.
            tools.run('cp', '--sparse=always', path, output / path.name)
            path = output / path.name
        print(path)


main(prog_name='python -m lab.guest')
