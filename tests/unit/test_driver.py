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

from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from nova.virt import fake
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import imagebackend as libvirt_imagebackend
from oslo_utils import units
from oslotest import base
import testscenarios

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import driver
from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import spec
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios


#: Methods that override nothing.
OWN = ('_check_build', '_check_addresses', '_convert', '_encryption',
       '_rename_disks', '_volume_paths')


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
        for name in ('_get_guest_config', *OWN):
            del overrides[name]
        for name, override in overrides.items():
            theirs = getattr(libvirt_driver.LibvirtDriver, name, None)
            self.assertIsNotNone(theirs, f'Nova has no {name}() any more')
            self.assertEqual(
                _parameters(theirs), _parameters(override), name)

    def test_get_guest_config_begins_as_novas_does(self):
        # The method is private and changes often, so the override hands on
        # what it does not read.
        theirs = _parameters(libvirt_driver.LibvirtDriver._get_guest_config)
        *named, args, kwargs = _parameters(
            driver.FakeDaxDriver._get_guest_config)
        self.assertEqual(theirs[:len(named)], named)
        self.assertEqual('block_device_info', named[-1][0])
        self.assertEqual(
            (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD),
            (args[1], kwargs[1]))

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
