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

"""The memmap in front of the content: cleared, cached and left unflushed."""

import errno
import itertools
import os
import struct
import time

from lab.machine import pagecache
from lab import wait
from nova_fakedax import layout
import testscenarios

from tests.device import base

load_tests = testscenarios.load_tests_apply_scenarios

#: Time for several rounds of the timer, none of which may start writeback.
SECONDS = 1

#: Where the memmap begins: nd_info_block_reserve() of Linux.
MEMMAP = 8192
LAYOUT = layout.planned(base.SIZE - layout.ALIGNMENT, memmap=True)


def fletcher64(block: bytes) -> int:
    """The checksum of an info block, whose last 8 bytes count as 0."""
    words = struct.unpack('<1022I', block[:4088]) + (0, 0)
    low = list(itertools.accumulate(words))
    return (sum(part % (1 << 32) for part in low) % (1 << 32) << 32
            | low[-1] % (1 << 32))


class MemmapTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.put_image_on_disk()

    def make_memmap_image(
        self, block: bytes | None = None
    ) -> tuple[bytes, bytes]:
        """An image full of letters but for its info block; none is cached.

        Return its memmap and its content.
        """
        self.make_image()
        with self.image.open('r+b') as file:
            os.pwrite(file.fileno(), block or layout.info_block(LAYOUT),
                      layout.INFO_BLOCK_OFFSET)
        pagecache.evict(self.image)
        return self.parts()

    def parts(self) -> tuple[bytes, bytes]:
        image = self.image.read_bytes()
        return image[MEMMAP:LAYOUT.offset], image[LAYOUT.offset:]

    def assertKept(self, block: bytes | None = None, **start: str) -> None:
        before = self.make_memmap_image(block)
        self.start_vm(self.image, **start).close()
        self.assertEqual(before, self.parts())

    def changed(self, format_: str, offset: int, value: int,
                checksum: bool = True) -> bytes:
        """An info block with another value."""
        block = bytearray(layout.info_block(LAYOUT))
        struct.pack_into(format_, block, offset, value)
        if checksum:
            struct.pack_into('<Q', block, 4088, fletcher64(block))
        return bytes(block)

    def test_memmap_is_cleared_at_the_start(self) -> None:
        _, content = self.make_memmap_image()
        blocks = self.image.stat().st_blocks
        self.start_vm(self.image)
        memmap, now = self.parts()
        self.assertEqual(0, memmap.count(b'A'))
        self.assertEqual(content, now)
        self.assertEqual(LAYOUT, layout.read(str(self.image)))
        self.assertLessEqual(blocks, self.image.stat().st_blocks)

    def test_memmap_is_cached_at_the_start(self) -> None:
        self.make_memmap_image()
        self.start_vm(self.image)
        self.assertGreaterEqual(pagecache.cached_bytes(self.image),
                                LAYOUT.offset - MEMMAP)

    def test_stores_do_not_read_the_old_memmap(self) -> None:
        self.make_memmap_image()
        vm = self.start_vm(self.image)
        before = vm.io('read_bytes')
        for offset in range(MEMMAP, LAYOUT.offset, base.PAGE):
            vm.qtest.write_bytes(self.memaddr(vm) + offset, b'B')
        self.assertEqual(0, vm.io('read_bytes') - before)

    def test_a_store_dirties_one_page_whatever_the_content_has(self) -> None:
        self.make_memmap_image()
        vm = self.start_vm(self.image, device='huge-pages=on')
        for offset in range(MEMMAP, LAYOUT.offset, base.PAGE):
            vm.qtest.read_bytes(self.memaddr(vm) + offset, 1)
        before = vm.io('write_bytes')
        stores = range(MEMMAP, LAYOUT.offset, 16 * base.PAGE)
        for offset in stores:
            vm.qtest.write_bytes(self.memaddr(vm) + offset, b'B')
        dirtied = (vm.io('write_bytes') - before) // base.PAGE
        # Linux counts what QEMU dirties elsewhere, too: rarely, one page.
        self.assertIn(dirtied - len(stores), (0, 1))

    def test_memmap_of_an_incoming_guest_is_kept(self) -> None:
        before = self.make_memmap_image()
        source = self.start_vm(self.image)
        source.qtest.write_bytes(self.memaddr(source) + MEMMAP, b'B' * 4096)
        self.incoming(self.image, 'destination')
        status = self.migrate(source, 'destination')
        self.assertEqual('completed', status['status'])
        memmap, content = self.parts()
        self.assertEqual(b'B' * 4096 + bytes(len(memmap) - 4096), memmap)
        self.assertEqual(before[1], content)

    def test_image_that_is_not_locked_is_kept(self) -> None:
        self.assertKept(device='lock=off')

    def test_read_only_image_is_kept(self) -> None:
        self.assertKept(memdev='share=on,readonly=on')

    def test_private_image_is_kept(self) -> None:
        self.assertKept(memdev='share=off')

    def test_damaged_block_is_not_believed(self) -> None:
        self.assertKept(self.changed('<H', 54, 3, checksum=False))

    def test_block_of_a_memmap_in_ram_is_not_taken_for_one(self) -> None:
        self.assertKept(self.changed('<I', 72, 1))

    def test_offset_outside_of_the_image_is_not_believed(self) -> None:
        for offset in (0, MEMMAP, LAYOUT.offset + 1, base.SIZE, 1 << 63):
            self.assertKept(self.changed('<Q', 56, offset),
                            name=f'dataoff-{offset}')


class FlushTestCase(base.DeviceTestCase):
    """A flush writes the content; what a migration needs is more."""

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.make_image()
        with self.image.open('r+b') as file:
            os.pwrite(file.fileno(), layout.info_block(LAYOUT),
                      layout.INFO_BLOCK_OFFSET)
        self.mounted = self.mount()
        self.vm = self.start_vm(self.mounted.path,
                                device='early-writeback=64k')
        self.pmem = self.bring_up(self.vm)

    def store(self, offset: int, pages: int = 1) -> None:
        self.vm.qtest.write_bytes(self.memaddr(self.vm) + offset,
                                  b'B' * base.PAGE * pages)

    def is_written(self, offset: int) -> bool:
        """Whether a page that was stored has reached the file below."""
        with self.image.open('rb') as file:
            return (os.pread(file.fileno(), base.PAGE, offset)
                    == b'B' * base.PAGE)

    def test_flush_leaves_out_the_memmap_and_a_stop_does_not(self) -> None:
        last = base.SIZE - base.PAGE
        for offset in (MEMMAP, LAYOUT.offset - base.PAGE, LAYOUT.offset, last):
            self.store(offset)
        self.assertEqual(0, self.pmem.flush())
        self.assertEqual([True], self.mounted.datasync)
        self.assertEqual([True, True], [
            self.is_written(offset) for offset in (LAYOUT.offset, last)])
        self.assertEqual([False, False], [
            self.is_written(offset)
            for offset in (MEMMAP, LAYOUT.offset - base.PAGE)])
        self.vm.qmp.cmd('stop')
        self.assertEqual([True, True], [
            self.is_written(offset)
            for offset in (MEMMAP, LAYOUT.offset - base.PAGE)])

    def test_flush_after_the_block_was_damaged_leaves_out_nothing(
        self
    ) -> None:
        self.store(MEMMAP)
        self.vm.qtest.write_bytes(
            self.memaddr(self.vm) + layout.INFO_BLOCK_OFFSET + 100, b'B')
        self.assertEqual(0, self.pmem.flush())
        self.assertTrue(self.is_written(MEMMAP))

    def test_flush_writes_a_new_block_once(self) -> None:
        block = bytearray(layout.info_block(LAYOUT))
        block[16:32] = b'B' * 16  # its uuid
        struct.pack_into('<Q', block, 4088, fletcher64(block))
        self.vm.qtest.write_bytes(
            self.memaddr(self.vm) + layout.INFO_BLOCK_OFFSET, bytes(block))
        self.store(MEMMAP)
        self.assertEqual(0, self.pmem.flush())
        with self.image.open('rb') as file:
            self.assertEqual(bytes(block), os.pread(
                file.fileno(), len(block), layout.INFO_BLOCK_OFFSET))
        self.assertTrue(self.is_written(MEMMAP))
        self.store(LAYOUT.offset - base.PAGE)
        self.assertEqual(0, self.pmem.flush())
        self.assertFalse(self.is_written(LAYOUT.offset - base.PAGE))

    def test_flush_that_cannot_write_the_content_fails(self) -> None:
        self.mounted.fail_writes(errno.EIO)
        self.store(LAYOUT.offset)
        self.assertEqual(-1, self.pmem.flush())
        self.assertEqual(errno.EIO, self.vm.pmem('last-error'))
        self.mounted.fail_writes(0)
        self.assertEqual(-1, self.pmem.flush())

    def test_early_writeback_leaves_out_the_memmap(self) -> None:
        self.assertEqual(0, self.pmem.flush())
        self.store(MEMMAP, 64)
        self.store(LAYOUT.offset, 15)
        time.sleep(SECONDS)
        self.assertEqual(0, self.vm.pmem('writebacks'))
        self.store(LAYOUT.offset, 16)
        wait.until('writeback to start',
                   lambda: self.vm.pmem('writebacks') or None, 20)
        wait.until('the content to be written',
                   lambda: self.is_written(LAYOUT.offset) or None, 20)
        self.assertFalse(self.is_written(MEMMAP))
