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
import os

import fixtures
from nova.tests.fixtures import libvirt
from oslo_serialization import jsonutils
import testscenarios

from tests.functional import base

load_tests = testscenarios.load_tests_apply_scenarios

#: What the scheduler does not refuse, the compute does.
EITHER_WAY = [('with filter', {'FILTER_ENABLED': True}),
              ('without filter', {'FILTER_ENABLED': False})]


class BuildFaultTestCase(base.FakeDaxTestCase):
    """The fault says what is wrong; nothing is left."""

    scenarios = EITHER_WAY
    ADDITIONAL_FILTERS = ['NUMATopologyFilter', 'PciPassthroughFilter']

    def fault(self, flavor, **kwargs):
        server = self.boot(flavor, expected_state='ERROR', **kwargs)
        self.assert_nothing_left(server)
        # An instance that failed can be deleted like any other.
        self._delete_server(server)
        return server['fault']['message']

    def put_unchecked_flavor(self, **extra_specs):
        """Make a flavor as before microversion 2.86, without validation."""
        self.admin_api.microversion = '2.85'
        flavor = self.put_flavor(None, **extra_specs)
        self.admin_api.microversion = 'latest'
        return flavor


class BuildFaultTest(BuildFaultTestCase):

    def test_a_key_that_the_api_did_not_check(self):
        self.start_compute()
        self.assertIn(
            "'fakedax:root' is not an extra spec of fake DAX; allowed: "
            "fakedax:disks", self.fault(
                self.put_unchecked_flavor(**{'fakedax:root': 'true'})))

    def test_an_image_that_does_not_know_fake_dax(self):
        self.start_compute()
        for image in (self.ordinary_image,
                      self.put_image('denies', fakedax_guest='false')):
            message = self.fault(self.put_flavor(), image_uuid=image)
            self.assertIn(image, message)
            self.assertIn("the image's property fakedax_guest is '", message)
            self.assertIn("allowed: 'true'", message)

    def test_a_disk_of_0_gib(self):
        self.policy.set_rules({
            'os_compute_api:servers:create:zero_disk_flavor': '@'},
            overwrite=False)
        self.start_compute()
        self.assertIn(
            "fakedax:disks names the root disk, but the flavor's disk is "
            "0 GiB; allowed: 1 GiB or more",
            self.fault(self.put_flavor(disk=0)))

    def test_a_pci_device(self):
        self.flags(group='pci', device_spec=[jsonutils.dumps({
            'vendor_id': libvirt.PCI_VEND_ID,
            'product_id': libvirt.PCI_PROD_ID})], alias=[jsonutils.dumps({
                'vendor_id': libvirt.PCI_VEND_ID,
                'product_id': libvirt.PCI_PROD_ID, 'name': 'nic'})])
        self.start_compute(pci_info=libvirt.HostPCIDevicesInfo(num_pci=1))
        self.assertIn(
            "pci_passthrough:alias='nic:1' is incompatible with "
            "fakedax:disks: a passed-through device pins the whole image",
            self.fault(self.put_flavor(**{'pci_passthrough:alias': 'nic:1'})))

    def test_a_virtual_gpu(self):
        self.flags(enabled_mdev_types=libvirt.NVIDIA_11_VGPU_TYPE,
                   group='devices')
        self.start_compute(
            pci_info=libvirt.HostPCIDevicesInfo(
                num_pci=0, num_pfs=0, num_vfs=0, num_mdevcap=2),
            mdev_info=libvirt.HostMdevDevicesInfo(devices={}))
        self.assertIn(
            "resources:VGPU='1' is incompatible with fakedax:disks: "
            "a mediated device pins the whole image",
            self.fault(self.put_flavor(**{'resources:VGPU': '1'})))
        self.assertIn(
            "resources1:VGPU='1' is incompatible with fakedax:disks",
            self.fault(self.put_flavor(**{'resources1:VGPU': '1'})))
        # What a flavor asks for in another way is found in the domain.
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.driver.LibvirtDriver._allocate_mdevs',
            return_value=['4f3a9b0e-6c1d-4f6e-9d3a-0c2b1e5d7f88']))
        self.assertIn(
            'a passed-through device is incompatible with disks on fake DAX',
            self.fault(self.put_flavor()))

    def test_a_real_time_guest(self):
        self.flags(cpu_dedicated_set='0-7', group='compute')
        self.start_compute()
        self.assertIn(
            "hw:cpu_realtime='yes' is incompatible with fakedax:disks: "
            "locked memory holds the whole image in RAM",
            self.fault(self.put_flavor(**{
                'hw:cpu_realtime': 'yes', 'hw:cpu_policy': 'dedicated',
                'hw:cpu_realtime_mask': '^1'})))

    def test_locked_memory(self):
        self.start_compute()
        self.assertIn(
            "hw:locked_memory='true' is incompatible with fakedax:disks: "
            "locked memory holds the whole image in RAM",
            self.fault(self.put_flavor(**{
                'hw:locked_memory': 'true', 'hw:mem_page_size': 'small'})))

    def test_a_limit_on_disk_io(self):
        self.start_compute()
        for disks in ('root', 'ephemeral'):
            self.assertIn(
                "quota:disk_total_iops_sec='100' is incompatible with "
                "fakedax:disks: nothing limits what a guest reads and "
                "stores through a mapping",
                self.fault(self.put_flavor(disks, ephemeral=1, **{
                    'quota:disk_total_iops_sec': '100'})))

    def test_memory_that_the_image_wants_locked(self):
        self.start_compute()
        image = self.put_image('locks', fakedax_guest='true',
                               hw_locked_memory='true',
                               hw_mem_page_size='small')
        self.assertIn(
            "the image's property hw_locked_memory='true' is incompatible "
            "with fakedax:disks: locked memory",
            self.fault(self.put_flavor(**{'hw:mem_page_size': 'any'}),
                       image_uuid=image).replace("'True'", "'true'"))

    def test_real_persistent_memory(self):
        self.flags(pmem_namespaces='SMALL:ns_0', group='libvirt')
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.libvirt.cleanup_vpmem'))
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.libvirt.get_pmem_namespaces',
            return_value=jsonutils.dumps([{
                'dev': 'namespace0.0', 'mode': 'devdax', 'map': 'mem',
                'size': 4292870144, 'name': 'ns_0', 'numa_node': 0,
                'daxregion': {
                    'id': 0, 'size': 4292870144, 'align': 2097152,
                    'devices': [{'chardev': 'dax0.0', 'size': 4292870144}],
                }}])))
        self.start_compute()
        self.assertIn(
            "hw:pmem='SMALL' is incompatible with fakedax:disks: real and "
            "fake persistent memory cannot be told apart",
            self.fault(self.put_flavor(**{'hw:pmem': 'SMALL'})))

    def test_more_than_the_guest_can_address(self):
        self.flags(cpu_mode='none', group='libvirt')
        self.start_compute()
        made = self.useFixture(fixtures.MockPatch(
            'nova_fakedax.layout._take_blocks')).mock
        # As 1 TiB of disk is for 40 bits.
        self.useFixture(fixtures.MockPatch(
            'nova_fakedax.addresses._DEFAULT_BITS', 32))
        self.assertIn(
            'disks on fake DAX of 1 GiB end at 8 GiB; the guest addresses 4 '
            'GiB (32 bits); hw_maxphysaddr_mode and hw_maxphysaddr_bits of '
            'the image raise that',
            self.fault(self.put_flavor(**{'fakedax:memmap': 'guest'})))
        made.assert_not_called()

    def test_ram_that_does_not_hold_the_memmap(self):
        self.start_compute()
        self.assertIn(
            "the flavor's RAM is 512 MiB, and with fakedax:memmap='guest' 32 "
            "GiB of disk take 512 MiB of it; allowed: 576 MiB or more, or "
            "fakedax:memmap='device'", self.fault(self.put_flavor(
                disk=32, **{'fakedax:memmap': 'guest'})))

    def test_no_space_for_the_image(self):
        self.start_compute()
        self.useFixture(fixtures.MockPatch(
            'nova_fakedax.layout._take_blocks', side_effect=OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC))))
        started = self.useFixture(fixtures.MockPatchObject(
            libvirt.Connection, 'defineXML')).mock
        # Another host may have space, so Nova's message is about all hosts.
        self.assertIn('Exceeded maximum number of retries',
                      self.fault(self.put_flavor()))
        self.assertRegex(
            self.stdlog.logger.output,
            r'Cannot allocate 1092616192 bytes for \S+/disk: No space left')
        started.assert_not_called()

    def test_a_root_disk_that_is_a_volume(self):
        self.start_compute()
        server = self._build_server(
            image_uuid='', networks='none',
            flavor_id=self.put_flavor('root,ephemeral', ephemeral=1))
        del server['imageRef']
        server['block_device_mapping_v2'] = [{
            'source_type': 'image', 'destination_type': 'volume',
            'boot_index': 0, 'uuid': self.image, 'volume_size': 1}]
        server = self.api.post_server({'server': server})
        server = self._wait_for_state_change(server, 'ERROR')
        self.assertIn(
            "fakedax:disks names the root disk, but the server boots from a "
            "volume; allowed: an image, or a flavor with "
            "fakedax:volumes='boot' as well", server['fault']['message'])
        self.assert_nothing_left(server)


class RefusedBySchedulerTest(BuildFaultTestCase):
    """Without the filter placement finds no host, and nobody says why."""

    scenarios = [('with filter', {'FILTER_ENABLED': True})]

    def test_encrypted_disks(self):
        self.start_compute()
        self.assertIn(
            "hw:ephemeral_encryption='true' is incompatible with "
            "fakedax:disks: an encrypted image cannot be mapped into a guest",
            self.fault(self.put_flavor(**{
                'hw:ephemeral_encryption': 'true'})))
        image = self.put_image('encrypts', fakedax_guest='true',
                               hw_ephemeral_encryption='true')
        self.assertIn(
            "the image's property hw_ephemeral_encryption='True' is "
            "incompatible with fakedax:disks",
            self.fault(self.put_flavor(), image_uuid=image))

    def test_a_trait_that_every_host_for_it_has(self):
        self.start_compute()
        self.assertIn(
            "trait:CUSTOM_FAKEDAX='forbidden' is incompatible with "
            "fakedax:disks: only a host with this trait can run it",
            self.fault(self.put_flavor(**{
                'trait:CUSTOM_FAKEDAX': 'forbidden'})))


class UnknownValueTest(BuildFaultTestCase):

    scenarios = testscenarios.multiply_scenarios(
        EITHER_WAY, [(value, {'value': value}) for value in (
            'root,root', 'swap')])

    def test_the_fault_says_what_is_allowed(self):
        self.start_compute()
        self.assertIn(
            f"'{self.value}' is not a value of fakedax:disks; allowed: "
            f"'root', 'ephemeral', 'root,ephemeral'", self.fault(
                self.put_unchecked_flavor(**{'fakedax:disks': self.value})))


class MissingEphemeralDiskTest(BuildFaultTestCase):

    scenarios = testscenarios.multiply_scenarios(
        EITHER_WAY, [(named, {'named': named}) for named in (
            'ephemeral', 'root,ephemeral')])

    def test_the_fault_says_that_the_flavor_has_none(self):
        self.start_compute()
        self.assertIn(
            "fakedax:disks names the ephemeral disk, but the flavor's "
            "ephemeral disk is 0 GiB; allowed: 1 GiB or more",
            self.fault(self.put_flavor(self.named)))
