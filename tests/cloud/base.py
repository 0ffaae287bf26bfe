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

"""What the cloud tests share: flavors, images and servers of the lab."""

from collections.abc import Mapping
import fcntl
import logging
import os
import time
from typing import Any, TextIO

import openstack
from oslotest import base
import testtools

from lab.deploy import clients
from lab.deploy import host
from lab.deploy import lifecycle
from lab.deploy import servers
from lab import guest
from lab import paths
from lab import wait

#: Tests that CI leaves out for their time. Most end as another one does; for
#: auto-converge there is no other.
on_demand = testtools.skipUnless(
    'FAKEDAX_LONG' in os.environ,
    'takes too long for CI; set FAKEDAX_LONG in the environment to run it')

ROOT = {'fakedax:disks': 'root', 'trait:CUSTOM_FAKEDAX': 'required'}

_TASKS_END_SECONDS = 120

#: Values by section and option, as lab.deploy.host.Host.configure takes them.
Options = Mapping[str, Mapping[str, str]]


def configure(options: Options, *nodes: host.Host) -> None:
    """Override options of nova-computes, and restart them."""
    for node in nodes:
        node.configure(options)
    lifecycle.restart([f'nova-compute{node.number}' for node in nodes])


class CloudTestCase(base.BaseTestCase):
    """A test against the lab's cloud, which must be up (lab/cloud up).

    Two run at a time, unless one of them needs the cloud alone.
    """

    #: Whether it changes hosts or services, or needs both cores.
    alone = False

    def setUp(self) -> None:
        super().setUp()
        self._share_the_cloud()
        # They log every request and its answer, which hides failures.
        for name in ('keystoneauth', 'urllib3', 'openstack'):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.cloud = clients.connect()
        self.built = guest.build()

    def _share_the_cloud(self) -> None:
        """Wait until this test may run, and keep the cloud until its end."""
        cloud, turn = (self._locked_file(name) for name in ('cloud', 'turn'))
        # First come, first served: a test that waits for others to end keeps
        # new ones from starting.
        with turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(cloud, fcntl.LOCK_EX if self.alone else fcntl.LOCK_SH)

    def _locked_file(self, name: str) -> TextIO:
        file = (paths.STATE / f'test-{name}.lock').open('a')
        self.addCleanup(file.close)
        return file

    def configure(self, options: Options, *nodes: host.Host) -> None:
        """Override options of nova-computes for this test, by default of all.

        They are restarted now, and again after the test.
        """
        assert self.alone, f'{self.id()} is not alone in the cloud'
        nodes = nodes or host.HOSTS
        self.addCleanup(configure, {}, *nodes)
        configure(options, *nodes)

    def image(self, kernel: bool = False, **properties: str) -> Any:
        name = '-'.join(['fakedax-test', *(['kernel-boot'] if kernel else []),
                         *(f'{key}={value}'
                           for key, value in sorted(properties.items()))])
        # Two tests that find no such image would both make it.
        with self._locked_file('image') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return servers.image(
                self.cloud, name, self.built, kernel=kernel, **properties)

    def flavor(self, extra_specs: dict[str, str] | None = None,
               **sizes: int) -> Any:
        """Make a flavor that only this test uses."""
        name = self.id().rpartition('.')[2]
        made = servers.flavor(
            self.cloud, f'{name}-{time.monotonic_ns()}',
            extra_specs=ROOT if extra_specs is None else extra_specs, **sizes)
        self.addCleanup(self.cloud.compute.delete_flavor, made)
        return made

    def create(self, flavor: Any, image: Any, status: str = 'ACTIVE',
               **arguments: Any) -> servers.Server:
        """Create a server, deleted after the test, and wait for a status.

        :param image: None if it boots from a volume
        """
        arguments.setdefault('networks', 'none')
        if image:
            arguments['image_id'] = image.id
        made = self.cloud.compute.create_server(
            name=self.id().rpartition('.')[2], flavor_id=flavor.id,
            **arguments)
        self.addCleanup(self.delete, made.id)
        self.wait(made.id, status)
        return servers.Server(self.cloud, made.id)

    def delete(self, server_id: str) -> None:
        self.cloud.compute.delete_server(server_id, ignore_missing=True)
        try:
            self.cloud.compute.wait_for_delete(
                self.cloud.compute.get_server(server_id), interval=0.5)
        except openstack.exceptions.NotFoundException:
            pass

    def wait(self, server_id: str, status: str) -> Any:
        """Wait until a server's tasks have ended, and expect a status."""
        show = servers.Server(self.cloud, server_id).show

        def idle() -> Any:
            server = show()
            busy = server.task_state is not None or server.status == 'BUILD'
            return None if busy else server

        server = wait.until(
            f'the task of server {server_id} to end', idle,
            _TASKS_END_SECONDS, interval=0.3,
            state=lambda: show().task_state)
        self.assertEqual(status, server.status, server.fault)
        return server

    def fault(self, server: servers.Server) -> str:
        """Why the server is in ERROR."""
        # Nova saves the state first, and then the fault
        # (nova.scheduler.utils.set_vm_state_and_notify).
        fault: dict[str, str] = wait.until(
            f'the fault of server {server.id}', lambda: server.show().fault,
            _TASKS_END_SECONDS)
        return fault['message']

    def act(self, server: servers.Server, status: str, action: str,
            *arguments: Any) -> Any:
        """Start an action on the server, and wait until it has ended."""
        getattr(self.cloud.compute, action)(server.id, *arguments)
        return self.wait(server.id, status)

    def finish_resize(self, server: servers.Server, action: str,
                      status: str = 'ACTIVE') -> servers.Server:
        """Confirm or revert a resize; return the server as it is then.

        :param status: what it was before the resize
        """
        getattr(self.cloud.compute, action)(server.id)
        # Nova answers before the compute has begun, and the server may have no
        # task while its resize still goes on.
        wait.until(
            f'{action} of server {server.id} to end',
            lambda: server.show().status not in (
                'VERIFY_RESIZE', 'REVERT_RESIZE'),
            _TASKS_END_SECONDS, interval=0.3)
        self.wait(server.id, status)
        return servers.Server(self.cloud, server.id)

    def begin_snapshot(self, server: servers.Server) -> Any:
        """Start a snapshot; return its image, deleted after the test."""
        image = self.cloud.compute.create_server_image(
            server.id, f'{self.id().rpartition(".")[2]}-{time.time_ns()}')
        self.addCleanup(self.cloud.image.delete_image, image.id)
        return image

    def snapshot(self, server: servers.Server,
                 disk_format: str = 'raw') -> Any:
        """Take a snapshot, wait until it is done, and return its image."""
        status = server.show().status
        image = self.begin_snapshot(server)
        self.wait(server.id, status)
        event = self.event(server, 'createImage')
        self.assertEqual('Success', event['result'], event)
        image = self.cloud.image.get_image(image.id)
        self.assertEqual(('active', disk_format),
                         (image.status, image.disk_format))
        return image

    def mounts(self, server: servers.Server) -> dict[str, tuple[str, str]]:
        """The guest's mounts: device and options by mount point."""
        with server.agent() as agent:
            text = agent.run('cat /proc/mounts', check=True).stdout
        return {place: (device, options)
                for device, place, _kind, options, *_rest in
                (line.split() for line in text.splitlines())}

    def assert_root_is_pmem(self, server: servers.Server) -> None:
        device, options = self.mounts(server)['/']
        self.assertTrue(device.startswith('/dev/pmem0'), device)
        self.assertIn('dax=always', options.split(','))

    def assert_nothing_left(self, server_id: str) -> None:
        """Assert that no domain, file or allocation of it is on any host."""
        for node in host.HOSTS:
            with node.libvirt() as libvirt:
                self.assertNotIn(
                    server_id,
                    [domain.UUIDString() for domain in
                     libvirt.listAllDomains()])
            self.assertFalse(
                node.path(host.INSTANCES / server_id).exists(), node.name)

        def allocations() -> Any:
            return self.cloud.placement.get(
                f'/allocations/{server_id}').json()['allocations']

        # ComputeManager._complete_deletion() deletes the server before them.
        wait.until(f'the allocations of server {server_id} to be deleted',
                   lambda: not allocations(), 30, interval=0.5,
                   state=allocations)

    def event(self, server: servers.Server, action: str) -> Any:
        """The last event of an action, as the administrator sees it."""
        return self.events(server, action)[0]

    def events(self, server: servers.Server, action: str) -> list[Any]:
        """The events of an action, the last one first."""
        actions = self.cloud.compute.get(
            f'/servers/{server.id}/os-instance-actions').json()
        request = next(each['request_id']
                       for each in actions['instanceActions']
                       if each['action'] == action)
        shown = self.cloud.compute.get(
            f'/servers/{server.id}/os-instance-actions/{request}').json()
        return shown['instanceAction']['events']
