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


"""The descriptions of extra specs and properties that Horizon shows."""

import json
import subprocess
from typing import Any

from lab.deploy import config
from lab import paths
from tests.cloud import base

METADEFS = paths.ROOT / 'etc/metadefs'


class MetadefsTest(base.CloudTestCase):

    def test_glance_loads_them(self) -> None:
        wanted = {}
        for path in METADEFS.glob('*.json'):
            described = json.loads(path.read_text())
            wanted[described['namespace']] = described
            self.addCleanup(self.forget, described)
        subprocess.run(
            [config.PYTHON, config.BASE / 'bin/glance-manage',
             '--config-file', config.ETC / 'glance/glance-api.conf',
             'db_load_metadefs', METADEFS], check=True)
        for namespace, described in wanted.items():
            loaded = self.cloud.image.get(
                f'/metadefs/namespaces/{namespace}').json()
            self.assertEqual(described['properties'], loaded['properties'])
            self.assertEqual(
                [kind['name'] for kind
                 in described['resource_type_associations']],
                [kind['name'] for kind
                 in loaded['resource_type_associations']])

    def forget(self, described: dict[str, Any]) -> None:
        path = f'/metadefs/namespaces/{described["namespace"]}'
        unprotected = {
            name: described[name] for name in (
                'namespace', 'display_name', 'description', 'visibility')
        } | {'protected': False}
        for answer in (self.cloud.image.put(path, json=unprotected),
                       self.cloud.image.delete(path)):
            self.assertTrue(answer.ok, answer.text)
