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

"""What the device tests share: images, mounts, emulators and drivers."""

from collections.abc import Callable
from concurrent import futures
import contextlib
import os
import pathlib
import re
import shutil
import tempfile
import time
import typing as ty

from oslotest import base
import testtools

from lab import guest
from lab.machine import emulators
from lab.machine import loop
from lab import paths
from lab import wait
from tests.device import backing
from tests.device import driver
from tests.device import emulator

MIB = 1 << 20
PAGE = 4096
SIZE = 16 * MIB

#: The newest machine types that both versions have.
Q35 = 'pc-q35-7.2'
I440FX = 'pc-i440fx-7.2'

#: The versions of QEMU to test, unless the environment names others.
VERSIONS = os.environ.get('FAKEDAX_TEST_QEMUS', '10.0 7.2').split()

#: For testscenarios: every test runs on each version.
EACH_VERSION = [(version, {'version': version}) for version in VERSIONS]


class DeviceTestCase(base.BaseTestCase):
    """A test of the device, without a guest and without OpenStack."""

    version = '10.0'

    def setUp(self) -> None:
        super().setUp()
        # Short: the path of a UNIX socket has at most 107 bytes.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='device-'))
        self.addCleanup(shutil.rmtree, self.directory)
        self.image = self.directory / 'image'
        self._backings: list[backing.BackingFile] = []
        self._threads = futures.ThreadPoolExecutor()
        self.addCleanup(self._threads.shutdown)

    def binary(self) -> str:
        return emulators.project(self.version)

    def make_image(self, size: int = SIZE) -> pathlib.Path:
        with self.image.open('wb') as file:
            file.write(b'A' * size)
        return self.image

    def put_image_on_disk(self) -> None:
        """Have the image where pages become dirty and files have holes.

        Temporary files may be in RAM.
        """
        directory = pathlib.Path(tempfile.mkdtemp(dir=paths.STATE))
        self.addCleanup(shutil.rmtree, directory)
        self.image = directory / 'image'

    def make_guest_image(self, size: int) -> guest.Guest:
        """Make an image of this size, with the test guest's root on it."""
        built = guest.build()
        built.copy_disk(self.image)
        os.truncate(self.image, size)
        return built

    def mount(self, name: str = 'host') -> backing.BackingFile:
        """Mount the image once more, with its own page cache."""
        if not self.image.exists():
            self.make_image()
        mounted = backing.BackingFile(self.image, self.directory / name)
        self._backings.append(mounted)
        self.addCleanup(mounted.close)
        return mounted

    def attach(self, file: pathlib.Path) -> pathlib.Path:
        """Make a file a block device until the test ends; return its node."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(loop.device(file))

    def start_vm(
        self,
        path: str | os.PathLike[str],
        *extra: str,
        name: str = 'qemu',
        binary: str | None = None,
        machine: str = Q35,
        memdev: str = 'share=on',
        device: str = '',
        size: int = SIZE,
        environment: ty.Mapping[str, str] | None = None,
    ) -> emulator.Emulator:
        """Start a QEMU whose device ``pmem0`` maps the file at ``path``.

        :param extra: further options of QEMU
        :param memdev: properties of the memory backend
        :param device: properties of the device
        """
        started = emulator.Emulator(
            binary or self.binary(),
            self.directory,
            name,
            [
                # RAM comes first, as with libvirt: when QEMU 10.0 migrates
                # under TCG, it takes an offset in a RAM block for an offset
                # in all of RAM (cpu_physical_memory_sync_dirty_bitmap()).
                *('-object', 'memory-backend-ram,id=ram,size=128M'),
                *('-machine', f'{machine},memory-backend=ram'),
                *('-m', '128M,maxmem=1G'),
                '-object',
                'memory-backend-file,id=mem0,mem-path='
                f'{os.fspath(path)},size={size},{memdev}',
                '-device',
                'virtio-pmem-pci,memdev=mem0,id=pmem0,addr=0x10'
                + (device and f',{device}'),
                *extra,
            ],
            environment,
        )
        self.addCleanup(self._end, started)
        return started

    def _end(self, started: emulator.Emulator) -> None:
        self.addDetail(
            started.name, testtools.content.text_content(started.log())
        )
        # While its sync is held, QEMU cannot be killed.
        for mounted in self._backings:
            mounted.release()
        started.close()

    def bring_up(
        self, started: emulator.Emulator, *features: int
    ) -> driver.PmemDriver:
        """Bring the device up, and return its driver."""
        made = driver.PmemDriver(started.qtest)
        made.map()
        made.start(*features)
        return made

    def background(
        self, function: Callable[..., ty.Any], *args: ty.Any, **kwargs: ty.Any
    ) -> futures.Future[ty.Any]:
        """Call, in a thread, a function that may block."""
        return self._threads.submit(function, *args, **kwargs)

    def assertPending(
        self, future: futures.Future[ty.Any], seconds: float = 0.5
    ) -> None:
        """Assert that a call does not return by itself."""
        done, _ = futures.wait([future], seconds)
        if done:
            self.fail(f'ended at once: {future.exception()} '
                      f'{future.result()}')

    def assertNoAnswer(
        self, pmem: driver.PmemDriver, seconds: float = 0.3
    ) -> None:
        """Assert that no request is answered."""
        time.sleep(seconds)
        self.assertEqual([], pmem.completed())

    def submit_held(
        self, mounted: backing.BackingFile, pmem: driver.PmemDriver
    ) -> int:
        """Submit a flush, and hold its sync once it has begun."""
        mounted.hold()
        begun = mounted.begun
        head = pmem.submit()
        mounted.wait(lambda: mounted.begun == begun + 1)
        return head

    def incoming(
        self, path: str | os.PathLike[str], name: str, *extra: str,
        **kwargs: ty.Any
    ) -> emulator.Emulator:
        """Start a QEMU that waits for a migration by :meth:`migrate`."""
        return self.start_vm(
            path, '-incoming', f'unix:{self.directory}/{name}.mig', *extra,
            name=name, **kwargs)

    def migrate(
        self, source: emulator.Emulator, destination: str,
        return_path: bool = True
    ) -> dict[str, ty.Any]:
        """Migrate to the QEMU of that name; return how it ended.

        :param return_path: whether the destination reports a failure to the
            source; libvirt sets this
        """
        source.qmp.cmd('migrate-set-capabilities', capabilities=[
            {'capability': 'return-path', 'state': return_path}])
        source.qmp.cmd('migrate', uri=self.uri(destination))
        return source.wait_migrated()

    def uri(self, name: str) -> str:
        return f'unix:{self.directory}/{name}.mig'

    def wait_status(
        self, started: emulator.Emulator, status: str, timeout: float = 20
    ) -> None:
        """Wait until the guest of an emulator is in a state."""
        def seen() -> str:
            return started.qmp.cmd('query-status')['status']

        wait.until(f'{started.name} to be {status}', lambda: seen() == status,
                   timeout, interval=0.02, state=seen)

    def wait_log(
        self, started: emulator.Emulator, expression: str,
        timeout: float = 20
    ) -> None:
        """Wait until the log of an emulator matches an expression."""
        wait.until(f'{expression!r} in the log of {started.name}',
                   lambda: re.search(expression, started.log()), timeout,
                   interval=0.05, state=started.log)

    def assertNamesBackendOnce(
        self, started: emulator.Emulator, message: str
    ) -> None:
        """Assert that a message in the log names the backend exactly once."""
        lines = [line for line in started.log().splitlines()
                 if message in line]
        self.assertNotEqual([], lines, started.log())
        for line in lines:
            self.assertEqual(1, line.count("memory backend 'mem0'"), line)

    def memaddr(self, started: emulator.Emulator, name: str = 'pmem0') -> int:
        """The address of a device's image in the guest's physical memory."""
        (address,) = [
            int(info['data']['memaddr'])
            for info in started.qmp.cmd('query-memory-devices')
            if info['data']['id'] == name]
        return address
