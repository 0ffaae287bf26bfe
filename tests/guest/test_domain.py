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

"""A guest on libvirt's own virtio-pmem element, with its agent over libvirt.

The libvirt driver runs inside the test (``qemu:///embed``) and keeps all its
files in the test's directory.
"""

import os
import pathlib
import shutil
import tempfile
import threading

import libvirt
from oslotest import base

from lab import guest
from lab.machine import agent
from lab import wait

SIZE_MIB = 512

DOMAIN = """
<domain type='qemu'>
  <name>fakedax-guest-test</name>
  <maxMemory unit='MiB'>2048</maxMemory>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu><numa><cell id='0' cpus='0' memory='256' unit='MiB'/></numa></cpu>
  <devices>
    <memory model='virtio-pmem' access='shared'>
      <source><path>{disk}</path></source>
      <target><size unit='MiB'>{size}</size></target>
    </memory>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
      <readonly/>
      <serial>fakedax-boot</serial>
      <boot order='1'/>
    </disk>
    <serial type='file'><source path='{console}'/></serial>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
  </devices>
</domain>
"""

#: Runs QEMU as the user that runs the test, unconfined.
QEMU_CONF = """
user = "+{uid}"
group = "+{gid}"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""


def _run_events(stop: threading.Event) -> None:
    while not stop.is_set():
        libvirt.virEventRunDefaultImpl()


class DomainTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='domain-test-'))
        self.addCleanup(shutil.rmtree, self.directory)
        self.image = self.directory / 'disk'
        guest.build().copy_disk(self.image)
        os.truncate(self.image, SIZE_MIB << 20)
        (self.directory / 'etc').mkdir()
        (self.directory / 'etc/qemu.conf').write_text(
            QEMU_CONF.format(uid=os.getuid(), gid=os.getgid()))
        self._start_events()
        connection = libvirt.open(f'qemu:///embed?root={self.directory}')
        self.addCleanup(connection.close)
        self.domain = connection.defineXML(DOMAIN.format(
            disk=self.image, size=SIZE_MIB, memory=256 + SIZE_MIB,
            console=self.directory / 'console'))
        self.addCleanup(self.domain.undefine)

    def _start_events(self) -> None:
        libvirt.virEventRegisterDefaultImpl()
        stop = threading.Event()
        # The loop looks at "stop" whenever something wakes it.
        timer = libvirt.virEventAddTimeout(100, lambda *_: None, None)
        thread = threading.Thread(target=_run_events, args=[stop])
        thread.start()
        self.addCleanup(libvirt.virEventRemoveTimeout, timer)
        self.addCleanup(thread.join)
        self.addCleanup(stop.set)

    def _destroy(self) -> None:
        if self.domain.isActive():
            self.domain.destroy()

    def _console(self) -> str:
        return (self.directory / 'console').read_text(errors='replace')

    def test_agent_over_libvirt(self) -> None:
        self.domain.create()
        self.addCleanup(self._destroy)
        guest_agent = agent.Agent(
            agent.DomainTransport(self.domain), self._console)

        self.assertRaisesRegex(
            agent.AgentTimeoutError,
            r'waited 0\.1 s for the guest agent.*not connected',
            guest_agent.wait_ready, 0.1)
        guest_agent.wait_ready()
        self.assertRegex(self._console(),
                         '(?m)^GUEST root-device=/dev/pmem0p2\r?$')

        result = guest_agent.run('cat; echo oops >&2; exit 3', input='in')
        self.assertEqual(agent.Result(3, 'in', 'oops\n'), result)
        self.assertRegex(guest_agent.read_file('/proc/mounts').decode(),
                         '(?m)^/dev/pmem0p2 / ext4 .*dax=always')
        self.assertRaisesRegex(agent.AgentError, 'nonesuch',
                               guest_agent.run, ['nonesuch'])

        self.domain.shutdown()
        wait.until('the guest to end', lambda: not self.domain.isActive(), 10)
        self.assertIn('GUEST-STOPPING', self._console())
        self.assertRaisesRegex(
            agent.AgentError, 'not running', guest_agent.run, 'true')
