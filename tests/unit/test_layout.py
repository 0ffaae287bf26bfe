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

import errno
import json
import os
import pathlib
import struct
import subprocess
from unittest import mock

import fixtures
from oslo_utils import units
from oslotest import base
import testscenarios

from lab.machine import pagecache
from nova_fakedax import layout
from tests import fixtures as our_fixtures

load_tests = testscenarios.load_tests_apply_scenarios

#: Where the memmap is.
MEMMAPS = [('device', {'memmap': True}), ('guest', {'memmap': False})]


class AlignedTest(base.BaseTestCase):

    def test_a_size_is_rounded_up_to_2_mib(self):
        for size, expected in {
            0: 0,
            1: 2 * units.Mi,
            2 * units.Mi - 1: 2 * units.Mi,
            2 * units.Mi: 2 * units.Mi,
            2 * units.Mi + 1: 4 * units.Mi,
            5 * units.Gi: 5 * units.Gi,
        }.items():
            self.assertEqual(expected, layout.aligned(size), size)


class FileTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(directory, 'disk')

    def write(self, content=b'', size=None, path=None):
        with open(path or self.path, 'wb') as image:
            image.write(content)
            if size is not None:
                image.truncate(size)

    def files(self):
        return sorted(os.listdir(os.path.dirname(self.path)))

    def content(self):
        """What the guest's disk holds, as the image itself says."""
        found = layout.read(self.path)
        with open(self.path, 'rb') as image:
            image.seek(found.offset)
            content = image.read()
        self.assertEqual(found.size, len(content))
        return content


class AllocateTest(FileTestCase):

    def test_a_sparse_file_becomes_whole_and_aligned(self):
        self.write(b'guest', size=3 * units.Mi)
        layout.allocate(self.path, 5 * units.Mi)
        status = os.stat(self.path)
        self.assertEqual(6 * units.Mi, status.st_size)
        self.assertGreaterEqual(status.st_blocks * 512, 6 * units.Mi)

    def test_what_the_file_holds_is_kept(self):
        content = os.urandom(units.Mi + 7)
        self.write(content)
        layout.allocate(self.path, 4 * units.Mi)
        with open(self.path, 'rb') as image:
            self.assertEqual(content, image.read(len(content)))
            self.assertEqual(b'', image.read().strip(b'\0'))

    def test_a_clone_gets_blocks_of_its_own(self):
        """Nova makes clones by cp(1), of a cached image or for a resize."""
        directory = os.path.dirname(self.path)
        self.useFixture(our_fixtures.XfsFixture(directory))
        content = os.urandom(2 * units.Mi)
        self.write(content)
        clone = os.path.join(directory, 'clone')
        subprocess.run(['cp', '--reflink=always', self.path, clone],
                       check=True)
        self.assertTrue(our_fixtures.shares_blocks(clone))
        layout.allocate(clone, 4 * units.Mi)
        self.assertFalse(our_fixtures.shares_blocks(clone))
        self.assertEqual(4 * units.Mi, layout.mapped_size(clone))
        with open(clone, 'rb') as image:
            self.assertEqual(content, image.read(len(content)))

    def test_a_larger_file_is_not_shortened(self):
        self.write(size=5 * units.Mi)
        layout.allocate(self.path, units.Mi)
        self.assertEqual(6 * units.Mi, os.path.getsize(self.path))

    def test_doing_it_again_changes_nothing(self):
        self.write(b'guest')
        layout.allocate(self.path, 2 * units.Mi)
        before = os.stat(self.path)
        layout.allocate(self.path, 2 * units.Mi)
        after = os.stat(self.path)
        self.assertEqual((before.st_size, before.st_blocks),
                         (after.st_size, after.st_blocks))

    def test_a_file_that_is_not_there_is_not_made(self):
        self.assertRaises(
            FileNotFoundError, layout.allocate, self.path, 2 * units.Mi)
        self.assertFalse(os.path.exists(self.path))

    def test_too_much_is_not_begun(self):
        # Otherwise other instances would find the file system full.
        self.write(b'guest')
        before = os.stat(self.path)
        free = os.statvfs(self.path)
        exc = self.assertRaises(
            OSError, layout.allocate, self.path,
            free.f_blocks * free.f_frsize + units.Gi)
        self.assertEqual(errno.ENOSPC, exc.errno)
        after = os.stat(self.path)
        self.assertEqual((before.st_size, before.st_blocks),
                         (after.st_size, after.st_blocks))

    def test_no_space_is_an_error(self):
        self.write()
        with mock.patch.object(layout, '_take_blocks', side_effect=OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC))):
            exc = self.assertRaises(
                OSError, layout.allocate, self.path, 2 * units.Mi)
        self.assertEqual(errno.ENOSPC, exc.errno)


class MappedSizeTest(FileTestCase):

    def test_what_allocate_leaves_can_be_mapped(self):
        self.write(b'guest')
        layout.allocate(self.path, 3 * units.Mi)
        self.assertEqual(4 * units.Mi, layout.mapped_size(self.path))

    def test_an_image_restored_as_a_sparse_file_is_allocated(self):
        with open(self.path, 'wb') as image:
            image.write(b'guest')
            image.truncate(4 * units.Mi)
        missing = layout.fill_holes(self.path)
        self.assertGreater(missing, 0)
        self.assertEqual(4 * units.Mi, layout.mapped_size(self.path))
        with open(self.path, 'rb') as image:
            self.assertEqual(b'guest' + bytes(4 * units.Mi - 5), image.read())
        with mock.patch.object(layout, '_fallocate') as fallocate:
            self.assertEqual(0, layout.fill_holes(self.path))
        fallocate.assert_not_called()

    def test_one_without_holes_of_another_user(self):
        """As that of a guest that runs, which belongs to QEMU's."""
        if not os.geteuid():
            os.seteuid(65534)
            self.addCleanup(os.seteuid, 0)
        path = '/etc/passwd'
        self.assertRaises(PermissionError, open, path, 'r+b')
        self.assertEqual(0, layout.fill_holes(path))

    def test_one_of_another_size_keeps_it(self):
        with open(self.path, 'wb') as image:
            image.truncate(4 * units.Mi + 1)
        layout.fill_holes(self.path)
        self.assertEqual(4 * units.Mi + 1, os.path.getsize(self.path))

    def test_holes_that_cannot_be_filled_are_an_error(self):
        with open(self.path, 'wb') as image:
            image.truncate(4 * units.Mi)
        with mock.patch.object(layout, 'available', return_value=units.Mi):
            self.assertEqual(errno.ENOSPC, self.assertRaises(
                OSError, layout.fill_holes, self.path).errno)
        with mock.patch.object(layout, '_fallocate', return_value=-1), \
                mock.patch('ctypes.get_errno',
                           return_value=errno.EOPNOTSUPP):
            self.assertEqual(errno.EOPNOTSUPP, self.assertRaises(
                OSError, layout.fill_holes, self.path).errno)

    def _refused(self):
        exc = self.assertRaises(
            layout.InvalidLayout, layout.mapped_size, self.path)
        return str(exc)

    def test_a_missing_file_is_refused(self):
        self.assertEqual(f'{self.path} does not exist', self._refused())

    def test_a_directory_is_refused(self):
        os.mkdir(self.path)
        self.assertEqual(f'{self.path} is not a regular file',
                         self._refused())

    def test_an_unaligned_file_is_refused(self):
        self.write(b'x' * (2 * units.Mi + 512))
        self.assertEqual(
            f'{self.path} has 2097664 bytes; allowed: a multiple of 2097152 '
            f'bytes', self._refused())

    def test_an_empty_file_is_refused(self):
        self.write()
        self.assertEqual(
            f'{self.path} has 0 bytes; allowed: a multiple of 2097152 bytes',
            self._refused())

    def test_a_file_with_a_hole_is_refused(self):
        self.write(b'x' * 4096, size=4 * units.Mi)
        allocated = os.stat(self.path).st_blocks * 512
        self.assertLess(allocated, 4 * units.Mi)
        self.assertEqual(
            f'{self.path} has 4194304 bytes, but only {allocated} are '
            f'allocated; a hard reboot of the server allocates the rest',
            self._refused())


class PlannedSizeTest(base.BaseTestCase):

    scenarios = [(str(size), {'size': size}) for size in (
        1, 2 * units.Mi, 126 * units.Mi, 1000 * units.Mi, units.Gi,
        32 * units.Gi, 100 * units.Gi, units.Ti)]

    def test_the_memmap_has_room_for_all_pages_of_the_device(self):
        planned = layout.planned(self.size, True)
        self.assertTrue(planned.memmap)
        self.assertEqual(layout.aligned(self.size), planned.size)
        pages = planned.file_size // 4096
        self.assertGreaterEqual(planned.offset, 8192 + (pages - 2) * 64)
        # And no more than alignment asks for.
        self.assertLess(planned.offset,
                        8192 + (pages - 2) * 64 + 2 * units.Mi)
        self.assertEqual(0, planned.offset % (2 * units.Mi))


class PlannedTest(base.BaseTestCase):

    def test_offsets(self):
        # Seen by the kernel: tests/guest/test_layout.py.
        self.assertEqual({1: 18, 8: 132, 32: 522, 100: 1626}, {
            gib: layout.planned(gib * units.Gi, True).offset // units.Mi
            for gib in (1, 8, 32, 100)})

    def test_without_a_memmap_the_content_is_the_file(self):
        planned = layout.planned(3 * units.Mi, False)
        self.assertEqual(layout.Layout(0, 4 * units.Mi), planned)
        self.assertFalse(planned.memmap)


def _fletcher64(block, order):
    """As nd_fletcher64() of drivers/nvdimm/core.c."""
    low = high = 0
    for (word,) in struct.iter_unpack(f'{order}I', block):
        low = (low + word) % 2 ** 32
        high += low
    return high % 2 ** 32 << 32 | low


class InfoBlockTestCase(FileTestCase):

    def setUp(self):
        super().setUp()
        self.write(b'guest', path=self.path + '.raw')
        layout.make(self.path, self.path + '.raw', 4 * units.Mi, True)

    def block(self):
        with open(self.path, 'rb') as image:
            image.seek(4096)
            return image.read(4096)

    def store(self, position, value, order='<', checksum=True):
        """As a guest can, with a checksum that fits."""
        block = bytearray(self.block())
        block[position:position + len(value)] = value
        if checksum:
            block[-8:] = bytes(8)
            block[-8:] = struct.pack(
                f'{order}Q', _fletcher64(block, order))
        with open(self.path, 'r+b') as image:
            image.seek(4096)
            image.write(block)

    def refused(self):
        exc = self.assertRaises(
            layout.InvalidLayout, layout.read, self.path)
        return str(exc).removeprefix(f'{self.path} has ')


class InfoBlockTest(InfoBlockTestCase):

    def test_it_is_what_the_kernel_reads(self):
        # struct nd_pfn_sb of drivers/nvdimm/pfn.h.
        block = self.block()
        for position, expected in (
                (0, b'NVDIMM_PFN_INFO\0'),
                (32, bytes(16)),  # parent_uuid
                (48, struct.pack('<I', 0)),  # flags
                (52, struct.pack('<HH', 1, 4)),  # version
                (56, struct.pack('<Q', 2 * units.Mi)),  # dataoff
                (64, struct.pack('<Q', 1024)),  # npfns
                (72, struct.pack('<I', 2)),  # mode: PFN_MODE_PMEM
                (76, struct.pack('<II', 0, 0)),  # start_pad, end_trunc
                (84, struct.pack('<I', 2 * units.Mi)),  # align
                (88, struct.pack('<I', 4096)),  # page_size
                (92, struct.pack('<H', 64)),  # page_struct_size
                (94, bytes(3994)),
                (4088, struct.pack('<Q', _fletcher64(
                    block[:4088] + bytes(8), '<')))):
            self.assertEqual(
                expected, block[position:position + len(expected)], position)
        self.assertNotEqual(bytes(16), block[16:32])

    def test_it_is_read_back(self):
        self.assertEqual(layout.planned(4 * units.Mi, True),
                         layout.read(self.path))
        self.assertEqual(layout.read(self.path).file_size,
                         layout.mapped_size(self.path))

    def test_a_damaged_block_is_refused(self):
        checksum = struct.unpack('<Q', self.block()[-8:])[0]
        self.store(56, b'\1', checksum=False)
        self.assertEqual(
            f'6291456 bytes and an info block whose checksum is '
            f'{checksum:#x}; allowed: '
            f'{_fletcher64(self.block()[:4088] + bytes(8), "<"):#x}',
            self.refused())

    def test_a_block_of_the_other_byte_order_is_refused(self):
        self.store(52, struct.pack('>HHQ', 1, 4, 2 * units.Mi), order='>')
        self.assertEqual(
            '6291456 bytes and an info block whose byte order is big-endian; '
            'allowed: little-endian', self.refused())

    def test_a_file_of_another_size_is_refused(self):
        # The last ends within the block.
        for size in (8 * units.Mi, 6 * units.Mi + 512, 2 * units.Mi, 6096):
            os.truncate(self.path, size)
            self.assertIn(f'{size} bytes and an info block', self.refused())

    def test_what_has_no_signature_has_no_memmap(self):
        self.store(0, b'X')
        self.assertEqual(layout.Layout(0, 6 * units.Mi),
                         layout.read(self.path))
        self.write()
        self.assertEqual(layout.Layout(0, 0), layout.read(self.path))

    def test_a_block_that_a_guest_makes_again_is_valid(self):
        self.store(16, b'another identity')
        self.assertEqual(layout.planned(4 * units.Mi, True),
                         layout.read(self.path))

    def test_what_qemu_reads_is_the_content(self):
        found = layout.read(self.path)
        name = found.qemu_filename(self.path)
        self.assertEqual(
            {'driver': 'raw', 'offset': 2 * units.Mi, 'size': 4 * units.Mi,
             'file': {'driver': 'file', 'filename': self.path}},
            json.loads(name.removeprefix('json:')))
        subprocess.run(['qemu-img', 'convert', '-f', 'raw', '-O', 'raw',
                        name, self.path + '.out'], check=True)
        with open(self.path + '.out', 'rb') as copy:
            self.assertEqual(self.content(), copy.read())
        self.assertEqual('disk', layout.Layout(0, 1).qemu_filename('disk'))


class ForgedFieldTest(InfoBlockTestCase):

    scenarios = [
        (f'{field}-{value}', {
            'position': position, 'field': field, 'value': value,
            'allowed': allowed, 'stored': stored})
        for position, field, value, allowed, stored in (
            (32, 'parent_uuid', '01', 'zeros', b'\1'),
            (48, 'flags', 1, 0, b'\1'),
            (52, 'version_major', 2, 1, b'\2'),
            (54, 'version_minor', 5, 4, b'\5'),
            (56, 'dataoff', 4 * units.Mi, 2 * units.Mi,
             struct.pack('<Q', 4 * units.Mi)),
            (56, 'dataoff', 2 * units.Mi + 4096, 2 * units.Mi,
             struct.pack('<Q', 2 * units.Mi + 4096)),
            (56, 'dataoff', units.Ti, 2 * units.Mi,
             struct.pack('<Q', units.Ti)),
            (56, 'dataoff', 0, 2 * units.Mi, bytes(8)),
            (64, 'npfns', 1025, 1024, struct.pack('<Q', 1025)),
            (72, 'mode', 1, 2, b'\1'),
            (76, 'start_pad', 1, 0, b'\1'),
            (80, 'end_trunc', 1, 0, b'\1'),
            (84, 'align', 4096, 2 * units.Mi, struct.pack('<I', 4096)),
            (88, 'page_size', 65536, 4096, struct.pack('<I', 65536)),
            (92, 'page_struct_size', 128, 64, b'\x80'),
            (94, 'padding', '01', 'zeros', b'\1'))]

    def test_it_is_refused(self):
        self.store(self.position, self.stored)
        self.assertEqual(
            f'6291456 bytes and an info block whose {self.field} is '
            f'{self.value}; allowed: {self.allowed}', self.refused())


class MakeTest(FileTestCase):

    scenarios = MEMMAPS

    def setUp(self):
        super().setUp()
        self.source = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'source')

    def test_the_content_is_the_source_and_zeros(self):
        source = os.urandom(2 * units.Mi + 5)
        self.write(source, path=self.source)
        layout.make(self.path, self.source, 8 * units.Mi, self.memmap)
        found = layout.read(self.path)
        self.assertEqual(layout.planned(8 * units.Mi, self.memmap), found)
        self.assertEqual(found.file_size, layout.mapped_size(self.path))
        self.assertEqual(source.ljust(8 * units.Mi, b'\0'), self.content())
        self.assertEqual(['disk'], self.files())

    def test_a_source_with_holes(self):
        with open(self.source, 'wb') as source:
            source.truncate(5 * units.Mi)
            source.seek(3 * units.Mi)
            source.write(b'data')
        with mock.patch('os.copy_file_range', wraps=os.copy_file_range) as (
                copy):
            layout.make(self.path, self.source, 6 * units.Mi, self.memmap)
        # Not the holes.
        self.assertLess(sum(call.args[2] for call in copy.mock_calls),
                        units.Mi)
        self.assertEqual(
            bytes(3 * units.Mi) + b'data', self.content().rstrip(b'\0'))

    def test_where_the_kernel_cannot_copy(self):
        source = os.urandom(5 * units.Mi)
        self.write(source, path=self.source)
        for error in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS,
                      errno.EINVAL):
            with mock.patch('os.copy_file_range', side_effect=OSError(
                    error, 'cannot')):
                layout.make(self.path, self.source, 6 * units.Mi, self.memmap)
            self.assertEqual(source, self.content()[:5 * units.Mi])

    def test_where_files_are_cloned_the_image_has_its_own_blocks(self):
        self.useFixture(our_fixtures.XfsFixture(os.path.dirname(self.path)))
        source = os.urandom(2 * units.Mi)
        self.source = self.path + '.raw'
        self.write(source, path=self.source)
        layout.make(self.path, self.source, 4 * units.Mi, self.memmap)
        self.assertFalse(our_fixtures.shares_blocks(self.path))
        self.assertEqual(source, self.content()[:2 * units.Mi])

    def test_a_larger_source_is_refused(self):
        self.write(size=4 * units.Mi + 1, path=self.source)
        exc = self.assertRaises(
            layout.InvalidLayout, layout.make, self.path, self.source,
            4 * units.Mi, self.memmap)
        self.assertEqual(f'{self.source} has 4194305 bytes; allowed: at '
                         f'most 4194304', str(exc))
        self.assertEqual([], self.files())

    def test_too_much_is_not_begun(self):
        self.write(b'guest', path=self.source)
        exc = self.assertRaises(
            OSError, layout.make, self.path, self.source, 2 ** 55,
            self.memmap)
        self.assertEqual(errno.ENOSPC, exc.errno)
        self.assertEqual([], self.files())


class CopyTest(FileTestCase):

    scenarios = MEMMAPS

    def setUp(self):
        super().setUp()
        self.source = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'source')
        content = os.path.join(os.path.dirname(self.source), 'content')
        self.write(b'data' * units.Mi, path=content)
        layout.make(self.source, content, 64 * units.Mi, self.memmap)
        pagecache.evict(pathlib.Path(self.source))

    def test_it_is_whole_and_what_was_not_written_is_not_read(self):
        with mock.patch('os.copy_file_range', wraps=os.copy_file_range) as (
                copied):
            layout.copy(self.path, self.source, 0, self.memmap)
        self.assertLess(sum(call.args[2] for call in copied.mock_calls),
                        8 * units.Mi)
        self.assertEqual(layout.read(self.source), layout.read(self.path))
        self.assertEqual((b'data' * units.Mi).ljust(64 * units.Mi, b'\0'),
                         self.content())
        layout.mapped_size(self.path)
        self.assertEqual(['disk'], self.files())

    def test_it_is_as_large_and_laid_out_as_wanted(self):
        for size, memmap in ((65 * units.Mi, True), (66 * units.Mi, False)):
            layout.copy(self.path, self.source, size, memmap)
            self.assertEqual(layout.planned(66 * units.Mi, memmap),
                             layout.read(self.path))
            self.assertEqual(
                (b'data' * units.Mi).ljust(66 * units.Mi, b'\0'),
                self.content())

    def test_an_error_leaves_nothing(self):
        with mock.patch('os.rename', side_effect=OSError(errno.EIO, 'gone')):
            self.assertRaisesRegex(
                OSError, 'gone', layout.copy, self.path, self.source,
                0, self.memmap)
        self.assertEqual([], self.files())


class _Crash:
    """Ends the process before the step of this number."""

    def __init__(self, steps):
        self.steps = steps

    def before(self, function):
        def step(*args, **kwargs):
            if not self.steps:
                os._exit(9)
            self.steps -= 1
            return function(*args, **kwargs)
        return step


class FitTestCase(FileTestCase):

    def make(self, size, memmap):
        content = os.urandom(size)
        source = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'source')
        self.write(content, path=source)
        layout.make(self.path, source, size, memmap)
        return content


class GrowthTest(FitTestCase):

    scenarios = [
        (f'{old}-{old_memmap}-{new}-{new_memmap}', {
            'old': old * units.Mi, 'old_memmap': old_memmap,
            'new': new * units.Mi, 'new_memmap': new_memmap})
        for old, old_memmap, new, new_memmap in (
            (2, True, 6, True), (2, True, 6, False), (2, False, 6, True),
            (2, False, 6, False), (6, True, 6, False), (6, False, 6, True),
            # The memmap gets another 2 MiB.
            (124, True, 140, True))]

    def test_growth_and_conversion_keep_the_content(self):
        content = self.make(self.old, self.old_memmap)
        layout.fit(self.path, self.new, self.new_memmap)
        found = layout.read(self.path)
        self.assertEqual(layout.planned(self.new, self.new_memmap), found)
        self.assertEqual(found.file_size, layout.mapped_size(self.path))
        self.assertEqual(content.ljust(self.new, b'\0'), self.content())
        self.assertEqual(['disk'], self.files())


class FitTest(FitTestCase):

    scenarios = MEMMAPS

    def test_what_fits_stays_the_same_file(self):
        self.make(4 * units.Mi, self.memmap)
        with open(self.path, 'rb') as image:
            layout.fit(self.path, 4 * units.Mi, self.memmap)
            self.assertTrue(
                os.path.samestat(os.fstat(image.fileno()),
                                 os.stat(self.path)))

    def test_a_larger_image_stays_as_it_is(self):
        content = self.make(8 * units.Mi, self.memmap)
        for new_memmap in True, False:
            layout.fit(self.path, 4 * units.Mi, new_memmap)
            self.assertEqual(content, self.content())
            self.assertEqual(layout.planned(8 * units.Mi, self.memmap),
                             layout.read(self.path))

    def test_a_file_that_was_copied_sparse_is_allocated(self):
        self.make(4 * units.Mi, self.memmap)
        subprocess.run(['cp', '--sparse=always', self.path,
                        self.path + '.copy'], check=True)
        os.truncate(self.path + '.copy', os.path.getsize(self.path))
        os.rename(self.path + '.copy', self.path)
        layout.fit(self.path, 4 * units.Mi, self.memmap)
        layout.mapped_size(self.path)


class FitMemmapTest(FitTestCase):

    def test_a_guest_gains_no_space_by_overwriting_the_block(self):
        self.make(8 * units.Mi, True)
        size = os.path.getsize(self.path)
        for _round in range(3):
            with open(self.path, 'r+b') as image:
                image.seek(4096)
                image.write(bytes(4096))
            layout.fit(self.path, 8 * units.Mi, True)
            self.assertEqual(size, os.path.getsize(self.path))

    def test_a_damaged_image_is_left_alone(self):
        self.make(4 * units.Mi, True)
        with open(self.path, 'r+b') as image:
            image.seek(4096 + 60)
            image.write(b'\1')
        self.assertRaises(layout.InvalidLayout, layout.fit, self.path,
                          8 * units.Mi, False)
        self.assertEqual(6 * units.Mi, os.path.getsize(self.path))

    def test_too_little_space_is_seen_first(self):
        content = self.make(2 * units.Mi, True)
        wanted = layout.planned(6 * units.Mi, True).file_size
        with mock.patch.object(layout, 'available',
                               return_value=wanted - 1), \
                mock.patch.object(layout, '_copy') as copy:
            exc = self.assertRaises(
                OSError, layout.fit, self.path, 6 * units.Mi, True)
        self.assertEqual(errno.ENOSPC, exc.errno)
        self.assertEqual(self.path, exc.filename)
        copy.assert_not_called()
        self.assertEqual(content, self.content())
        with mock.patch.object(layout, 'available', return_value=wanted):
            layout.fit(self.path, 6 * units.Mi, True)

    def test_an_error_in_between_leaves_the_old_image_alone(self):
        content = self.make(2 * units.Mi, True)
        for step in '_copy', '_take_blocks':
            with mock.patch.object(layout, step, side_effect=OSError(
                    errno.EIO, 'lost')):
                self.assertRaises(
                    OSError, layout.fit, self.path, 6 * units.Mi, True)
            self.assertEqual(content, self.content())
            self.assertEqual(['disk'], self.files())


class CrashTest(FitTestCase):

    scenarios = [
        (f'{old_memmap}-{new_memmap}', {
            'old_memmap': old_memmap, 'new_memmap': new_memmap})
        for old_memmap, new_memmap in (
            (True, True), (True, False), (False, True))]

    def crash(self, steps, size, memmap):
        """Whether it ends before it has done that many steps."""
        child = os.fork()
        if not child:
            crash = _Crash(steps)
            for owner, name in (
                    (layout, '_copy_chunk'), (layout, '_take_blocks'),
                    (os, 'pwrite'), (os, 'fsync'), (os, 'rename'),
                    (os, 'unlink')):
                setattr(owner, name, crash.before(getattr(owner, name)))
            try:
                layout.fit(self.path, size, memmap)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.assertIn(status, (0, 9))
        return status == 9

    def test_a_crash_at_any_step_leaves_one_of_the_two(self):
        outcomes = []
        while True:
            content = self.make(2 * units.Mi, self.old_memmap)
            crashed = self.crash(len(outcomes), 6 * units.Mi, self.new_memmap)
            found = layout.read(self.path)
            outcomes.append(found.size // units.Mi)
            self.assertIn(found, (
                layout.planned(2 * units.Mi, self.old_memmap),
                layout.planned(6 * units.Mi, self.new_memmap)))
            self.assertEqual(found.file_size, layout.mapped_size(self.path))
            self.assertEqual(content.ljust(found.size, b'\0'),
                             self.content())
            # The next attempt clears up.
            layout.fit(self.path, 6 * units.Mi, self.new_memmap)
            self.assertEqual(['disk'], self.files())
            self.assertEqual(content.ljust(6 * units.Mi, b'\0'),
                             self.content())
            if not crashed:
                break
        # The old one until the rename, then the new one.
        self.assertEqual(sorted(outcomes), outcomes)
        self.assertEqual({2, 6}, set(outcomes))
        self.assertGreater(len(outcomes), 6)


class ViewTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        directory = self.useFixture(fixtures.TempDir()).path
        self.image = os.path.join(directory, 'disk')
        self.make()

    def make(self):
        with open(f'{self.image}.new', 'wb') as file:
            file.write(b'content')
        os.rename(f'{self.image}.new', self.image)

    def files(self):
        return sorted(os.listdir(os.path.dirname(self.image)))

    def test_it_is_another_name_of_the_image(self):
        view = layout.view(self.image)
        self.assertEqual(f'{self.image}.view', view)
        self.assertTrue(layout.is_view(view))
        self.assertFalse(layout.is_view(self.image))
        self.assertTrue(os.path.samefile(self.image, view))
        self.assertEqual(view, layout.view(self.image))
        self.assertEqual(['disk', 'disk.view'], self.files())

    def test_of_an_image_in_place_of_another(self):
        layout.view(self.image)
        self.make()
        self.assertTrue(os.path.samefile(
            self.image, layout.view(self.image)))
        self.assertEqual(['disk', 'disk.view'], self.files())

    def test_what_a_crash_left(self):
        os.link(self.image, f'{self.image}.view.unfinished')
        self.make()
        self.assertTrue(os.path.samefile(
            self.image, layout.view(self.image)))
        self.assertEqual(['disk', 'disk.view'], self.files())

    def test_where_there_are_no_links_it_is_the_image_itself(self):
        layout.view(self.image)
        self.make()
        with mock.patch('os.link', side_effect=OSError(
                errno.EPERM, os.strerror(errno.EPERM))):
            self.assertEqual(self.image, layout.view(self.image))
