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

"""What the tests of this project share."""

import os
import subprocess
import typing as ty
import unittest

import fixtures
from nova import conf as nova_conf
from nova import privsep as nova_privsep
from oslo_config import fixture as config_fixture

from nova_fakedax import privsep

#: An instance.
UUID = '4f3a9b0e-6c1d-4f6e-9d3a-0c2b1e5d7f88'

#: What QEMU prints, for all questions at once: the properties of its device
#: and its machine types. Every guest of Nova's fake libvirt is a pc-0.12.
HELP = """\
virtio-pmem-pci options:
  memdev=<link<memory-backend>>
Supported machines are:
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)
pc-q35-10.0          Standard PC (Q35 + ICH9, 2009)
pc-0.12              Standard PC (i440FX + PIIX, 1996)
"""


#: The same for a device that migrates.
MIGRATING_HELP = HELP + """\
  cache-dropped=<uint64>
  cache-left=<uint64>
  drop-cache=<bool>
  last-error=<uint64>
"""


class EmulatorFixture(fixtures.Fixture):
    """A program that answers as QEMU does when asked what it can do.

    :ivar path: where it is
    """

    def _setUp(self) -> None:
        directory = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(directory, 'qemu')
        self._log = os.path.join(directory, 'calls')
        self.answer(HELP)

    def answer(self, text: str, status: int = 0) -> None:
        """Replace the program by one that prints a text and exits."""
        with open(self.path, 'w') as script:
            script.write(f"#!/bin/sh\necho \"$*\" >>'{self._log}'\n"
                         f"cat <<'EOF'\n{text}EOF\nexit {status}\n")
        os.chmod(self.path, 0o755)

    def calls(self) -> list[str]:
        """The arguments of each call."""
        with open(self._log) as log:
            return log.read().splitlines()


class ConfFixture(fixtures.Fixture):
    """Nova's configuration, with instances in a directory of their own.

    :ivar instances_path: that directory
    """

    def _setUp(self) -> None:
        self.instances_path = self.useFixture(fixtures.TempDir()).path
        self._config = self.useFixture(
            config_fixture.Config(nova_conf.CONF))
        self.config(instances_path=self.instances_path)

    def config(self, **options: ty.Any) -> None:
        """Override options, of the group that is given as ``group``."""
        self._config.config(**options)


class XfsFixture(fixtures.Fixture):
    """Mounts a file system that clones files.

    :param directory: where
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._directory = directory

    def _setUp(self) -> None:
        device = self.useFixture(fixtures.TempDir()).join('xfs')
        with open(device, 'wb') as file:
            # The least that mkfs.xfs takes.
            file.truncate(300 << 20)
        subprocess.run(['mkfs.xfs', '-q', '-m', 'reflink=1', device],
                       check=True)
        done = subprocess.run(
            ['mount', '-o', 'loop', device, self._directory],
            capture_output=True, text=True)
        if done.returncode:
            raise unittest.SkipTest(
                f'no XFS can be mounted here: {done.stderr}')
        self.addCleanup(
            subprocess.run, ['umount', self._directory], check=True)


def shares_blocks(path: str) -> bool:
    """Whether a file shares blocks with another, as the kernel says."""
    extents = subprocess.run(['filefrag', '-s', '-v', path], check=True,
                             capture_output=True, text=True).stdout
    return 'shared' in extents


class PrivsepFixture(fixtures.Fixture):
    """Does in this process what a daemon would do as root."""

    def _setUp(self) -> None:
        for context in (privsep.fakedax_pctxt, nova_privsep.sys_admin_pctxt):
            self.useFixture(fixtures.MockPatchObject(
                context, 'client_mode', False))
