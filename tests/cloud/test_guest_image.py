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


"""The image of guest-image-elements, as a user of the cloud runs it."""

import base64
from typing import Any

from lab.deploy import servers
from tests.cloud import base
from tests.image import base as image_base

#: A whole distribution boots, by TCG, while the whole cloud runs: only a boot
#: that hangs takes longer.
BOOT_SECONDS = 600

USER_DATA = ('#cloud-config\n'
             'write_files:\n'
             '- {path: /root/from-user-data, content: hello}\n')


@image_base.on_demand
class GuestImageTest(base.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.uploaded = servers.upload(
            self.cloud, 'fakedax-test-guest-image', image_base.build(),
            servers.DISTRIBUTION_PROPERTIES)

    def boot(self, flavor: Any, image: Any = None) -> servers.Server:
        return self.create(
            flavor, image or self.uploaded, config_drive=True,
            user_data=base64.b64encode(USER_DATA.encode()).decode())

    def run_in(self, server: servers.Server, *commands: str) -> list[str]:
        """Run commands that must succeed, and return what they print."""
        with server.agent(BOOT_SECONDS) as agent:
            # "systemctl start" waits for a unit that is starting.
            agent.run('systemctl start fakedax-guest.service',
                      timeout=BOOT_SECONDS)
            return [agent.run(command, check=True, timeout=BOOT_SECONDS
                              ).stdout.strip() for command in commands]

    def assert_cloud_init_finished(self, server: servers.Server) -> None:
        status, written, datasource = self.run_in(
            server, 'cloud-init status --wait', 'cat /root/from-user-data',
            'cat /run/cloud-init/result.json')
        self.assertIn('status: done', status)
        self.assertEqual('hello', written)
        self.assertIn('ConfigDrive', datasource)

    def test_root_and_ephemeral_disk_are_on_dax_on_two_boots(self) -> None:
        server = self.boot(self.flavor(
            base.ROOT | {'fakedax:disks': 'root,ephemeral'}, ram=1024,
            disk=4, ephemeral=1))
        for boot in range(2):
            if boot:
                self.act(server, 'SHUTOFF', 'stop_server')
                self.act(server, 'ACTIVE', 'start_server')
            self.assert_cloud_init_finished(server)
            report, root_mib, label = self.run_in(
                server, 'fakedax-guest',
                'df --block-size=1M --output=size / | tail -n 1',
                'findmnt --noheadings --output LABEL /mnt/ephemeral0')
            self.assertIn('ok: / (/dev/pmem0p3, ext4) uses DAX', report)
            self.assertIn(
                'ok: /mnt/ephemeral0 (/dev/pmem1, ext4) uses DAX', report)
            # Grown to the flavor's 4 GiB.
            self.assertGreater(int(root_mib), 3500)
            self.assertEqual('ephemeral0', label)
            self.assert_root_is_pmem(server)
            self.assertIn(report.splitlines()[0], server.console())

    def test_a_resize_grows_root_and_a_snapshot_makes_a_new_server(
            self) -> None:
        server = self.boot(self.flavor(ram=1024, disk=2))
        self.assert_root_on_dax(server, 2)
        self.act(server, 'VERIFY_RESIZE', 'resize_server',
                 self.flavor(ram=1024, disk=3).id)
        server = self.finish_resize(
            servers.Server(self.cloud, server.id), 'confirm_server_resize')
        self.assert_root_on_dax(server, 3)
        self.run_in(server, 'echo kept > /root/kept && sync /root/kept')
        image = self.snapshot(server)
        self.delete(server.id)

        server = self.boot(self.flavor(ram=1024, disk=4), image)
        self.assert_cloud_init_finished(server)
        self.assert_root_on_dax(server, 4)
        self.assertEqual(['kept'], self.run_in(server, 'cat /root/kept'))

    def assert_root_on_dax(self, server: servers.Server, gib: int) -> None:
        """Assert that it has grown to a disk of a size, too."""
        report, root_mib = self.run_in(
            server, 'fakedax-guest',
            'df --block-size=1M --output=size / | tail -n 1')
        self.assertIn('ok: / (/dev/pmem0p3, ext4) uses DAX', report)
        # The rest is the firmware's partitions and the file system's metadata.
        self.assertGreater(int(root_mib), gib * 1024 - 600)
        self.assertLess(int(root_mib), gib * 1024)
        self.assert_root_is_pmem(server)

    def test_the_same_image_on_an_ordinary_flavor(self) -> None:
        server = self.boot(self.flavor({}, ram=1024, disk=4, ephemeral=1))
        self.assert_cloud_init_finished(server)
        report, root_mib, ephemeral = self.run_in(
            server, 'fakedax-guest',
            'df --block-size=1M --output=size / | tail -n 1',
            'findmnt --noheadings --output SOURCE,LABEL /mnt/ephemeral0')
        self.assertIn('note: root is on /dev/vda3, an ordinary disk', report)
        self.assertGreater(int(root_mib), 3500)
        self.assertEqual(['/dev/vdb', 'ephemeral0'], ephemeral.split())
        self.assertEqual('/dev/vda3', self.mounts(server)['/'][0])
