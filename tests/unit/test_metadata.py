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

from nova import objects
from nova.virt.libvirt import config as vconfig
from oslo_utils.fixture import uuidsentinel as uuids
from oslotest import base

from nova_fakedax import domain
from nova_fakedax import metadata

#: The addresses of devices, by alias.
ADDRESSES = {
    'ua-fakedax-root': '0000:07:01.0', 'ua-fakedax-eph0': '0000:07:02.0',
    'ua-fakedax-eph1': '0000:07:03.0'}


class MetadataTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()

    def bdm(self, tag, root=False, volume=None):
        return objects.BlockDeviceMapping(
            tag=tag, volume_id=volume, boot_index=0 if root else -1,
            source_type='image' if root else 'blank',
            destination_type='volume' if volume else 'local',
            guest_format=None)

    def guest(self, *names):
        guest = vconfig.LibvirtConfigGuest()
        for name in names:
            device = domain.LibvirtConfigGuestVirtioPMEM()
            device.alias = f'ua-fakedax-{name}'
            guest.add_device(device)
        return guest

    def made(self, guest, *bdms, theirs=None):
        """The tags, the path and the address of each device."""
        found = metadata.with_fake_dax_disks(
            theirs, guest, list(bdms),
            lambda device: objects.PCIDeviceBus(address=ADDRESSES[
                device.alias]))
        return found and [
            (device.tags, device.path, device.bus.address)
            for device in found.devices]

    def test_each_tagged_disk_has_the_address_of_its_device(self):
        self.assertEqual([
            (['system'], '/dev/pmem0', '0000:07:01.0'),
            (['scratch'], '/dev/pmem2', '0000:07:03.0'),
        ], self.made(
            self.guest('root', 'eph0', 'eph1'), self.bdm(None),
            self.bdm('system', root=True), self.bdm('scratch')))

    def test_the_boot_view_is_replaced_and_other_devices_stay(self):
        bus = objects.PCIDeviceBus(address='0000:00:03.0')
        theirs = objects.InstanceDeviceMetadata(devices=[
            objects.DiskMetadata(tags=[tag], path='/dev/vda', bus=bus)
            for tag in ('system', 'volume')])
        self.assertEqual([
            (['volume'], '/dev/vda', '0000:00:03.0'),
            (['system'], '/dev/pmem0', '0000:07:01.0'),
        ], self.made(self.guest('root'), self.bdm('system', root=True),
                     theirs=theirs))

    def test_without_tags_there_is_none(self):
        self.assertIsNone(self.made(
            self.guest('root', 'eph0'), self.bdm(None, root=True),
            self.bdm(None)))

    def test_a_disk_that_has_no_mapping_has_no_tag(self):
        self.assertIsNone(self.made(
            self.guest('eph1'), self.bdm('scratch')))

    def test_the_order_of_the_mappings_is_that_of_nova(self):
        """As nova.virt.libvirt.blockinfo.get_disk_mapping numbers them."""
        self.assertEqual([(['second'], '/dev/pmem0', '0000:07:03.0')],
                         self.made(self.guest('eph1'), self.bdm('first'),
                                   self.bdm('second')))

    def test_a_volume_is_found_by_its_id(self):
        bus = objects.PCIDeviceBus(address='0000:00:03.0')
        theirs = objects.InstanceDeviceMetadata(devices=[
            objects.DiskMetadata(tags=['system'], path='/dev/vda', bus=bus)])
        found = metadata.with_fake_dax_disks(
            theirs, self.guest(uuids.root, 'eph0', uuids.data, uuids.plain), [
                self.bdm('db', volume=uuids.data),
                self.bdm(None, volume=uuids.plain), self.bdm('scratch'),
                self.bdm('system', root=True, volume=uuids.root)],
            lambda device: bus)
        self.assertEqual([
            (['system'], '/dev/pmem0', uuids.root),
            (['scratch'], '/dev/pmem1', None),
            (['db'], '/dev/pmem2', uuids.data),
        ], [(device.tags, device.path, getattr(device, 'serial', None)
             if 'serial' in device else None) for device in found.devices])


class NameVolumesTest(base.BaseTestCase):

    class Mapping(dict):
        """As nova.virt.block_device.DriverVolumeBlockDevice."""

        saved = 0

        def save(self):
            self.saved += 1

    def mapping(self, volume, name, boot_index=None):
        return self.Mapping(
            mount_device=name, boot_index=boot_index,
            connection_info={'serial': volume})

    def test_as_the_guest_numbers_them(self):
        guest = vconfig.LibvirtConfigGuest()
        for name in (uuids.root, 'eph0', uuids.first, uuids.second):
            device = domain.LibvirtConfigGuestVirtioPMEM()
            device.alias = f'ua-fakedax-{name}'
            guest.add_device(device)
        mappings = [
            self.mapping(uuids.ordinary, '/dev/vdb'),
            # One before it was detached.
            self.mapping(uuids.first, '/dev/pmem3'),
            self.mapping(uuids.second, '/dev/pmem3'),
            self.mapping(uuids.root, '/dev/vda', boot_index=0)]
        metadata.name_volumes({'block_device_mapping': mappings}, guest)
        self.assertEqual(
            [('/dev/vdb', 0), ('/dev/pmem2', 1), ('/dev/pmem3', 0),
             ('/dev/vda', 0)],
            [(mapping['mount_device'], mapping.saved)
             for mapping in mappings])

    def test_a_guest_without_volumes(self):
        metadata.name_volumes(None, vconfig.LibvirtConfigGuest())


class ForgetNamesTest(base.BaseTestCase):

    def info(self, *ephemerals):
        return {
            'image': [{'device_name': '/dev/vda'}],
            'ephemerals': [{'device_name': name, 'disk_bus': None}
                           for name in ephemerals],
            'swap': {'device_name': '/dev/vdx'},
            'block_device_mapping': [{'mount_device': '/dev/vdy'}]}

    def names(self, info):
        return [bdm.get('device_name') or bdm.get('mount_device') for bdm in [
            *info['image'], *info['ephemerals'], info['swap'],
            *info['block_device_mapping']]]

    def test_volumes_that_may_be_on_fake_dax_no_more(self):
        info = self.info('/dev/vdb')
        info['block_device_mapping'][0]['mount_device'] = '/dev/pmem1'
        self.assertTrue(metadata.forget_names(info, None))
        self.assertEqual([None, None, None, None], self.names(info))

    def test_ephemeral_disks_that_are_on_fake_dax_now(self):
        info = self.info('/dev/vdb', '/dev/vdc')
        self.assertTrue(metadata.forget_names(info, 1))
        self.assertEqual([None, '/dev/pmem1', '/dev/pmem2', None, None],
                         self.names(info))
        self.assertEqual('virtio', info['ephemerals'][0]['disk_bus'])

    def test_ephemeral_disks_that_are_not_any_more(self):
        info = self.info('/dev/pmem1')
        self.assertTrue(metadata.forget_names(info, None))
        self.assertEqual([None] * 4, self.names(info))

    def test_names_that_are_right(self):
        for names, first in ((['/dev/pmem0'], 0), (['/dev/vdb'], None),
                             ([], 0), ([], None)):
            info = self.info(*names)
            self.assertFalse(metadata.forget_names(info, first))
            self.assertEqual(['/dev/vda', *names, '/dev/vdx', '/dev/vdy'],
                             self.names(info))

    def test_pmems_have_other_numbers_if_the_root_disk_is_one_now(self):
        info = self.info('/dev/pmem0')
        self.assertTrue(metadata.forget_names(info, 1))
        self.assertEqual([None, '/dev/pmem1', None, None], self.names(info))

    def test_a_server_without_block_devices(self):
        self.assertFalse(metadata.forget_names(None, 0))
