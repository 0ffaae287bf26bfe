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
import json
import os
import shutil
import subprocess
from unittest import mock

import fixtures as base_fixtures
from nova import objects
from oslo_concurrency import processutils
from oslo_utils import units
from oslotest import base

from nova_fakedax import imagebackend
from nova_fakedax import layout
from nova_fakedax import resize
from tests import fixtures

DATA = b'of the guest' * 1000
#: Bytes of the disks before.
SIZE = 64 * units.Mi


class ResizeTestCase(base.BaseTestCase):
    """Files and qemu-img are real."""

    def setUp(self):
        super().setUp()
        if not shutil.which('qemu-img'):
            self.skipTest('qemu-img is not installed')
        objects.register_all()
        self.after = self.useFixture(base_fixtures.TempDir()).path
        #: Where Nova has moved what is copied.
        self.before = f'{self.after}_resize'
        os.mkdir(self.before)
        self.addCleanup(shutil.rmtree, self.before)
        self.infos = []

    def flavor(self, disks, memmap='device'):
        return objects.Flavor(root_gb=1, extra_specs={
            'fakedax:disks': disks, 'fakedax:memmap': memmap} if disks else {})

    @contextlib.contextmanager
    def resized(self, old, new, memmap='device'):
        instance = objects.Instance(
            uuid=fixtures.UUID, flavor=self.flavor(old))
        with resize.copies(instance, self.flavor(new, memmap), self.infos):
            yield

    def old(self, name, source_format):
        """Put a disk where it is before."""
        path = os.path.join(self.before, name)
        if source_format == 'image':
            source = f'{path}.source'
            with open(source, 'wb') as file:
                file.write(DATA)
            layout.make(path, source, SIZE, True)
            os.unlink(source)
            source_format = 'raw'
        else:
            # As Nova has it: what the guest has not written is in a template.
            template = f'{path}.base'
            with open(template, 'wb') as file:
                file.write(DATA)
                file.truncate(SIZE)
            if source_format == 'raw':
                os.rename(template, path)
            else:
                subprocess.run(
                    ['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw',
                     '-b', template, path], check=True)
        self.infos.append({
            'path': os.path.join(self.after, name), 'type': source_format,
            'virt_disk_size': SIZE})
        return path

    def copy(self, name, host=None, send=None):
        return resize.copy(
            os.path.join(self.after, name), os.path.join(self.before, name),
            host, send)

    def content(self, name):
        path = os.path.join(self.after, name)
        with open(path, 'rb') as file:
            file.seek(layout.read(path).offset)
            return file.read().rstrip(b'\0')

    def left(self):
        return {name for name in os.listdir(self.before)
                + os.listdir(self.after) if name.endswith(
                    ('.unfinished', '.to-send'))}


class KeptTest(ResizeTestCase):
    """A disk that is on fake DAX before and after."""

    def test_it_is_copied_as_the_new_flavor_needs_it(self):
        self.old('disk', 'image')
        self.assertFalse(self.copy('disk'))
        with self.resized('root', 'root'):
            self.assertFalse(self.copy('disk.info'))
            self.assertTrue(self.copy('disk'))
        self.assertFalse(self.copy('disk'))
        self.assertEqual(layout.planned(units.Gi, True),
                         layout.read(os.path.join(self.after, 'disk')))
        self.assertEqual(DATA, self.content('disk'))

    def test_another_host_gets_it_as_it_is(self):
        moved = self.old('disk', 'image')
        sent = []
        with self.resized('root', 'root'):
            self.assertTrue(self.copy('disk', 'other', sent.append))
        self.assertEqual([moved], sent)
        self.assertTrue(os.path.exists(moved))

    def test_an_error_on_the_way_names_it(self):
        moved = self.old('disk', 'image')
        send = mock.Mock(side_effect=processutils.ProcessExecutionError(
            stderr='rsync: write error: Broken pipe (32)\n'))
        with self.resized('root', 'root'):
            self.assertRaisesRegex(
                imagebackend.CopyFailed,
                f'Cannot copy {moved}: rsync: write error: Broken pipe',
                self.copy, 'disk', 'other', send)

    def test_an_error_names_it(self):
        moved = self.old('disk', 'image')
        error = OSError(errno.ENOSPC, 'No space left on device')
        with self.resized('root', 'root'), mock.patch(
                'nova_fakedax.layout.copy', side_effect=error):
            self.assertRaisesRegex(
                imagebackend.CopyFailed,
                f'Cannot copy {moved}: No space left on device',
                self.copy, 'disk')


class PutOnFakeDaxTest(ResizeTestCase):

    def assert_image(self, memmap=True):
        path = os.path.join(self.after, 'disk')
        wanted = layout.planned(units.Gi, memmap)
        self.assertEqual(wanted, layout.read(path))
        self.assertEqual(wanted.file_size, layout.mapped_size(path))
        self.assertEqual(DATA, self.content('disk'))
        self.assertEqual(set(), self.left())

    def test_from_each_format(self):
        for source_format in 'raw', 'qcow2':
            for memmap in 'device', 'guest':
                self.infos.clear()
                self.old('disk', source_format)
                with self.resized(None, 'root', memmap):
                    self.assertTrue(self.copy('disk'))
                self.assert_image(memmap == 'device')
                os.unlink(os.path.join(self.after, 'disk'))

    def test_an_ephemeral_disk_keeps_its_size(self):
        self.old('disk.eph0', 'qcow2')
        with self.resized(None, 'ephemeral'):
            self.copy('disk.eph0')
        self.assertEqual(
            layout.planned(SIZE, True),
            layout.read(os.path.join(self.after, 'disk.eph0')))

    def test_a_raw_disk_that_looks_like_another_format_is_content(self):
        """Its guest could have stored the header of a qcow2 image."""
        path = self.old('disk', 'raw')
        with open(path, 'r+b') as file:
            file.write(b'QFI\xfb')
        with self.resized(None, 'root'):
            self.copy('disk')
        self.assertEqual(b'QFI\xfb' + DATA[4:], self.content('disk'))

    def test_a_raw_disk_with_an_info_block_is_content(self):
        path = self.old('disk', 'raw')
        block = layout.info_block(layout.planned(2 * units.Mi, True))
        with open(path, 'r+b') as file:
            file.seek(layout.INFO_BLOCK_OFFSET)
            file.write(block)
        with self.resized(None, 'root'):
            self.copy('disk')
        self.assertEqual(
            block, self.content('disk')[layout.INFO_BLOCK_OFFSET:][:4096])

    def test_another_host_is_sent_an_image(self):
        self.old('disk', 'qcow2')
        sent = []

        def send(path):
            sent.append(path)
            shutil.copy(path, os.path.join(self.after, 'disk'))

        with self.resized(None, 'root'):
            self.assertTrue(self.copy('disk', 'other', send))
        self.assertEqual([os.path.join(self.before, 'disk.to-send')], sent)
        path = os.path.join(self.after, 'disk')
        self.assertEqual(layout.planned(units.Gi, True), layout.read(path))
        self.assertEqual(DATA, self.content('disk'))
        self.assertEqual(set(), self.left())

    def test_the_disk_is_noted_as_raw(self):
        """Or the destination would believe what was noted before."""
        self.old('disk', 'qcow2')
        self.old('disk.eph0', 'qcow2')
        paths = [info['path'] for info in self.infos]
        with open(os.path.join(self.before, 'disk.info'), 'w') as file:
            file.write(json.dumps(dict.fromkeys(paths, 'qcow2')))
        with self.resized(None, 'root'):
            self.assertTrue(self.copy('disk.info'))
        with open(os.path.join(self.after, 'disk.info')) as file:
            self.assertEqual(
                {paths[0]: 'raw', paths[1]: 'qcow2'}, json.load(file))
        with open(os.path.join(self.before, 'disk.info')) as file:
            self.assertEqual({'qcow2'}, set(json.load(file).values()))

    def test_a_disk_that_qemu_img_cannot_read(self):
        path = self.old('disk', 'qcow2')
        with open(path, 'r+b') as file:
            file.write(bytes(4))
        with self.resized(None, 'root'):
            self.assertRaisesRegex(
                imagebackend.CopyFailed, f'Cannot copy {path}: qemu-img: ',
                self.copy, 'disk')
        self.assertEqual([], os.listdir(self.after))

    def test_no_space_leaves_nothing(self):
        self.old('disk', 'qcow2')
        with self.resized(None, 'root'), mock.patch.object(
                layout, '_take_blocks', side_effect=OSError(
                    errno.ENOSPC, os.strerror(errno.ENOSPC))):
            self.assertRaisesRegex(
                imagebackend.CopyFailed, 'No space left', self.copy, 'disk')
        self.assertEqual([], os.listdir(self.after))


class TakenOffTest(ResizeTestCase):

    def test_it_is_a_raw_file_of_the_content(self):
        for name, disks, size in (('disk', 'root', units.Gi),
                                  ('disk.eph0', 'ephemeral', SIZE)):
            self.old(name, 'image')
            with self.resized(disks, None):
                self.assertTrue(self.copy(name))
            path = os.path.join(self.after, name)
            self.assertEqual(layout.Layout(0, size), layout.read(path))
            self.assertEqual(DATA, self.content(name))

    def test_another_host_is_sent_that(self):
        self.old('disk', 'image')
        sent = []

        def send(path):
            sent.append(layout.read(path))

        with self.resized('root', None):
            self.assertTrue(self.copy('disk', 'other', send))
        self.assertEqual([layout.Layout(0, units.Gi)], sent)
        self.assertEqual(set(), self.left())

    def test_a_damaged_info_block(self):
        path = self.old('disk', 'image')
        with open(path, 'r+b') as file:
            file.seek(layout.INFO_BLOCK_OFFSET + 56)
            file.write(b'\1')
        with self.resized('root', None):
            self.assertRaises(
                layout.InvalidLayout, self.copy, 'disk')
        self.assertEqual([], os.listdir(self.after))


class ConvertedTest(base.BaseTestCase):
    """Which disks a host with qcow2 disks makes qcow2 files of."""

    def setUp(self):
        super().setUp()
        conf = self.useFixture(fixtures.ConfFixture())
        self.useFixture(fixtures.PrivsepFixture())
        objects.register_all()
        self.directory = os.path.join(conf.instances_path, fixtures.UUID)
        os.makedirs(self.directory)
        self.formats = {}

    def converted(self, *names):
        instance = objects.Instance(
            uuid=fixtures.UUID, flavor=objects.Flavor(extra_specs={
                'fakedax:disks': 'root'}))
        instance.old_flavor = instance.flavor
        infos = []
        for name in names:
            path = os.path.join(self.directory, name)
            with open(path, 'wb') as file:
                file.write(DATA)
            infos.append({'path': path, 'type': 'raw'})
        found = resize.to_convert(instance, json.dumps(infos),
                                  imagebackend.FakeDaxBackend(True))
        noted = os.path.join(self.directory, 'disk.info')
        if os.path.exists(noted):
            with open(noted) as file:
                self.formats = {os.path.basename(path): form for path, form
                                in json.load(file).items()}
        return [os.path.basename(info['path']) for info in json.loads(found)]

    def test_an_ordinary_disk(self):
        self.assertEqual(['disk.eph0'], self.converted('disk', 'disk.eph0'))

    def test_a_config_drive_stays_raw_in_the_guests_xml(self):
        self.assertEqual([], self.converted('disk', 'disk.config'))
        self.assertNotIn('disk.config', self.formats)
