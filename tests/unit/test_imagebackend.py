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

import contextlib
import errno
import inspect
import os
import shutil
import subprocess
import sys
import threading
from unittest import mock

import fixtures as base_fixtures
from nova.compute import utils as compute_utils
from nova import exception
from nova import objects
from nova.virt import images
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import imagebackend as nova_imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from oslo_utils import units
from oslotest import base

from nova_fakedax import imagebackend
from nova_fakedax import layout
from tests import fixtures

CONTENT = b'guest' * 1000


class BackendTestCase(base.BaseTestCase):
    """Nova's own backend on real files."""

    def setUp(self):
        super().setUp()
        if not shutil.which('qemu-img'):
            self.skipTest('qemu-img is not installed')
        self.conf = self.useFixture(fixtures.ConfFixture())
        self.instances_path = self.conf.instances_path
        self.useFixture(fixtures.PrivsepFixture())
        objects.register_all()

    def instance(self, disks=None, memmap='guest'):
        instance = objects.Instance(uuid=fixtures.UUID)
        instance.flavor = objects.Flavor(
            extra_specs={'fakedax:disks': disks, 'fakedax:memmap': memmap}
            if disks else {})
        return instance

    def image(self, name='disk', disks='root,ephemeral', use_cow=True,
              memmap='guest'):
        """The image through which the driver makes the disk."""
        instance = self.instance(disks, memmap)
        os.makedirs(os.path.join(self.instances_path, instance.uuid),
                    exist_ok=True)
        # LibvirtDriver names the configured type in every call.
        return imagebackend.FakeDaxBackend(use_cow).by_name(
            instance, name, 'default')

    def files(self):
        """What is in the instance's directory."""
        return set(os.listdir(
            os.path.join(self.instances_path, fixtures.UUID)))


def _fetch(target, **_kwargs):
    """Like the download of a Glance image of an odd size."""
    with open(target, 'wb') as image:
        image.write(CONTENT)


def _fetch_qcow2(target, **_kwargs):
    subprocess.run(
        ['qemu-img', 'create', '-q', '-f', 'qcow2', target, '1M'],
        check=True)


class ByNameTest(BackendTestCase):

    def _types(self, disks, use_cow=True):
        return {name: type(self.image(name, disks, use_cow)) for name in (
            'disk', 'disk.local', 'disk.eph0', 'disk.swap', 'disk.config',
            'disk.rescue')}

    def test_only_wanted_disks_get_our_backend(self):
        expected = imagebackend.FakeDaxImage
        for disks, wanted in {
            None: set(),
            'root': {'disk'},
            'ephemeral': {'disk.local', 'disk.eph0'},
            'root,ephemeral': {'disk', 'disk.local', 'disk.eph0'},
        }.items():
            self.assertEqual(wanted, {
                name for name, made in self._types(disks).items()
                if made is expected}, disks)

    def test_other_disks_keep_novas_choice(self):
        for use_cow, expected in ((True, nova_imagebackend.Qcow2),
                                  (False, nova_imagebackend.Flat)):
            self.assertIs(
                expected, self._types('root', use_cow)['disk.swap'])
            self.assertIs(expected, self._types(None, use_cow)['disk'])


class CacheTest(BackendTestCase):

    def test_a_root_disk_is_raw_aligned_and_allocated(self):
        self.image().cache(
            _fetch, 'base', 3 * units.Mi, image_id='6f1c')
        path = os.path.join(self.instances_path, fixtures.UUID, 'disk')
        self.assertEqual(4 * units.Mi, layout.mapped_size(path))
        with open(path, 'rb') as image:
            self.assertEqual(CONTENT, image.read(len(CONTENT)))
            self.assertEqual(b'', image.read().strip(b'\0'))

    def test_the_image_in_the_cache_stays_as_it_was(self):
        self.image().cache(_fetch, 'base', 2 * units.Mi, image_id='6f1c')
        self.assertEqual(len(CONTENT), os.path.getsize(
            os.path.join(self.instances_path, '_base', 'base')))

    def test_an_ephemeral_disk_is_made_in_place(self):
        self.image('disk.eph0').cache(
            _fetch, 'ephemeral_1_abc', 2 * units.Mi)
        self.assertEqual(2 * units.Mi, layout.mapped_size(os.path.join(
            self.instances_path, fixtures.UUID, 'disk.eph0')))

    def test_a_disk_that_is_there_is_kept(self):
        self.image().cache(_fetch, 'base', 2 * units.Mi, image_id='6f1c')
        path = os.path.join(self.instances_path, fixtures.UUID, 'disk')
        with open(path, 'r+b') as image:
            image.write(b'DATA')
        self.image().cache(_fetch, 'base', 2 * units.Mi, image_id='6f1c')
        with open(path, 'rb') as image:
            self.assertEqual(b'DATA', image.read(4))

    def test_a_guest_that_writes_a_header_does_not_change_the_format(self):
        self.image().cache(_fetch, 'base', 2 * units.Mi, image_id='6f1c')
        path = os.path.join(self.instances_path, fixtures.UUID, 'disk')
        _fetch_qcow2(path + '.tmp')
        with open(path + '.tmp', 'rb') as source, open(path, 'r+b') as image:
            image.write(source.read())
        self.assertEqual('raw', self.image().driver_format)

    def test_an_image_that_is_not_raw_is_refused(self):
        exc = self.assertRaises(
            exception.InvalidDiskFormat, self.image().cache,
            _fetch_qcow2, 'base', 2 * units.Mi, image_id='6f1c')
        self.assertIn('qcow2', exc.format_message())
        self.assertNotIn('disk', self.files())

    def test_no_space_leaves_no_image(self):
        with mock.patch.object(layout, '_take_blocks', side_effect=OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC))):
            exc = self.assertRaises(
                imagebackend.NoSpace, self.image().cache,
                _fetch, 'base', 2 * units.Mi, image_id='6f1c')
        self.assertEqual(
            f'Cannot allocate 2097152 bytes for {self.instances_path}/'
            f'{fixtures.UUID}/disk: No space left on device',
            exc.format_message())
        self.assertNotIn('disk', self.files())

    def test_no_space_for_an_image_of_no_given_size(self):
        with mock.patch.object(layout, '_take_blocks', side_effect=OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC))):
            exc = self.assertRaises(
                imagebackend.NoSpace, self.image('disk.eph0').cache,
                _fetch, 'base')
        self.assertEqual(
            f'Cannot allocate 2097152 bytes for '
            f'{self.instances_path}/{fixtures.UUID}/disk.eph0: '
            f'No space left on device', exc.format_message())

    def test_no_space_does_not_remove_a_disk_that_was_there(self):
        self.image().cache(_fetch, 'base', 2 * units.Mi, image_id='6f1c')
        with mock.patch.object(layout, '_take_blocks', side_effect=OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC))):
            self.assertRaises(
                imagebackend.NoSpace, self.image().cache,
                _fetch, 'base', 4 * units.Mi, image_id='6f1c')
        self.assertIn('disk', self.files())


class MemmapTestCase(BackendTestCase):
    """Images whose content does not begin at byte 0."""

    def make(self, name='disk', size=4 * units.Mi, memmap='device'):
        kwargs = {'image_id': '6f1c'} if name == 'disk' else {}
        image = self.image(name, memmap=memmap)
        image.cache(_fetch, 'base', size, **kwargs)
        return image

    def content(self, image):
        found = layout.read(image.path)
        with open(image.path, 'rb') as file:
            file.seek(found.offset)
            return file.read().rstrip(b'\0')


class MemmapTest(MemmapTestCase):

    def test_a_new_image_has_the_layout_that_the_flavor_wants(self):
        for name in 'disk', 'disk.eph0', 'disk.local':
            for memmap in 'device', 'guest':
                image = self.make(name, memmap=memmap)
                wanted = layout.planned(4 * units.Mi, memmap == 'device')
                self.assertEqual(wanted, layout.read(image.path))
                self.assertEqual(wanted.file_size,
                                 layout.mapped_size(image.path))
                self.assertEqual(CONTENT, self.content(image))
                self.assertEqual(4 * units.Mi,
                                 image.get_disk_size(image.path))
                self.assertEqual({name, 'disk.info'}, self.files())
                os.unlink(image.path)
                os.unlink(image.disk_info_path)

    def test_a_root_disk_is_copied_once(self):
        with mock.patch('os.copy_file_range',
                        wraps=os.copy_file_range) as copy:
            self.make()
        self.assertLess(sum(call.args[2] for call in copy.mock_calls),
                        2 * len(CONTENT))

    def test_a_crash_leaves_nothing_that_the_next_attempt_meets(self):
        self.make('disk.eph0')
        path = os.path.join(self.instances_path, fixtures.UUID, 'disk.eph0')
        for name in '.template', '.unfinished':
            with open(path + name, 'wb') as left:
                left.write(b'left' * units.Mi)
        os.unlink(path)
        self.assertEqual(CONTENT, self.content(self.make('disk.eph0')))
        self.assertEqual({'disk.eph0', 'disk.info'}, self.files())

    def test_a_file_system_that_cannot_be_made_leaves_nothing(self):
        def fail(target, **_kwargs):
            with open(target, 'wb'):
                raise ValueError

        self.assertRaises(ValueError, self.image(
            'disk.eph0', memmap='device').cache, fail, 'ephemeral',
            2 * units.Mi)
        self.assertEqual(set(), self.files())

    def test_what_looks_like_an_info_block_in_a_users_image_is_content(self):
        """It must not move the beginning of the content."""
        forged = os.path.join(self.instances_path, 'forged')
        with open(forged, 'wb'):
            pass
        layout.fit(forged, 2 * units.Mi, True)

        def fetch(target, **_kwargs):
            shutil.copy(forged, target)

        image = self.image(memmap='device')
        image.cache(fetch, 'forged', 4 * units.Mi, image_id='6f1c')
        found = layout.read(image.path)
        self.assertEqual(layout.planned(4 * units.Mi, True), found)
        with open(image.path, 'rb') as file, open(forged, 'rb') as source:
            file.seek(found.offset)
            self.assertEqual(source.read(), file.read())

    def test_a_resize_grows_and_converts(self):
        for old, new in (('device', 'device'), ('device', 'guest'),
                         ('guest', 'device'), ('guest', 'guest')):
            self.make(memmap=old)
            image = self.make(size=8 * units.Mi, memmap=new)
            self.assertEqual(layout.planned(8 * units.Mi, new == 'device'),
                             layout.read(image.path))
            self.assertEqual(CONTENT, self.content(image))
            os.unlink(image.path)

    def test_a_cold_migration_converts(self):
        self.make(memmap='guest')
        image = self.make()
        self.assertEqual(layout.planned(4 * units.Mi, True),
                         layout.read(image.path))
        self.assertEqual(CONTENT, self.content(image))

    def test_a_conversion_needs_no_cached_base(self):
        """As at the destination, or when the image has been deleted."""
        self.make(memmap='guest')
        os.unlink(os.path.join(self.instances_path, '_base', 'base'))
        self.assertEqual(CONTENT, self.content(self.make()))

    def test_an_image_larger_than_the_flavor_is_refused(self):
        exc = self.assertRaises(
            exception.FlavorDiskSmallerThanImage, self.make, size=1000)
        self.assertIn('5120 bytes', exc.format_message())
        self.assertEqual(set(), self.files())

    def test_no_space_for_a_larger_image_leaves_the_old_one_whole(self):
        image = self.make()
        with mock.patch.object(layout, 'available', return_value=units.Mi):
            exc = self.assertRaises(
                imagebackend.NoSpace, self.make, size=8 * units.Mi)
        self.assertEqual(
            f'Cannot allocate 10485760 bytes for {image.path}: No space left '
            f'on device', exc.format_message())
        self.assertEqual(layout.planned(4 * units.Mi, True),
                         layout.read(image.path))
        self.assertEqual(CONTENT, self.content(image))
        self.assertEqual({'disk', 'disk.info'}, self.files())

    def test_a_damaged_info_block_is_not_resized(self):
        image = self.make()
        with open(image.path, 'r+b') as file:
            file.seek(4096 + 56)
            file.write(b'\1')
        exc = self.assertRaises(
            layout.InvalidLayout, self.make, size=8 * units.Mi)
        self.assertIn('an info block whose checksum', exc.format_message())
        self.assertEqual(6 * units.Mi, os.path.getsize(image.path))

    def test_the_copy_of_a_guest_that_is_off_is_the_content(self):
        for memmap in 'device', 'guest':
            image = self.make(memmap=memmap)
            # As LibvirtDriver.snapshot() finds it.
            found = imagebackend.FakeDaxBackend(True).by_libvirt_path(
                self.instance('root'), image.path, 'raw')
            for image_format in 'raw', 'qcow2':
                copy = os.path.join(self.instances_path, image_format)
                found.snapshot_extract(copy, image_format)
                subprocess.run(
                    ['qemu-img', 'convert', '-f', image_format, '-O', 'raw',
                     copy, copy + '.raw'], check=True)
                with open(copy + '.raw', 'rb') as file:
                    self.assertEqual(CONTENT.ljust(4 * units.Mi, b'\0'),
                                     file.read())
            os.unlink(image.path)

    def test_an_ordinary_disk_is_copied_by_nova(self):
        image = imagebackend.FakeDaxBackend(True).by_libvirt_path(
            self.instance('ephemeral'), '/i/disk', 'raw')
        self.assertIs(nova_imagebackend.Flat, type(image))


class ExtractTest(MemmapTestCase):

    def test_one_operation_at_a_time_is_enough(self):
        """What holds the semaphore does not wait for it again."""
        self.useFixture(base_fixtures.MockPatchObject(
            compute_utils, 'disk_ops_semaphore',
            threading.BoundedSemaphore(1)))
        image = self.make()
        copy = os.path.join(self.instances_path, 'copy')
        image.snapshot_extract(copy, 'raw')
        self.assertTrue(os.path.exists(copy))

    def test_an_error_of_qemu_img_is_novas(self):
        exc = self.assertRaises(
            exception.ImageUnacceptable, imagebackend.extract,
            '/no/such/image', os.path.join(self.instances_path, 'copy'),
            'iso')
        self.assertIn('Unable to convert image to raw', exc.format_message())

    def test_a_copy_is_compressed_where_novas_would_be(self):
        self.conf.config(snapshot_compression=True, group='libvirt')
        for image_format, compressed in (('qcow2', True), ('raw', False)):
            with mock.patch('nova.privsep.qemu.unprivileged_convert_image',
                            autospec=True) as convert:
                imagebackend.extract('disk', 'copy', image_format)
            convert.assert_called_once_with(
                'disk', 'copy', 'raw', image_format, self.instances_path,
                compressed)

    def test_the_guest_stores_nothing_meanwhile(self):
        order = []

        @contextlib.contextmanager
        def nothing_stored(instance):
            order.append(instance.uuid)
            yield
            order.append('resume')

        backend = imagebackend.FakeDaxBackend(True)
        backend.nothing_stored = nothing_stored
        found = backend.by_libvirt_path(
            self.instance('root'), self.make().path, 'raw')
        with mock.patch.object(imagebackend, 'extract',
                               side_effect=lambda *_args: order.append(
                                   'copy')):
            found.snapshot_extract('copy', 'raw')
        self.assertEqual([fixtures.UUID, 'copy', 'resume'], order)


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes what extract() follows."""

    def test_a_conversion_waits_and_does_what_extract_does(self):
        self.assertEqual("""\
def _convert_image(source, dest, in_format, out_format, run_as_root,
                   compress=False, src_encryption=None, dest_encryption=None):
    try:
        with compute_utils.disk_ops_semaphore:
            if not run_as_root:
                nova.privsep.qemu.unprivileged_convert_image(
                    source, dest, in_format, out_format, CONF.instances_path,
                    compress, src_encryption=src_encryption,
                    dest_encryption=dest_encryption)
""", inspect.getsource(images._convert_image).partition(
            '            else:')[0])
        source = inspect.getsource(libvirt_utils.extract_snapshot)
        for part in ("if dest_fmt == 'iso':\n        dest_fmt = 'raw'",
                     "if dest_fmt == 'ploop':\n        dest_fmt = 'parallels'",
                     'CONF.libvirt.snapshot_compression and '
                     'dest_fmt == "qcow2"'):
            self.assertIn(part, source)

    def test_a_guest_is_paused_before_it_is_copied_by_these(self):
        source = inspect.getsource(libvirt_driver.LibvirtDriver.snapshot)
        for call in ('self._suspend_guest_for_snapshot(',
                     'root_disk.snapshot_extract(out_path, image_format)'):
            self.assertIn(call, source)


class FullFileSystemTest(base.BaseTestCase):
    """A file system that is really full."""

    SCRIPT = """\
import sys
from nova_fakedax import imagebackend
from tests.unit import test_imagebackend

class Case(test_imagebackend.BackendTestCase):
    def runTest(self):
        self.conf.config(instances_path=sys.argv[1])
        self.instances_path = sys.argv[1]
        image = self.image('disk.eph0')
        exc = self.assertRaises(
            imagebackend.NoSpace, image.cache,
            test_imagebackend._fetch, 'ephemeral', 16 << 20)
        print(exc.format_message())
        print(self.files())

result = Case().run()
sys.exit(not result.wasSuccessful())
"""

    def test_nothing_is_left_on_a_full_file_system(self):
        if os.geteuid():
            self.skipTest('only root can mount a small tmpfs')
        if not shutil.which('qemu-img'):
            self.skipTest('qemu-img is not installed')
        directory = self.useFixture(base_fixtures.TempDir()).path
        done = subprocess.run(
            ['unshare', '--mount', 'sh', '-ec',
             'mount -t tmpfs -o size=8m tmpfs "$1"; exec "$2" -c "$3" "$1"',
             'sh', directory, sys.executable, self.SCRIPT],
            # oslotest would capture what the case prints there.
            env=os.environ | {'OS_STDOUT_CAPTURE': '0'},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode and 'unshare failed' in done.stderr:
            self.skipTest(done.stderr.strip())
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        [message, files] = done.stdout.splitlines()[:2]
        self.assertEqual(
            f'Cannot allocate 16777216 bytes for {directory}/'
            f'{fixtures.UUID}/disk.eph0: No space left on device', message)
        self.assertNotIn('disk.eph0', files)
