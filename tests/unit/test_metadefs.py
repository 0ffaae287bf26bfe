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

"""What Horizon offers is what Nova's API takes."""

import json
import pathlib

from oslotest import base

from nova_fakedax import spec

METADEFS = pathlib.Path(__file__).parents[2] / 'etc/metadefs'


class MetadefsTest(base.BaseTestCase):

    def properties(self, kind):
        return json.loads((METADEFS / f'compute-fakedax-{kind}.json')
                          .read_text())['properties']

    def test_extra_specs_of_a_flavor(self):
        self.assertEqual(
            {row.key: (list(row.values), row.description)
             for row in spec.EXTRA_SPECS.values()},
            {key: (value['enum'], value['description'])
             for key, value in self.properties('flavor').items()})
        self.assertEqual(
            spec.MEMMAP_DEFAULT,
            self.properties('flavor')[spec.MEMMAP_KEY]['default'])
        self.assertEqual(
            spec.NO_VOLUMES,
            self.properties('flavor')[spec.VOLUMES_KEY]['default'])

    def test_property_of_an_image(self):
        self.assertEqual([spec.IMAGE_PROPERTY],
                         list(self.properties('image')))
