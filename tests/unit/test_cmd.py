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
import io
import json
import mmap
import os
import pathlib
import re
from unittest import mock

import fixtures
from grafana_foundation_sdk.cog import encoder
from grafana_foundation_sdk.models import dashboard
import libvirt
from nova import conf as nova_conf
import oslo_messaging
from oslo_utils import units
from oslotest import base
import prometheus_client

from nova_fakedax.cmd import app
from nova_fakedax.cmd import common
from nova_fakedax.cmd import exporter
from nova_fakedax import hostcache
from nova_fakedax import inventory
from nova_fakedax import layout
from nova_fakedax import monitor
from nova_fakedax import pagecache
from nova_fakedax import process
from nova_fakedax import recovery

UUIDS = ('4f3a9b0e-6c1d-4f6e-9d3a-0c2b1e5d7f88',
         '5f3a9b0e-6c1d-4f6e-9d3a-0c2b1e5d7f88')
COUNTERS = {'requests': 7, 'syncs': 5, 'errors': 1, 'locked': True,
            'sync-latency': [0] * 9 + [98, 1, 1] + [0] * 20}


class Domain:
    """A guest as libvirt has it."""

    def __init__(self, uuid, directory, roles, active=True):
        self.uuid, self.active = uuid, active
        self.memories = ''
        for name, alias in roles.items():
            path = os.path.join(directory, name)
            with open(path, 'wb'):
                pass
            layout.fit(path, 4 * units.Mi, True)
            self.memories += (
                f"<memory model='virtio-pmem'><source><path>{path}</path>"
                f"</source><target><size unit='KiB'>6144</size></target>"
                f"<alias name='ua-fakedax-{alias}'/></memory>")

    def UUIDString(self):
        return self.uuid

    def name(self):
        return f'instance-{self.uuid[0]}'

    def isActive(self):
        return int(self.active)

    def XMLDesc(self):
        return f'<domain><devices>{self.memories}</devices></domain>'


class HostTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.domains = []
        for uuid, roles, active in (
                (UUIDS[1], {'disk': 'root'}, False),
                (UUIDS[0], {'disk.eph0': 'eph0', 'disk': 'root'}, True),
                ('6f3a', {}, True)):
            directory = self.useFixture(fixtures.TempDir()).path
            self.domains.append(Domain(uuid, directory, roles, active))
        self.connection = mock.Mock()
        self.connection.listAllDomains.return_value = self.domains
        self.counters = COUNTERS
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.monitor.device_property', self.device_property))

    def device_property(self, _guest, alias, name):
        if name not in self.counters:
            raise monitor.MonitorError('no such property')
        return self.counters[name]


class InventoryTest(HostTestCase):

    def test_the_images_of_all_guests_in_order(self):
        self.assertEqual(
            [(UUIDS[0], 'root', True), (UUIDS[0], 'ephemeral0', True),
             (UUIDS[1], 'root', False)],
            [(image.server, image.name, image.running)
             for image in inventory.images(self.connection)])

    def test_a_volume_has_its_id_for_a_name(self):
        [self.domains[1].memories, self.domains[0].memories] = [
            Domain(uuid, self.useFixture(fixtures.TempDir()).path,
                   roles).memories for uuid, roles in (
                (UUIDS[0], {'root': UUIDS[1], 'disk.eph0': 'eph0',
                            'data': UUIDS[0]}),
                (UUIDS[1], {'disk': 'root', 'more': UUIDS[0]}))]
        # Of each server in the order of its guest.
        self.assertEqual(
            [(UUIDS[0], UUIDS[1]), (UUIDS[0], 'ephemeral0'),
             (UUIDS[0], UUIDS[0]), (UUIDS[1], 'root'), (UUIDS[1], UUIDS[0])],
            [(image.server, image.name)
             for image in inventory.images(self.connection)])

    def test_those_of_one_server(self):
        for server in UUIDS[1], 'instance-5':
            [image] = inventory.images(self.connection, [server])
            self.assertEqual(UUIDS[1], image.server)

    def test_a_server_that_is_not_here(self):
        for server in 'nonesuch', '6f3a':
            exc = self.assertRaises(
                inventory.NoSuchServer, inventory.images, self.connection,
                [UUIDS[0], server])
            self.assertIn(f"no server '{server}'", str(exc))
            self.assertIn(UUIDS[1], str(exc))
        self.connection.listAllDomains.return_value = []
        exc = self.assertRaises(inventory.NoSuchServer, inventory.images,
                                self.connection, ['nonesuch'])
        self.assertIn('there is none', str(exc))

    def test_a_guest_that_goes_meanwhile(self):
        with mock.patch.object(
                Domain, 'XMLDesc', side_effect=libvirt.libvirtError('gone')):
            self.assertEqual([], inventory.images(self.connection))

    def test_status_of_a_guest_that_runs(self):
        image = inventory.images(self.connection)[0]
        with mock.patch.object(inventory, '_mapped', return_value=units.Mi):
            found = inventory.status(image)
        self.assertEqual(
            (units.Mi, True, 7, 5, 1, 1.024, 2.048),
            (found.mapped, found.locked, found.requests, found.syncs,
             found.errors, found.p50, found.p99))

    def test_status_of_qemus_own_device(self):
        self.counters = {}
        found = inventory.status(inventory.images(self.connection)[0])
        self.assertEqual((None, None, None),
                         (found.locked, found.requests, found.p50))

    def test_status_of_a_server_that_is_off(self):
        found = inventory.status(inventory.images(self.connection)[2])
        self.assertEqual((None, None), (found.mapped, found.requests))

    def test_percentiles(self):
        for buckets, part, expected in (
                ([0, 0], 0.5, None), ([1], 0.5, 0.002), ([0, 99, 1], 0.99,
                                                         0.004),
                ([0, 98, 2], 0.99, 0.008)):
            self.assertEqual(
                expected, inventory.percentile(buckets, part), buckets)


class ProcessTest(base.BaseTestCase):
    """This process maps a file as QEMU maps an image."""

    def setUp(self):
        super().setUp()
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'disk')
        file = open(self.path, 'w+b')
        self.addCleanup(file.close)
        file.write(bytes(4 * units.Mi))
        file.flush()
        os.fsync(file.fileno())
        self.mapped = mmap.mmap(file.fileno(), 0)
        self.addCleanup(self.mapped.close)
        self.mapped.madvise(mmap.MADV_RANDOM)

    def test_what_it_has_mapped(self):
        self.assertEqual(0, process.resident(os.getpid(), self.path))
        self.mapped[0]
        # Linux may map what is around it as well.
        self.assertGreater(process.resident(os.getpid(), self.path), 0)
        self.assertEqual(0, process.resident(os.getpid(), self.path + 'x'))

    def test_what_is_clean_is_given_back_and_what_is_dirty_stays(self):
        for offset in range(0, 4 * units.Mi, mmap.PAGESIZE):
            self.mapped[offset]
        self.mapped[units.Mi] = 1
        process.page_out(os.getpid(), self.path)
        found = pagecache.of_file(self.path)
        # A large folio is dirty as a whole.
        self.assertLess(found.cached, 4 * units.Mi)
        self.assertGreater(found.cached, 0)
        self.assertEqual(1, self.mapped[units.Mi])

    def test_a_process_that_is_not_there(self):
        self.assertIsNone(process.of_server('4f3a9b0e-nonesuch'))
        self.assertRaises(OSError, process.resident, 1 << 30, self.path)
        self.assertRaises(OSError, process.page_out, 1 << 30, self.path)


class PageCacheTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'file')
        with open(self.path, 'wb') as file:
            file.write(bytes(units.Mi))
            os.fsync(file.fileno())

    def test_a_file_that_was_written(self):
        self.assertEqual(units.Mi, pagecache.of_file(self.path).cached)

    def test_without_cachestat(self):
        with mock.patch.object(pagecache, '_cachestat', side_effect=OSError):
            self.assertEqual(pagecache.Cached(units.Mi),
                             pagecache.of_file(self.path))

    def test_who_may_not_write_is_not_told(self):
        if not os.geteuid():
            os.seteuid(65534)
            self.addCleanup(os.seteuid, 0)
        # mincore(2) tells them that all of it is cached.
        with mock.patch.object(pagecache, '_cachestat', side_effect=OSError):
            self.assertEqual(pagecache.Cached(None),
                             pagecache.of_file('/etc/passwd'))

    def test_what_an_overlay_has_cached_below(self):
        with mock.patch.object(pagecache, '_cachestat',
                               return_value=pagecache._CacheStat()):
            self.assertEqual(pagecache.Cached(units.Mi),
                             pagecache.of_file(self.path))

    def test_a_file_of_which_nothing_is_cached(self):
        open(self.path, 'wb').close()
        with mock.patch.object(pagecache, '_cachestat',
                               return_value=pagecache._CacheStat()):
            self.assertEqual(pagecache.Cached(0, 0, 0),
                             pagecache.of_file(self.path))

    def test_a_file_that_is_larger_than_the_hosts_memory(self):
        large = 2 * os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        # The last page of a piece, and one of the last piece, which is short.
        os.truncate(self.path, large + units.Gi + 4096)
        with open(self.path, 'r+b') as file:
            for offset in (0, units.Gi - 4096, large + units.Gi):
                os.pwrite(file.fileno(), b'x', offset)
        with mock.patch.object(pagecache, '_cachestat', side_effect=OSError):
            self.assertEqual(pagecache.Cached(units.Mi + 8192),
                             pagecache.of_file(self.path))

    def test_no_such_file(self):
        self.assertRaises(
            FileNotFoundError, pagecache.of_file, self.path + 'x')


class CommandTestCase(HostTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.cmd.common.libvirt', self.libvirt))
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.cmd.common.uri', lambda: 'test:///default'))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.conf.CONF', mock.Mock(spec=nova_conf.CONF)))

    def libvirt(self):
        return mock.Mock(
            __enter__=lambda _self: self.connection,
            __exit__=lambda *_args: None)

    def run_command(self, *arguments):
        """Run the program; the exit status and what it printed."""
        command = app.NovaFakeDax()
        command.stdout, command.stderr = io.StringIO(), io.StringIO()
        status = command.run(arguments)
        return status, command.stdout.getvalue(), command.stderr.getvalue()


class StatusTest(CommandTestCase):

    def test_json(self):
        status, printed, _errors = self.run_command('status', '-f', 'json')
        self.assertEqual(0, status)
        row, _second, off = json.loads(printed)
        self.assertEqual(
            (UUIDS[0], 'root', '6.0', 'yes', '7', '5', '1', '1.024', '2.048'),
            (row['Server'], row['Disk'], row['Size MiB'], row['Locked'],
             row['Flushes'], row['Syncs'], row['Errors'], row['p50 ms'],
             row['p99 ms']))
        self.assertEqual('-', off['Flushes'])

    def test_an_image_that_cannot_be_read(self):
        with mock.patch.object(pagecache, 'of_file', side_effect=OSError(
                errno.EACCES, 'Permission denied')):
            status, printed, _errors = self.run_command(
                'status', UUIDS[1], '-f', 'json')
        self.assertEqual(0, status)
        [row] = json.loads(printed)
        self.assertEqual('Permission denied', row['Size MiB'])

    def test_watch_ends_by_an_interrupt(self):
        with mock.patch('time.sleep', side_effect=KeyboardInterrupt) as sleep:
            status, printed, _errors = self.run_command('status', '--watch')
        self.assertEqual(0, status)
        sleep.assert_called_once_with(2.0)
        self.assertIn(UUIDS[0], printed)

    def test_a_server_that_is_not_here(self):
        status, printed, errors = self.run_command('status', 'nonesuch')
        self.assertEqual((1, ''), (status, printed))
        self.assertIn("no server 'nonesuch'", errors)


class FlushTest(CommandTestCase):

    def test_all(self):
        with mock.patch.object(hostcache, 'flush') as flush:
            status, printed, _errors = self.run_command('flush', '-f', 'json')
        self.assertEqual(0, status)
        self.assertEqual(['flushed'] * 3, [
            row['Result'] for row in json.loads(printed)])
        self.assertEqual(3, flush.call_count)

    def test_one_that_fails(self):
        with mock.patch.object(hostcache, 'flush', side_effect=[
                OSError(errno.EIO, 'Input/output error'), None]):
            status, printed, _errors = self.run_command(
                'flush', UUIDS[0], '-f', 'json')
        self.assertEqual(1, status)
        self.assertEqual(
            ['failed: Input/output error', 'flushed'],
            [row['Result'] for row in json.loads(printed)])


class RecoverTest(CommandTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.cmd.recover.connect_to_nova', mock.Mock()))
        self.steps = [recovery.Step(True, 'it runs there', mock.Mock()),
                      recovery.RecoveryRefused('it runs on both')]
        moves = [mock.Mock(
            instance=mock.Mock(uuid=uuid),
            migration=mock.Mock(migration_type='resize', dest_compute='there'))
            for uuid in UUIDS]
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.recovery.moves', lambda *_args: moves))
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.recovery.step', mock.Mock(side_effect=self.steps)))

    def recover(self, *arguments):
        status, printed, _errors = self.run_command(
            'recover', '-f', 'json', *arguments)
        self.assertEqual(1, status)
        return [row['Result'] for row in json.loads(printed)]

    def test_servers_that_are_named(self):
        self.assertEqual(
            ['finished: it runs there', 'left: it runs on both'],
            self.recover(*UUIDS))
        self.steps[0].do.assert_called_once_with()

    def test_nothing_is_done_without_a_server_or_dry(self):
        for arguments in (), (UUIDS[0], '--dry-run'):
            recovery.step.side_effect = self.steps
            self.assertEqual(
                ['to finish: it runs there', 'left: it runs on both'],
                self.recover(*arguments))
        self.steps[0].do.assert_not_called()

    def test_a_conductor_that_does_not_answer(self):
        recovery.step.side_effect = oslo_messaging.MessagingTimeout('60 s')
        status, _printed, errors = self.run_command('recover')
        self.assertEqual(1, status)
        self.assertIn('Nova does not answer: 60 s', errors)


class RecoverWithoutDriverTest(CommandTestCase):

    def test_another_driver(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_fakedax.cmd.recover._CONF',
            mock.Mock(compute_driver='libvirt.LibvirtDriver')))
        status, _printed, errors = self.run_command('recover')
        self.assertEqual(1, status)
        self.assertIn("'libvirt.LibvirtDriver'; allowed: 'fakedax", errors)


class EvictTest(CommandTestCase):

    def evict(self, after, page_out=None):
        before = pagecache.Cached(2 * units.Mi, 0, 0)
        with mock.patch.object(pagecache, 'of_file',
                               side_effect=[before, after]), \
                mock.patch.object(process, 'of_server', return_value=7), \
                mock.patch.object(process, 'page_out',
                                  side_effect=page_out):
            status, printed, _errors = self.run_command(
                'evict', UUIDS[1], '-f', 'json')
        [row] = json.loads(printed)
        return status, row['Given back MiB'], row['Result']

    def test_what_comes_back(self):
        self.assertEqual((0, '2.0', 'evicted'),
                         self.evict(pagecache.Cached(0, 0, 0)))

    def test_what_is_in_use_again(self):
        self.assertEqual((0, '1.5', '512 KiB are in use'), self.evict(
            pagecache.Cached(units.Mi // 2, 0, 0)))

    def test_what_is_dirty(self):
        self.assertEqual(
            (0, '1.0', '1.0 MiB are not on storage yet: nova-fakedax flush'),
            self.evict(pagecache.Cached(units.Mi, units.Mi // 2,
                                        units.Mi // 2)))

    def test_one_that_fails(self):
        self.assertEqual(
            (1, '-', 'failed: Operation not permitted'), self.evict(
                None, OSError(errno.EPERM, 'Operation not permitted')))


class CheckTest(CommandTestCase):

    def check(self, against, moves=()):
        capability = 'nova_fakedax.capability.'
        with mock.patch('nova.virt.libvirt.host.Host'), \
                mock.patch(f'{capability}reasons_against',
                           return_value=against), \
                mock.patch(f'{capability}migration_reasons_against',
                           return_value=moves), \
                mock.patch(f'{capability}evacuation_reasons_against',
                           return_value=[]):
            status, printed, errors = self.run_command('check', '-f', 'json')
        self.assertEqual('', errors)
        return status, [(row['Answer'], row['Why not'])
                        for row in json.loads(printed)]

    def test_a_host_that_can(self):
        self.assertEqual((0, [('yes', '')] * 3), self.check([]))

    def test_a_host_that_cannot_migrate(self):
        self.assertEqual(
            (0, [('yes', ''), ('no', 'old QEMU'), ('yes', '')]),
            self.check([], ['old QEMU']))

    def test_a_host_that_cannot(self):
        self.assertEqual((1, [('no', 'one; two')] * 3),
                         self.check(['one', 'two']))


class LibvirtTest(base.BaseTestCase):

    def test_a_host_without_libvirt(self):
        with mock.patch.object(common, 'uri', return_value='test:///nope'):
            exc = self.assertRaises(
                RuntimeError, common.libvirt().__enter__)
        self.assertIn('cannot connect to libvirt at test:///nope', str(exc))


class ExporterTest(CommandTestCase):

    def scrape(self):
        """Each value by the metric's name, and its disk or bucket."""
        metrics = prometheus_client.CollectorRegistry()
        metrics.register(exporter.Collector())
        return {
            (sample.name, sample.labels.get('uuid'),
             sample.labels.get('disk'), sample.labels.get('le')): sample.value
            for family in metrics.collect() for sample in family.samples}

    def test_figures_of_a_guest_that_runs(self):
        found = self.scrape()
        of_root = {name: value for (name, uuid, disk, le), value
                   in found.items() if (uuid, disk, le) == (
                       UUIDS[0], 'root', None)}
        cached = of_root.pop('fakedax_image_cached_bytes')
        for name in 'dirty', 'writeback':
            # They are not known before Linux 6.5.
            of_root.pop(f'fakedax_image_{name}_bytes', None)
        self.assertGreater(cached, 0)
        self.assertEqual({
            'fakedax_image_size_bytes': 6 * units.Mi,
            'fakedax_image_locked': 1, 'fakedax_flushes_total': 7,
            'fakedax_syncs_total': 5, 'fakedax_sync_errors_total': 1}, of_root)
        self.assertEqual(1, found['fakedax_libvirt_up', None, None, None])

    def test_latency_is_a_histogram_in_seconds(self):
        found = self.scrape()
        self.assertEqual([0, 98, 99, 100, 100], [
            found['fakedax_sync_seconds_bucket', UUIDS[0], 'root', le]
            for le in ('0.000512', '0.001024', '0.002048', '0.004096',
                       '+Inf')])

    def test_a_server_that_is_off_has_no_counters(self):
        self.assertEqual(
            {'fakedax_image_size_bytes', 'fakedax_image_cached_bytes'},
            {name for name, uuid, *_rest in self.scrape() if uuid == UUIDS[1]}
            - {'fakedax_image_dirty_bytes', 'fakedax_image_writeback_bytes'})

    def test_an_image_that_cannot_be_read(self):
        with mock.patch.object(pagecache, 'of_file', side_effect=OSError(
                errno.EACCES, 'Permission denied')):
            found = self.scrape()
        self.assertEqual(
            1, found['fakedax_image_unreadable', UUIDS[1], 'root', None])

    def test_libvirt_that_does_not_answer(self):
        with mock.patch.object(common, 'libvirt',
                               side_effect=RuntimeError('refused')):
            self.assertEqual(
                {('fakedax_libvirt_up', None, None, None): 0}, self.scrape())

    def test_it_serves_until_it_is_interrupted(self):
        server, thread = mock.Mock(), mock.Mock()
        thread.join.side_effect = KeyboardInterrupt
        with mock.patch.object(prometheus_client, 'start_http_server',
                               return_value=(server, thread)) as start:
            status, printed, _errors = self.run_command(
                'exporter', '--port', '9')
        self.assertEqual(
            (0, 'serving http://127.0.0.1:9/metrics\n'), (status, printed))
        start.assert_called_once_with(9, '127.0.0.1', mock.ANY)
        server.shutdown.assert_called_once_with()

    def test_a_port_that_is_taken(self):
        with mock.patch.object(
                prometheus_client, 'start_http_server', side_effect=OSError(
                    errno.EADDRINUSE, 'Address already in use')):
            status, _printed, errors = self.run_command('exporter')
        self.assertEqual(1, status)
        self.assertIn('cannot listen on 127.0.0.1:9978: Address already in '
                      'use', errors)

    def test_ports_that_are_none(self):
        for port in '0', '65536', 'http':
            with mock.patch('sys.stderr', io.StringIO()) as errors:
                self.assertRaises(
                    SystemExit, self.run_command, 'exporter', '--port', port)
            self.assertIn(f"'{port}' is not a port from 1 to 65535",
                          errors.getvalue())


class DashboardTest(base.BaseTestCase):
    """etc/grafana/nova-fakedax.json"""

    def setUp(self):
        super().setUp()
        path = pathlib.Path(__file__).parents[2] / 'etc/grafana'
        self.board = json.loads((path / 'nova-fakedax.json').read_text())

    def test_grafana_knows_all_that_it_says(self):
        read = dashboard.Dashboard.from_json(self.board)
        written = json.loads(encoder.JSONEncoder(sort_keys=True).encode(read))
        self.assertEqual(self.board, self.common(self.board, written))

    def common(self, said, known):
        """What is said of what is known."""
        if isinstance(said, dict):
            return {key: self.common(value, known[key])
                    for key, value in said.items() if key in known}
        if isinstance(said, list):
            return [self.common(*pair) for pair in zip(said, known)]
        return known

    def test_it_shows_each_metric_and_no_others(self):
        exported = {'fakedax_libvirt_up', 'fakedax_image_unreadable',
                    'fakedax_sync_seconds_bucket',
                    *(name for name, _text, _figure in exporter._GAUGES),
                    *(f'{name}_total' for name, _text, _figure
                      in exporter._COUNTERS)}
        shown = {name for panel in self.board['panels']
                 for target in panel['targets']
                 for name in re.findall('fakedax_[a-z_]+', target['expr'])}
        self.assertEqual(exported, shown)

    def test_panels_do_not_overlap(self):
        places = [(panel['gridPos']['x'], panel['gridPos']['y'])
                  for panel in self.board['panels']]
        self.assertEqual(len(places), len(set(places)))
        self.assertEqual(
            len(places), len({panel['id'] for panel in self.board['panels']}))
