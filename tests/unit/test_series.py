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

"""The patches for QEMU say the same as the device.

A patch made by git contains the hash of each file before and after it. So the
final files of the series are known without QEMU's source.
"""

import hashlib
import pathlib
import runpy

from oslotest import base

PATCHES = pathlib.Path(__file__).parents[2] / 'qemu-device' / 'patches'
ADVICE = 'the patches and the device differ: qemu-device/patches/README.rst'

derive = runpy.run_path(str(PATCHES / 'derive'))


def blob(text):
    """The hash of a file with that content in git."""
    data = text.encode()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def changes():
    """Yield each diff: the file, its hash before and after, the lines."""
    for patch in sorted(PATCHES.glob('*.patch')):
        for part in patch.read_text().split('\ndiff --git ')[1:]:
            lines = part.splitlines()
            index = next(line for line in lines if line.startswith('index '))
            before, after = index.split()[1].split('..')
            yield lines[0].partition(' b/')[2], before, after, lines


class SeriesTestCase(base.BaseTestCase):

    def test_each_patch_begins_where_the_one_before_has_ended(self):
        seen = {}
        for path, before, after, _lines in changes():
            self.assertEqual(seen.get(path, before), before, path)
            seen[path] = after

    def test_series_ends_in_the_device(self):
        ends = {path: after for path, _before, after, _lines in changes()}
        files = derive['derive']()
        for path in ('hw/virtio/virtio-pmem.c',
                     'include/hw/virtio/virtio-pmem.h'):
            self.assertEqual(ends[path], blob(files[path]),
                             f'{path}: {ADVICE}')

    def test_series_ends_in_the_trace_points_of_the_device(self):
        added = []
        for path, _before, _after, lines in changes():
            if path != 'hw/virtio/trace-events':
                continue
            for line in lines:
                if line.startswith('+virtio_pmem_'):
                    added.append(line[1:])
                elif line.startswith('-virtio_pmem_') and line[1:] in added:
                    added.remove(line[1:])
        trace_points = (PATCHES.parent / 'trace-events').read_text()
        self.assertEqual(sorted(trace_points.splitlines()), sorted(added),
                         ADVICE)

    def test_a_change_of_the_device_is_noticed(self):
        text = derive['derive']()['hw/virtio/virtio-pmem.c']
        self.assertNotEqual(blob(text), blob(text.replace('-1', '-2', 1)))

    def test_what_is_not_there_cannot_be_replaced(self):
        self.assertRaises(derive['DeriveError'], derive['substitute'],
                          'some text', [('other text', '', 1)])
