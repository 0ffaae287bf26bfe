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

"""A QEMU without libvirt, for tests of the guest and the device."""

from collections.abc import Sequence
import contextlib
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
from typing import Any

from qemu.qmp import error as qmp_error

from lab import errors
from lab.machine import agent
from lab.machine import loop
from lab.machine import monitor
from lab import wait
from nova_fakedax import layout

#: How long to wait for the guest to shut down before the next press.
_BUTTON_SECONDS = 10


def counter(pid: int, file: str, name: str) -> int:
    """A number that Linux keeps of a QEMU, from a file in /proc/PID.

    For example ``write_bytes`` in ``io``: the bytes that QEMU and its guest
    have made dirty of the image (proc_pid_io(5)).

    :raises MachineError: the file has no such number
    """
    text = pathlib.Path(f'/proc/{pid}/{file}').read_text()
    found = re.search(rf'(?m)^{name}: +(\d+)', text)
    if not found:
        raise MachineError(f'/proc/PID/{file} has no {name}')
    return int(found[1])


class MachineError(errors.LabError):
    """QEMU, or the guest in it, failed."""


def direct_kernel(kernel: pathlib.Path, initrd: pathlib.Path,
                  command_line: str) -> list[str]:
    """Boot as Nova does with kernel and ramdisk images."""
    return ['-kernel', str(kernel), '-initrd', str(initrd),
            '-append', command_line]


def pmem(image: pathlib.Path, name: str = 'root',
         properties: str = '') -> list[str]:
    """Show a raw image to the guest as fake persistent memory.

    The file must exist: QEMU would create it.

    :param image: a file or a block device
    :param properties: more properties of the device, as ``name=value,...``
    """
    size = loop.size(image)
    return ['-object', f'memory-backend-file,id=mem-{name},share=on,'
                       f'mem-path={image},size={size}',
            '-device', ','.join(filter(None, (
                'virtio-pmem-pci', f'id={name}', f'memdev=mem-{name}',
                properties)))]


def boot_view(image: pathlib.Path, scsi: bool = False) -> list[str]:
    """Show its content to firmware: read-only, first in boot order.

    :param scsi: by virtio-scsi, as with hw_disk_bus=scsi, not by virtio-blk
    """
    found = layout.read(str(image))
    device = 'virtio-blk-pci'
    controller = []
    if scsi:
        device, controller = 'scsi-hd', ['-device', 'virtio-scsi-pci']
    return ['-blockdev', f'driver=file,node-name=boot-file,filename={image},'
                         f'read-only=on,auto-read-only=off',
            '-blockdev', 'driver=raw,node-name=boot,file=boot-file,'
                         f'read-only=on,offset={found.offset},'
                         f'size={found.size}',
            *controller, '-device', f'{device},drive=boot,'
                                    'serial=fakedax-boot,bootindex=1']


def virtio_blk(image: pathlib.Path, name: str = 'disk',
               direct: bool = False, boot_index: int = 2) -> list[str]:
    """Show a raw image as an ordinary, writable disk.

    :param direct: bypass the host's page cache, as Nova's disk cache mode
        ``none`` does; otherwise as ``writeback``
    :param boot_index: firmware boots from the disk with the lowest, and
        never from one with -1
    """
    cache = f'cache.direct={"on" if direct else "off"}'
    return ['-blockdev', f'driver=file,node-name={name}-file,'
                         f'filename={image},{cache}',
            '-blockdev', f'driver=raw,node-name={name},file={name}-file,'
                         f'{cache}',
            '-device', f'virtio-blk-pci,drive={name},'
                       f'bootindex={boot_index}']


class Machine:
    """A machine that runs for the length of a ``with`` block.

    :param options: more options of QEMU, as the functions above return them
    :param memory_mib: the guest's RAM
    :param emulator: program; a bare name is looked up in PATH
    :param agent_serial: the agent's channel is the second serial port, not a
        virtio port; the guest's command line must have ``agent=ttyS1``
    :param accelerator: TCG, with options
    :param prefix: a command that executes QEMU, which follows
    :raises MachineError: on entering, if QEMU does not start
    """

    def __init__(self, *options: str, memory_mib: int = 256,
                 emulator: str = 'qemu-system-x86_64',
                 agent_serial: bool = False,
                 accelerator: str = 'tcg',
                 prefix: Sequence[str] = ()) -> None:
        self._options = options
        self._prefix = prefix
        self._agent_serial = agent_serial
        self._accelerator = accelerator
        self._memory_mib = memory_mib
        self._emulator = emulator

    def __enter__(self) -> 'Machine':
        with contextlib.ExitStack() as stack:
            # Short: the path of a UNIX socket has at most 107 bytes.
            self._directory = pathlib.Path(tempfile.mkdtemp(
                prefix='machine-'))
            stack.callback(shutil.rmtree, self._directory)
            self._start(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        near, theirs = socket.socketpair()
        with theirs:
            argv = [
                *self._prefix, self._emulator, '-accel', self._accelerator,
                # RAM first, as in libvirt's command line: when it migrates
                # under TCG, QEMU 10.0 takes an offset in a RAM block for
                # one in all RAM (cpu_physical_memory_sync_dirty_bitmap()).
                '-object',
                f'memory-backend-ram,id=ram,size={self._memory_mib}M',
                '-machine', 'q35,memory-backend=ram',
                '-m', f'{self._memory_mib}M,maxmem=256G',
                '-nodefaults', '-no-user-config', '-display', 'none',
                '-serial', f'file:{self._console}',
                '-chardev', f'socket,id=qmp,fd={theirs.fileno()}',
                '-mon', 'chardev=qmp,mode=control',
                '-chardev', f'socket,id=agent,server=on,wait=off,'
                            f'path={self._directory}/agent',
                *(['-serial', 'chardev:agent'] if self._agent_serial else
                  ['-device', 'virtio-serial-pci',
                   '-device', 'virtserialport,chardev=agent,'
                              'name=org.qemu.guest_agent.0']),
                *self._options]
            with (self._directory / 'stderr').open('wb') as stderr:
                self._process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=stderr,
                    stderr=stderr, pass_fds=[theirs.fileno()])
        stack.callback(self._stop)
        self._qmp = monitor.Monitor(near)
        stack.callback(self._disconnect)
        try:
            self._qmp.connect()
        except (qmp_error.QMPError, OSError, EOFError) as e:
            self._process.wait(10)
            raise MachineError(
                f'{self._emulator} does not start: {self.errors()}') from e
        #: The agent's channel, for commands without a method of ``agent``.
        self.agent_transport = agent.SocketTransport(
            self._directory / 'agent')
        stack.callback(self.agent_transport.close)
        #: The guest's agent.
        self.agent = agent.Agent(self.agent_transport, self.console)

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _disconnect(self) -> None:
        # QEMU may have ended, which closing reports as an error.
        with contextlib.suppress(qmp_error.QMPError, OSError, EOFError):
            self._qmp.close()

    def counter(self, file: str, name: str) -> int:
        """A number that Linux keeps of this QEMU: see :func:`counter`."""
        return counter(self.pid, file, name)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether QEMU has not ended yet."""
        return self._process.poll() is None

    @property
    def _console(self) -> pathlib.Path:
        return self._directory / 'console'

    def console(self) -> str:
        """What the guest has written to its serial console."""
        try:
            return self._console.read_text(errors='replace')
        except FileNotFoundError:
            return ''

    def errors(self) -> str:
        """What QEMU wrote to its standard error."""
        return (self._directory / 'stderr').read_text(errors='replace')

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; an underscore in a name stands for a dash."""
        return self._qmp.cmd(command, **{
            name.replace('_', '-'): value
            for name, value in arguments.items()})

    def events(self) -> list[dict[str, Any]]:
        """QMP's events since the last call."""
        # They are read together with the answer to a command.
        self._qmp.cmd('query-status')
        return self._qmp.get_events()

    def wait_console(self, pattern: str, timeout: float = 300) -> str:
        """Wait for a regular expression on the console; return the console.

        :param timeout: seconds
        :raises MachineError: it did not come, or QEMU ended before it
        """
        def seen() -> re.Match[str] | None:
            # In this order: what the guest wrote before the end counts.
            ended = self._process.poll() is not None
            text = self.console()
            match = re.search(pattern, text, re.MULTILINE)
            if ended and not match:
                raise MachineError(
                    f'QEMU ended with status {self._process.returncode} '
                    f'before {pattern!r}: {self.errors()}\n{_tail(text)}')
            return match

        return wait.until(
            f'{pattern!r} on the console', seen, timeout, interval=0.05,
            state=lambda: f'it ends:\n{_tail(self.console())}',
            error=MachineError).string

    def wait_exit(self, timeout: float = 30) -> int:
        """Wait until QEMU has ended; return its exit status.

        :param timeout: seconds
        :raises MachineError: it is still running
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise MachineError(
                f'waited {timeout:g} s for QEMU to end; the console ends:\n'
                f'{_tail(self.console())}') from None

    def power_off(self, timeout: float = 30) -> None:
        """Press the power button until the guest has shut down, as Nova does.

        Again and again: a guest that still boots misses it until its login
        manager listens.

        :param timeout: seconds
        :raises MachineError: it is still running
        """
        def ended() -> bool:
            # QEMU may have ended just before.
            with contextlib.suppress(qmp_error.QMPError, OSError, EOFError):
                self.qmp('system_powerdown')
            with contextlib.suppress(MachineError):
                self.wait_exit(_BUTTON_SECONDS)
            return self._process.poll() is not None

        wait.until('the guest to shut down', ended, timeout,
                   state=lambda: f'the console ends:\n{_tail(self.console())}',
                   error=MachineError)


def _tail(text: str) -> str:
    return '\n'.join(text.splitlines()[-20:])
