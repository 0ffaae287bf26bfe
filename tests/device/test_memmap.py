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

"""The memmap in front of the content: cleared, and cached in small pages."""

import itertools
import os
import struct

from lab.machine import pagecache
from nova_fakedax import layout
import testscenarios

from tests.device import base

load_tests = testscenarios.load_tests_apply_scenarios

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
        vm.qtest.write_bytes(self.memaddr(vm) + LAYOUT.offset // 2, b'B')
        self.assertEqual(base.PAGE, vm.io('write_bytes') - before)

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
