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

"""A server of the lab after a random walk; tests/walk.py has the model."""

from typing import Any

from lab.deploy import host
from lab.deploy import servers
from lab import wait
from tests.cloud import base
from tests.cloud import volumes
from tests import walk

_FILE = '/root/walk'
_BLOCKS = 4
_DATA = '/run/data'
_REBUILD_SECONDS = 120

#: Steps of one call, and the status after them.
_ACTIONS = {
    'stop': ('SHUTOFF', 'stop_server'),
    'start': ('ACTIVE', 'start_server'),
    'soft_reboot': ('ACTIVE', 'reboot_server', 'SOFT'),
    'hard_reboot': ('ACTIVE', 'reboot_server', 'HARD'),
    'pause': ('PAUSED', 'pause_server'),
    'unpause': ('ACTIVE', 'unpause_server'),
    'suspend': ('SUSPENDED', 'suspend_server'),
    'resume': ('ACTIVE', 'resume_server'),
    'rescue': ('RESCUE', 'rescue_server'),
    'unrescue': ('ACTIVE', 'unrescue_server'),
    'shelve': ('SHELVED_OFFLOADED', 'shelve_server'),
    'unshelve': ('ACTIVE', 'unshelve_server'),
    'migrate': ('VERIFY_RESIZE', 'migrate_server'),
}


class WalkTest(base.CloudTestCase):

    def test_walk(self) -> None:
        walk.walk(_Walker(self), *walk.length(8))


class VolumeWalkTest(volumes.VolumeTestCase):

    # One whose snapshots are Cinder's own.
    backend = 'block'

    def test_walk(self) -> None:
        # Nova rescues a server from a volume only with another image.
        walk.walk(_VolumeWalker(self), *walk.length(20), ('rescue',))


class _Walker:
    """A server on its walk, as tests/walk.py wants it."""

    def __init__(self, test: base.CloudTestCase) -> None:
        self._test = test
        self._image = test.image()
        self._before = 'ACTIVE'
        self._create()

    def _create(self) -> None:
        test = self._test
        #: One with the memmap on the device and one without, so that a resize
        #: converts the image.
        self._flavors = [
            test.flavor(base.ROOT | {'fakedax:memmap': memmap}, disk=1)
            for memmap in ('device', 'guest')]
        self._server = test.create(self._flavors[0], self._image)

    @property
    def _status(self) -> str:
        return str(self._server.show().status)

    def do(self, step: str) -> None:
        if step in ('migrate', 'resize'):
            self._before = self._status
        if step in _ACTIONS:
            status, action, *arguments = _ACTIONS[step]
            self._test.act(self._server, status, action, *arguments)
        else:
            getattr(self, f'_{step}')()
        # It may be on another host.
        self._server = servers.Server(self._test.cloud, self._server.id)

    def _rebuild(self, image: Any = None) -> None:
        status = self._status
        self._test.cloud.compute.rebuild_server(
            self._server.id, image=(image or self._image).id)
        # Nova shows a server that was off as ACTIVE, without a task, just
        # before it stops it again (ComputeManager._rebuild_instance).
        wait.until(
            f'the rebuild of server {self._server.id} to end',
            lambda: any(event['event'] == 'compute_rebuild_instance' and
                        event['result'] for event in
                        self._test.events(self._server, 'rebuild')),
            _REBUILD_SECONDS, interval=0.5)
        self._test.wait(self._server.id, status)

    def _refused_rebuild(self) -> None:
        self._rebuild(self._test.image(fakedax_guest=''))
        self._test.assertEqual(
            self._image.id, self._server.show().image.id)

    def _snapshot(self) -> None:
        # A long walk would fill the disk.
        self._test.cloud.image.delete_image(
            self._test.snapshot(self._server))

    def _live_migrate(self) -> None:
        status = self._status
        self._test.assertEqual('completed', self._server.live_migrate())
        self._test.wait(self._server.id, status)

    def _resize(self) -> None:
        # The first is the one that the server has, if it is not reverted.
        self._flavors.reverse()
        self._test.cloud.compute.resize_server(
            self._server.id, self._flavors[0].id)
        self._test.wait(self._server.id, 'VERIFY_RESIZE')

    def _confirm(self) -> None:
        self._finish('confirm_server_resize')

    def _revert(self) -> None:
        self._finish('revert_server_resize')
        names = [flavor.name for flavor in self._flavors]
        if self._server.show().flavor.name != names[0]:
            self._flavors.reverse()

    def _finish(self, action: str) -> None:
        self._server = self._test.finish_resize(
            self._server, action, self._before)

    def store(self, number: int) -> bool:
        if self._status != 'ACTIVE':
            return False
        with self._server.agent() as agent:
            agent.run(f'probe write {_FILE} {_BLOCKS} {number}', check=True)
        return True

    def check(self, model: walk.Model) -> None:
        self._test.assertEqual(model.status, self._status)
        running = {node.name for node in host.HOSTS
                   if node.emulators(self._server.id)}
        if model.status in ('SHUTOFF', 'SUSPENDED', 'SHELVED_OFFLOADED'):
            self._test.assertEqual(set(), running)
        elif model.status != 'VERIFY_RESIZE':
            self._test.assertEqual(
                {self._server.show().compute_host}, running)
        if model.status != 'ACTIVE':
            return
        wanted = (
            f'probe verify {_FILE} {_BLOCKS} {model.content}'
            if model.content else f'test ! -e {_FILE}')
        with self._server.agent() as agent:
            agent.run(wanted, check=True)


class _VolumeWalker(_Walker):
    """A server that boots from a volume, with a data volume.

    The data volume has what was stored last, whatever becomes of the root.
    """

    _test: volumes.VolumeTestCase

    def _create(self) -> None:
        test = self._test
        self._stored = 0
        self._volumes = [test.boot_volume(), test.volume()]
        self._flavors = [
            test.flavor({'fakedax:volumes': 'all',
                         'trait:CUSTOM_FAKEDAX': 'required'}, ram=ram)
            for ram in (320, 352)]
        self._server = test.boot(self._flavors[0], *self._volumes)
        test.make_file_system(self._server, 'pmem1', _DATA)

    def _refused_rebuild(self) -> None:
        self._rebuild(self._test.image(fakedax_guest=''))

    def _snapshot(self) -> None:
        image = self._test.cloud.compute.create_server_image(
            self._server.id, self._test.name())
        for volume in self._volumes:
            for made in self._test.cinder.snapshots(volume_id=volume.id):
                self._test.wait_snapshot(made.id)
                self._test.delete_snapshot(made.id)
        self._test.cloud.image.delete_image(image.id)

    def store(self, number: int) -> bool:
        if not super().store(number):
            return False
        self._mount()
        self._test.run_in(
            self._server,
            f'probe write {_DATA}/walk {_BLOCKS} {number}')
        self._stored = number
        return True

    def check(self, model: walk.Model) -> None:
        super().check(model)
        if model.status == 'ACTIVE' and self._stored:
            self._mount()
            self._test.run_in(
                self._server,
                f'probe verify {_DATA}/walk {_BLOCKS} {self._stored}')

    def _mount(self) -> None:
        """Mount the data volume, unless the guest has not booted since."""
        if _DATA not in self._test.mounts(self._server):
            self._test.mount(self._server, 'pmem1', _DATA)
