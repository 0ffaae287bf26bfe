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

"""Random operations on the device by a hostile guest.

Every choice comes from a seed, which is printed: the same seed makes the same
operations. When a sync ends does not depend on the seed, so it may take a few
runs to see a finding again.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import pathlib
import random
import re
import shutil
import struct
import sys
import tempfile
import time

from lab.machine import emulators
from lab import wait
from tests.device import backing
from tests.device import driver
from tests.device import emulator

SIZE = 2 << 20
RAM = 128 << 20
#: One dirty page is enough for writeback to start early.
_PAGE = 4096
#: How many operations one QEMU serves.
ROUND = 10000

# Sanitizers stop at the first finding. They do not look for leaks, because
# QEMU does not free all of its memory when it exits.
SANITIZERS = {
    'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=1',
    'UBSAN_OPTIONS': 'halt_on_error=1:print_stacktrace=1:abort_on_error=1',
}

_FINDING = re.compile(
    r'AddressSanitizer|runtime error|Assertion|ERROR:|stack smashing')


class Finding(Exception):
    """QEMU ended, or a sanitizer found an error."""


class Fuzzer:
    """One round of random operations.

    :param packed: whether to offer packed rings
    """

    def __init__(self, binary: str, directory: pathlib.Path, seed: int,
                 packed: bool) -> None:
        self._random = random.Random(seed)
        self._directory = directory
        self._packed = packed
        #: What happens to the guest when a sync fails.
        self._policy = self._random.choice(['report', 'stop'])
        self._lines: list[str] = []
        self._recent: list[str] = []
        self._backends = 0
        self._binary = binary
        self._moves = 0
        self._operations = [
            (operation, weight) for name, weight in _WEIGHTS.items()
            for operation in [getattr(self, f'_{name}')]]
        image = directory / 'image'
        image.write_bytes(b'A' * SIZE)
        self._backing = backing.BackingFile(image, directory / 'mount')
        try:
            self._emulator = self._start('fuzz')
        except BaseException:
            self._backing.close()
            raise

    def _start(self, name: str, *extra: str) -> emulator.Emulator:
        return emulator.Emulator(
            self._binary, self._directory, name, [
                *('-object', f'memory-backend-ram,id=ram,size={RAM}'),
                *('-machine', 'pc-i440fx-7.2,memory-backend=ram'),
                *('-m', '128M,maxmem=1G'),
                '-object',
                'memory-backend-file,id=mem0,share=on,'
                f'mem-path={self._backing.path},size={SIZE}',
                '-device', 'virtio-pmem-pci,memdev=mem0,id=pmem0,'
                f'addr=0x10,packed={"on" if self._packed else "off"},'
                f'early-writeback={_PAGE},werror={self._policy}', *extra],
            SANITIZERS)

    def run(self, operations: int) -> None:
        """Do random operations and end QEMU.

        :raises Finding: with QEMU's log and the last operations
        """
        try:
            self._driver = (
                driver.PackedDriver if self._packed else driver.PmemDriver
            )(self._emulator.qtest)
            self._bring_up()
            choices = self._random.choices(
                *zip(*self._operations), k=operations)
            for operation in choices:
                operation()
                if len(self._lines) >= 64:
                    self._send()
            self._send()
            self._backing.release()
            self._look()
            self._emulator.qmp.cmd('quit')
            status = self._emulator.wait_exit(60)
        except (Exception, KeyboardInterrupt) as exc:
            if isinstance(exc, KeyboardInterrupt):
                raise
            time.sleep(1)
            status = self._emulator.process.poll()
            # The reason comes last, because a summary of failures keeps only
            # the last lines.
            raise Finding(
                '\n'.join(self._recent[-100:]) + '\n'
                + self._emulator.log()[-8000:]
                + f'\nQEMU\'s status: {status}\n'
                f'{type(exc).__name__}: {exc}') from exc
        self._look()
        if status:
            raise Finding(f'QEMU ended with {status}:\n'
                          + self._emulator.log()[-8000:])

    def close(self) -> None:
        self._emulator.process.kill()
        self._backing.close()
        self._emulator.close()

    def _look(self) -> None:
        if _FINDING.search(self._emulator.log()):
            raise Finding(self._emulator.log()[:8000])

    def _send(self) -> None:
        if self._lines:
            self._recent = (self._recent + self._lines)[-200:]
            lines, self._lines = self._lines, []
            self._emulator.qtest.commands(lines)

    def _qmp(self, command: str, **arguments: object) -> None:
        self._send()
        self._recent.append(f'{command} {arguments}')
        self._emulator.qmp.cmd(command, **arguments)

    def _note(self, text: str) -> None:
        self._send()
        self._recent.append(text)

    # Random values, biased towards the ones that matter.

    def _address(self) -> int:
        pick = self._random.choice
        base = pick([
            driver.RING, driver.RING, self._driver.desc, self._driver.avail,
            self._driver.used, driver.BUFFERS, driver.BUFFERS, driver.TABLES,
            *self._driver.structures.values(),
            1 << 32, (1 << 32) + SIZE - 16, 0, RAM - 8, 0xFEE00000,
            (1 << 64) - 16, 1 << 40, self._random.getrandbits(64)])
        return base + pick([0, 0, 0, 1, 4, 8, 16, 4095]) & (1 << 64) - 1

    def _length(self) -> int:
        return self._random.choice([
            0, 1, 2, 3, 4, 4, 4, 4, 8, 16, 32, 64, 4096, 1 << 20, RAM,
            0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, self._random.getrandbits(32)])

    def _number(self, bits: int) -> int:
        pick = self._random.choice
        return pick([
            0, 1, 2, 4, 16, 127, 128, 1023, 1024, 1025,
            (1 << bits) - 1, 1 << bits - 1, self._random.getrandbits(bits)
        ]) & (1 << bits) - 1

    def _index(self) -> int:
        return self._random.choice([
            0, 0, 1, 2, 3, self._random.randrange(16),
            self._random.randrange(1024), self._number(16)])

    def _write(self, address: int, size: int, value: int) -> None:
        width = {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]
        value &= (1 << 8 * size) - 1
        self._lines.append(f'write{width} {address:#x} {value:#x}')

    def _write_bytes(self, address: int, data: bytes) -> None:
        self._lines.append(f'write {address:#x} {len(data):#x} 0x{data.hex()}')

    def _config(self, offset: int, size: int, value: int) -> None:
        width = {1: 'b', 2: 'w', 4: 'l'}[size]
        value &= (1 << 8 * size) - 1
        address = 1 << 31 | self._driver.devfn << 8 | offset & ~3
        self._lines += [f'outl 0xcf8 {address:#x}',
                        f'out{width} {0xCFC + (offset & 3):#x} {value:#x}']

    # The operations.

    def _descriptor(self) -> None:
        table = self._random.choice(
            [self._driver.desc] * 3 + [driver.TABLES])
        flags = self._random.choice([
            0, driver.NEXT, driver.NEXT, driver.WRITE, driver.INDIRECT,
            self._random.randrange(8), self._number(16)])
        if self._packed:
            flags ^= self._random.choice([0, 1 << 7, 1 << 15, 0x8080])
        self._write_bytes(table + 16 * self._random.randrange(16), struct.pack(
            '<QIHH', self._address(), self._length(),
            *(lambda a, b: (b, a) if self._packed else (a, b))(
                flags, self._index() & 0xFFFF)))

    def _request(self) -> None:
        """Offer a correct request."""
        head = self._random.randrange(0, 16, 2)
        request = driver.BUFFERS + 16 * head
        kind = self._random.choice([0, 0, 0, 1, self._number(32)])
        self._write(request, 4, kind)
        if self._packed:
            self._packed_request(head, request)
            return
        self._write_bytes(self._driver.desc + 16 * head, struct.pack(
            '<QIHHQIHH', request, 4, driver.NEXT, head + 1,
            request + 8, 4, driver.WRITE, 0))
        self._offer_head(head)
        self._notify()

    def _packed_request(self, head: int, request: int) -> None:
        for wrap in (0x80, 0x8000):
            slot = self._random.randrange(0, 16, 2)
            self._write_bytes(self._driver.desc + 16 * slot, struct.pack(
                '<QIHHQIHH', request, 4, head, driver.NEXT | wrap,
                request + 8, 4, head, driver.WRITE | wrap))
        self._notify()

    def _indirect(self) -> None:
        """Offer an indirect table of up to 16 descriptors."""
        head = self._random.randrange(16)
        self._write_bytes(self._driver.desc + 16 * head, struct.pack(
            '<QIHH', driver.TABLES, 16 * self._random.randrange(17),
            *((head, driver.INDIRECT | 0x80) if self._packed
              else (driver.INDIRECT, 0))))
        self._offer_head(head)
        self._notify()

    def _offer_head(self, head: int) -> None:
        self._available += 1
        self._write(self._driver.avail + 4
                    + 2 * ((self._available - 1) % self._driver.size), 2, head)
        self._write(self._driver.avail + 2, 2, self._available)

    def _offer(self) -> None:
        self._offer_head(self._index())

    def _ring(self) -> None:
        """Write to any word of the rings."""
        ring = self._random.choice([self._driver.avail, self._driver.used])
        self._write(ring + self._random.choice([
            0, 2, 4, 6, 4 + 2 * self._driver.size,
            4 + 8 * self._driver.size, self._random.randrange(0x2000)]),
            2, self._number(16))

    def _ring_index(self) -> None:
        self._available += self._random.choice([0, 1, 2, 5, 1024, 1025, -1])
        self._write(self._driver.avail + 2, 2, self._available)

    def _notify(self) -> None:
        self._write(self._driver.notify_address, 2, 0)

    def _notify_any(self) -> None:
        self._write(
            self._driver.structures[driver.NOTIFY]
            + self._random.randrange(0x1000), self._random.choice([1, 2, 4]),
            self._number(32))

    def _status(self) -> None:
        self._write(
            self._driver.structures[driver.COMMON] + driver.DEVICE_STATUS, 1,
            self._random.choice([0, 1, 3, 11, 15, 15, 15, self._number(8)]))

    def _common(self) -> None:
        """Write to any register of the common configuration."""
        common = self._driver.structures[driver.COMMON]
        offset = self._random.randrange(0x40)
        size = self._random.choice([1, 2, 4])
        value = self._random.choice([
            self._number(32), self._address() & 0xFFFFFFFF])
        if self._random.random() < 0.3:
            self._lines.append(f'readl {common + (offset & ~3):#x}')
        else:
            self._write(common + offset, size, value)

    def _queue_address(self) -> None:
        common = self._driver.structures[driver.COMMON]
        address = self._address()
        offset = self._random.choice([
            driver.QUEUE_DESC, driver.QUEUE_DRIVER, driver.QUEUE_DEVICE])
        self._write(common + offset, 4, address)
        self._write(common + offset + 4, 4, address >> 32)

    def _queue_reset(self) -> None:
        common = self._driver.structures[driver.COMMON]
        self._write(common + driver.QUEUE_RESET, 2, 1)
        if self._random.random() < 0.7:
            self._write(common + driver.QUEUE_ENABLE, 2, 1)

    def _device_config(self) -> None:
        place = self._driver.structures[driver.DEVICE]
        offset = self._random.randrange(0x20)
        if self._random.random() < 0.5:
            self._lines.append(f'readq {place + (offset & ~7):#x}')
        else:
            self._write(place + offset, 4, self._number(32))

    def _isr(self) -> None:
        self._lines.append(
            f'readb {self._driver.structures[driver.ISR]:#x}')

    def _pci_config(self) -> None:
        self._config(self._random.choice([
            4, 4, 6, 0x10, 0x14, 0x20, self._random.randrange(0x100)]),
            self._random.choice([1, 2, 4]), self._number(32))

    def _bring_up(self) -> None:
        """Do what a correct driver does, so that the device works again."""
        self._note('bring up')
        features = [
            bit for bit in (driver.INDIRECT_DESC, driver.EVENT_IDX,
                            driver.RING_RESET)
            if self._random.random() < 0.7]
        self._driver.map()
        self._driver.start(
            *features, size=self._random.choice([None, None, 2, 16, 256]))
        self._available = 0

    def _memory(self) -> None:
        """Store to the guest's memory."""
        self._write(
            (1 << 32) + self._random.randrange(SIZE), 1, self._number(8))

    def _hold(self) -> None:
        if self._policy == 'stop':
            # A failed sync stops the guest, and all of QEMU would then wait
            # for the sync that is held.
            return
        self._note('hold')
        self._backing.hold()

    def _release(self) -> None:
        self._note('release')
        self._backing.release()

    def _eject(self) -> None:
        """Eject the device, perhaps during a sync, and plug in a new one.

        The new device does not know of earlier errors.
        """
        self._note('eject')
        self._driver.eject()
        # Opening a file on FUSE waits for its syncs.
        self._release()
        self._backends += 1
        self._qmp('object-add', **{
            'qom-type': 'memory-backend-file', 'share': True, 'size': SIZE,
            'id': f'mem{self._backends}',
            'mem-path': str(self._backing.path)})
        self._qmp('device_add', driver='virtio-pmem-pci', id='pmem0',
                  memdev=f'mem{self._backends}', addr='0x10',
                  packed=self._packed,
                  werror=self._policy,
                  **{'early-writeback': _PAGE,
                     'sync-bps': self._random.choice([0, 1 << 20])})
        # The old backend is not deleted: QEMU deadlocks if a migration begins
        # while RAM is freed. ram_init_bitmaps() holds the list of RAM blocks
        # and waits for a CPU, while the RCU thread holds the BQL and waits
        # for the list.
        self._bring_up()

    def _fail(self) -> None:
        self._note('fail')
        self._backing.fail(self._random.choice([errno.EIO, errno.ENOSPC]))

    def _stop(self) -> None:
        self._release()
        self._qmp('stop')
        for _ in range(self._random.randrange(5)):
            self._random.choice([
                self._request, self._notify, self._status, self._common])()
        if self._random.random() < 0.3:
            self._qmp('qom-get', path='/machine/peripheral/pmem0',
                      property='sync-latency')
        self._qmp('cont')

    def _save(self) -> None:
        """Migrate to /dev/null, and resume the guest here."""
        self._release()
        self._qmp('migrate', uri='exec:cat >/dev/null')
        self._emulator.wait_migrated()
        self._qmp('cont')
        self._wait_running()

    def _cancel(self) -> None:
        """Cancel a migration at a random moment."""
        if self._random.random() < 0.5:
            self._release()
        self._qmp('migrate', uri='exec:cat >/dev/null')
        self._write_memory()
        time.sleep(self._random.random() / 20)
        self._release()
        self._qmp('migrate_cancel')
        self._emulator.wait_migrated()
        self._qmp('cont')
        self._wait_running()

    def _steal(self) -> None:
        """Resume the guest while another process holds the image."""
        self._release()
        self._qmp('migrate', uri='exec:cat >/dev/null')
        self._emulator.wait_migrated()
        with (self._directory / 'image').open('r+b') as file:
            for byte in self._random.sample([300, 301], 1):
                flock = struct.pack(
                    'hhqqi4x', fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
                with contextlib.suppress(BlockingIOError):
                    fcntl.fcntl(file, fcntl.F_OFD_SETLK, flock)
            self._qmp('cont')
            # Operations that store to the image are left out: the guest does
            # not run, so it could not do them.
            for _ in range(self._random.randrange(20)):
                self._random.choice([self._status, self._properties])()
            self._send()
        self._wait_running()

    def _move(self) -> None:
        """Migrate to another QEMU on the same host, which may refuse."""
        self._release()
        self._moves += 1
        name = f'fuzz{self._moves}'
        path = self._directory / f'{name}.mig'
        destination = self._start(name, '-incoming', f'unix:{path}')
        try:
            self._qmp('migrate-set-capabilities', capabilities=[
                {'capability': 'return-path', 'state': True}])
            self._qmp('migrate', uri=f'unix:{path}')
            moved = self._emulator.wait_migrated()['status'] == 'completed'
        except BaseException:
            destination.process.kill()
            destination.close()
            raise
        if moved:
            destination, self._emulator = self._emulator, destination
            self._driver.qtest = self._emulator.qtest
        destination.process.kill()
        destination.close()
        if _FINDING.search(destination.log()):
            raise Finding(destination.log()[:8000])
        self._qmp('migrate-set-capabilities', capabilities=[
            {'capability': 'return-path', 'state': False}])
        # An error may have stopped the guest.
        self._qmp('cont')
        self._wait_running()

    def _write_memory(self) -> None:
        for _ in range(20):
            self._memory()
        self._send()

    def _wait_running(self) -> None:
        wait.until('the guest to run again', lambda: self._emulator.qmp.cmd(
            'query-status')['status'] == 'running', 30, interval=0.01)

    def _system_reset(self) -> None:
        self._qmp('system_reset')
        self._qmp('query-status')
        if self._random.random() < 0.9:
            self._bring_up()

    def _properties(self) -> None:
        self._qmp('qom-get', path='/machine/peripheral/pmem0',
                  property=self._random.choice([
                      'requests', 'merged', 'syncs', 'errors', 'last-error',
                      'sync-latency', 'cache-left', 'cache-dropped',
                      'writebacks']))


_WEIGHTS = {
    'request': 300, 'indirect': 100, 'descriptor': 200, 'offer': 60,
    'ring': 60, 'ring_index': 30, 'notify': 100, 'notify_any': 10,
    'status': 8, 'common': 30, 'queue_address': 6, 'queue_reset': 6,
    'device_config': 10, 'isr': 10, 'pci_config': 6,
    'bring_up': 60, 'memory': 20, 'hold': 4, 'release': 8, 'eject': 1,
    'fail': 0.3, 'stop': 1, 'save': 0.1, 'cancel': 0.1, 'steal': 0.1,
    'move': 0.03, 'system_reset': 1, 'properties': 2,
}


def fuzz(binary: str, operations: int, seed: int,
         packed: bool = True) -> None:
    """Do this many operations, on as many QEMUs as that takes.

    :param packed: whether to offer packed rings in a third of the rounds
    :raises Finding: with the seed of the round that found something
    """
    while operations > 0:
        directory = pathlib.Path(tempfile.mkdtemp(prefix='fuzz-'))
        try:
            fuzzer = Fuzzer(
                binary, directory, seed, packed and seed % 3 == 2)
            try:
                fuzzer.run(min(operations, ROUND))
            except Finding as exc:
                raise Finding(f'seed {seed}: {exc}') from exc
            finally:
                fuzzer.close()
        finally:
            shutil.rmtree(directory)
        operations -= ROUND
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python3 -m tests.device.fuzz', description=__doc__)
    parser.add_argument('--operations', type=int, default=1_000_000,
                        help='how many to do (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=1,
                        help='the seed of the first round '
                             '(default: %(default)s)')
    parser.add_argument('--version', choices=['10.2', '10.0', '7.2'],
                        default='10.0')
    parser.add_argument('--emulator',
                        help='the QEMU to test instead of a sanitizer build')
    arguments = parser.parse_args()
    if arguments.operations < 1:
        parser.error(f'--operations {arguments.operations}: must be positive')
    binary = arguments.emulator or emulators.build(
        '--version', arguments.version, '--asan')
    seed, left = arguments.seed, arguments.operations
    started = time.monotonic()
    while left > 0:
        try:
            # Other versions of QEMU fail an assertion on an empty indirect
            # table in a packed ring, with any device.
            fuzz(binary, min(left, ROUND), seed,
                 packed=arguments.version == '10.0')
        except Finding as exc:
            sys.exit(f'found with {exc}')
        left -= ROUND
        print(f'seed {seed}: nothing found; '
              f'{arguments.operations - max(left, 0)} operations, '
              f'{time.monotonic() - started:.0f} s', flush=True)
        seed += 1


if __name__ == '__main__':
    main()
