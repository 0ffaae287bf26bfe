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

"""The install guide, followed on a cloud that was made without the project.

Commands and options are read from the pages. Only what they leave to the
reader is here.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile

import fixtures
from oslotest import base as oslotest_base
import testtools
from testtools import content

from lab import guest
from lab import paths
from lab import wait
from tests.package import base
from tests.package import cloud
from tests.package import container
from tests.package import page

INSTALL = paths.ROOT / 'doc/source/admin/install.rst'
USER = paths.ROOT / 'doc/source/user/index.rst'

#: Sections of the install guide that are for other clouds, hosts with an
#: AppArmor, or packages of test_qemu.
ELSEWHERE = {'A wheel', 'QEMU', 'AppArmor'}

#: Nova's default, for the dots of the page.
FILTERS = ('ComputeCapabilitiesFilter', 'ImagePropertiesFilter',
           'ServerGroupAntiAffinityFilter', 'ServerGroupAffinityFilter')

SECONDS = 300

#: capabilities(7): 2.
DAC_READ_SEARCH = 1 << 2


@testtools.skipUnless(
    'FAKEDAX_PACKAGE_CLOUD' in os.environ,
    'takes too long for CI; set FAKEDAX_PACKAGE_CLOUD in the environment to '
    'run it')
class InstallGuideTest(oslotest_base.BaseTestCase):

    def setUp(self) -> None:
        # It has the time that a cloud takes to be made, too.
        self.useFixture(fixtures.EnvironmentVariable(
            'OS_TEST_TIMEOUT', str(SECONDS * 12)))
        super().setUp()
        if os.geteuid():
            self.skipTest('only root can start a container')
        try:
            layers = cloud.make_cloud()
        except base.NotThere as exc:
            self.skipTest(str(exc))
        # Not in /tmp, which may be in memory.
        directory = pathlib.Path(tempfile.mkdtemp(dir=base.ROOTS))
        self.addCleanup(shutil.rmtree, directory)
        self.shared = directory / 'shared'
        self.shared.mkdir()
        (directory / 'state').mkdir()
        self.there = container.Container(
            layers, directory / 'state', {self.shared: '/mnt'})
        self.addCleanup(self.there.stop)
        self.addOnException(self.add_logs)
        self.there.start()
        # Who follows the guide says yes.
        self.there.write('/etc/apt/apt.conf.d/yes',
                         'APT::Get::Assume-Yes "true";\n')
        cloud.until_ready(self.there)
        shutil.copy(guest.build().disk, self.shared / 'guest.raw')
        self.blocks = page.blocks(INSTALL)
        self.used: set[page.Block] = set()

    def add_logs(self, _exc_info: object) -> None:
        for name in ('nova/nova-compute', 'nova/nova-api',
                     'nova/nova-scheduler', 'nova/nova-conductor'):
            text = self.there.run(
                f'tail -n 60 /var/log/{name}.log', check=False)
            self.addDetail(name, content.text_content(text))

    def block(self, section: str, language: str, index: int = 0) -> page.Block:
        """A block of a section of the install guide."""
        block = [each for each in self.blocks if each.section == section
                 and each.language == language][index]
        self.used.add(block)
        return block

    def follow(self, block: page.Block, **placeholders: str) -> str:
        """Run the commands of a block; return what they print."""
        return ''.join(self.type(command, **placeholders)
                       for _, command in block.commands())

    def type(self, command: str, **placeholders: str) -> str:
        """Run a command of a page there; return what it prints."""
        for name, value in placeholders.items():
            self.assertIn(name, command)
            command = command.replace(name, value)
        # Users and operators have a client that knows the cloud.
        return self.there.run(f'cd /mnt; {command}',
                              environment=cloud.CREDENTIALS)

    def boot(self, name: str, flavor: str) -> dict[str, str]:
        """Create a server; return what its guest says."""
        cloud.openstack(
            self.there, '--os-compute-api-version 2.37 server create --wait'
            f' --nic none --image my-image --flavor {flavor} {name}')
        self.assertEqual('ACTIVE', cloud.openstack(
            self.there, f'server show -f value -c status {name}').strip())

        def console() -> str:
            return cloud.openstack(
                self.there, f'console log show {name}', check=False)

        def said() -> dict[str, str]:
            text = console()
            if 'GUEST-READY' not in text:
                return {}
            return dict(line.split()[1].split('=', 1)
                        for line in text.splitlines()
                        if line.startswith('GUEST '))

        return wait.until('the guest to boot', said, SECONDS, interval=2,
                          state=console)

    def boot_ordinary(self, name: str) -> None:
        """A server of a flavor that asks for nothing of the project."""
        seen = self.boot(name, 'ordinary')
        self.assertIn('/dev/vda', seen['root-device'])
        self.delete(name)

    def delete(self, name: str) -> None:
        cloud.openstack(self.there, f'server delete --wait {name}')

    def restart(self) -> None:
        self.follow(self.block('Restart and check', 'console', 1))
        cloud.until_ready(self.there)

    def files(self) -> set[str]:
        """The files there, but for what any installation and any use leave."""
        return set(self.there.run(r'''
            find /etc /usr /opt /srv /boot /var/lib/nova -xdev \
                \( -name __pycache__ -o -path "/var/lib/nova/[.i]*" \) \
                -prune -o -print''').splitlines())

    def test_guide(self) -> None:
        self.prepare()
        before = self.files()
        self.install()
        self.configure()
        self.check()
        self.use()
        self.remove()
        left = self.files() - before
        self.assertEqual(set(), left)

        # A command that no test follows may be wrong.
        self.assertEqual(
            set(), {block for block in self.blocks
                    if block.section not in ELSEWHERE} - self.used)

    def prepare(self) -> None:
        """What the cloud has, without the project."""
        self.type('''
            openstack flavor create --ram 512 --disk 1 --vcpus 1 ordinary
            openstack image create --disk-format raw --container-format bare \
                --file guest.raw my-image''')
        self.boot_ordinary('before')

    def install(self) -> None:
        block = self.block('Debian', 'console')
        (_, build), (_, install) = block.commands()
        # In a clone, and copied to the host.
        subprocess.run(build.replace('--output .', f'--output {self.shared}'),
                       shell=True, cwd=paths.ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        self.type(install)

    def configure(self) -> None:
        cloud.set_options(self.there, '/etc/nova/nova-compute.conf',
                          self.block('nova-compute', 'ini').text)
        self.scheduler = self.there.read('/etc/nova/nova.conf')
        cloud.set_options(
            self.there, '/etc/nova/nova.conf',
            self.block('nova-scheduler', 'ini').text.replace(
                '...', ','.join(FILTERS)))

    def check(self) -> None:
        said = self.follow(self.block('Restart and check', 'console', 0))
        self.assertEqual(4, said.count('Result: Success'), said)
        self.restart()
        said = self.follow(self.block('Restart and check', 'console', 2))
        self.assertRegex(said, r'run servers with disks on fake DAX +\| yes')
        # By Debian's QEMU.
        self.assertRegex(said, r'suspend them, and migrate them live +\| no')

        user = self.there.run(
            'ps -o user= -p $(systemctl show --property=MainPID --value'
            ' nova-compute)')
        self.assertEqual('nova', user.strip())

    def use(self) -> None:
        """What the pages for users say."""
        for block in page.blocks(USER):
            self.follow(block)
        self.follow(self.block('Flavors, images, quotas', 'console'))
        namespaces = self.type('openstack image metadef namespace list')
        self.assertIn('OS::Compute::FakeDAX ', namespaces)
        self.assertIn('OS::Compute::FakeDAXImage ', namespaces)

        seen = self.boot('dax', 'dax.small')
        self.assertIn('/dev/pmem0', seen['root-device'])
        self.assertIn('dax', seen['root-options'])
        self.assertEqual('yes', seen['root-file-dax'])
        domain = self.type('openstack server show -f value -c id dax').strip()
        self.assertIn("model='virtio-pmem'",
                      self.there.run(f'virsh dumpxml {domain}'))
        self.boot_ordinary('next-to-it')
        self.stop(domain)

    def stop(self, domain: str) -> None:
        """Stop a server whose image only QEMU's user may read."""
        self.there.run(f'chmod 600 /var/lib/nova/instances/{domain}/disk')
        self.type('openstack server stop dax')
        wait.until(
            'the server to stop',
            lambda: self.type('openstack server show -f value -c status dax'
                              ).strip() == 'SHUTOFF', SECONDS, interval=2)
        # Brackets, so that the shell that runs this is not found.
        helper = self.there.run("pgrep -f 'privsep-helper.*nova[_]fakedax'")
        status = self.there.run(f'cat /proc/{int(helper)}/status')
        for name in ('CapEff', 'CapPrm'):
            self.assertIn(f'{name}:\t{DAC_READ_SEARCH:016x}', status)

    def remove(self) -> None:
        self.delete('dax')
        self.follow(self.block('Removing', 'console', 0), FLAVOR='dax.small')
        cloud.set_options(self.there, '/etc/nova/nova-compute.conf',
                          self.block('Removing', 'ini').text)
        # Takes the filter from the two options.
        self.there.write('/etc/nova/nova.conf', self.scheduler)
        self.restart()
        self.follow(self.block('Removing', 'console', 1))
        self.restart()
        self.boot_ordinary('after')
