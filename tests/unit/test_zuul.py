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

"""What the jobs in zuul.d name is there."""

import configparser
import pathlib

from oslotest import base
import yaml

ROOT = pathlib.Path(__file__).parents[2]


class ZuulTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        [project] = yaml.safe_load(
            (ROOT / 'zuul.d/project.yaml').read_text())
        self.pipelines = project['project']
        self.jobs = {job['job']['name']: job['job'] for job in yaml.safe_load(
            (ROOT / 'zuul.d/jobs.yaml').read_text())}

    def test_each_job_runs_in_a_pipeline(self):
        run = {job for pipeline in ('check', 'gate', 'periodic')
               for job in self.pipelines[pipeline]['jobs']}
        self.assertEqual(set(self.jobs), run)

    def test_environments_of_tox(self):
        tox = configparser.ConfigParser(interpolation=None)
        tox.read(ROOT / 'tox.ini')
        for name, job in self.jobs.items():
            if job['parent'] == 'openstack-tox':
                self.assertIn(
                    f"testenv:{job['vars']['tox_envlist']}", tox, name)

    def test_settings_of_the_devstack_plugin(self):
        settings = (ROOT / 'devstack/settings').read_text()
        for name, job in self.jobs.items():
            for setting in job.get('vars', {}).get('devstack_localrc', {}):
                self.assertIn(f'\n{setting}=', settings, name)
