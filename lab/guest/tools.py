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

"""Running the programs that build a guest."""

from collections.abc import Sequence
import os
import subprocess

from lab import errors


class GuestBuildError(errors.LabError):
    """The guest cannot be built; the message says why."""


def run(*argv: str | os.PathLike[str], stdin: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None) -> str:
    """Run a program to its end and return its output.

    :raises GuestBuildError: it is not installed, or failed; has its
        standard error
    """
    # A plain "su" leaves the administrator's programs out of PATH.
    env = dict(os.environ, LC_ALL='C',
               PATH=os.environ.get('PATH', '') + ':/usr/sbin:/sbin:/bin')
    if isinstance(stdin, str):
        stdin = stdin.encode()
    try:
        done = subprocess.run(argv, input=stdin, cwd=cwd, env=env,
                              capture_output=True)
    except FileNotFoundError as e:
        raise GuestBuildError(
            f'{argv[0]} is not installed; bindep.txt lists the packages '
            f'that the lab needs') from e
    if done.returncode:
        raise GuestBuildError(
            f'{_line(argv)} failed with status {done.returncode}: '
            f'{done.stderr.decode(errors="replace").strip()}')
    return done.stdout.decode(errors='replace')


def _line(argv: Sequence[str | os.PathLike[str]]) -> str:
    return ' '.join(os.fspath(arg) for arg in argv)
