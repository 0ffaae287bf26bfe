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

"""A guest that commits to a disk whose power is cut."""

from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
import time

from lab import guest
from lab.guest import debian
from lab.machine import emulators
from lab.machine import qemu
from lab import wait
from tests.paravirt import disk
from tests.paravirt import verdict

#: The packages of kernels, by their names in tables. Debian 13 has only the
#: second.
KERNELS = {
    '6.1': 'linux-image-cloud-amd64',
    '6.12': 'linux-image-6.12-cloud-amd64',
}

#: Whether a driver, by its name in tables, is that of guest-image-elements.
DRIVERS = {'kernel': False, 'fakedax': True}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is under test.

    :ivar kind: the kind of disk: ``pmem``, or ``blk`` for virtio-blk with a
        write-back cache, which does not use our driver
    """

    kernel: str
    driver: str
    system: str
    kind: str = 'pmem'

    def guest(self) -> guest.Guest:
        return guest.build(
            kernel_package=package(self.kernel),
            with_driver=DRIVERS[self.driver],
            extra_modules=['xfs'] if self.system == 'xfs' else [])


def package(kernel: str) -> str:
    """The package of that kernel here; on Debian 13, 6.12 is the default.

    :raises GuestBuildError: this release of Debian has none
    """
    name = KERNELS[kernel]
    default = debian.kernel(KERNELS['6.1'])
    if default.startswith(f'linux-image-{kernel}.'):
        return default
    if kernel == '6.1':
        raise guest.GuestBuildError(
            f'no kernel {kernel}: apt has {default} for {name}')
    return name


class Committing:
    """A guest that commits to a disk, from the start of a ``with`` block.

    :ivar disk: the disk whose power is cut
    :ivar machine: the machine that the guest runs in
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.system = verdict.FILE_SYSTEMS[setup.system]
        self._guest = setup.guest()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> 'Committing':
        with contextlib.ExitStack() as stack:
            self._directory = pathlib.Path(tempfile.mkdtemp(prefix='crash-'))
            stack.callback(shutil.rmtree, self._directory)
            image = self._directory / 'image'
            self.system.make(image)
            self.disk = disk.Disk(image, self._directory)
            stack.callback(self.disk.close)
            self.machine = stack.enter_context(self._machine())
            # While its sync is held, QEMU cannot be killed.
            stack.callback(self.disk.backing.release)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _machine(self) -> qemu.Machine:
        root = self._directory / 'root'
        disk.copy(self._guest.disk, root)
        disks = [*qemu.virtio_blk(root)]
        if self.setup.kind == 'pmem':
            disks += qemu.pmem(self.disk.path, 'data')
        else:
            disks += qemu.virtio_blk(self.disk.path, 'data', boot_index=3)
        return qemu.Machine(
            *qemu.direct_kernel(self._guest.kernel, self._guest.initrd,
                                guest.COMMAND_LINE),
            *disks, '-serial', f'file:{self._log}',
            emulator=emulators.project())

    @property
    def _log(self) -> pathlib.Path:
        return self._directory / 'acks'

    def _start(self) -> None:
        self.machine.agent.wait_ready()
        name, option = (('pmem0', '-o dax=always')
                        if self.setup.kind == 'pmem' else ('vdb', ''))
        self.machine.agent.run(
            f'mkdir -p /mnt/data && mount -t {self.system.kind} {option} '
            f'/dev/{name} /mnt/data', check=True)
        self.machine.agent.run(
            f'probe commit /mnt/data {verdict.TASKS} /dev/ttyS1 '
            '>/run/commit 2>&1 &', check=True)
        wait.until('each task to commit',
                   lambda: len(self.acks()) == verdict.TASKS, 60,
                   interval=0.05, state=self.errors)

    def errors(self) -> str:
        """What the guest says of what went wrong."""
        said = self.machine.agent.run('cat /run/commit; dmesg | tail').stdout
        return said + self.machine.errors()

    def version(self) -> str:
        """The driver's version; the kernel's own has none."""
        return self.machine.agent.run(
            'cat /sys/module/nd_virtio/version').stdout.strip()

    def acks(self) -> dict[int, int]:
        """The last generation that each task has acknowledged."""
        return verdict.acknowledged(self._log.read_text(errors='replace'))

    @contextlib.contextmanager
    def cut(self, syncs: int, seconds: float) -> Iterator[disk.Cut]:
        """Cut the power with a sync under way.

        :param syncs: how many other syncs may end before
        :param seconds: how long the guest runs on while the sync is held
        """
        self.disk.hold(syncs)
        time.sleep(seconds)
        try:
            with self.disk.cut(self.machine) as cut:
                yield cut
        finally:
            self.disk.backing.release()

    def crash(self, cut: disk.Cut, kept: dict[int, bytes]
              ) -> tuple[verdict.Verdict, list[str]]:
        """Judge what a cut leaves if the host has written these pages."""
        image = self._directory / 'crashed'
        cut.image(image, kept)
        return verdict.judge(image, self.system, self._guest.probe,
                             self.acks())
