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

import os
import tempfile
from unittest import mock

from lxml import etree
from nova.compute import power_state
from nova import exception
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units
from oslotest import base
import testscenarios

from nova_fakedax import conf
from nova_fakedax import domain
from nova_fakedax import hooks
from nova_fakedax import hostcache
from nova_fakedax import hotplug
from nova_fakedax import refusals
from nova_fakedax import volumes
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios

#: A guest with 512 MiB of RAM and a volume of 1 GiB, with room for another
#: 1 GiB on one of two root ports.
XML = """
<domain type='kvm'>
  <maxMemory slots='2' unit='KiB'>2621440</maxMemory>
  <memory unit='KiB'>1572864</memory>
  <cpu><numa><cell id='0' cpus='0' memory='524288' unit='KiB'/></numa></cpu>
  <devices>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'>
      <address type='pci' domain='0' bus='0x00' slot='0x01' function='0x0'/>
    </controller>
    <controller type='pci' index='2' model='pcie-root-port'>
      <address type='pci' domain='0' bus='0x00' slot='0x01' function='0x1'/>
    </controller>
    <memory model='virtio-pmem' access='shared'>
      <source><path>/dev/loop7</path></source>
      <target><size unit='KiB'>1048576</size></target>
      <alias name='ua-fakedax-{there}'/>
      <address type='pci' domain='0' bus='0x01' slot='0x00' function='0x0'/>
    </memory>
  </devices>
</domain>
""".format(there=uuids.there)


class HotplugTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()
        hooks.install()
        self.conf = self.useFixture(fixtures.ConfFixture())
        self.useFixture(fixtures.PrivsepFixture())
        conf.register_opts(hotplug.CONF)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, 'volume')
        with open(self.path, 'wb') as file:
            file.truncate(units.Gi)
        self.xml = XML
        self.state = power_state.RUNNING
        self.domain = mock.Mock(
            XMLDesc=lambda flags: self.xml, spec=['XMLDesc',
                                                  'attachDeviceFlags'])
        self.guest = libvirt_guest.Guest(self.domain)
        self.guest.get_power_state = lambda host: self.state
        self.host = mock.Mock(spec=libvirt_host.Host)
        self.host.get_guest.return_value = self.guest
        self.instance = objects.Instance(
            uuid=fixtures.UUID, task_state=None, image_ref='',
            system_metadata={}, flavor=objects.Flavor(
                memory_mb=512, extra_specs={'fakedax:volumes': 'all'}))


class AttachTestCase(HotplugTestCase):

    def setUp(self):
        super().setUp()
        self.driver = mock.Mock(
            spec=libvirt_driver.LibvirtDriver, _host=self.host)
        self.driver._get_volume_config.side_effect = self.config
        self.driver._build_device_metadata.return_value = None
        self.instance.save = mock.Mock()
        self.connection_info = {
            'driver_volume_type': 'nfs', 'serial': uuids.new,
            'data': {'volume_id': uuids.new}}

    def config(self, _connection_info, disk_info):
        self.driver._connect_volume.assert_called_once()
        self.assertEqual('vdb', disk_info['dev'])
        config = vconfig.LibvirtConfigGuestDisk()
        config.source_type, config.source_path = 'file', self.path
        config.driver_format, config.serial = 'raw', uuids.new
        config.source_device = 'disk'
        return config

    def attach(self):
        hotplug.attach(self.driver, None, self.connection_info, self.instance,
                       '/dev/vdb', 'virtio', 'disk', {})

    def assert_undone(self, error, reason):
        exc = self.assertRaises(error, self.attach)
        self.assertIn(reason, exc.format_message())
        self.assertIn(uuids.new, exc.format_message())
        self.domain.attachDeviceFlags.assert_not_called()
        self.driver._disconnect_volume.assert_called_once_with(
            None, self.connection_info, self.instance, encryption={})
        self.instance.save.assert_not_called()


class AttachTest(AttachTestCase):

    def plugged(self):
        """The device, and whether the running guest has got it."""
        self.domain.attachDeviceFlags.assert_called_once()
        call = self.domain.attachDeviceFlags.call_args
        flags = call.kwargs['flags']
        libvirt = libvirt_driver.libvirt
        self.assertTrue(flags & libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        return (etree.fromstring(call.args[0]),
                bool(flags & libvirt.VIR_DOMAIN_AFFECT_LIVE))

    def test_a_running_guest_gets_the_device(self):
        for self.state in (power_state.RUNNING, power_state.PAUSED):
            self.attach()
            device, live = self.plugged()
            self.assertTrue(live)
            self.assertEqual(
                ('memory', 'virtio-pmem', self.path, '1048576',
                 f'ua-fakedax-{uuids.new}'),
                (device.tag, device.get('model'),
                 device.findtext('./source/path'),
                 device.findtext('./target/size'),
                 device.find('./alias').get('name')))
            self.domain.attachDeviceFlags.reset_mock()
            self.driver._connect_volume.reset_mock()
        self.driver._disconnect_volume.assert_not_called()
        self.assertEqual(2, self.instance.save.call_count)

    def test_its_file_is_allocated_before(self):
        self.attach()
        self.assertLessEqual(
            units.Gi, os.stat(self.path).st_blocks * 512)

    def test_the_definition_of_a_guest_that_is_off_gets_it(self):
        self.state = power_state.SHUTDOWN
        self.attach()
        self.assertFalse(self.plugged()[1])

    def test_a_definition_without_room_waits_for_the_next_start(self):
        self.state = power_state.SHUTDOWN
        self.xml = XML.replace("slots='2'", "slots='1'")
        self.attach()
        self.domain.attachDeviceFlags.assert_not_called()
        self.driver._disconnect_volume.assert_not_called()
        self.instance.save.assert_called_once_with()

    def test_what_cannot_be_mapped_is_not_even_connected(self):
        self.connection_info['data']['format'] = 'qcow2'
        self.assertRaisesRegex(
            volumes.VolumeRefused, "its format is 'qcow2'", self.attach)
        self.driver._connect_volume.assert_not_called()
        self.driver._disconnect_volume.assert_not_called()

    def test_what_libvirt_refuses_is_disconnected(self):
        self.domain.attachDeviceFlags.side_effect = (
            libvirt_driver.libvirt.libvirtError('no'))
        self.assertRaises(libvirt_driver.libvirt.libvirtError, self.attach)
        self.driver._disconnect_volume.assert_called_once()

    def test_what_the_guest_has_stays_whatever_comes_after(self):
        """It cannot be taken from it, so it must stay connected."""
        self.driver._build_device_metadata.side_effect = ValueError
        self.attach()
        self.driver._disconnect_volume.assert_not_called()

    def test_a_size_that_no_guest_maps(self):
        with open(self.path, 'r+b') as file:
            file.truncate(units.Gi + 4096)
        self.assert_undone(volumes.VolumeRefused, 'it has 1073745920 bytes')

    def test_ram_that_does_not_hold_the_memmap(self):
        self.instance.flavor.memory_mb = 95
        # Of two volumes of 1 GiB.
        with mock.patch.object(volumes, 'without_memmap',
                               lambda found: [each.size for each in found]):
            self.assert_undone(volumes.VolumeRefused, 'take 32 MiB of it')
            self.driver._disconnect_volume.reset_mock()
            self.driver._connect_volume.reset_mock()
            self.instance.flavor.memory_mb = 96
            self.attach()


class NoRoomTest(AttachTestCase):
    """It says what the operator has allowed."""

    scenarios = [
        ('slots', {
            'old': "slots='2'", 'new': "slots='1'",
            'reason': "all of the guest's 1 slots for disks on fake DAX are "
                      'in use; allowed: more of them, by '
                      '[fakedax]spare_volumes=8'}),
        ('memory', {
            'old': '2621440', 'new': '2621439',
            'reason': f'it has {units.Gi} bytes; allowed: '
                      f'{units.Gi - units.Ki}, with '
                      f'[fakedax]spare_volumes_gib=256'}),
        ('root ports', {
            'old': '</devices>',
            'new': "<interface><address type='pci' domain='0' bus='0x02' "
                   "slot='0x00' function='0x0'/></interface></devices>",
            'reason': "all of the guest's 2 PCIe root ports are in use"}),
        ('started before', {
            'old': "<maxMemory slots='2' unit='KiB'>2621440</maxMemory>",
            'new': '',
            'reason': 'the guest was started without room for one'}),
    ]

    def test_the_volume_is_disconnected(self):
        self.assertIn(self.old, self.xml)
        self.xml = self.xml.replace(self.old, self.new)
        with mock.patch.object(volumes, 'without_memmap', return_value=[]):
            self.assert_undone(hotplug.NoRoom, self.reason)
        self.assertEqual(0, os.stat(self.path).st_blocks)


class OldMachineTest(AttachTestCase):

    def test_it_needs_no_root_port(self):
        self.xml = self.xml.replace("model='pcie-root'/>", "model='pci-root'/>"
                                    ).replace('pcie-root-port', 'pci-bridge')
        with mock.patch.object(volumes, 'without_memmap', return_value=[]):
            self.attach()
        self.domain.attachDeviceFlags.assert_called_once()


class RefuseTest(HotplugTestCase):

    def refuse(self, volume, **also):
        hotplug.refuse(hotplug.EXTEND, self.host, self.instance, volume,
                       **also)

    def test_of_a_guest_with_a_qemu(self):
        for self.state in (power_state.RUNNING, power_state.PAUSED):
            self.assertRaises(
                refusals.OperationRefused, self.refuse, uuids.there)

    def test_what_goes_while_it_is_off(self):
        self.state = power_state.SHUTDOWN
        self.refuse(uuids.there)
        self.assertRaises(refusals.OperationRefused, self.refuse,
                          uuids.there, also_off=True)

    def test_an_ordinary_volume_is_left_to_nova(self):
        self.refuse(uuids.ordinary, also_off=True)
        self.refuse(None, also_off=True)

    def test_a_guest_that_is_not_here(self):
        """A live migration to this host is undone."""
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id=fixtures.UUID)
        self.refuse(uuids.there, also_off=True)
        hotplug.refuse_detach(self.host, self.instance, uuids.there)

    def test_a_detach_is_refused_as_nova_expects_it(self):
        exc = self.assertRaises(
            exception.DeviceDetachFailed, hotplug.refuse_detach, self.host,
            self.instance, uuids.there)
        self.assertIn(refusals.refused(hotplug.DETACH).format_message(),
                      exc.format_message())

    def test_each_is_in_the_table(self):
        for operation in (hotplug.DETACH, hotplug.EXTEND, hotplug.SWAP,
                          hotplug.SNAPSHOT):
            self.assertIn(operation, refusals.REFUSED)


class FindTest(HotplugTestCase):

    def test_the_device_of_a_volume(self):
        device = hotplug.device_of(self.guest, uuids.there)
        self.assertIsInstance(device, domain.LibvirtConfigGuestVirtioPMEM)
        self.assertEqual('/dev/loop7', device.source_path)


class ForgetTest(HotplugTestCase):

    def setUp(self):
        super().setUp()
        self.order = mock.Mock()
        for owner, name in ((hostcache, 'invalidate'),
                            (volumes, 'forget_view')):
            patch = mock.patch.object(owner, name, getattr(self.order, name))
            patch.start()
            self.addCleanup(patch.stop)
        self.info = {'data': {'device_path': self.path}}

    def test_the_pages_of_a_connected_volume_are_dropped(self):
        hotplug.forget(self.info)
        self.order.invalidate.assert_called_once_with(self.path)
        self.order.forget_view.assert_not_called()

    def test_one_without_a_path(self):
        for info in ({}, {'data': None}, {'data': {}}):
            hotplug.forget(info)
        self.order.invalidate.assert_not_called()

    def test_it_keeps_nobody(self):
        self.order.invalidate.side_effect = OSError(5, 'no storage')
        with self.assertLogs(hotplug.LOG.logger, 'WARNING') as logs:
            hotplug.forget(self.info)
        self.assertIn('no storage', logs.output[0])
        self.order.invalidate.side_effect = FileNotFoundError
        with self.assertNoLogs(hotplug.LOG.logger, 'WARNING'):
            hotplug.forget(self.info)

    def test_the_view_goes_with_the_volume(self):
        hotplug.give_up(self.info, self.instance)
        self.assertEqual(
            [mock.call.invalidate(self.path),
             mock.call.forget_view(self.info)], self.order.mock_calls)

    def test_the_view_stays_for_the_destination_of_a_live_migration(self):
        self.instance.task_state = 'migrating'
        hotplug.give_up(self.info, self.instance)
        self.order.forget_view.assert_not_called()
