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

"""A QEMU process, its monitor (QMP) and its qtest socket.

The guest's CPU does nothing. The test acts as the guest: it sends, over qtest,
the loads, stores and port accesses that a CPU would make. See
docs/devel/testing/qtest.rst in QEMU's source.
"""

import os
import pathlib
import socket
import subprocess
import time
import typing as ty

from lab.machine import monitor
from qemu.qmp import protocol

# Firmware that ends in "cli; hlt; jmp" at the reset vector. QEMU's qtest
# accelerator would not need firmware, but distributions do not build it.
FIRMWARE = bytes.fromhex('faf4ebfd').ljust(16, b'\0').rjust(65536, b'\0')


class QTestError(Exception):
    """QEMU refused a qtest command, or ended during it."""


class QTest:
    """The client side of QEMU's qtest protocol."""

    def __init__(self, path: pathlib.Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        # QEMU answers at once unless its main loop is stuck.
        self._socket.settimeout(60)
        self._buffer = b''

    def command(self, line: str) -> list[str]:
        """Run one command and return the words after its OK."""
        (words,) = self.commands([line])
        return words

    def commands(self, lines: ty.Sequence[str]) -> list[list[str]]:
        """Run commands without waiting for each; return their words.

        :raises QTestError: a command failed; the others may not have run
        """
        try:
            self._socket.sendall('\n'.join([*lines, '']).encode())
            return [self._answer(line) for line in lines]
        except (ConnectionError, TimeoutError) as exc:
            raise QTestError(f'{lines[0]}: {exc}') from exc

    def _answer(self, command: str) -> list[str]:
        while True:
            words = self._line().split()
            if words[0] != 'IRQ':
                break
        if words[0] != 'OK':
            raise QTestError(f'{command}: {" ".join(words)}')
        return words[1:]

    def _line(self) -> str:
        while b'\n' not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError('QEMU closed the qtest socket')
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b'\n')
        return line.decode()

    def read(self, address: int, size: int) -> int:
        """Load 1, 2, 4 or 8 bytes."""
        width = {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]
        return int(self.command(f'read{width} {address:#x}')[0], 0)

    def write(self, address: int, size: int, value: int) -> None:
        """Store 1, 2, 4 or 8 bytes."""
        width = {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]
        self.command(f'write{width} {address:#x} {value:#x}')

    def read_bytes(self, address: int, length: int) -> bytes:
        return bytes.fromhex(
            self.command(f'read {address:#x} {length:#x}')[0][2:]
        )

    def write_bytes(self, address: int, data: bytes) -> None:
        self.command(f'write {address:#x} {len(data):#x} 0x{data.hex()}')

    def out(self, port: int, size: int, value: int) -> None:
        width = {1: 'b', 2: 'w', 4: 'l'}[size]
        self.command(f'out{width} {port:#x} {value:#x}')

    def in_(self, port: int, size: int) -> int:
        width = {1: 'b', 2: 'w', 4: 'l'}[size]
        return int(self.command(f'in{width} {port:#x}')[0], 0)

    def close(self) -> None:
        self._socket.close()


class Emulator:
    """One QEMU process without a guest.

    :ivar qmp: the monitor, a :class:`lab.machine.monitor.Monitor`.
    :ivar qtest: the guest's side.
    """

    def __init__(
        self,
        binary: str,
        directory: pathlib.Path,
        name: str,
        arguments: ty.Sequence[str],
        environment: ty.Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = directory / f'{name}.log'
        qmp = directory / f'{name}.qmp'
        qtest = directory / f'{name}.qtest'
        firmware = directory / 'firmware'
        firmware.write_bytes(FIRMWARE)
        with self._log.open('w') as log:
            self.process = subprocess.Popen(
                [
                    # QEMU must not outlive a test that is killed.
                    *('setpriv', '--pdeathsig', 'KILL'),
                    binary,
                    *('-name', name),
                    *('-accel', 'tcg'),
                    *('-bios', str(firmware)),
                    *('-display', 'none'),
                    '-nodefaults',
                    *('-qmp', f'unix:{qmp},server=on,wait=off'),
                    *('-qtest', f'unix:{qtest},server=on,wait=off'),
                    *('-qtest-log', 'none'),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        self.qmp = monitor.Monitor(str(qmp))
        try:
            self._connect(qmp, qtest)
        except BaseException:
            self.close()
            raise

    def _connect(self, qmp: pathlib.Path, qtest: pathlib.Path) -> None:
        deadline = time.monotonic() + 30
        while not (qmp.exists() and qtest.exists()):
            if self.process.poll() is not None:
                raise RuntimeError(f'{self.name} ended: {self.log()}')
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f'{self.name} did not create its sockets in 30 s')
            time.sleep(0.01)
        try:
            self.qmp.connect()
            self.qtest = QTest(qtest)
        except (OSError, EOFError, protocol.ConnectError) as exc:
            # QEMU creates its sockets before its devices.
            self.process.wait(30)
            raise RuntimeError(f'{self.name} ended: {self.log()}') from exc
        self.qmp.settimeout(60)

    def log(self) -> str:
        """What the process wrote to its standard output and error."""
        return self._log.read_text(errors='replace')

    def pmem(self, name: str) -> ty.Any:
        """The value of a property of the device with the id ``pmem0``."""
        return self.qmp.cmd(
            'qom-get', path='/machine/peripheral/pmem0', property=name
        )

    def wait_migrated(self, timeout: float = 30) -> dict[str, ty.Any]:
        """Wait for the end of an outgoing migration, however it ends.

        QEMU reports the end before it leaves the run state finish-migrate,
        in which it refuses ``cont`` (qmp_cont() in monitor/qmp-cmds.c).
        """
        deadline = time.monotonic() + timeout
        while True:
            info = self.qmp.cmd('query-migrate')
            state = self.qmp.cmd('query-status')['status']
            if (info.get('status') in ('completed', 'failed', 'cancelled')
                    and state != 'finish-migrate'):
                return info
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f'migration after {timeout} s: {state}, {info}')
            time.sleep(0.01)

    def io(self, name: str) -> int:
        """A count of bytes that Linux keeps of QEMU, see proc_pid_io(5)."""
        fields = dict(line.split(': ') for line in pathlib.Path(
            f'/proc/{self.process.pid}/io').read_text().splitlines())
        return int(fields[name])

    def mapping_flags(self, path: pathlib.Path) -> list[str]:
        """The flags of QEMU's mapping of a file, see proc_pid_smaps(5)."""
        maps = pathlib.Path(f'/proc/{self.process.pid}/smaps').read_text()
        _before, _path, mapping = maps.partition(f' {path}\n')
        _before, _name, flags = mapping.partition('VmFlags: ')
        return flags.partition('\n')[0].split()

    def wait_exit(self, timeout: float = 30) -> int:
        """Wait for the end of the process and return its status."""
        return self.process.wait(timeout)

    def answers(self, timeout: float = 5) -> bool:
        """Whether the monitor answers within ``timeout`` seconds."""
        self.qmp.settimeout(timeout)
        try:
            self.qmp.cmd('query-status')
            return True
        except TimeoutError:
            return False
        finally:
            self.qmp.settimeout(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        try:
            self.qmp.close()
        except Exception:
            # The process is gone, so errors of the connection do not matter.
            pass
        if hasattr(self, 'qtest'):
            self.qtest.close()
