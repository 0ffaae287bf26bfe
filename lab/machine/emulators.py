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

"""The QEMUs that guests run on: with our device, or with QEMU's own."""

import functools
import os
import shutil
import subprocess

from lab import errors
from lab import paths

_BUILD = paths.ROOT / 'qemu-device/build'

#: What a host's guests can run on: our device in a release of QEMU, or
#: Debian's QEMU as it is installed. The first is the default.
CHOICES = ('10.0', '10.2', '7.2', 'debian')

# A test's home directory is not the user's.
_ENVIRONMENT = os.environ | {'XDG_CACHE_HOME': str(paths.CACHE.parent)}


class EmulatorError(errors.LabError):
    """An emulator cannot be built, or is not installed."""


@functools.cache
def build(*options: str) -> str:
    """Build an emulator unless the cache has it; return its path.

    :param options: those of qemu-device/build
    :raises EmulatorError: it cannot be built; says why
    """
    done = subprocess.run(
        ['nice', str(_BUILD), *options], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT)
    if done.returncode:
        raise EmulatorError(
            f'qemu-device/build {" ".join(options)}: {done.stderr}')
    return done.stdout.strip()


def project(version: str = '10.0') -> str:
    """QEMU with our device; ``10.2-series`` with the patches for upstream.

    :raises EmulatorError: it cannot be built
    """
    version, _, series = version.partition('-')
    return build('--version', version, *([f'--{series}'] if series else []))


def stock(version: str) -> str:
    """QEMU as Debian has it; ``installed`` for the one of this machine.

    :raises EmulatorError: it cannot be built, or none is installed
    """
    if version != 'installed':
        return build('--version', version, '--stock')
    found = shutil.which('qemu-system-x86_64')
    if not found:
        raise EmulatorError('no qemu-system-x86_64: install qemu-system-x86')
    return found


def chosen(choice: str) -> str:
    """The emulator for one of :data:`CHOICES`; empty for libvirt's default.

    :raises EmulatorError: it cannot be built
    """
    return '' if choice == 'debian' else project(choice)
