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

"""Makes Nova's fake libvirt keep what it drops."""

import re
import typing as ty

import fixtures
from lxml import etree
from nova.tests.fixtures import libvirt

_VIRTIO_PMEM = "./devices/memory[@model='virtio-pmem']"


class FakeLibvirtFixture(fixtures.Fixture):
    """Keeps the elements of a domain that make disks on fake DAX.

    nova.tests.fixtures.libvirt.Domain makes its XML from what it has parsed,
    without virtio-pmem, serial numbers and slices of disks and the emulator.

    :param emulator: path of the QEMU binary that libvirt chooses
    """

    def __init__(self, emulator: str) -> None:
        super().__init__()
        self._emulator = emulator

    def _setUp(self) -> None:
        attach_device = libvirt.Domain.attachDevice
        detach_device = libvirt.Domain.detachDevice
        parse_definition = libvirt.Domain._parse_definition
        xml_desc = libvirt.Domain.XMLDesc
        get_domain_capabilities = libvirt.Connection.getDomainCapabilities

        def parse_and_keep(domain: ty.Any, xml: str) -> ty.Any:
            definition = parse_definition(domain, xml)
            kept = etree.fromstring(xml)
            _check(kept)
            definition['kept'] = kept
            return definition

        def xml_desc_with_kept(domain: ty.Any, flags: int) -> str:
            made = etree.fromstring(xml_desc(domain, flags))
            _restore(made, domain._def['kept'])
            return etree.tostring(made, encoding='unicode')

        def attach_or_keep(domain: ty.Any, xml: str) -> ty.Any:
            if not xml.startswith('<memory'):
                return attach_device(domain, xml)
            domain._def['kept'].find('./devices').append(
                etree.fromstring(xml))
            _check(domain._def['kept'])
            return True

        def detach_or_forget(domain: ty.Any, xml: str) -> ty.Any:
            if not xml.startswith('<memory'):
                return detach_device(domain, xml)
            if domain._state == libvirt.VIR_DOMAIN_RUNNING:
                _fail('this virtio based memory device cannot be unplugged')
            devices = domain._def['kept'].find('./devices')
            alias = etree.fromstring(xml).find('./alias').get('name')
            devices.remove(devices.find(f"./memory/alias[@name='{alias}']/.."))
            return True

        def capabilities_with_emulator(
            connection: ty.Any, *args: ty.Any,
        ) -> str:
            return re.sub(
                '<path>.*?</path>', f'<path>{self._emulator}</path>',
                get_domain_capabilities(connection, *args), count=1)

        for target, name, replacement in (
            (libvirt.Domain, 'attachDevice', attach_or_keep),
            (libvirt.Domain, 'detachDevice', detach_or_forget),
            (libvirt.Domain, '_parse_definition', parse_and_keep),
            (libvirt.Domain, 'XMLDesc', xml_desc_with_kept),
            (libvirt.Connection, 'getDomainCapabilities',
             capabilities_with_emulator),
        ):
            self.useFixture(fixtures.MockPatchObject(
                target, name, replacement))


def _check(domain: ty.Any) -> None:
    """Refuse what libvirt refuses.

    virDomainDefPostParseMemory(), virDomainMemoryDefValidate() and
    qemuValidateDomainDeviceDefDiskFrontend() of libvirt 11.3.
    """
    pmems = domain.findall(_VIRTIO_PMEM)
    problem = None
    if pmems and not int(domain.find('./maxMemory').get('slots')):
        problem = 'both maximum memory size and memory slot count'
    if pmems and domain.find('./cpu/numa/cell') is None:
        problem = 'At least one numa node has to be configured'
    for disk in domain.findall("./devices/disk[@device='disk']/readonly/.."):
        bus = disk.find('./target').get('bus')
        if bus in ('ide', 'sata'):
            problem = f'readonly {bus} disks are not supported'
    if problem:
        _fail(problem)


def _fail(problem: str) -> ty.NoReturn:
    raise libvirt.make_libvirtError(
        libvirt.libvirtError, problem,
        error_code=libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        error_domain=libvirt.VIR_FROM_QEMU)


def _restore(made: ty.Any, kept: ty.Any) -> None:
    devices = made.find('./devices')
    for number, pmem in enumerate(kept.findall(_VIRTIO_PMEM)):
        pmem = etree.fromstring(etree.tostring(pmem))
        if pmem.find('./address') is None:
            # libvirt gives each device a slot.
            etree.SubElement(
                pmem, 'address', type='pci', domain='0x0000', bus='0x07',
                slot=f'0x{number + 1:02x}', function='0x0')
        devices.append(pmem)
    for name in ('maxMemory', 'cpu'):
        element = kept.find(f'./{name}')
        if element is not None and made.find(f'./{name}') is None:
            made.append(etree.fromstring(etree.tostring(element)))
    emulator = kept.find('./devices/emulator')
    if emulator is not None:
        devices.find('./emulator').text = emulator.text
    for disk in kept.findall('./devices/disk'):
        target = disk.find('./target').get('dev')
        twin = devices.find(f"./disk/target[@dev='{target}']/..")
        for name in ('serial', 'readonly'):
            element = disk.find(f'./{name}')
            if twin is not None and element is not None:
                twin.append(etree.fromstring(etree.tostring(element)))
        slices = disk.find('./source/slices')
        if twin is not None and slices is not None:
            twin.find('./source').append(
                etree.fromstring(etree.tostring(slices)))
