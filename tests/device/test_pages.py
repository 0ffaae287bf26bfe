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

"""The size of the pages in which the host caches and writes the image."""

from lab.machine import pagecache
import testscenarios

from tests.device import base

load_tests = testscenarios.load_tests_apply_scenarios


class PageSizeTestCase(base.DeviceTestCase):

    scenarios = base.EACH_VERSION

    def setUp(self) -> None:
        super().setUp()
        self.put_image_on_disk()

    def test_a_store_dirties_one_page(self) -> None:
        pagecache.evict(self.make_image())
        vm = self.start_vm(self.image)
        before = vm.io('write_bytes')
        vm.qtest.write_bytes(self.memaddr(vm) + base.SIZE // 2, b'B')
        self.assertEqual(base.PAGE, vm.io('write_bytes') - before)

    def test_huge_pages_can_be_turned_on(self) -> None:
        vm = self.start_vm(self.make_image(), device='huge-pages=on')
        self.assertIn('hg', vm.mapping_flags(self.image))
