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

"""A guest that AppArmor confines can use its image, and no other.

libvirt's own helper makes the rules of a domain, AppArmor's own parser reads
them with those of etc/apparmor, and a kernel that enforces them, that of the
test guest, says what a program may do that runs as QEMU does: this machine's
kernel may have no AppArmor.
"""

import pathlib
import re
import shutil
import subprocess

from nova.virt.libvirt import config as vconfig

from lab.guest import debian
from lab.machine import qemu
from lab import paths
from nova_fakedax import domain
from nova_fakedax import layout
from tests.guest import test_guest

HELPER = pathlib.Path('/usr/lib/libvirt/virt-aa-helper')
RULES = pathlib.Path('/etc/apparmor.d')
INSTANCES = '/var/lib/nova/instances'
UUID = '4f3a9b0e-6c1d-4f6e-9d3a-0c2b1e5d7f88'
#: What the rules for all guests let them execute.
EMULATOR = '/usr/bin/qemu-system-x86_64'

DENIED = 'open=13'
ALLOWED = 'open=0 lock=0'
NOT_LOCKED = 'open=0 lock=13'

#: What a thread has read, seen from the directory of the instances.
IO = '../../../../proc/thread-self/io'


class AppArmorTest(test_guest.GuestTestCase):

    def setUp(self) -> None:
        super().setUp()
        if not HELPER.exists():
            self.skipTest(f'this libvirt has no {HELPER}')
        self.instance = self.directory / 'instances' / UUID
        self.instance.mkdir(parents=True)
        source = self.directory / 'source'
        source.write_bytes(b'content')
        layout.make(str(self.instance / 'disk'), str(source), 4 << 20, True)
        package, = debian.find('apparmor')
        self.tools = self.directory / 'apparmor'
        debian.unpack(package, self.tools)

    def xml(self) -> str:
        """The domain, as the driver makes it."""
        guest = vconfig.LibvirtConfigGuest()
        guest.virt_type = 'qemu'
        guest.uuid, guest.name, guest.memory, guest.vcpus = (
            UUID, 'confined', 512 << 10, 1)
        guest.os_type, guest.os_arch = 'hvm', 'x86_64'
        disk = vconfig.LibvirtConfigGuestDisk()
        disk.source_type, disk.driver_format = 'file', 'raw'
        disk.source_path = str(self.instance / 'disk')
        disk.target_dev, disk.target_bus = 'vda', 'virtio'
        guest.add_device(disk)
        domain.convert(
            guest, str(self.instance), lambda path: path.endswith('disk'))
        return guest.to_xml()

    def rules_of_the_domain(self, xml: str) -> str:
        """What libvirt's helper writes for it, with Nova's usual paths."""
        done = subprocess.run(
            [HELPER, '--create', '--dryrun', '--uuid', f'libvirt-{UUID}'],
            input=xml, check=True, capture_output=True, text=True)
        [rules] = re.findall(
            r'\.files\nvirt-aa-helper:\n(.*?)\n\n', done.stdout + done.stderr,
            re.DOTALL)
        return rules.replace(str(self.instance.parent), INSTANCES)

    def policy(self, rules: str, with_projects: bool) -> pathlib.Path:
        """The rules as the kernel takes them."""
        base = self.directory / 'rules'
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(self.tools / 'etc/apparmor.d', base)
        shutil.copytree(RULES / 'abstractions', base / 'abstractions',
                        dirs_exist_ok=True)
        more = base / 'abstractions/libvirt-qemu.d'
        more.mkdir(exist_ok=True)
        (more / 'nova-fakedax').unlink(missing_ok=True)
        if with_projects:
            shutil.copy(paths.ROOT / 'etc/apparmor/nova-fakedax', more)
        template = (RULES / 'libvirt/TEMPLATE.qemu').read_text()
        profile = base / 'profile'
        profile.write_text(re.sub(
            r'\}\s*$', lambda _match: f'{rules}\n}}\n',
            template.replace('LIBVIRT_TEMPLATE', f'libvirt-{UUID}')))
        compiled = self.directory / 'policy'
        subprocess.run(
            [self.tools / 'sbin/apparmor_parser', '--skip-cache',
             '--skip-kernel-load', '--features-file',
             self.tools / 'usr/share/apparmor-features/features',
             '--base', base, '--ofile', compiled, profile],
            check=True, capture_output=True)
        return compiled

    def allowed(self, policy: pathlib.Path,
                *asked: tuple[str, str]) -> list[str]:
        """What the guest's kernel says to a program with this policy."""
        size = policy.stat().st_size
        with policy.open('r+b') as file:
            file.truncate(1 << 20)
        with qemu.Machine(
                *self.direct_kernel(), *qemu.virtio_blk(self.disk()),
                *qemu.virtio_blk(policy, 'policy', boot_index=3)) as machine:
            self.boot(machine)
            machine.agent.wait_ready()

            def run(command: str) -> str:
                return machine.agent.run(command, check=True).stdout.strip()

            run(f"""\
                mount -t securityfs none /sys/kernel/security
                mkdir -p {INSTANCES}/{UUID} {INSTANCES}/other /usr/bin
                cd {INSTANCES} && echo x > {UUID}/disk && echo x > other/disk
                ln {UUID}/disk {UUID}/disk.view
                cp /bin/probe {EMULATOR}
                head -c {size} /dev/vdb > /tmp/policy
                dd if=/tmp/policy of=/sys/kernel/security/apparmor/.replace \
                    bs=1M""")
            return [run(
                f'echo "exec libvirt-{UUID}" > /proc/self/attr/exec &&'
                f' exec {EMULATOR} access {INSTANCES}/{path} {how}')
                for path, how in asked]

    def test_the_image_can_be_written_to_and_locked_and_the_view_read(
        self
    ) -> None:
        policy = self.policy(self.rules_of_the_domain(self.xml()), True)
        self.assertEqual(
            [ALLOWED, ALLOWED, DENIED, DENIED, DENIED, NOT_LOCKED],
            self.allowed(
                policy, (f'{UUID}/disk', 'rw'), (f'{UUID}/disk.view', 'r'),
                (f'{UUID}/disk.view', 'rw'), ('other/disk', 'r'),
                ('other/disk', 'rw'), (IO, 'r')))

    def test_without_our_rules_the_image_cannot_be_locked(self) -> None:
        """Nor does QEMU learn what its threads have read."""
        policy = self.policy(self.rules_of_the_domain(self.xml()), False)
        self.assertEqual([NOT_LOCKED, DENIED], self.allowed(
            policy, (f'{UUID}/disk', 'rw'), (IO, 'r')))

    def test_a_view_of_the_same_name_denies_writes_to_the_image(self) -> None:
        """Why the boot view has a name of its own."""
        same = self.xml().replace('disk.view', 'disk')
        self.assertEqual([DENIED], self.allowed(
            self.policy(self.rules_of_the_domain(same), True),
            (f'{UUID}/disk', 'rw')))
