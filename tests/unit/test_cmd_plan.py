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

import io
import json
import os
import sys
import textwrap
from unittest import mock

import fixtures
import requests
from requests_mock.contrib import fixture as requests_fixture

from nova_fakedax.planner import density
from tests.unit import test_cmd
from tests.unit import test_planner

WEB = 'name=web,ram=2048,programs=350,hot=300@50+1000@2'
SMALL = 'name=small,ram=512,programs=40%'
FILE = textwrap.dedent('''\
    host-memory: 64
    misses: 20
    guests:
      - name: web
        ram: 2048
        programs: 350
        hot: 300@50
      - {name: small, ram: 512, count: 2.5, programs: 40%}
    ''')
NOVA = 'http://nova.test/v2.1'


class PlanTestCase(test_cmd.CommandTestCase):

    def plan(self, *arguments):
        """The rows of a plan; its assumptions are kept."""
        status, printed, self.errors = self.run_command(
            'plan', '-f', 'json', *arguments)
        self.assertEqual(0, status, self.errors)
        return json.loads(printed)

    def fails(self, *arguments):
        """What a plan that fails says."""
        with mock.patch('sys.stderr', io.StringIO()) as errors:
            try:
                status, printed, said = self.run_command('plan', *arguments)
            except SystemExit as exc:
                status, printed, said = exc.code, '', errors.getvalue()
        self.assertEqual('', printed)
        self.assertIn(status, (1, 2))
        return said

    def write(self, text):
        path = os.path.join(self.useFixture(fixtures.TempDir()).path, 'file')
        with open(path, 'w') as file:
            file.write(text)
        return path


class PlanTest(PlanTestCase):

    def test_one_flavor(self):
        rows = self.plan('--host-memory', '256', '--reserved', '4',
                         '--guest', WEB)
        self.assertEqual(
            [('virtio-blk, writeback', 'web', 122, 122, 1, 0, 'memory'),
             ('virtio-blk, none', 'web', 122, 122, 1, 0, 'memory')],
            [tuple(row[name] for name in (
                'Disks', 'Flavor', 'Guests', 'A host', 'Ratio', 'Misses %',
                'Limit')) for row in rows[:2]])
        fake_dax = rows[2]
        self.assertEqual('fake DAX', fake_dax['Disks'])
        self.assertGreater(fake_dax['Ratio'], 1.5)
        self.assertGreater(fake_dax['Misses %'], 3)
        self.assertLessEqual(fake_dax['Misses %'], 5)
        self.assertAlmostEqual(
            fake_dax['Guests'] * 2 / 252, fake_dax['RAM ratio'], places=2)

    def test_a_mix_on_many_hosts(self):
        rows = self.plan('--host-memory', '64', '--hosts', '3',
                         '--guest', WEB, '--guest', SMALL + ',count=2')
        self.assertEqual(['web', 'small', 'all'] * 3,
                         [row['Flavor'] for row in rows])
        for web, small, both in zip(rows[::3], rows[1::3], rows[2::3]):
            self.assertEqual(both['Guests'], web['Guests'] + small['Guests'])
            self.assertAlmostEqual(2, small['Guests'] / web['Guests'],
                                   delta=0.05)
            self.assertAlmostEqual(both['Guests'] / 3, both['A host'],
                                   delta=0.1)

    def test_assumptions_are_not_in_the_output(self):
        self.plan('--host-memory', '64', '--guest', WEB + ',busy=0.25')
        for text in ('Assumed:', 'reserved', 'web: 2048 MiB of RAM, 50 MiB',
                     '300 MiB, 50 times a second and 1000 MiB, 2 times',
                     'busy 25% of the time',
                     'A miss reads 4 KiB: the device turns readahead off'):
            self.assertIn(text, self.errors)

    def test_device_that_reads_ahead(self):
        self.plan('--host-memory', '64', '--guest', WEB,
                  '--read-ahead', '128')
        self.assertIn('A miss reads 128 KiB, all of it as hot as what was '
                      'missed: the device does not turn', self.errors)

    def test_a_limit_of_misses(self):
        [*_ordinary, fake_dax] = self.plan(
            '--host-memory', '64', '--misses', '3', '--guest', WEB)
        self.assertLessEqual(fake_dax['Misses %'], 3)
        self.assertEqual('misses', fake_dax['Limit'])

    def test_cpus(self):
        for row in self.plan('--host-memory', '64', '--cpus', '4', '--guest',
                             WEB + ',cpus=0.5'):
            self.assertEqual((8, 'CPU'), (row['Guests'], row['Limit']))

    def test_cpus_that_misses_take(self):
        limits = {taken: [row['Limit'] for row in self.plan(
            '--host-memory', '64', '--cpus', '1', '--misses', '100',
            '--miss-cpu-ms', taken, '--guest', WEB)] for taken in '05'}
        self.assertNotIn('CPU', limits['0'])
        self.assertEqual('CPU', limits['5'][-1])

    def test_swap_adds_rows(self):
        rows = {row['Disks']: row for row in self.plan(
            '--host-memory', '64', '--swap', '32', '--guest',
            WEB + ',idle=200')}
        self.assertEqual(
            ['virtio-blk, writeback', 'virtio-blk, none', 'fake DAX',
             'virtio-blk, writeback, swap', 'virtio-blk, none, swap',
             'fake DAX, swap'], [*rows])
        swap = rows['virtio-blk, writeback, swap']
        self.assertEqual('swap', swap['Limit'])
        self.assertGreater(swap['Ratio'], 1.4)
        self.assertGreater(rows['fake DAX, swap']['Guests'],
                           rows['fake DAX']['Guests'])

    def test_nothing_fits(self):
        for row in self.plan('--host-memory', '0.6', '--guest', WEB):
            self.assertEqual((0, '-', 'memory'), (
                row['Guests'], row['Ratio'], row['Limit']))

    def test_a_file(self):
        path = self.write(FILE)
        web, small = self.plan('--file', path)[6:8]
        self.assertAlmostEqual(2.5, small['Guests'] / web['Guests'],
                               delta=0.05)
        self.assertIn('small: 512 MiB of RAM, 50 MiB QEMU itself; kernel and '
                      'programs take 204.8 MiB', self.errors)

    def test_the_command_line_counts_more_than_the_file(self):
        path = self.write(FILE)
        rows = self.plan('--file', path, '--host-memory', '32',
                         '--guest', 'name=web,ram=1024,programs=350')
        self.assertIn('1 hosts with 32 GiB', self.errors)
        self.assertIn('web: 1024 MiB of RAM', self.errors)
        self.assertEqual(9, len(rows))


class BadInputTest(PlanTestCase):
    """Each names the value and what is allowed."""

    def test_options(self):
        guest = ('--guest', WEB)
        for arguments, message in (
                (('--host-memory', '9G', *guest),
                 "--host-memory: '9G'; allowed: a number of at least 0.1"),
                (('--hosts', '1.5', '--host-memory', '9', *guest),
                 "--hosts: '1.5'; allowed: a whole number"),
                (('--lost', '100', '--host-memory', '9', *guest),
                 "--lost: '100'; allowed: a number from 0 to 99"),
                (guest, '--host-memory or --cloud must say'),
                (('--host-memory', '9'), '--guest, --file or --cloud must'),
                (('--host-memory', '9', '--guest', 'name=a,disk=3'),
                 "'disk' is no field; allowed: name, hot, ram, "),
                (('--host-memory', '9', '--guest', 'name=a,ram=1'),
                 "guest 'a': programs is missing; allowed: a number"),
                (('--host-memory', '9', *guest, *guest),
                 "guest 'web' is described more than once"),
                (('--host-memory', '9', '--cloud', 'x'),
                 '--host-memory is incompatible with --cloud')):
            self.assertIn(message, self.fails(*arguments))

    def test_files(self):
        for text, message in (
                ('hosts: many', "hosts: 'many'; allowed: a number from 1"),
                ('memory: 5', "'memory' is no key; allowed: hosts, "
                              'host-memory, '),
                ('- a', 'not keys and values; allowed: hosts, '),
                ('guests: 5', 'guests is no list of fields and values'),
                ('guests: [{ram: 5}]', 'has no name'),
                ('guests: [{name: a, disk: 5}]', "'disk' is no field"),
                ('a: b: c', 'mapping values are not allowed')):
            path = self.write(text)
            said = self.fails('--file', path)
            self.assertIn(path, said)
            self.assertIn(message, said)
        self.assertIn('/nonesuch: No such file',
                      self.fails('--file', '/nonesuch'))


class CheckTest(PlanTestCase):
    """Against made-up rows."""

    def check(self, *rows):
        status, printed, errors = self.run_command(
            'plan', '-f', 'json', '--check', self.write(json.dumps(rows)))
        self.assertEqual('', errors)
        return status, [
            (row['Figure'], row['Planned'], row['Measured'],
             row['Difference %'], row['Close']) for row in json.loads(printed)]

    def test_close(self):
        self.assertEqual((0, [('guests', 4, '4', 0, 'yes'),
                              ('guests_95', 4, '4', 0, 'yes')]),
                         self.check(test_planner.row(), {'part': 'frozen'}))

    def test_off(self):
        self.assertEqual(
            (1, [('guests', 4, '3 or more', 0, 'yes'),
                 ('guests_95', 4, '2', 100, 'no')]),
            self.check(test_planner.row(
                guests=3, guests_95=2, stopped_by='none')))

    def test_other_files(self):
        for text, message in (
                ('x', 'Expecting value'), ('[5]', 'has no'),
                ('[]', f"no row has the part '{density.PART}'"),
                (json.dumps([{'part': 'how-many'}]), "row 0 has no '")):
            self.assertIn(message, self.fails('--check', self.write(text)))
        self.assertIn('/nonesuch: No such file',
                      self.fails('--check', '/nonesuch'))


class CloudTest(PlanTestCase):
    """openstacksdk, and an API that answers as Nova's does."""

    def setUp(self):
        super().setUp()
        for name in [*os.environ]:
            if name.startswith('OS_'):
                self.useFixture(fixtures.EnvironmentVariable(name))
        mine = {'auth_type': 'none', 'auth': {'endpoint': NOVA},
                'compute_endpoint_override': NOVA}
        self.useFixture(fixtures.EnvironmentVariable(
            'OS_CLIENT_CONFIG_FILE', self.write(json.dumps({'clouds': {
                'mine': mine, 'micro': mine | {
                    'compute_api_version': '2.95'}}}))))
        self.api = self.useFixture(requests_fixture.Fixture())
        self.hypervisors = [
            self.hypervisor(1, 32768), self.hypervisor(2, 65536),
            self.hypervisor(3, 9999, hypervisor_type='ironic'),
            self.hypervisor(4, 9999, state='down'),
            self.hypervisor(5, 9999, status='disabled')]
        self.servers = [self.server('m1.small', 2048)] * 3 + [
            self.server('m1.large', 8192)]
        self.api.get(NOVA, json={'version': {
            'id': 'v2.1', 'status': 'CURRENT', 'version': '2.103',
            'min_version': '2.1', 'links': [{'rel': 'self', 'href': NOVA}]}})
        self.api.get(f'{NOVA}/os-hypervisors/detail',
                     json=lambda *_args: {'hypervisors': self.hypervisors})
        self.api.get(f'{NOVA}/servers/detail',
                     json=lambda *_args: {'servers': self.servers})

    def hypervisor(self, number, memory, **changes):
        return {'id': f'{number}', 'hypervisor_hostname': f'host{number}',
                'hypervisor_type': 'QEMU', 'state': 'up', 'memory_mb': memory,
                'status': 'enabled'} | changes

    def server(self, flavor, ram):
        return {'id': 'a', 'status': 'ACTIVE', 'flavor': {
            'original_name': flavor, 'ram': ram, 'vcpus': 1, 'disk': 1,
            'ephemeral': 0, 'swap': 0, 'extra_specs': {}}}

    def test_hosts_and_flavors(self):
        self.hosts_and_flavors('mine')

    def test_a_microversion_in_clouds_yaml(self):
        self.hosts_and_flavors('micro')

    def hosts_and_flavors(self, cloud):
        rows = self.plan('--cloud', cloud, '--guest',
                         'name=*,programs=20%,hot=10%@20')
        self.assertIn('2 hosts with 96 GiB', self.errors)
        self.assertIn('m1.large: 8192 MiB of RAM', self.errors)
        large, small, _both = rows[:3]
        self.assertEqual(('m1.large', 'm1.small'),
                         (large['Flavor'], small['Flavor']))
        self.assertAlmostEqual(3, small['Guests'] / large['Guests'],
                               delta=0.4)
        for request in self.api.request_history:
            if request.path.endswith('/detail'):
                self.assertEqual('compute 2.87', request.headers[
                    'OpenStack-API-Version'])
        self.assertEqual(
            {'all_tenants': ['true'], 'status': ['active']}, request.qs)

    def test_the_environments(self):
        self.useFixture(fixtures.EnvironmentVariable('OS_CLOUD', 'mine'))
        self.plan('--cloud', '--guest', 'name=*,programs=20%')
        self.assertIn('2 hosts with 96 GiB', self.errors)

    def test_flavors_that_nothing_is_said_about(self):
        self.assertIn(
            'nothing says what guests of these flavors use: m1.large;',
            self.fails('--cloud', 'mine', '--guest',
                       'name=m1.small,programs=20%'))

    def test_a_cloud_that_refuses(self):
        self.api.get(f'{NOVA}/os-hypervisors/detail', status_code=403,
                     json={'forbidden': {'message': 'not for you',
                                         'code': 403}})
        said = self.fails('--cloud', 'mine', '--guest', SMALL)
        self.assertIn("cloud 'mine': ", said)
        self.assertIn('not for you', said)

    def test_a_cloud_that_does_not_answer(self):
        for url in (NOVA, f'{NOVA}/os-hypervisors/detail'):
            self.api.get(url, exc=requests.ConnectionError)
        self.assertIn("cloud 'mine': ",
                      self.fails('--cloud', 'mine', '--guest', SMALL))

    def test_a_cloud_that_is_not_there(self):
        self.assertIn("cloud 'nope': Cloud nope was not found",
                      self.fails('--cloud', 'nope', '--guest', SMALL))

    def test_a_cloud_without_hosts_or_servers(self):
        self.servers = []
        self.assertIn('the cloud has no active server',
                      self.fails('--cloud', 'mine', '--guest', SMALL))
        self.hypervisors = []
        self.assertIn('the cloud has no host of type QEMU or KVM',
                      self.fails('--cloud', 'mine', '--guest', SMALL))

    def test_without_openstacksdk(self):
        with mock.patch.dict(sys.modules, {'openstack': None}):
            self.assertIn('to ask a cloud, install openstacksdk',
                          self.fails('--cloud', 'mine', '--guest', SMALL))
