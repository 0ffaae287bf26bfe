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

"""Two compute hosts, each with its own libvirt, without OpenStack.

They are the lab's hosts, in directories of the test. Each is a set of
namespaces, so everything on a host ends with the test, however that ends. They
listen on UNIX sockets only.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import threading
import time
import typing as ty

import libvirt
import psutil

from lab.deploy import config
from lab.deploy import host

_READY_SECONDS = 60

#: The first process of the namespaces: it must reap the emulators, whose
#: parent exits as soon as they run.
_FIRST = """
for mount in "$@"; do
    mount --bind "${mount#*=}" "${mount%=*}"
done
LD_PRELOAD=$LIBVIRTD_PRELOAD libvirtd --pid-file /run/libvirt/libvirtd.pid &
wait
"""


@dataclasses.dataclass(frozen=True)
class Host(host.Host):
    """One of two hosts, in a directory of its own.

    :param directory: its path must be short, because it has UNIX sockets
    """

    directory: pathlib.Path

    @property
    def state(self) -> pathlib.Path:
        return self.directory / self.name

    @property
    def uri(self) -> str:
        return f'qemu+unix:///system?socket={self.state}/run/libvirt-sock'

    @property
    def pid_file(self) -> pathlib.Path:
        return self.state / 'pid'

    @property
    def console(self) -> pathlib.Path:
        """The directory that the host has as /var/log/libvirt/console."""
        return self.state / 'log/console'

    def log(self, domain: str) -> str:
        """QEMU's log of a domain, from /var/log/libvirt/qemu."""
        return (self.state / f'log/qemu/{domain}.log').read_text()

    @property
    def namespaces(self) -> Sequence[str]:
        """Options of unshare(1), for more namespaces of its own."""
        return ()

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of libvirtd; LIBVIRTD_PRELOAD: a library for it alone."""
        return {}

    def pid(self) -> int:
        return int((self.state / 'first').read_text())

    def run(self, args: Sequence[str | os.PathLike[str]],
            **kwargs: ty.Any) -> subprocess.CompletedProcess[ty.Any]:
        return subprocess.run(
            ['nsenter', '--target', str(self.pid()), '--mount', '--uts',
             '--pid', '--', *args], **kwargs)

    def virsh(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run virsh as an operator does."""
        return subprocess.run(
            ['virsh', '--connect', self.uri, *args], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def domains(self) -> list[str]:
        """The names of all domains that libvirt knows, running or not."""
        return self.virsh('list', '--all', '--name').stdout.split()

    def _render(self, number_of_hosts: int) -> None:
        for name in ('cache', 'etc/qemu', 'lib/images', 'log', 'run'):
            (self.state / name).mkdir(parents=True)
        values = {
            'node': self, 'libvirt_port': host.LIBVIRT_PORT,
            'hosts': [Host(number + 1, self.directory)
                      for number in range(number_of_hosts)]}
        for name in ('hold.sh', 'hosts', 'etc/libvirtd.conf',
                     'etc/qemu.conf'):
            config.render(f'node/{pathlib.Path(name).name}.j2',
                          self.state / name, values)

    @contextlib.contextmanager
    def up(self, files: Mapping[pathlib.Path, pathlib.Path],
           number_of_hosts: int = 2) -> ty.Iterator[None]:
        """Run the host, with libvirt, for the length of a ``with`` block.

        :param files: by the path of a file on the host, the file that it has
            there instead
        :raises TimeoutError: libvirt does not answer; with its log
        """
        self._render(number_of_hosts)
        log = self.state / 'libvirtd.log'
        with log.open('w') as output:
            # It is killed when this process ends, and with it all that runs
            # inside.
            process = subprocess.Popen(
                ['setpriv', '--pdeathsig', 'KILL', 'unshare', '--mount',
                 '--uts', '--net', '--pid', '--fork', '--kill-child',
                 '--mount-proc', '--propagation', 'private',
                 *self.namespaces, '/bin/bash',
                 self.state / 'hold.sh', '/bin/bash', '-c', _FIRST, 'first',
                 *(f'{path}={file}' for path, file in files.items())],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            self._wait_ready(process, log)
            yield
        finally:
            process.kill()
            process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes],
                    log: pathlib.Path) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            with contextlib.suppress(libvirt.libvirtError):
                with self.libvirt() as connection:
                    if connection.getHostname() == self.name:
                        break
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(
                    f'{self.name} is not ready: {log.read_text()}')
            time.sleep(0.05)
        [first] = psutil.Process(process.pid).children()
        (self.state / 'first').write_text(str(first.pid))


class Events:
    """The event loop of libvirt's Python binding, for connections made later.

    It runs until the process ends: libvirt allows only one, and only once.
    """

    _thread: threading.Thread | None = None

    @classmethod
    def run(cls) -> None:
        if cls._thread is None:
            libvirt.virEventRegisterDefaultImpl()
            cls._thread = threading.Thread(target=cls._loop, daemon=True)
            cls._thread.start()

    @staticmethod
    def _loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()
