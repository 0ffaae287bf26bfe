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

"""libvirt's own element for the device, without Nova."""

import json
import mmap
import os
import subprocess

import libvirt
import libvirt_qemu

from lab.deploy import host
from lab.deploy import lifecycle
from lab import guest
from lab.machine import agent
from lab.machine import emulators
from tests.cloud import base

SIZE_MIB = 512
NAME = 'fakedax-native'

_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <maxMemory slots='1' unit='MiB'>1280</maxMemory>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{built.kernel}</kernel>
    <initrd>{built.initrd}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu><numa><cell id='0' cpus='0' memory='256' unit='MiB'/></numa></cpu>
  <devices>
    <emulator>{emulator}</emulator>
    <memory model='virtio-pmem' access='shared'>
      <source><path>{directory}/image</path></source>
      <target><size unit='MiB'>{size}</size></target>
      <alias name='ua-pmem'/>
    </memory>
    <serial type='file'><source path='{directory}/console'/></serial>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
  </devices>
</domain>
"""


class NativeElementTest(base.CloudTestCase):
    """A domain on the lab's shared storage, run by either libvirt."""

    alone = True

    def setUp(self) -> None:
        super().setUp()
        self.directory = host.INSTANCES / NAME
        seen = host.HOSTS[0].path(self.directory)
        self.addCleanup(host.HOSTS[0].run, ['rm', '-rf', self.directory])
        seen.mkdir()
        subprocess.run(['cp', self.built.disk, seen / 'image'], check=True)
        with (seen / 'image').open('r+b') as file:
            os.posix_fallocate(file.fileno(), 0, SIZE_MIB << 20)
        for node in host.HOSTS:
            self.addCleanup(self.remove, node)
        with host.HOSTS[0].libvirt() as connection:
            domain = connection.defineXML(_DOMAIN.format(
                name=NAME, built=self.built, directory=self.directory,
                command_line=guest.COMMAND_LINE, size=SIZE_MIB,
                emulator=emulators.project()))
            domain.create()
        self.boot_id = self.run_in_guest(
            host.HOSTS[0], 'cat /proc/sys/kernel/random/boot_id')

    def remove(self, node: host.Host) -> None:
        with node.libvirt() as connection:
            try:
                domain = connection.lookupByName(NAME)
            except libvirt.libvirtError:
                return
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)

    def run_in_guest(self, node: host.Host, command: str) -> str:
        with node.libvirt() as connection:
            guest_agent = agent.Agent(agent.DomainTransport(
                connection.lookupByName(NAME)))
            guest_agent.wait_ready()
            return guest_agent.run(command, check=True).stdout

    def pmem(self, node: host.Host, name: str) -> int:
        query = {'execute': 'qom-get', 'arguments': {
            'path': '/machine/peripheral/ua-pmem', 'property': name}}
        with node.libvirt() as connection:
            return json.loads(libvirt_qemu.qemuMonitorCommand(
                connection.lookupByName(NAME), json.dumps(query),
                0))['return']

    def migrate(self, source: host.Host, destination: host.Host) -> None:
        with source.libvirt() as connection:
            connection.lookupByName(NAME).migrateToURI3(
                destination.uri,
                {libvirt.VIR_MIGRATE_PARAM_URI:
                 f'tcp://{destination.address}'},
                libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
                | libvirt.VIR_MIGRATE_PERSIST_DEST
                | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE)

    def assert_flushes(self, node: host.Host) -> None:
        """Assert that the guest is the same and its fsync reaches QEMU."""
        before = self.pmem(node, 'requests')
        self.assertEqual(self.boot_id, self.run_in_guest(
            node, 'probe fsync /root/f 5 >/dev/null &&'
                  ' cat /proc/sys/kernel/random/boot_id'))
        self.assertGreaterEqual(self.pmem(node, 'requests'), before + 5)
        self.assertEqual(0, self.pmem(node, 'last-error'))

    def test_fsync_works_after_all_that_libvirt_does(self) -> None:
        here, there = host.HOSTS
        self.assert_flushes(here)
        self.run_in_guest(here, 'probe write /root/data 8 1 && sync')

        lifecycle.restart([f'libvirtd{here.number}'])
        self.assert_flushes(here)

        self.migrate(here, there)
        self.assert_flushes(there)
        self.run_in_guest(there, 'probe verify /root/data 8 1 &&'
                                 ' probe write /root/data 8 2 && sync')
        self.migrate(there, here)
        self.assert_flushes(here)
        self.run_in_guest(here, 'probe verify /root/data 8 2')
        self.assertGreater(self.pmem(here, 'cache-dropped'), 0)

        with here.libvirt() as connection:
            connection.lookupByName(NAME).managedSave()
            connection.lookupByName(NAME).create()
        self.assert_flushes(here)
        self.run_in_guest(here, 'probe verify /root/data 8 2')

    @base.on_demand
    def test_destination_that_cannot_drop_its_cache_is_refused(self) -> None:
        """libvirt reports why, and the guest runs on at the source."""
        here, there = host.HOSTS
        with (there.path(self.directory / 'image').open('rb') as file,
              mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped):
            # A page that is mapped and was read cannot be dropped.
            mapped.read(1)
            error = self.assertRaises(
                libvirt.libvirtError, self.migrate, here, there)
        self.assertIn("remain in this host's page cache", str(error))
        self.assert_flushes(here)
        with there.libvirt() as connection:
            self.assertNotIn(NAME, [each.name() for each in
                                    connection.listAllDomains()])
        self.migrate(here, there)
        self.assert_flushes(there)
