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

import inspect
from unittest import mock

from nova import conf as nova_conf
from nova import exception
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import host as libvirt_host
from oslo_config import fixture as config_fixture
from oslotest import base
import testscenarios

from nova_fakedax import addresses
from nova_fakedax import conf
from nova_fakedax import volumes

load_tests = testscenarios.load_tests_apply_scenarios

CONF = nova_conf.CONF


class AddressesTestCase(base.BaseTestCase):
    """A host with a CPU of Intel that has 46 bits."""

    def setUp(self):
        super().setUp()
        objects.register_all()
        self.conf = self.useFixture(config_fixture.Config(CONF))
        self.host = mock.create_autospec(libvirt_host.Host, instance=True)
        self.host_cpu = self.host.get_capabilities.return_value.host.cpu
        self.host_cpu.vendor = 'Intel'
        self.host_cpu.maxphysaddr = self.address_bits('passthrough', 46)
        self.capabilities('')

    def capabilities(self, host_model):
        (self.host.get_connection.return_value.getDomainCapabilities
         .return_value) = (
            f"<domainCapabilities><cpu><mode name='host-model'>{host_model}"
            f"</mode></cpu></domainCapabilities>")

    @staticmethod
    def address_bits(mode, bits):
        found = vconfig.LibvirtConfigCPUMaxPhysAddr()
        found.mode, found.bits = mode, bits
        return found

    def check(self, gib, machine='q35', ram=256, cpu_mode='custom',
              maxphysaddr=None, memmap='guest'):
        cpu = vconfig.LibvirtConfigGuestCPU()
        cpu.mode, cpu.maxphysaddr = cpu_mode, maxphysaddr
        addresses.check(CONF, self.host, objects.Flavor(
            memory_mb=ram, root_gb=gib, ephemeral_gb=0, extra_specs={
                'fakedax:disks': 'root', 'fakedax:memmap': memmap}),
            cpu, machine)

    def refused(self, *args, **kwargs):
        return self.assertRaises(
            exception.InvalidInput, self.check, *args, **kwargs
        ).format_message()


class VolumesTest(AddressesTestCase):
    """They count as other disks do, of 987 GiB that there is room for."""

    def check_volumes(self, value, *gib, root=0, disks='root'):
        extra_specs = {'fakedax:memmap': 'guest', 'fakedax:volumes': value}
        if disks:
            extra_specs['fakedax:disks'] = disks
        cpu = vconfig.LibvirtConfigGuestCPU()
        cpu.mode = 'custom'
        addresses.check(
            CONF, self.host, objects.Flavor(
                memory_mb=256, root_gb=100, ephemeral_gb=0,
                extra_specs=extra_specs),
            cpu, 'q35', [
                volumes.Volume(str(number), number == root, {}, size)
                for number, size in enumerate(gib, 1)])

    def setUp(self):
        super().setUp()
        conf.register_opts(CONF)
        self.conf.config(
            group='fakedax', spare_volumes=0, spare_volumes_gib=0)

    def refused(self, *args, **kwargs):
        return self.assertRaises(
            exception.InvalidInput, self.check_volumes, *args, **kwargs
        ).format_message()

    def test_those_that_the_flavor_wants(self):
        self.check_volumes('all', 800)
        self.refused('all', 500, 400)
        self.check_volumes('none', 500, 400)

    def test_a_root_volume_in_place_of_the_root_disk(self):
        self.check_volumes('boot', 980, root=1)
        self.assertIn('disks on fake DAX of 990 GiB end', self.refused(
            'boot', 990, root=1))

    def test_the_room_for_more(self):
        self.check_volumes('all', 700)
        self.conf.config(
            group='fakedax', spare_volumes=4, spare_volumes_gib=200)
        self.check_volumes('all', 600)
        self.assertIn(
            'disks on fake DAX and spare_volumes_gib of 1000 GiB end',
            self.refused('all', 700))
        self.check_volumes('boot', 880, root=1)


class LimitTest(AddressesTestCase):
    """The largest disk of 1 GiB steps that QEMU 10.0 was seen to start."""

    scenarios = [
        (f'{vendor} {machine} {ram}', {
            'vendor': vendor, 'machine': machine, 'ram': ram, 'gib': gib})
        for vendor, machine, ram, gib in (
            ('AMD', 'q35', 256, 975), ('AMD', 'pc', 256, 1005),
            ('AMD', 'q35', 8192, 969), ('Intel', 'q35', 256, 987),
            ('Intel', 'pc', 256, 1017))]

    def test_the_next_is_refused(self):
        self.host_cpu.vendor = self.vendor
        self.check(self.gib, self.machine, self.ram)
        self.assertIn(f'disks on fake DAX of {self.gib + 1} GiB end',
                      self.refused(self.gib + 1, self.machine, self.ram))


class BitsTest(AddressesTestCase):

    def test_the_fault_has_the_figures_and_what_helps(self):
        self.assertIn(
            'disks on fake DAX of 2048 GiB end at 2085 GiB; the guest '
            'addresses 1024 GiB (40 bits); hw_maxphysaddr_mode and '
            'hw_maxphysaddr_bits of the image raise that',
            self.refused(2048))

    def test_the_memmap_counts(self):
        self.check(987)
        self.refused(987, memmap='device')

    def test_those_that_the_flavor_asks_for(self):
        for mode, bits in (('emulate', 42), ('passthrough', None)):
            self.check(2048, maxphysaddr=self.address_bits(mode, bits))
        self.assertIn('the guest addresses 64 GiB (36 bits)',
                      self.refused(60, maxphysaddr=self.address_bits(
                          'emulate', 36)))

    def test_those_of_the_host(self):
        for mode in ('host-passthrough', 'maximum'):
            self.check(2048, cpu_mode=mode)
            self.host_cpu.maxphysaddr.bits = 39
            self.refused(512, cpu_mode=mode)
            self.host_cpu.maxphysaddr.bits = 46

    def test_those_of_the_hosts_model(self):
        self.refused(2048, cpu_mode='host-model')
        self.capabilities("<maxphysaddr mode='passthrough' limit='46'/>")
        self.check(2048, cpu_mode='host-model')

    def test_what_is_not_known_is_left_to_qemu(self):
        self.host_cpu.maxphysaddr = None
        self.check(2048, cpu_mode='host-passthrough')
        for machine in (None, 'virt', 'microvm', 'pseries'):
            self.check(2048, machine)

    def test_another_hypervisor_can_have_any_cpu(self):
        self.conf.config(virt_type='qemu', group='libvirt')
        self.refused(987)
        self.check(975)

    def test_versions_of_machine_types(self):
        self.refused(1018, 'pc-i440fx-10.0')
        self.check(1017, 'pc-i440fx-10.0')
        self.refused(988, 'pc-q35-10.0')


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes how a guest's CPU is made."""

    def test_the_cpu_has_what_is_read(self):
        self.assertEqual(
            ['self', 'flavor', 'image_meta', 'guest_cpu_numa_config',
             'instance_numa_topology'], list(inspect.signature(
                 libvirt_driver.LibvirtDriver._get_guest_cpu_config
             ).parameters))
        self.assertIn('cpu.maxphysaddr = ', inspect.getsource(
            libvirt_driver.LibvirtDriver._get_guest_cpu_config))
