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


"""Ordinary servers with volumes: Cinder and its two backends work here."""

import testscenarios

from lab.deploy import host
from tests.cloud import volumes

KEEP = '/run/data/keep'


class VolumeTest(testscenarios.WithScenarios, volumes.VolumeTestCase):

    scenarios = volumes.BACKENDS

    def test_data_volume_of_one_server_and_then_of_another(self) -> None:
        volume = self.volume()
        image = self.image(fakedax_guest='')
        first = self.create(self.flavor({}), image)
        self.attach(first, volume)
        self.make_file_system(first, 'vdb', '/run/data')
        self.run_in(first, f'probe write {KEEP} 4 7 && umount /run/data')
        self.detach(first, volume)
        [other] = [node for node in host.HOSTS if node != first.host]
        self.delete(first.id)

        snapshot = self.volume_snapshot(volume)
        # Cinder's NFS driver leaves the file of a larger volume of a snapshot
        # as large as the snapshot.
        gib = 1 if self.backend == 'file' else 2
        copies = [self.volume(gib, snapshot_id=snapshot.id),
                  self.volume(gib, source_volume_id=volume.id)]
        second = self.create(self.flavor({}), image,
                             availability_zone=f'nova:{other.name}')
        for each, disk in zip((volume, *copies), ('vdb', 'vdc', 'vdd'),
                              strict=True):
            self.attach(second, each)
            self.mount(second, disk, '/run/data')
            self.run_in(second, f'probe verify {KEEP} 4 7 && '
                                'umount /run/data')
        sectors = self.run_in(second, 'cat /sys/block/vdc/size')
        self.assertEqual(gib << 30, int(sectors) * 512)

    def test_server_from_a_volume(self) -> None:
        volume = self.boot_volume(fakedax_guest='')
        server = self.boot(self.flavor({}), volume)
        self.assertTrue(self.mounts(server)['/'][0].startswith('/dev/vda'))
        self.run_in(server, 'probe write /root/keep 4 7 && sync')
        source = server.host
        self.assertNotEqual(source.name, self.migrate(server))
        if self.backend == 'block':
            # The other host has a device of its own.
            self.assertFalse(self.on(source, volume).is_symlink())
            self.assertTrue(self.on(server.host, volume).is_block_device())
        self.run_in(server, 'probe verify /root/keep 4 7')
        self.act(server, 'SHUTOFF', 'stop_server')
        self.act(server, 'ACTIVE', 'start_server')
        self.run_in(server, 'probe verify /root/keep 4 7')
        self.delete(server.id)
        self.delete_volume(volume.id)
        for node in host.HOSTS:
            self.assertFalse(self.on(node, volume).exists(), node.name)
