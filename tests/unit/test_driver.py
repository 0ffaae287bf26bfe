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

"""The driver by itself, and what it takes from Nova.

What it does to instances is in tests/functional.
"""

import ast
import errno
import inspect
import os
import pathlib
from unittest import mock

from nova.compute import power_state
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from nova.virt import fake
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import imagebackend as libvirt_imagebackend
from oslo_utils import units
from oslotest import base
import testscenarios

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import driver
from nova_fakedax import hooks
from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import refusals
from nova_fakedax import spec
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios


#: Methods that override nothing.
OWN = ('_check_build', '_check_addresses', '_convert', '_encryption',
       '_refuse', '_rename_disks', '_volume_paths')
#: Private ones, which change often. They hand on what they do not read, which
#: is all after this parameter.
HAND_ON = {'_get_guest_config': 'block_device_info',
           '_connect_volume': 'instance', '_disconnect_volume': 'instance',
           '_volume_snapshot_delete': 'volume_id'}


def _methods(cls):
    return {name: value for name, value in vars(cls).items()
            if inspect.isfunction(value)}


def _parameters(function):
    """Names, kinds and defaults, in order; annotations do not matter."""
    return [(parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(function).parameters.values()]


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes what the driver overrides."""

    def setUp(self):
        super().setUp()
        objects.register_all()

    def test_each_method_overrides_one_of_novas_and_has_its_signature(self):
        overrides = _methods(driver.FakeDaxDriver)
        for name in (*HAND_ON, *OWN):
            del overrides[name]
        for name, override in overrides.items():
            theirs = getattr(libvirt_driver.LibvirtDriver, name, None)
            self.assertIsNotNone(theirs, f'Nova has no {name}() any more')
            self.assertEqual(
                _parameters(theirs), _parameters(override), name)

    def test_what_is_handed_on_begins_as_novas_does(self):
        for name in HAND_ON:
            theirs = _parameters(getattr(libvirt_driver.LibvirtDriver, name))
            *named, args, kwargs = _parameters(
                getattr(driver.FakeDaxDriver, name))
            self.assertEqual(theirs[:len(named)], named, name)
            self.assertEqual((inspect.Parameter.VAR_POSITIONAL,
                              inspect.Parameter.VAR_KEYWORD),
                             (args[1], kwargs[1]), name)
            self.assertEqual(HAND_ON[name], named[-1][0], name)

    def test_the_image_has_the_signature_of_novas_method(self):
        for override, theirs in (
            (imagebackend.FakeDaxImage.cache,
             libvirt_imagebackend.Image.cache),
            (imagebackend.FakeDaxBackend.by_name,
             libvirt_imagebackend.Backend.by_name),
            (imagebackend.FakeDaxBackend.__init__,
             libvirt_imagebackend.Backend.__init__),
        ):
            self.assertEqual(_parameters(theirs), _parameters(override))

    def test_nova_makes_images_through_what_we_override(self):
        # Flat, the raw backend, must not override cache() itself, and the
        # driver must ask by_name() of the backend that we replace.
        self.assertNotIn('cache', vars(libvirt_imagebackend.Flat))
        for method in ('_create_image', '_create_and_inject_local_root'):
            self.assertIn('image_backend.by_name(', inspect.getsource(
                getattr(libvirt_driver.LibvirtDriver, method)))
        self.assertIn(
            'self.BACKEND', inspect.getsource(
                libvirt_imagebackend.Backend.__init__))

    def test_nova_names_the_files_as_we_read_them(self):
        self.assertEqual('disk.eph7', blockinfo.get_eph_disk(7))
        self.assertEqual(disk.DiskId(disk.EPHEMERAL, 7), disk.DiskId.from_path(
            blockinfo.get_eph_disk(7)))
        instance = objects.Instance(
            uuid=fixtures.UUID, root_device_name='/dev/vda', ephemeral_gb=1,
            config_drive='', image_ref='',
            system_metadata={'image_min_ram': '0'}, flavor=objects.Flavor(
                ephemeral_gb=1, swap=0, extra_specs={}))
        mapping = blockinfo.get_disk_mapping(
            'kvm', instance, 'virtio', 'sata', objects.ImageMeta.from_dict({}),
            block_device_info={'root_device_name': '/dev/vda'})
        self.assertEqual({'root', 'disk', 'disk.local'}, set(mapping))

    def test_a_snapshot_calls_what_we_override(self):
        source = inspect.getsource(libvirt_driver.LibvirtDriver.snapshot)
        for call in ('self._live_snapshot(',
                     'self._suspend_guest_for_snapshot(',
                     'self._resume_guest_after_snapshot('):
            self.assertIn(call, source)

    def test_nova_tells_cinder_of_a_snapshot_that_is_refused(self):
        for name in 'volume_snapshot_create', 'volume_snapshot_delete':
            source = inspect.getsource(
                getattr(libvirt_driver.LibvirtDriver, name))
            self.assertLess(
                source.index(f'self._{name}('),
                source.index('self._volume_snapshot_update_status('))
        self.assertIn('self._get_guest_disk_device', inspect.getsource(
            libvirt_driver.LibvirtDriver.detach_volume))

    def test_finish_migration_makes_qcow2_of_what_it_is_told_of(self):
        source = inspect.getsource(
            libvirt_driver.LibvirtDriver.finish_migration)
        self.assertIn('for info in jsonutils.loads(disk_info):', source)
        self.assertEqual(1, source.count('jsonutils.loads(disk_info)'))
        self.assertIn("self._disk_raw_to_qcow2(info['path'])", source)

    def test_the_compute_manager_rebuilds_through_the_driver(self):
        # ComputeDriver.rebuild() refuses, and then the manager destroys the
        # disks itself: what we check must come before.
        self.assertIs(
            virt_driver.ComputeDriver.rebuild,
            libvirt_driver.LibvirtDriver.rebuild)


class ShapeTest(base.BaseTestCase):

    def test_no_function_of_the_driver_is_long(self):
        """What needs more lines is a module of its own."""
        tree = ast.parse(pathlib.Path(driver.__file__).read_text())
        functions = [node for node in ast.walk(tree) if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        self.assertGreater(len(functions), 20)
        for function in functions:
            statements = function.body[
                ast.get_docstring(function) is not None:]
            lines = sum(statement.end_lineno - statement.lineno + 1
                        for statement in statements)
            self.assertLessEqual(lines, 12, function.name)


class DriverTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.conf = self.useFixture(fixtures.ConfFixture())
        self.useFixture(fixtures.PrivsepFixture())
        objects.register_all()
        with mock.patch('nova.virt.libvirt.host.Host'):
            self.driver = driver.FakeDaxDriver(fake.FakeVirtAPI())
        self.driver._reasons_against = []

    def instance(self, disks='root', properties=None, **extra_specs):
        instance = objects.Instance(
            uuid=fixtures.UUID, image_ref='6f1c', task_state=None,
            host=driver.CONF.host,
            system_metadata=properties or {'image_fakedax_guest': 'true'})
        instance.flavor = objects.Flavor(
            memory_mb=512, root_gb=1, ephemeral_gb=1,
            extra_specs=extra_specs)
        if disks is not None:
            instance.flavor.extra_specs['fakedax:disks'] = disks
        return instance


class DriverTest(DriverTestCase):

    def test_the_image_backend_is_the_projects(self):
        self.assertIsInstance(
            self.driver.image_backend, imagebackend.FakeDaxBackend)

    def test_a_driver_that_was_not_started_builds_nothing(self):
        with mock.patch('nova.virt.libvirt.host.Host'):
            new = driver.FakeDaxDriver(fake.FakeVirtAPI())
        with mock.patch.object(
                libvirt_driver.LibvirtDriver, 'spawn') as spawn:
            exc = self.assertRaises(
                exception.ComputeResourcesUnavailable, new.spawn, None,
                self.instance(), None, None, None, None)
        self.assertIn('nova-compute is starting', exc.format_message())
        spawn.assert_not_called()

    def test_disk_info_has_each_disk_once(self):
        guest = vconfig.LibvirtConfigGuest()
        for alias, path, kib in (
            ('ua-fakedax-root', '/i/disk', 4096),
            ('ua-fakedax-eph0', '/i/disk.eph0', 2048),
        ):
            device = domain.LibvirtConfigGuestVirtioPMEM()
            device.alias, device.source_path = alias, path
            device.target_size = kib
            guest.add_device(device)
        view = {'type': 'raw', 'path': '/i/disk', 'backing_file': '',
                'virt_disk_size': 4 * units.Mi, 'disk_size': 4 * units.Mi,
                'over_committed_disk_size': 0}
        with mock.patch.object(
                libvirt_driver.LibvirtDriver,
                '_get_instance_disk_info_from_config', return_value=[view]):
            infos = self.driver._get_instance_disk_info_from_config(
                guest, None)
        self.assertEqual([view, view | {
            'path': '/i/disk.eph0', 'virt_disk_size': 2 * units.Mi,
            'disk_size': 2 * units.Mi}], infos)

    def migrate(self, instance):
        with mock.patch.object(
                libvirt_driver.LibvirtDriver, '_live_migration_operation',
                side_effect=libvirt_driver.libvirt.libvirtError('stale')):
            self.driver._live_migration_operation(
                None, instance, 'there', False, None, None, [])

    def test_a_migration_that_libvirt_refuses_is_left_to_its_monitor(self):
        """The monitor has rolled it back, but Nova would set ERROR."""
        self.migrate(self.instance())

    def test_that_of_an_ordinary_instance_is_left_to_nova(self):
        self.assertRaises(libvirt_driver.libvirt.libvirtError,
                          self.migrate, self.instance(None))


class SupportTest(DriverTestCase):
    """Nova hears what the host can."""

    scenarios = [('can', {'reasons': []}), ('cannot', {'reasons': ['old']})]

    def setUp(self):
        super().setUp()
        self.driver._reasons_against = self.reasons
        self.driver._migration_reasons_against = self.reasons

    def test_by_its_traits(self):
        tree = mock.Mock()
        self.driver.provider_tree = mock.Mock()
        with mock.patch.object(
                libvirt_driver.LibvirtDriver, 'update_provider_tree'):
            self.driver.update_provider_tree(tree, 'node')
        for changed in (tree, self.driver.provider_tree):
            add, remove = changed.add_traits, changed.remove_traits
            if self.reasons:
                add, remove = remove, add
            self.assertEqual(
                [mock.call('node', spec.TRAIT),
                 mock.call('node', spec.MIGRATION_TRAIT)], add.mock_calls)
            remove.assert_not_called()

    def test_by_its_statistics(self):
        with mock.patch.object(
                libvirt_driver.LibvirtDriver, 'get_available_resource',
                return_value={'vcpus': 2}):
            resources = self.driver.get_available_resource('node')
        self.assertEqual(2, resources['vcpus'])
        self.assertEqual(
            {'fakedax_supported': '; '.join(self.reasons) or 'true'},
            resources['stats'])


class PowerOffTest(DriverTestCase):

    scenarios = [
        ('root', {'disks': 'root', 'flushed': ['disk']}),
        ('ephemeral', {
            'disks': 'ephemeral', 'flushed': ['disk.eph0', 'disk.eph1']}),
        ('both', {
            'disks': 'root,ephemeral',
            'flushed': ['disk', 'disk.eph0', 'disk.eph1']}),
        ('none', {'disks': None, 'flushed': []}),
    ]

    def test_it_flushes_the_images_before_and_after_the_guest_ends(self):
        directory = os.path.join(self.conf.instances_path, fixtures.UUID)
        os.mkdir(directory)
        for name in ('disk', 'disk.eph0', 'disk.eph1', 'disk.swap',
                     'disk.config', 'disk.info'):
            with open(os.path.join(directory, name), 'wb'):
                pass
        order = mock.Mock()
        with mock.patch.object(libvirt_driver.LibvirtDriver, 'power_off',
                               order.power_off), \
                mock.patch('nova_fakedax.hostcache.flush', order.flush):
            self.driver.power_off(self.instance(self.disks), 60, 10)
        flushes = [mock.call.flush(os.path.join(directory, name))
                   for name in self.flushed]
        self.assertEqual(
            [*flushes, mock.call.power_off(mock.ANY, 60, 10), *flushes],
            order.mock_calls)


class EndOfAGuestTest(DriverTestCase):
    """QEMU's last sync must be short, or libvirt gives up on it."""

    def setUp(self):
        super().setUp()
        self.order = mock.Mock()
        directory = os.path.join(self.conf.instances_path, fixtures.UUID)
        os.mkdir(directory)
        self.path = os.path.join(directory, 'disk')
        with open(self.path, 'wb'):
            pass
        for owner, name in ((libvirt_driver.LibvirtDriver, 'power_off'),
                            (libvirt_driver.LibvirtDriver, 'destroy'),
                            (hostcache, 'flush')):
            patch = mock.patch.object(owner, name, getattr(self.order, name))
            patch.start()
            self.addCleanup(patch.stop)

    def test_a_delete_and_a_hard_reboot_flush_first(self):
        self.driver.destroy(None, self.instance(), [])
        self.assertEqual(['flush', 'destroy'],
                         [call[0] for call in self.order.mock_calls])

    def test_what_another_host_has_by_now_is_not_flushed_here(self):
        """Evacuated: this host's dirty pages are older."""
        instance = self.instance()
        instance.host = 'other'
        self.driver.destroy(None, instance, [], destroy_disks=False)
        self.assertEqual(['destroy'],
                         [call[0] for call in self.order.mock_calls])

    def test_storage_that_fails_does_not_keep_a_server(self):
        self.order.flush.side_effect = OSError(errno.EIO, 'no storage')
        with self.assertLogs(imagebackend.LOG.logger, 'ERROR') as logs:
            self.driver.destroy(None, self.instance(), [])
        self.order.destroy.assert_called_once()
        self.assertIn(self.path, logs.output[0])

    def test_a_stop_reports_what_only_the_first_flush_was_told(self):
        self.order.flush.side_effect = [OSError(errno.EIO, 'no storage'), None]
        with self.assertLogs(imagebackend.LOG.logger, 'ERROR'):
            self.assertRaisesRegex(
                imagebackend.FlushFailed, 'no storage',
                self.driver.power_off, self.instance())
        self.order.power_off.assert_called_once()

    def test_a_helper_that_does_not_run_keeps_nobody(self):
        self.order.flush.side_effect = hostcache.HelperError(13, 'no')
        self.driver.destroy(None, self.instance(), [])
        self.order.destroy.assert_called_once()


class PowerOffWithoutHelperTest(DriverTestCase):

    def test_the_host_is_synced_instead(self):
        """The guest is off, and its device has synced what it flushed."""
        directory = os.path.join(self.conf.instances_path, fixtures.UUID)
        os.mkdir(directory)
        with open(os.path.join(directory, 'disk'), 'wb'):
            pass
        with mock.patch.object(libvirt_driver.LibvirtDriver, 'power_off'), \
                mock.patch('nova_fakedax.hostcache.flush',
                           side_effect=hostcache.HelperError(13, 'no')), \
                mock.patch('os.sync') as sync, \
                self.assertLogs(imagebackend.LOG.logger, 'WARNING') as logs:
            self.driver.power_off(self.instance())
        sync.assert_called_once_with()
        self.assertIn('syncing all file systems instead', logs.output[0])


class VolumesTest(DriverTestCase):
    """Of a guest that has one volume on fake DAX."""

    VOLUME = '5b1f3d9e-3a75-4bd5-9e8c-0e4f7a6f7b61'
    INFO = {'serial': VOLUME, 'driver_volume_type': 'nfs',
            'data': {'device_path': '/mnt/volume'}}

    def setUp(self):
        super().setUp()
        hooks.install()
        self.order = mock.Mock()
        for owner, name in (
                (hostcache, 'flush'), (hostcache, 'invalidate'),
                *((libvirt_driver.LibvirtDriver, name) for name in (
                    'power_off', 'destroy', '_connect_volume',
                    '_disconnect_volume', 'attach_volume', 'detach_volume',
                    'extend_volume', 'swap_volume', 'quiesce', 'unquiesce',
                    '_volume_snapshot_update_status',
                    '_get_guest_disk_device'))):
            patch = mock.patch.object(owner, name, getattr(self.order, name))
            patch.start()
            self.addCleanup(patch.stop)
        xml = f"""<domain><devices><memory model='virtio-pmem'>
            <source><path>/mnt/volume</path></source>
            <target><size unit='KiB'>2048</size></target>
            <alias name='ua-fakedax-{self.VOLUME}'/>
            </memory></devices></domain>"""
        self.guest = libvirt_guest.Guest(mock.Mock(
            XMLDesc=lambda flags: xml))
        self.state = power_state.RUNNING
        self.guest.get_power_state = lambda host: self.state
        self.driver._host.get_guest.return_value = self.guest

    def volumes(self, volumes='all'):
        return self.instance(None, **{'fakedax:volumes': volumes})

    def calls(self):
        return [call[0] for call in self.order.mock_calls]

    def test_a_stop_flushes_them(self):
        self.driver.power_off(self.volumes())
        self.assertEqual(['flush', 'power_off', 'flush'], self.calls())
        self.order.flush.assert_called_with('/mnt/volume')

    def test_so_does_a_delete(self):
        self.driver.destroy(None, self.volumes(), [])
        self.assertEqual(['flush', 'destroy'], self.calls())

    def test_what_was_cached_before_a_connection_is_not_believed(self):
        self.driver._connect_volume(None, self.INFO, self.volumes())
        self.assertEqual(['_connect_volume', 'invalidate'], self.calls())

    def test_nor_what_is_left_after_it(self):
        self.driver._disconnect_volume(
            None, self.INFO, self.volumes('boot'), None, False, True)
        self.assertEqual(['invalidate', '_disconnect_volume'], self.calls())
        self.order._disconnect_volume.assert_called_once_with(
            None, self.INFO, mock.ANY, None, False, True)

    def test_the_pages_of_ordinary_volumes_stay(self):
        for instance in (self.volumes('none'), self.instance()):
            self.driver._connect_volume(None, self.INFO, instance)
            self.driver._disconnect_volume(None, self.INFO, instance)
        self.order.invalidate.assert_not_called()

    @mock.patch('nova_fakedax.hotplug.attach')
    def test_only_a_flavor_for_all_volumes_plugs_them_in(self, attach):
        self.driver.attach_volume(
            None, self.INFO, self.volumes('boot'), '/dev/vdb')
        attach.assert_not_called()
        self.order.attach_volume.assert_called_once()
        self.driver.attach_volume(
            None, self.INFO, self.volumes(), '/dev/vdb')
        attach.assert_called_once()
        self.order.attach_volume.assert_called_once()

    def test_a_detach_finds_the_device(self):
        self.assertEqual('/mnt/volume', self.driver._get_guest_disk_device(
            self.guest, 'vdb', self.VOLUME).source_path)
        self.order._get_guest_disk_device.assert_not_called()

    def test_that_of_an_ordinary_volume_is_found_by_nova(self):
        self.driver._get_guest_disk_device(self.guest, 'vdb', 'other', True)
        self.order._get_guest_disk_device.assert_called_once_with(
            self.guest, 'vdb', 'other', True)

    def change(self, name, instance=None):
        method = getattr(self.driver, name)
        instance = instance or self.volumes()
        if name == 'detach_volume':
            method(None, self.INFO, instance, '/dev/vdb')
        elif name == 'extend_volume':
            method(None, self.INFO, instance, 2 * units.Gi)
        else:
            method(None, self.INFO, {}, instance, '/dev/vdb', 0)

    def test_what_a_running_guest_cannot_do_is_refused_first(self):
        for name in 'detach_volume', 'extend_volume', 'swap_volume':
            exc = self.assertRaises(
                exception.NovaException, self.change, name)
            self.assertIn('is not supported', exc.format_message())
        self.assertEqual([], self.calls())

    def test_while_it_is_off_that_is_left_to_nova(self):
        self.state = power_state.SHUTDOWN
        names = ['detach_volume', 'extend_volume', 'swap_volume']
        for name in names:
            self.change(name)
        self.assertEqual(names, self.calls())

    def test_so_is_that_of_an_ordinary_server(self):
        names = ['detach_volume', 'extend_volume', 'swap_volume']
        for name in names:
            self.change(name, self.instance(None))
        self.assertEqual(names, self.calls())

    def test_cinder_is_told_that_no_file_becomes_qcow2(self):
        for self.state in power_state.RUNNING, power_state.SHUTDOWN:
            for method, status, arguments in (
                (self.driver.volume_snapshot_create, 'error', ({
                    'type': 'qcow2', 'snapshot_id': 'snapshot',
                    'new_file': 'volume.snapshot'},)),
                (self.driver.volume_snapshot_delete, 'error_deleting', (
                    'snapshot', {'type': 'qcow2'})),
            ):
                exc = self.assertRaises(
                    refusals.OperationRefused, method, None, self.volumes(),
                    self.VOLUME, *arguments)
                self.assertIn('qcow2', exc.format_message())
                self.order._volume_snapshot_update_status.assert_called_with(
                    None, 'snapshot', status)

    def test_a_guest_without_volumes_is_quiesced_by_nova(self):
        for instance in self.instance(None), self.instance():
            self.driver.quiesce(None, instance, None)
            self.driver.unquiesce(None, instance, None)
        self.assertEqual(['quiesce', 'unquiesce'] * 2, self.calls())

    def test_one_with_volumes_is_not(self):
        with mock.patch('nova_fakedax.quiesce.quiesce') as quiesce, \
                mock.patch('nova_fakedax.quiesce.unquiesce') as unquiesce:
            self.driver.quiesce(None, self.volumes(), None)
            self.driver.unquiesce(None, self.volumes(), None)
        quiesce.assert_called_once_with(
            self.driver, None, mock.ANY, None, ['/mnt/volume'])
        unquiesce.assert_called_once_with(self.driver, None, mock.ANY, None)
        self.assertEqual([], self.calls())


class PassedThroughInterfaceTest(DriverTestCase):

    scenarios = [(vnic_type, {'vnic_type': vnic_type}) for vnic_type in (
        'direct', 'direct-physical', 'vdpa', 'accelerator-direct',
        'remote-managed')]

    def test_it_is_not_attached(self):
        vif = {'vnic_type': self.vnic_type}
        with mock.patch.object(libvirt_driver.LibvirtDriver,
                               'attach_interface') as attach:
            exc = self.assertRaises(
                exception.NovaException, self.driver.attach_interface, None,
                self.instance(), None, vif)
            attach.assert_not_called()
            self.assertIn('attach of a passed-through interface',
                          exc.format_message())
            self.driver.attach_interface(
                None, self.instance(None), None, vif)
            attach.assert_called_once()


class OrdinaryInterfaceTest(DriverTestCase):

    scenarios = [(vnic_type, {'vnic_type': vnic_type})
                 for vnic_type in ('normal', 'macvtap')]

    def test_it_is_attached(self):
        with mock.patch.object(libvirt_driver.LibvirtDriver,
                               'attach_interface') as attach:
            self.driver.attach_interface(
                None, self.instance(), None, {'vnic_type': self.vnic_type})
        attach.assert_called_once()
