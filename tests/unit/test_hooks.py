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

"""What is changed in Nova, when, and that Nova still works that way."""

import inspect
import json
import pkgutil
import subprocess
import sys
import textwrap
from unittest import mock

from lxml import etree
from nova.compute import manager
from nova.compute import resource_tracker
from nova.scheduler import request_filter as nova_request_filter
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import migration as libvirt_migrate
from nova.virt.libvirt import utils as libvirt_utils
from oslotest import base

import nova_fakedax
from nova_fakedax import hooks
from nova_fakedax import request_filter

MODULES = sorted(f'nova_fakedax.{module.name}'
                 for module in pkgutil.iter_modules(nova_fakedax.__path__))

ROOT = ("<memory model='virtio-pmem'><source><path>/i/disk</path></source>"
        "<target><size unit='KiB'>2048</size></target>"
        "<alias name='ua-fakedax-root'/></memory>")


def run(code, *arguments):
    """What a new interpreter prints, from JSON."""
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *arguments],
        text=True, capture_output=True, cwd='/')
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


class ImportTest(base.BaseTestCase):

    def test_it_changes_nothing_in_nova(self):
        changed, groups = run("""
            import importlib, json, sys

            # What the package imports from Nova and what registers options.
            import nova.api.validation.extra_specs.base
            import nova.compute.rpcapi
            import nova.network.neutron
            import nova.scheduler.client.report
            import nova.scheduler.filters
            from nova import conf
            from nova.compute import manager, resource_tracker
            from nova.scheduler import request_filter
            from nova.virt.libvirt import config, driver, migration, utils

            def state():
                return {
                    'parse_dom': config.LibvirtConfigGuest.parse_dom,
                    'find_disk': utils.find_disk,
                    'copy_image': utils.copy_image,
                    'volumes': str(migration._update_volume_xml),
                    'rebuild': str(
                        manager.ComputeManager._do_rebuild_instance),
                    'allocation': str(
                        resource_tracker.ResourceTracker
                        .delete_allocation_for_evacuated_instance),
                    'filters': list(request_filter.ALL_REQUEST_FILTERS)}

            before, groups = state(), set(conf.CONF)
            for name in sys.argv[1:]:
                importlib.import_module(name)
            after = state()
            print(json.dumps((
                [key for key in before if before[key] != after[key]],
                sorted(set(conf.CONF) - groups))))
            """, *MODULES)
        self.assertEqual([], changed)
        # oslo_privsep.priv_context.PrivContext registers its options when it
        # is created, and must be a global: the daemon imports it by name.
        self.assertEqual(['nova_fakedax_privileged'], groups)

    def test_the_scheduler_loads_no_libvirt_driver(self):
        self.assertEqual([], run("""
            import json, sys
            from nova_fakedax import scheduler
            scheduler.FakeDaxFilter()
            print(json.dumps([name for name in sys.modules
                              if name.startswith('nova.virt.libvirt')]))
            """))

    def test_the_options_are_there_once_nova_has_created_the_driver(self):
        self.assertEqual([False, True], run("""
            import json
            from unittest import mock
            from nova import conf
            from nova.virt import fake
            from nova_fakedax import driver
            before = 'fakedax' in conf.CONF
            with mock.patch('nova.virt.libvirt.host.Host'):
                driver.FakeDaxDriver(fake.FakeVirtAPI())
            print(json.dumps([before, conf.CONF.fakedax.emulator is None]))
            """))


class InstallTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        for owner, name in ((vconfig.LibvirtConfigGuest, 'parse_dom'),
                            (libvirt_utils, 'find_disk'),
                            (libvirt_utils, 'copy_image'),
                            (libvirt_migrate, '_update_volume_xml'),
                            (manager.ComputeManager, '_do_rebuild_instance'),
                            (resource_tracker.ResourceTracker,
                             'delete_allocation_for_evacuated_instance')):
            original = inspect.unwrap(getattr(owner, name))
            patch = mock.patch.object(owner, name, original)
            patch.start()
            self.addCleanup(patch.stop)

    def parse(self, devices):
        guest = vconfig.LibvirtConfigGuest()
        guest.parse_dom(etree.fromstring(
            f'<domain><devices>{devices}</devices></domain>'))
        return guest

    def test_a_domain_is_read_with_its_disks_on_fake_dax(self):
        self.assertEqual([], self.parse(ROOT).devices)
        hooks.install()
        [device] = self.parse(ROOT).devices
        self.assertEqual('/i/disk', device.source_path)

    def test_each_function_is_wrapped_once(self):
        hooks.install()
        once = (vconfig.LibvirtConfigGuest.parse_dom, libvirt_utils.find_disk)
        hooks.install()
        self.assertEqual(once, (
            vconfig.LibvirtConfigGuest.parse_dom, libvirt_utils.find_disk))
        self.assertEqual(1, len(self.parse(ROOT).devices))

    def test_the_root_disk_is_found_before_nova_looks(self):
        hooks.install()
        guest = mock.Mock()
        guest.get_config.return_value = self.parse(ROOT)
        self.assertEqual(('/i/disk', 'raw'), libvirt_utils.find_disk(guest))

    def test_another_root_disk_is_found_by_nova(self):
        hooks.install()
        guest = mock.Mock()
        guest.get_config.return_value = self.parse(
            "<disk type='file' device='disk'><driver type='raw'/>"
            "<source file='/i/first'/></disk>")
        self.assertEqual(('/i/first', 'raw'), libvirt_utils.find_disk(guest))

    def test_a_migration_names_volumes_as_the_destination_does(self):
        nova = mock.create_autospec(
            inspect.unwrap(libvirt_migrate._update_volume_xml))
        order = mock.Mock()
        order.attach_mock(nova, 'nova')
        with mock.patch.object(libvirt_migrate, '_update_volume_xml', nova), \
                mock.patch('nova_fakedax.migration.move_volumes',
                           order.move_volumes):
            hooks.install()
            data = mock.Mock()
            self.assertIs(nova.return_value, libvirt_migrate.
                          _update_volume_xml('xml', data, 'instance', 'get'))
        self.assertEqual(
            [mock.call.move_volumes('xml', data.bdms, 'get'),
             mock.call.nova('xml', data, 'instance', 'get')],
            order.mock_calls)

    @mock.patch('nova_fakedax.resize.copy', return_value=False)
    def test_another_file_is_copied_by_nova(self, copy):
        nova = mock.create_autospec(inspect.unwrap(libvirt_utils.copy_image))
        with mock.patch.object(libvirt_utils, 'copy_image', nova):
            hooks.install()
            libvirt_utils.copy_image('/i/from', '/i/to', compression=False)
            libvirt_utils.copy_image('/i/from', '/i/to', host='other')
        self.assertEqual(
            [mock.call('/i/to', '/i/from', None, mock.ANY),
             mock.call('/i/to', '/i/from', 'other', mock.ANY)],
            copy.call_args_list)
        self.assertEqual(
            [mock.call('/i/from', '/i/to', None, compression=False),
             mock.call('/i/from', '/i/to', 'other')], nova.call_args_list)

    @mock.patch('nova_fakedax.resize.copy', return_value=True)
    def test_nova_sends_what_was_made_for_another_host(self, copy):
        nova = mock.create_autospec(inspect.unwrap(libvirt_utils.copy_image))
        with mock.patch.object(libvirt_utils, 'copy_image', nova):
            hooks.install()
            libvirt_utils.copy_image(
                '/i/from', '/i/to', host='other', compression=False)
        nova.assert_not_called()
        copy.call_args.args[-1]('/i/made')
        nova.assert_called_once_with(
            '/i/made', '/i/to', 'other', compression=False)


class InstallSchedulerTest(base.BaseTestCase):

    def test_the_request_filter_is_added_once(self):
        with mock.patch.object(
                nova_request_filter, 'ALL_REQUEST_FILTERS', ['one']):
            hooks.install_scheduler()
            hooks.install_scheduler()
            self.assertEqual(['one', request_filter.require_fake_dax],
                             nova_request_filter.ALL_REQUEST_FILTERS)

    def test_nova_reads_the_list_at_each_request(self):
        self.assertIn('for filter in ALL_REQUEST_FILTERS:', inspect.getsource(
            nova_request_filter.process_reqspec))


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes what is hooked."""

    def test_the_functions_take_what_the_hooks_hand_on(self):
        for function, parameters in (
                (vconfig.LibvirtConfigGuest.parse_dom, ['self', 'xmldoc']),
                (libvirt_utils.find_disk, ['guest']),
                (libvirt_migrate._update_volume_xml, [
                    'xml_doc', 'migrate_data', 'instance',
                    'get_volume_config']),
                (libvirt_utils.copy_image, [
                    'src', 'dest', 'host', 'receive', 'on_execute',
                    'on_completion', 'compression']),
                (manager.ComputeManager._do_rebuild_instance, [
                    'self', 'context', 'instance', 'orig_image_ref',
                    'image_meta', 'injected_files', 'new_pass',
                    'orig_sys_metadata', 'bdms', 'evacuate',
                    'on_shared_storage', 'preserve_ephemeral', 'migration',
                    'request_spec', 'allocations',
                    'request_group_resource_providers_mapping',
                    'accel_uuids', 'reimage_boot_volume', 'target_state']),
                (resource_tracker.ResourceTracker.
                 delete_allocation_for_evacuated_instance, [
                     'self', 'context', 'instance', 'node', 'node_type'])):
            self.assertEqual(
                parameters, list(inspect.signature(function).parameters))

    def test_nova_calls_them_by_the_names_that_are_replaced(self):
        self.assertIn('libvirt_utils.find_disk(guest)', inspect.getsource(
            libvirt_driver.LibvirtDriver.snapshot))
        self.assertIn('xml_doc = _update_volume_xml(', inspect.getsource(
            libvirt_migrate.get_updated_guest_xml))
        self.assertIn(
            'libvirt_utils.copy_image(from_path, img_path, host=dest,',
            inspect.getsource(
                libvirt_driver.LibvirtDriver.migrate_disk_and_power_off))
