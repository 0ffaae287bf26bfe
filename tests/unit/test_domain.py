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
import textwrap
from unittest import mock

import fixtures
from lxml import etree
from nova import conf as nova_conf
from nova import exception
from nova.virt.libvirt import config as vconfig
from oslo_config import fixture as config_fixture
from oslo_utils import units
from oslotest import base
import testscenarios

from nova_fakedax import conf
from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import hooks
from nova_fakedax import layout
from nova_fakedax import spec
from nova_fakedax import volumes

load_tests = testscenarios.load_tests_apply_scenarios

SCHEMA = '/usr/share/libvirt/schemas/domain.rng'
UUID = '4f3a9b0e-6c1d-4f6e-9d3a-0c2b1e5d7f88'

# Elements of a guest of 1 GiB and 2 vCPUs, before and after <os>.
HEAD = f"""\
<domain type="kvm">
  <uuid>{UUID}</uuid>
  <name>instance-00000001</name>
  <memory>1048576</memory>
"""
HVM = """\
  <vcpu>2</vcpu>
  <os>
    <type arch="x86_64">hvm</type>
    <boot dev="hd"/>
  </os>
"""
CELL = """\
  <cpu match="exact">
    <numa>
      <cell id="0" cpus="0-1" memory="1048576"/>
    </numa>
  </cpu>
"""


class ConvertTestCase(base.BaseTestCase):
    """A guest as LibvirtDriver makes it, with backing files that exist."""

    def setUp(self):
        super().setUp()
        self.path = self.useFixture(fixtures.TempDir()).path

    def guest(self, *devices):
        guest = vconfig.LibvirtConfigGuest()
        guest.virt_type = 'kvm'
        guest.uuid = UUID
        guest.name = 'instance-00000001'
        guest.memory = units.Gi // units.Ki
        guest.vcpus = 2
        guest.os_type = 'hvm'
        guest.os_arch = 'x86_64'
        guest.os_boot_dev = ['hd']
        for device in devices:
            guest.add_device(device)
        return guest

    def disk(self, name, target, mib=None, memmap=False):
        """As nova.virt.libvirt.imagebackend.Image.libvirt_info makes it."""
        device = vconfig.LibvirtConfigGuestDisk()
        device.driver_name = 'qemu'
        device.driver_format = 'raw'
        device.driver_cache = 'none'
        device.driver_discard = 'unmap'
        device.source_path = os.path.join(self.path, name)
        device.target_dev = target
        device.target_bus = 'virtio'
        if mib:
            with open(device.source_path, 'wb'):
                pass
            layout.fit(device.source_path, mib * units.Mi, memmap)
        return device

    def convert(self, guest, *wanted, emulator=None, models=()):
        domain.convert(
            guest, self.path,
            lambda path: os.path.basename(path) in wanted, emulator, models)

    def refused(self, guest, error=exception.InvalidInput):
        exc = self.assertRaises(error, self.convert, guest, 'disk.eph0')
        return str(exc)

    def assert_xml(self, expected, guest):
        xml = guest.to_xml()
        # The directory of the files does not matter.
        self.assertEqual(expected, xml.replace(self.path, '/i'))
        if os.path.exists(SCHEMA):
            schema = etree.RelaxNG(file=SCHEMA)
            schema.assertValid(etree.fromstring(xml))


class BootViewBusTest(ConvertTestCase):
    """The bus of an ordinary root disk is that of the image."""

    scenarios = [
        (f'{bus} {dev}', {'bus': bus, 'dev': dev, 'view': view})
        for bus, dev, view in (
            ('virtio', 'vda', ('virtio', 'vda')),
            ('virtio', 'vdb', ('virtio', 'vdb')),
            ('scsi', 'sda', ('scsi', 'sda')),
            ('sata', 'sda', ('virtio', 'vda')),
            ('ide', 'hda', ('virtio', 'vda')),
            ('usb', 'sda', ('virtio', 'vda')),
            ('fdc', 'fda', ('virtio', 'vda')))]

    def test_the_view_is_on_one_that_firmware_boots_from(self):
        root = self.disk('disk', self.dev, mib=4)
        root.target_bus = self.bus
        other = self.disk('disk.swap', 'xda')
        other.target_bus = self.bus
        guest = self.guest(root, other)
        self.convert(guest, 'disk')
        view, kept = guest.devices[:2]
        self.assertEqual(self.view, (view.target_bus, view.target_dev))
        self.assertEqual((self.bus, 'xda'), (kept.target_bus, kept.target_dev))


class BootViewBusConflictTest(ConvertTestCase):

    def test_a_virtio_disk_that_firmware_would_take_first_is_named(self):
        root = self.disk('disk', 'sda', mib=4)
        root.target_bus = 'sata'
        guest = self.guest(root, self.disk('disk.swap', 'vda'))
        message = str(self.assertRaises(
            exception.InvalidInput, self.convert, guest, 'disk'))
        self.assertIn("hw_disk_bus is 'sata'", message)
        self.assertIn("another virtio disk is vda; allowed: 'virtio', 'scsi'",
                      message)


class ConvertTest(ConvertTestCase):
    """The exact XML: what libvirt and QEMU were seen to run."""

    maxDiff = None

    def test_root_with_firmware_boot_keeps_a_read_only_view(self):
        guest = self.guest(self.disk('disk', 'vda', mib=4))
        self.convert(guest, 'disk')
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1052672</maxMemory>
""" + HVM + CELL + """\
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none"/>
      <source file="/i/disk.view"/>
      <target dev="vda" bus="virtio"/>
      <serial>fakedax-boot</serial>
      <readonly/>
    </disk>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk</path>
      </source>
      <target>
        <size unit="KiB">4096</size>
      </target>
      <alias name="ua-fakedax-root"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_root_with_a_kernel_image_needs_no_view(self):
        guest = self.guest(self.disk('disk', 'vda', mib=4))
        guest.os_boot_dev = []
        guest.os_kernel = '/i/kernel'
        guest.os_initrd = '/i/ramdisk'
        guest.os_cmdline = 'root=/dev/pmem0p1'
        self.convert(guest, 'disk')
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1052672</maxMemory>
  <vcpu>2</vcpu>
  <os>
    <type arch="x86_64">hvm</type>
    <kernel>/i/kernel</kernel>
    <initrd>/i/ramdisk</initrd>
    <cmdline>root=/dev/pmem0p1</cmdline>
  </os>
""" + CELL + """\
  <devices>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk</path>
      </source>
      <target>
        <size unit="KiB">4096</size>
      </target>
      <alias name="ua-fakedax-root"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_an_ephemeral_disk_leaves_an_ordinary_root_alone(self):
        guest = self.guest(self.disk('disk', 'vda', mib=4),
                           self.disk('disk.eph0', 'vdb', mib=2))
        self.convert(guest, 'disk.eph0')
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1050624</maxMemory>
""" + HVM + CELL + """\
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none" discard="unmap"/>
      <source file="/i/disk"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk.eph0</path>
      </source>
      <target>
        <size unit="KiB">2048</size>
      </target>
      <alias name="ua-fakedax-eph0"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_root_and_two_ephemeral_disks_root_first(self):
        # In an order that Nova does not use, and with a disk that stays.
        guest = self.guest(self.disk('disk.swap', 'vdd', mib=2),
                           self.disk('disk.eph1', 'vdc', mib=2),
                           self.disk('disk.eph0', 'vdb', mib=8),
                           self.disk('disk', 'vda', mib=4))
        self.convert(guest, 'disk', 'disk.eph0', 'disk.eph1')
        self.assert_xml(HEAD + """\
  <maxMemory slots="3">1062912</maxMemory>
""" + HVM + CELL + """\
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none"/>
      <source file="/i/disk.view"/>
      <target dev="vda" bus="virtio"/>
      <serial>fakedax-boot</serial>
      <readonly/>
    </disk>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none" discard="unmap"/>
      <source file="/i/disk.swap"/>
      <target dev="vdd" bus="virtio"/>
    </disk>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk</path>
      </source>
      <target>
        <size unit="KiB">4096</size>
      </target>
      <alias name="ua-fakedax-root"/>
    </memory>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk.eph0</path>
      </source>
      <target>
        <size unit="KiB">8192</size>
      </target>
      <alias name="ua-fakedax-eph0"/>
    </memory>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk.eph1</path>
      </source>
      <target>
        <size unit="KiB">2048</size>
      </target>
      <alias name="ua-fakedax-eph1"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_a_numa_topology_stays_as_it_is(self):
        guest = self.guest(self.disk('disk', 'vda', mib=4))
        guest.os_kernel = '/i/kernel'
        guest.cpu = vconfig.LibvirtConfigGuestCPU()
        guest.cpu.numa = vconfig.LibvirtConfigGuestCPUNUMA()
        for number in range(2):
            cell = vconfig.LibvirtConfigGuestCPUNUMACell()
            cell.id = number
            cell.cpus = {number}
            cell.memory = guest.memory // 2
            guest.cpu.numa.cells.append(cell)
        self.convert(guest, 'disk')
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1052672</maxMemory>
  <vcpu>2</vcpu>
  <os>
    <type arch="x86_64">hvm</type>
    <kernel>/i/kernel</kernel>
    <boot dev="hd"/>
  </os>
  <cpu match="exact">
    <numa>
      <cell id="0" cpus="0" memory="524288"/>
      <cell id="1" cpus="1" memory="524288"/>
    </numa>
  </cpu>
  <devices>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk</path>
      </source>
      <target>
        <size unit="KiB">4096</size>
      </target>
      <alias name="ua-fakedax-root"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_the_configured_emulator_runs_the_guest(self):
        guest = self.guest(self.disk('disk', 'vda'),
                           self.disk('disk.local', 'vdb', mib=2))
        self.convert(guest, 'disk.local', emulator='/opt/qemu')
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1050624</maxMemory>
""" + HVM + CELL + """\
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none" discard="unmap"/>
      <source file="/i/disk"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk.local</path>
      </source>
      <target>
        <size unit="KiB">2048</size>
      </target>
      <alias name="ua-fakedax-eph0"/>
    </memory>
    <emulator>/opt/qemu</emulator>
  </devices>
</domain>
""", guest)

    def test_a_guest_without_wanted_disks_is_not_changed(self):
        guest = self.guest(self.disk('disk', 'vda'))
        before = guest.to_xml()
        self.convert(guest, emulator='/opt/qemu')
        self.assertEqual(before, guest.to_xml())

    def test_the_model_of_the_cpu_is_kept(self):
        guest = self.guest(self.disk('disk.eph0', 'vda', mib=2))
        guest.cpu = vconfig.LibvirtConfigGuestCPU()
        guest.cpu.mode = 'host-model'
        self.convert(guest, 'disk.eph0')
        self.assertEqual('host-model', guest.cpu.mode)
        self.assertEqual([{0, 1}],
                         [cell.cpus for cell in guest.cpu.numa.cells])

    def test_a_disk_of_that_name_elsewhere_is_not_the_instances(self):
        volume = self.disk('disk', 'vdb')
        volume.source_path = '/mnt/volumes/disk'
        cdrom = self.disk('disk', 'vdc')
        cdrom.source_path = None
        guest = self.guest(volume, cdrom)
        self.convert(guest, 'disk')
        self.assertEqual([volume, cdrom], guest.devices)


class MemmapTest(ConvertTestCase):
    """Images whose content does not begin at byte 0."""

    SLICED = """\
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none"{discard}/>
      <source file="/i/{name}">
        <slices>
          <slice type="storage" offset="2097152" size="4194304"/>
        </slices>
      </source>
      <target dev="{target}" bus="virtio"/>
{rest}    </disk>
"""

    def sliced(self, name='disk', target='vda', discard='', rest=''):
        return self.SLICED.format(
            name=name, target=target, discard=discard, rest=rest)

    def test_the_boot_view_is_the_content_and_the_device_all(self):
        guest = self.guest(self.disk('disk', 'vda', mib=4, memmap=True))
        self.convert(guest, 'disk')
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1054720</maxMemory>
""" + HVM + CELL + """\
  <devices>
""" + self.sliced('disk.view', rest="""\
      <serial>fakedax-boot</serial>
      <readonly/>
""") + """\
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/disk</path>
      </source>
      <target>
        <size unit="KiB">6144</size>
      </target>
      <alias name="ua-fakedax-root"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_libvirt_labels_the_image_for_the_device_alone(self):
        for memmap in True, False:
            guest = self.guest(self.disk('disk', 'vda', mib=4, memmap=memmap))
            self.convert(guest, 'disk', models=('selinux', 'dac'))
            view = etree.fromstring(guest.to_xml()).find('./devices/disk')
            self.assertEqual(
                [('selinux', 'no'), ('dac', 'no')],
                [(label.get('model'), label.get('relabel'))
                 for label in view.findall('./source/seclabel')])
            if os.path.exists(SCHEMA):
                etree.RelaxNG(file=SCHEMA).assertValid(
                    etree.fromstring(guest.to_xml()))
            os.unlink(f'{self.path}/disk')

    def test_a_rescued_guest_gets_the_content_to_write_to(self):
        rescue = self.disk('disk.rescue', 'vda')
        old, plain = self.disk('disk.local', 'vdd', mib=2), self.disk(
            'disk.swap', 'vde', mib=2)
        guest = self.guest(
            rescue, self.disk('disk', 'vdb', mib=4, memmap=True),
            self.disk('disk.eph0', 'vdc', mib=4, memmap=True), old, plain)
        domain.convert_rescue(
            guest, self.path, lambda path: os.path.basename(path) in (
                'disk', 'disk.eph0', 'disk.local'))
        self.assertEqual(
            [device.to_xml() for device in (rescue, old, plain)],
            [guest.devices[index].to_xml() for index in (0, 3, 4)])
        for index, name, target in ((1, 'disk', 'vdb'),
                                    (2, 'disk.eph0', 'vdc')):
            xml = guest.devices[index].to_xml().replace(self.path, '/i')
            self.assertEqual(
                textwrap.dedent(self.sliced(
                    name, target, ' discard="unmap"')), xml)

    def test_a_damaged_image_is_not_shown(self):
        for name in 'disk', 'disk.eph0':
            self._damaged_is_refused(
                self.disk(name, 'vda', mib=4, memmap=True), name)

    def _damaged_is_refused(self, device, name):
        with open(device.source_path, 'r+b') as image:
            image.seek(4096 + 56)
            image.write(b'\1')
        for convert in (
                lambda guest: self.convert(guest, name),
                lambda guest: domain.convert_rescue(
                    guest, self.path, lambda path: True)):
            exc = self.assertRaises(
                layout.InvalidLayout, convert, self.guest(device))
            self.assertIn('an info block whose checksum is',
                          exc.format_message())

    def test_the_slice_is_read_back(self):
        hooks.install()
        guest = self.guest(self.disk('disk', 'vda', mib=4, memmap=True),
                           self.disk('disk.swap', 'vdb', mib=2))
        self.convert(guest, 'disk')
        xml = guest.to_xml()
        parsed = vconfig.LibvirtConfigGuest()
        parsed.parse_dom(etree.fromstring(xml))
        self.assertEqual(
            [(True, 2 * units.Mi, 4 * units.Mi), (False, None, None)],
            [(device.readonly, getattr(device, 'slice_offset', None),
              getattr(device, 'slice_size', None))
             for device in parsed.devices
             if isinstance(device, vconfig.LibvirtConfigGuestDisk)])
        self.assertIn('<slice type="storage" offset="2097152" '
                      'size="4194304"/>', parsed.to_xml())


class VolumesTestCase(ConvertTestCase):
    """With volumes that are connected: files in place of what os-brick has."""

    ROOT = '6f1c2b9a-0d4e-4f6e-9d3a-0c2b1e5d7f01'
    DATA = '6f1c2b9a-0d4e-4f6e-9d3a-0c2b1e5d7f02'
    MORE = '6f1c2b9a-0d4e-4f6e-9d3a-0c2b1e5d7f03'

    def volume(self, volume, target, mib=4, kind='file', memmap=False):
        """As LibvirtDriver._get_volume_config makes it."""
        device = self.disk(f'volume-{volume}', target, mib, memmap)
        device.source_type, device.source_device = kind, 'disk'
        device.driver_discard = None
        device.serial, device.alias = volume, f'ua-{volume}'
        return device

    def convert_volumes(self, guest, *attached, root=None, wanted=(),
                        models=(), **kwargs):
        domain.convert(
            guest, self.path,
            lambda path: os.path.basename(path) in wanted, None, models,
            [volumes.Volume(volume, volume == root) for volume in attached],
            **kwargs)

    def pmems(self, guest):
        return [(device.alias, os.path.basename(device.source_path),
                 device.target_size) for device in guest.devices
                if isinstance(device, domain.LibvirtConfigGuestVirtioPMEM)]

    def of_volume(self, volume, mib=4):
        return f'ua-fakedax-{volume}', f'volume-{volume}', mib * units.Ki


class VolumesTest(VolumesTestCase):

    maxDiff = None

    def test_a_root_volume_with_its_boot_view(self):
        guest = self.guest(self.volume(self.ROOT, 'vda', kind='block'))
        self.convert_volumes(guest, self.ROOT, root=self.ROOT,
                             models=['dac'])
        self.assert_xml(HEAD + """\
  <maxMemory slots="1">1052672</maxMemory>
""" + HVM + CELL + f"""\
  <devices>
    <disk type="block" device="disk">
      <driver name="qemu" type="raw" cache="none"/>
      <alias name="ua-fakedax-boot"/>
      <source dev="/i/volume-{self.ROOT}">
        <seclabel model="dac" relabel="no"/>
      </source>
      <target dev="vda" bus="virtio"/>
      <serial>fakedax-boot</serial>
      <readonly/>
    </disk>
    <memory model="virtio-pmem" access="shared">
      <source>
        <path>/i/volume-{self.ROOT}</path>
      </source>
      <target>
        <size unit="KiB">4096</size>
      </target>
      <alias name="ua-fakedax-{self.ROOT}"/>
    </memory>
  </devices>
</domain>
""", guest)

    def test_no_view_with_a_kernel_image(self):
        guest = self.guest(self.volume(self.ROOT, 'vda'))
        guest.os_kernel = '/i/kernel'
        self.convert_volumes(guest, self.ROOT, root=self.ROOT,
                             models=['apparmor'])
        self.assertEqual([self.of_volume(self.ROOT)], self.pmems(guest))
        self.assertEqual(1, len(guest.devices))

    def test_root_then_files_then_other_volumes(self):
        guest = self.guest(
            self.disk('disk.eph0', 'vdb', mib=2),
            self.volume(self.MORE, 'vdd', mib=6),
            self.volume(self.ROOT, 'vda'), self.volume(self.DATA, 'vdc'))
        self.convert_volumes(guest, self.DATA, self.ROOT, self.MORE,
                             root=self.ROOT, wanted=['disk.eph0'])
        self.assertEqual([
            self.of_volume(self.ROOT), ('ua-fakedax-eph0', 'disk.eph0', 2048),
            self.of_volume(self.DATA), self.of_volume(self.MORE, 6),
        ], self.pmems(guest))
        self.assertEqual(4, guest.max_memory_slots)
        self.assertEqual(guest.memory + 16 * units.Ki, guest.max_memory_size)
        # And that is how it is read back.
        self.assertEqual(
            [alias for alias, _path, _size in self.pmems(guest)],
            [device.alias for _disk, device in domain.fake_dax_disks(guest)])
        self.assertEqual(
            [self.ROOT, self.DATA, self.MORE],
            [found.id.volume for found, _device
             in domain.fake_dax_volumes(guest)])
        found, device = domain.fake_dax_volume(guest, self.MORE)
        self.assertEqual((self.MORE, f'ua-fakedax-{self.MORE}'),
                         (found.id.volume, device.alias))
        self.assertIsNone(domain.fake_dax_volume(guest, UUID))
        # It is no file of the instance.
        self.assertIsNone(domain.root_disk(guest))

    def test_a_file_is_the_root_before_data_volumes(self):
        guest = self.guest(self.volume(self.DATA, 'vdb'),
                           self.disk('disk', 'vda', mib=4))
        self.convert_volumes(guest, self.DATA, wanted=['disk'])
        disks = [found for found, _device in domain.fake_dax_disks(guest)]
        self.assertEqual([disk.ROOT, disk.VOLUME],
                         [found.id.role for found in disks])
        self.assertEqual(disks[0], domain.root_disk(guest))

    def test_a_volume_that_is_not_wanted_stays_a_disk(self):
        guest = self.guest(self.volume(self.ROOT, 'vda'),
                           self.volume(self.DATA, 'vdb'))
        self.convert_volumes(guest, self.ROOT, root=self.ROOT)
        self.assertEqual(
            [('vda', 'fakedax-boot'), ('vdb', self.DATA)],
            [(device.target_dev, device.serial) for device in guest.devices
             if isinstance(device, vconfig.LibvirtConfigGuestDisk)])

    def test_one_that_has_no_disk_is_not_left_out(self):
        self.assertRaises(
            exception.DiskNotFound, self.convert_volumes, self.guest(),
            self.DATA)

    def test_one_that_cannot_be_mapped_is_refused(self):
        device = self.volume(self.DATA, 'vda')
        device.driver_format = 'qcow2'
        self.assertRaises(
            volumes.VolumeRefused, self.convert_volumes, self.guest(device),
            self.DATA)

    def test_what_pins_memory_is_refused(self):
        guest = self.guest(self.volume(self.DATA, 'vdb'),
                           vconfig.LibvirtConfigGuestHostdevPCI())
        self.assertIn('a passed-through device', str(self.assertRaises(
            exception.InvalidInput, self.convert_volumes, guest, self.DATA)))

    def test_a_memmap_of_the_user_s_is_left_out_of_the_boot_view(self):
        guest = self.guest(self.volume(self.ROOT, 'vda', memmap=True))
        self.convert_volumes(guest, self.ROOT, root=self.ROOT)
        view = guest.devices[0]
        self.assertEqual((2 * units.Mi, 4 * units.Mi),
                         (view.slice_offset, view.slice_size))
        self.assertEqual([self.of_volume(self.ROOT, 6)], self.pmems(guest))

    def test_nova_s_disks_do_not_count_volumes(self):
        guest = self.guest(self.disk('disk', 'vda', mib=4),
                           self.volume(self.DATA, 'vdb'))
        self.convert_volumes(guest, self.DATA, wanted=['disk'])
        self.assertEqual(
            [os.path.join(self.path, 'disk')],
            [info['path'] for info in domain.with_fake_dax_disks(guest, [])])


class VolumeViewTest(VolumesTestCase):
    """Where AppArmor confines guests, the view needs a second name."""

    def view(self, kind='file'):
        guest = self.guest(self.volume(self.ROOT, 'vda', kind=kind))
        self.convert_volumes(guest, self.ROOT, root=self.ROOT,
                             models=['apparmor', 'dac'])
        return guest.devices[0]

    def test_a_file_gets_one_until_it_is_disconnected(self):
        path = os.path.join(self.path, f'volume-{self.ROOT}')
        view = self.view()
        self.assertEqual(f'{path}.view', view.source_path)
        self.assertTrue(os.path.samefile(path, view.source_path))
        # AppArmor has no labels.
        self.assertEqual(['dac'], view.unlabelled)
        connection_info = {'data': {'device_path': path}}
        for _twice in range(2):
            volumes.forget_view(connection_info)
            self.assertEqual([os.path.basename(path)], os.listdir(self.path))

    def test_what_was_not_connected_has_none(self):
        for connection_info in {}, {'data': None}, {'data': {
                'device_path': '/dev/no-such-device'}}:
            volumes.forget_view(connection_info)

    def test_none_that_can_be_made_is_refused(self):
        with mock.patch.object(layout, 'view', side_effect=lambda path: path):
            exc = self.assertRaises(volumes.VolumeRefused, self.view)
        self.assertIn(
            f'Volume {self.ROOT} cannot be on fake DAX: AppArmor confines',
            str(exc))
        self.assertIn('allowed: an image with kernel_id', str(exc))
        # Behind what Nova writes before it.
        self.assertLess(len(str(exc)), 255 - 65)

    def test_a_block_device_is_refused(self):
        with mock.patch.object(os.path, 'isfile', return_value=False):
            self.assertIn('AppArmor confines', str(self.assertRaises(
                volumes.VolumeRefused, self.view, 'block')))


class SpareTest(VolumesTestCase):
    """Room for volumes that are attached later."""

    SPARE = domain.Spare(3, 5 * units.Mi)

    def ports(self, guest):
        return [device for device in guest.devices if isinstance(
            device, vconfig.LibvirtConfigGuestPCIeRootPortController)]

    def test_slots_and_size(self):
        guest = self.guest(self.volume(self.DATA, 'vdb'))
        self.convert_volumes(guest, self.DATA, spare=self.SPARE)
        self.assertEqual(4, guest.max_memory_slots)
        self.assertEqual(
            guest.memory + 4 * units.Ki + 5 * units.Mi, guest.max_memory_size)

    def test_a_guest_without_volumes_has_it_too(self):
        guest = self.guest(self.disk('disk', 'vda'))
        self.convert_volumes(guest, spare=self.SPARE)
        self.assertEqual(3, guest.max_memory_slots)
        self.assertEqual(guest.memory + 5 * units.Mi, guest.max_memory_size)
        self.assertIsNotNone(guest.cpu.numa)

    def test_root_ports_on_q35(self):
        guest = self.guest(self.volume(self.DATA, 'vdb'),
                           self.disk('disk', 'vda'),
                           vconfig.LibvirtConfigGuestSerial())
        guest.os_mach_type = 'pc-q35-10.0'
        self.convert_volumes(guest, self.DATA, spare=self.SPARE)
        # A disk, a pmem and what libvirt adds.
        self.assertEqual(
            2 + domain._IMPLICIT_DEVICES + 3, len(self.ports(guest)))
        [_root] = [device for device in guest.devices if isinstance(
            device, vconfig.LibvirtConfigGuestPCIeRootController)]

    def test_those_that_nova_has_added_count(self):
        guest = self.guest(
            vconfig.LibvirtConfigGuestPCIeRootController(),
            *[vconfig.LibvirtConfigGuestPCIeRootPortController()
              for _number in range(28)])
        guest.os_mach_type = 'q35'
        self.convert_volumes(guest, spare=self.SPARE)
        self.assertEqual(28, len(self.ports(guest)))
        self.assertEqual(29, len(guest.devices))

    def test_no_root_ports_elsewhere(self):
        for machine in None, 'pc', 'pc-i440fx-10.0':
            guest = self.guest(self.volume(self.DATA, 'vdb'))
            guest.os_mach_type = machine
            self.convert_volumes(guest, self.DATA, spare=self.SPARE)
            self.assertEqual([], self.ports(guest))

    def test_the_options_say_how_much(self):
        conf.register_opts(nova_conf.CONF)
        config = self.useFixture(config_fixture.Config(nova_conf.CONF))
        config.config(group='fakedax', spare_volumes=2, spare_volumes_gib=3)
        for volume, expected in (
            ('none', domain.Spare()), ('boot', domain.Spare()),
            ('all', domain.Spare(2, 3 * units.Mi)),
        ):
            self.assertEqual(expected, domain.spare(
                nova_conf.CONF, spec.FakeDaxSpec(volumes=volume)))


class RescuedVolumesTest(VolumesTestCase):

    def test_they_are_ordinary_disks_of_their_content(self):
        root = self.volume(self.ROOT, 'vda', memmap=True)
        data = self.volume(self.DATA, 'pmem1')
        other = self.volume(self.MORE, 'vdc')
        guest = self.guest(root, data, other)
        domain.convert_rescue(
            guest, self.path, lambda _path: False,
            [volumes.Volume(self.ROOT, True),
             volumes.Volume(self.DATA, False)])
        self.assertEqual(
            [('vda', 4 * units.Mi, None), ('vdb', 0, None), ('vdc', 0, None)],
            [(device.target_dev, getattr(device, 'slice_size', 0),
              device.readonly or None) for device in guest.devices])

    def test_a_guest_that_nova_gives_none(self):
        guest = self.guest()
        domain.convert_rescue(
            guest, self.path, lambda _path: False,
            [volumes.Volume(self.DATA, False)])
        self.assertEqual([], guest.devices)


class ConvertRefusesTest(ConvertTestCase):

    def test_a_missing_backing_file(self):
        guest = self.guest(self.disk('disk.eph0', 'vda'))
        self.assertEqual(f'{self.path}/disk.eph0 does not exist',
                         self.refused(guest, layout.InvalidLayout))

    def test_a_sparse_backing_file(self):
        device = self.disk('disk.eph0', 'vda', mib=2)
        with open(device.source_path, 'r+b') as image:
            image.truncate(8 * units.Mi)
        self.assertIn('but only 2097152 are allocated', self.refused(
            self.guest(device), layout.InvalidLayout))

    def test_locked_memory(self):
        guest = self.guest(self.disk('disk.eph0', 'vda', mib=2))
        guest.membacking = vconfig.LibvirtConfigGuestMemoryBacking()
        guest.membacking.locked = True
        self.assertIn('locked memory is incompatible with',
                      self.refused(guest))

    def test_encrypted_memory(self):
        guest = self.guest(self.disk('disk.eph0', 'vda', mib=2))
        guest.launch_security = (
            vconfig.LibvirtConfigGuestSEVLaunchSecurity())
        self.assertIn('encrypted memory is incompatible with',
                      self.refused(guest))

    def test_ordinary_interfaces_and_memory_are_not_refused(self):
        interface = vconfig.LibvirtConfigGuestInterface()
        interface.net_type = 'bridge'
        guest = self.guest(
            self.disk('disk.eph0', 'vda', mib=2), interface)
        guest.membacking = vconfig.LibvirtConfigGuestMemoryBacking()
        self.convert(guest, 'disk.eph0')

    def test_a_conflict_is_none_without_disks_on_fake_dax(self):
        guest = self.guest(vconfig.LibvirtConfigGuestHostdevPCI())
        self.convert(guest, 'disk.eph0')


class PinningDeviceTest(ConvertTestCase):

    scenarios = [
        ('PCI', {
            'device_class': vconfig.LibvirtConfigGuestHostdevPCI,
            'attributes': {}, 'named': 'a passed-through device'}),
        ('mdev', {
            'device_class': vconfig.LibvirtConfigGuestHostdevMDEV,
            'attributes': {}, 'named': 'a passed-through device'}),
        ('hostdev interface', {
            'device_class': vconfig.LibvirtConfigGuestInterface,
            'attributes': {'net_type': 'hostdev'},
            'named': 'a network interface of type hostdev'}),
        ('vDPA interface', {
            'device_class': vconfig.LibvirtConfigGuestInterface,
            'attributes': {'net_type': 'vdpa'},
            'named': 'a network interface of type vdpa'}),
        ('vPMEM', {
            'device_class': vconfig.LibvirtConfigGuestVPMEM,
            'attributes': {}, 'named': 'a vPMEM device (hw:pmem)'}),
    ]

    def test_it_is_refused(self):
        device = self.device_class()
        for key, value in self.attributes.items():
            setattr(device, key, value)
        guest = self.guest(self.disk('disk.eph0', 'vda', mib=2), device)
        self.assertEqual(
            f'Invalid input received: {self.named} is incompatible with '
            f'disks on fake DAX', self.refused(guest))


class ReadBackTest(base.BaseTestCase):
    """What libvirt returns: in KiB, with aliases and addresses."""

    XML = """\
<domain type='kvm'>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <memory model='virtio-pmem' access='shared'>
      <source><path>/i/disk.eph0</path></source>
      <target><size unit='KiB'>2048</size></target>
      <alias name='ua-fakedax-eph0'/>
    </memory>
    <memory model='virtio-pmem' access='shared'>
      <source><path>/i/disk</path></source>
      <target><size unit='KiB'>4096</size></target>
      <alias name='ua-fakedax-root'/>
      <address type='pci' domain='0x0000' bus='0x05' slot='0x01'
               function='0x2'/>
    </memory>
    <memory model='virtio-pmem' access='shared'>
      <source><path>/i/other</path></source>
      <target><size unit='KiB'>2048</size></target>
      <alias name='virtiopmem2'/>
    </memory>
    <memory model='nvdimm' access='shared'>
      <source><path>/dev/dax0.0</path><alignsize>2048</alignsize></source>
      <target><size>2048</size><node>0</node></target>
    </memory>
    <memory model='virtio-mem'/>
  </devices>
</domain>
"""

    def setUp(self):
        super().setUp()
        hooks.install()
        self.guest = vconfig.LibvirtConfigGuest()
        self.guest.parse_dom(etree.fromstring(self.XML))

    def test_our_disks_are_read_in_order_and_in_bytes(self):
        self.assertEqual([
            disk.FakeDaxDisk(
                disk.DiskId(disk.ROOT, 0), '/i/disk', 4 * units.Mi),
            disk.FakeDaxDisk(
                disk.DiskId(disk.EPHEMERAL, 0), '/i/disk.eph0', 2 * units.Mi),
        ], [found for found, _device in domain.fake_dax_disks(self.guest)])

    def test_a_devices_address_is_read_once_it_has_one(self):
        [root, ephemeral] = [
            device for _found, device in domain.fake_dax_disks(self.guest)]
        self.assertEqual('0000:05:01.2', root.device_addr.format_address())
        self.assertIsNone(ephemeral.device_addr)

    def test_each_device_is_read_once(self):
        self.assertEqual(
            ['/i/disk.eph0', '/i/disk', '/i/other'],
            [device.source_path for device in self.guest.devices if
             isinstance(device, domain.LibvirtConfigGuestVirtioPMEM)])
        self.assertEqual(1, sum(
            isinstance(device, vconfig.LibvirtConfigGuestVPMEM)
            for device in self.guest.devices))

    def test_a_guest_of_others_has_none(self):
        guest = vconfig.LibvirtConfigGuest()
        guest.parse_dom(etree.fromstring('<domain><devices/></domain>'))
        self.assertEqual([], domain.fake_dax_disks(guest))
