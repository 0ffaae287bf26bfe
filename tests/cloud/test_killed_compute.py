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

"""nova-compute is killed in the middle of an operation.

Afterwards the server is whole, or in ERROR with its disks as they were, and an
operator brings it back as the administrator guide says.
"""

import contextlib
import os
import shutil
from typing import Any

import libvirt
import testscenarios
import testtools

from lab.deploy import host
from lab.deploy import servers
from lab import wait
from tests.cloud import test_recovery

load_tests = testscenarios.load_tests_apply_scenarios

KEEP = '/root/keep'

#: Of the operations; CI has time for one.
CHOSEN = os.environ.get('FAKEDAX_KILLS', 'resize').split()

#: By name: the task during which nova-compute is killed, the status that the
#: server must have first (empty: ACTIVE), and the call that begins the task,
#: with its arguments.
OPERATIONS: dict[str, tuple[str, str, str, tuple[Any, ...]]] = {
    'stop': ('powering-off', '', 'stop_server', ()),
    'start': ('powering-on', 'SHUTOFF', 'start_server', ()),
    'reboot': ('rebooting_hard', '', 'reboot_server', ('HARD',)),
    'suspend': ('suspending', '', 'suspend_server', ()),
    'resume': ('resuming', 'SUSPENDED', 'resume_server', ()),
    'rescue': ('rescuing', '', 'rescue_server', ()),
    'unrescue': ('unrescuing', 'RESCUE', 'unrescue_server', ()),
    'snapshot': ('image_', '', 'create_server_image', ('killed',)),
    'shelve': ('shelving', '', 'shelve_server', ()),
    'resize': ('resize_migrating', '', 'resize_server', ()),
    'resize-finish': ('resize_finish', '', 'resize_server', ()),
    'rebuild': ('rebuild', '', 'rebuild_server', ()),
    'delete': ('deleting', '', 'delete_server', ()),
}

#: How a server gets to a state from which the operation begins.
TO_STATE = {'SHUTOFF': 'stop_server', 'SUSPENDED': 'suspend_server',
            'RESCUE': 'rescue_server'}

#: What a user does next with a server in such a state.
NEXT = {'SHUTOFF': 'start_server', 'SUSPENDED': 'resume_server',
        'RESCUE': 'unrescue_server', 'SHELVED': 'unshelve_server',
        'SHELVED_OFFLOADED': 'unshelve_server',
        'VERIFY_RESIZE': 'confirm_server_resize'}

#: How long Nova has to finish or give up what was interrupted.
_SETTLE_SECONDS = 60


class KilledComputeTest(test_recovery.RecoveryTestCase):

    scenarios = [(name, {'operation': name}) for name in OPERATIONS]
    operation = ''

    def setUp(self) -> None:
        super().setUp()
        if self.operation not in CHOSEN and 'all' not in CHOSEN:
            self.skipTest('takes too long for CI; set FAKEDAX_KILLS to its '
                          'name, or to "all", to run it')

    def test_the_server_is_whole_or_can_be_brought_back(self) -> None:
        server = self.create(self.flavor(), self.image())
        self.source = server.host
        with server.agent() as agent:
            agent.run(f'probe write {KEEP} 4 7 && sync', check=True)
        task, before, action, arguments = OPERATIONS[self.operation]
        if before:
            self.act(server, before, TO_STATE[before])
        if action == 'resize_server':
            arguments = (self.flavor(disk=2).id,)
        elif action == 'rebuild_server':
            arguments = (self.image().id,)
        getattr(self.cloud.compute, action)(server.id, *arguments)
        if not self.reaches(server, task):
            self.skipTest(f'the server was never seen {task}: too quick')
        self.kill_service(f'nova-compute{self.where(server).number}')
        self.revive()
        if self.operation == 'delete':
            wait.until('the server to be gone',
                       lambda: not self.exists(server), _SETTLE_SECONDS)
            self.assert_nothing_left(server.id)
            return
        self.bring_back(server)
        if self.operation == 'rebuild':
            # The old root disk may be gone, which the user has asked for.
            with server.agent() as agent:
                agent.run('probe fsync /root/after 3', check=True)
            return
        with servers.Server(self.cloud, server.id).agent() as agent:
            agent.run(f'probe verify {KEEP} 4 7', check=True)
            agent.run('probe fsync /root/after 3', check=True)

    def exists(self, server: servers.Server) -> bool:
        return any(found.id == server.id
                   for found in self.cloud.compute.servers(details=False))

    def reaches(self, server: servers.Server, task: str) -> bool:
        """Wait until it has a task; whether it was ever seen to have it."""
        seen: list[str | None] = []

        def begun() -> bool:
            seen.append(server.show().task_state)
            return (seen[-1] or '').startswith(task) or (
                seen[-1] is None and any(seen))

        wait.until(f'the server to be {task}', begun, _SETTLE_SECONDS,
                   interval=0.02, state=lambda: seen[-5:])
        self.addDetail('tasks', testtools.content.text_content(str(seen)))
        return (seen[-1] or '').startswith(task)

    def where(self, server: servers.Server) -> host.Host:
        """The host that carries the task out."""
        if self.operation != 'resize-finish':
            return self.source
        return next(node for node in host.HOSTS if node != self.source)

    def bring_back(self, server: servers.Server) -> None:
        """Do what a user, and then an operator, would do until it runs."""
        steps = []
        for _step in range(6):
            with contextlib.suppress(wait.WaitError):
                wait.until('the task of the server to end',
                           lambda: not server.show().task_state,
                           _SETTLE_SECONDS)
            shown = server.show()
            if shown.task_state or shown.status in ('ERROR', 'BUILD'):
                steps.append(f'{shown.status}/{shown.task_state}: repair')
                self.repair(server)
            elif shown.status in NEXT:
                steps.append(f'{shown.status}: {NEXT[shown.status]}')
                getattr(self.cloud.compute, NEXT[shown.status])(server.id)
                wait.until('the server to begin', lambda: (
                    server.show().status != shown.status or
                    server.show().task_state), _SETTLE_SECONDS)
            elif self.runs(server):
                break
            else:
                steps.append(f'{shown.status}: hard reboot')
                self.reboot(server)
        self.addDetail('steps', testtools.content.text_content(
            '\n'.join(steps)))
        self.wait(server.id, 'ACTIVE')

    def runs(self, server: servers.Server) -> bool:
        here = servers.Server(self.cloud, server.id).host
        if not self.is_defined(server, here):
            return False
        with self.domain(server, here) as domain:
            return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)

    def repair(self, server: servers.Server) -> None:
        """As "Snapshots, resize and crashes" of the administrator guide."""
        directory = self.source.path(host.INSTANCES / server.id)
        moved = directory.with_name(f'{directory.name}_resize')
        if moved.exists():
            if directory.exists():
                shutil.rmtree(directory)
            moved.rename(directory)
        self.cloud.compute.reset_server_state(server.id, 'active')
        self.reboot(server)

    def reboot(self, server: servers.Server) -> None:
        self.cloud.compute.reboot_server(server.id, 'HARD')
        wait.until('the reboot to begin',
                   lambda: server.show().status != 'ACTIVE', _SETTLE_SECONDS)
