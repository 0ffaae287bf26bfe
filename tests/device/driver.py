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

"""A driver for the virtio-pmem PCI device, over qtest.

The registers and rings are those of Virtual I/O Device Specification 1.3:
4.1.4 (the PCI transport's structures), 2.7 (split virtqueues), 2.8 (packed
virtqueues) and 5.19 (the pmem device).
"""

import collections
import struct
import time

from tests.device import emulator

VENDOR_DEVICE = 0x1041 + 27 - 1 << 16 | 0x1AF4

# Where things go in the guest's physical memory. The ring is at the start
# of an otherwise unused part of RAM, the BARs in the 32-bit PCI hole.
RING = 0x100000
BUFFERS = 0x200000
TABLES = 0x300000
BARS = 0xE0000000

COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4

# Offsets in the common configuration structure (4.1.4.3).
DEVICE_FEATURE_SELECT, DEVICE_FEATURE = 0x00, 0x04
DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0x08, 0x0C
DEVICE_STATUS = 0x14
QUEUE_SELECT, QUEUE_SIZE = 0x16, 0x18
QUEUE_ENABLE, QUEUE_NOTIFY_OFF = 0x1C, 0x1E
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x20, 0x28, 0x30
QUEUE_RESET = 0x3A

# Device status bits (2.1).
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
NEEDS_RESET, FAILED = 64, 128

# Features (6).
INDIRECT_DESC, EVENT_IDX = 28, 29
VERSION_1, RING_PACKED, RING_RESET = 32, 34, 40

# Descriptor flags (2.7.5).
NEXT, WRITE, INDIRECT = 1, 2, 4

FLUSH = 0
UNANSWERED = 0x5A5A5A5A


class PmemDriver:
    """Bring the device up and send it flush requests.

    :param address: the device's slot and function on bus 0, as in
        ``addr=0x10`` of ``-device``.
    """

    def __init__(self, qtest: emulator.QTest, address: int = 0x10) -> None:
        self.qtest = qtest
        self.devfn = address << 3
        self.size = 0

    def config(self, offset: int) -> int:
        """Read 32 bits of PCI configuration space."""
        self.qtest.out(0xCF8, 4, 1 << 31 | self.devfn << 8 | offset & ~3)
        return self.qtest.in_(0xCFC, 4)

    def set_config(self, offset: int, value: int) -> None:
        self.qtest.out(0xCF8, 4, 1 << 31 | self.devfn << 8 | offset & ~3)
        self.qtest.out(0xCFC, 4, value)

    def map(self) -> None:
        """Map the BARs and find the virtio structures in them."""
        found = self.config(0)
        assert found == VENDOR_DEVICE, f'no virtio-pmem: {found:#x}'
        # BAR 1 holds MSI-X, BAR 4 (64 bits) the virtio structures.
        self.set_config(0x14, BARS + 0x100000)
        self.set_config(0x20, BARS)
        self.set_config(0x24, 0)
        self.set_config(0x04, self.config(0x04) & 0xFFFF0000 | 0x6)
        self.structures: dict[int, int] = {}
        pointer = self.config(0x34) & 0xFF
        while pointer:
            header = self.config(pointer)
            if header & 0xFF == 0x09:
                kind = header >> 24
                bar = self.config(pointer + 4) & 0xFF
                if bar == 4:
                    offset = self.config(pointer + 8)
                    self.structures.setdefault(kind, BARS + offset)
                if kind == NOTIFY:
                    self._multiplier = self.config(pointer + 16)
            pointer = header >> 8 & 0xFF

    def read(self, offset: int, size: int) -> int:
        return self.qtest.read(self.structures[COMMON] + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.qtest.write(self.structures[COMMON] + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(DEVICE_STATUS, 1)

    def reset(self) -> None:
        """Reset the device through its status register."""
        self.write(DEVICE_STATUS, 1, 0)

    def eject(self) -> None:
        """Eject the slot through the ACPI hotplug controller of an i440fx.

        See docs/specs/acpi_pci_hotplug.rst in QEMU's source.
        """
        self.qtest.out(0xAE10, 4, 0)
        self.qtest.out(0xAE08, 4, 1 << (self.devfn >> 3))

    def negotiate(self, *features: int) -> None:
        """Reset, and accept VERSION_1 and these feature bits."""
        self.reset()
        self.write(DEVICE_STATUS, 1, ACKNOWLEDGE)
        self.write(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.accept(*features)
        self.write(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.status & FEATURES_OK, 'the device refuses the features'

    def accept(self, *features: int) -> None:
        """Write VERSION_1 and these feature bits, without FEATURES_OK."""
        accepted = sum(1 << bit for bit in {VERSION_1, *features})
        for half in range(2):
            self.write(DRIVER_FEATURE_SELECT, 4, half)
            self.write(DRIVER_FEATURE, 4, accepted >> 32 * half & 0xFFFFFFFF)

    def start(self, *features: int, size: int | None = None) -> None:
        """Negotiate, set up the queue and start the device.

        :param size: of the queue; by default, the largest that is possible
        """
        self.negotiate(*features)
        self.enable_queue(size)
        self.write(
            DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        )

    def enable_queue(self, size: int | None = None) -> None:
        self.write(QUEUE_SELECT, 2, 0)
        self.max_size = self.read(QUEUE_SIZE, 2)
        self.size = size or self.max_size
        self.write(QUEUE_SIZE, 2, self.size)
        # 1024 descriptors take 16 KiB, the rings less than 16 KiB each.
        self.desc, self.avail, self.used = (
            RING, RING + 0x8000, RING + 0x10000
        )
        self.qtest.write_bytes(self.desc, bytes(0x18000))
        for offset, address in (
            (QUEUE_DESC, self.desc),
            (QUEUE_DRIVER, self.avail),
            (QUEUE_DEVICE, self.used),
        ):
            self.write(offset, 4, address)
            self.write(offset + 4, 4, 0)
        self.write(QUEUE_ENABLE, 2, 1)
        self.notify_address = (
            self.structures[NOTIFY]
            + self.read(QUEUE_NOTIFY_OFF, 2) * self._multiplier
        )
        self._free = collections.deque(range(self.size))
        # The descriptors of each request in flight, by its head.
        self._chains: dict[int, list[int]] = {}
        self._avail = 0
        self._used = 0

    def kick(self) -> None:
        self.qtest.write(self.notify_address, 2, 0)

    def describe(self, index: int, address: int, length: int,
                 flags: int = 0, next_: int = 0) -> None:
        """Write one descriptor of the table."""
        self.qtest.write_bytes(
            self.desc + 16 * index,
            struct.pack('<QIHH', address, length, flags, next_),
        )

    def offer(self, head: int) -> None:
        """Put a chain into the available ring."""
        self.qtest.write(
            self.avail + 4 + 2 * (self._avail % self.size), 2, head
        )
        self._avail += 1
        self.qtest.write(self.avail + 2, 2, self._avail & 0xFFFF)

    def response(self, head: int) -> int:
        """The address of the answer to the request at ``head``."""
        return BUFFERS + 16 * head + 8

    def submit(self, kind: int = FLUSH, kick: bool = True) -> int:
        """Offer one request and return the head of its chain."""
        head, second = self._free.popleft(), self._free.popleft()
        self._chains[head] = [head, second]
        request = self.prepare(head, kind)
        self.describe(head, request, 4, NEXT, second)
        self.describe(second, self.response(head), 4, WRITE)
        self.offer(head)
        if kick:
            self.kick()
        return head

    def submit_indirect(self, kind: int = FLUSH, kick: bool = True) -> int:
        """Offer one request whose chain is in an indirect table."""
        head = self._free.popleft()
        self._chains[head] = [head]
        request = self.prepare(head, kind)
        table = TABLES + 32 * head
        self.qtest.write_bytes(
            table,
            struct.pack('<QIHH', request, 4, NEXT, 1)
            + struct.pack('<QIHH', self.response(head), 4, WRITE, 0),
        )
        self.describe(head, table, 32, INDIRECT)
        self.offer(head)
        if kick:
            self.kick()
        return head

    def prepare(self, head: int, kind: int = FLUSH) -> int:
        """Write a request's buffers and return their address."""
        request = BUFFERS + 16 * head
        self.qtest.write(request, 4, kind)
        self.qtest.write(self.response(head), 4, UNANSWERED)
        return request

    def completed(self) -> list[tuple[int, int]]:
        """The (head, answer) pairs that have arrived since the last call."""
        index = self.qtest.read(self.used + 2, 2)
        pairs = []
        while self._used & 0xFFFF != index:
            element = self.used + 4 + 8 * (self._used % self.size)
            head = self.qtest.read(element, 4)
            length = self.qtest.read(element + 4, 4)
            pairs.append((head, self.answer(head, length)))
            self._free.extend(self._chains.pop(head, []))
            self._used += 1
        return pairs

    def answer(self, head: int, length: int) -> int:
        assert length == 4, f'{length} bytes written for {head}'
        answer = self.qtest.read(self.response(head), 4)
        return answer - (answer >> 31 << 32)

    def wait(self, count: int, timeout: float = 20) -> list[tuple[int, int]]:
        """Wait for ``count`` answers."""
        deadline = time.monotonic() + timeout
        pairs = self.completed()
        while len(pairs) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f'{pairs} after {timeout} s')
            time.sleep(0.005)
            pairs += self.completed()
        return pairs

    def flush(self) -> int:
        """Send one flush, wait, and return the answer."""
        head = self.submit()
        ((answered, value),) = self.wait(1)
        assert answered == head, f'{answered} answered instead of {head}'
        return value


class PackedDriver(PmemDriver):
    """The same driver with a packed virtqueue, for ``packed=on``."""

    # Descriptor flags (2.8.1).
    AVAIL, USED = 1 << 7, 1 << 15

    def start(self, *features: int, size: int | None = None) -> None:
        super().start(RING_PACKED, *features, size=size)

    def enable_queue(self, size: int | None = None) -> None:
        super().enable_queue(size)
        # The next slot to offer and the next slot to look at, each with its
        # wrap counter.
        self._next, self._next_wrap = 0, True
        self._seen, self._seen_wrap = 0, True

    def submit(self, kind: int = FLUSH, kick: bool = True) -> int:
        head = self._free.popleft()
        request = self.prepare(head, kind)
        first = self._put(request, 4, head, NEXT)
        last = self._put(self.response(head), 4, head, WRITE)
        # The first descriptor's flags offer the chain, so they come last.
        self._expose(*last)
        self._expose(*first)
        self._chains[head] = [head]
        if kick:
            self.kick()
        return head

    def _put(self, address: int, length: int, identifier: int,
             flags: int) -> tuple[int, int]:
        slot = self.desc + 16 * self._next
        self.qtest.write_bytes(
            slot, struct.pack('<QIH', address, length, identifier)
        )
        flags |= self.AVAIL if self._next_wrap else self.USED
        self._next += 1
        if self._next == self.size:
            self._next, self._next_wrap = 0, not self._next_wrap
        return slot, flags

    def _expose(self, slot: int, flags: int) -> None:
        self.qtest.write(slot + 14, 2, flags)

    def completed(self) -> list[tuple[int, int]]:
        pairs = []
        while True:
            slot = self.desc + 16 * self._seen
            flags = self.qtest.read(slot + 14, 2)
            if not (
                bool(flags & self.AVAIL)
                == bool(flags & self.USED)
                == self._seen_wrap
            ):
                return pairs
            length = self.qtest.read(slot + 8, 4)
            head = self.qtest.read(slot + 12, 2)
            pairs.append((head, self.answer(head, length)))
            self._free.extend(self._chains.pop(head))
            self._seen += 2
            if self._seen >= self.size:
                self._seen -= self.size
                self._seen_wrap = not self._seen_wrap
