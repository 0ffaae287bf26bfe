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

"""A server after a random walk through what can be done with it.

30 steps by default; tests/walk.py says how to go further.
"""

import glob
import os

import fixtures as base_fixtures
from nova.tests.fixtures import libvirt
from nova.tests.functional.libvirt import base as libvirt_base
from nova.virt.libvirt import driver as libvirt_driver
from oslo_utils import units

from nova_fakedax import monitor
from tests import fixtures
from tests.functional import base
from tests import walk


_RUNNING = {libvirt.VIR_DOMAIN_RUNNING}
_OFF = {libvirt.VIR_DOMAIN_SHUTOFF}

#: What libvirt says of a server's domain.
_STATES = {
    'ACTIVE': _RUNNING, 'RESCUE': _RUNNING,
    'PAUSED': {libvirt.VIR_DOMAIN_PAUSED},
    'SHUTOFF': _OFF,
    # The fake libvirt saves a domain without ending it.
    'SUSPENDED': _RUNNING,
    # As before the resize.
    'VERIFY_RESIZE': _RUNNING | _OFF,
}


class _Walker:
    """The test's server, as tests/walk.py wants it."""

    def __init__(self, test):
        self.do, self.check = test.do, test.check
        self._test = test

    def store(self, number):
        if self._test.status == 'SHELVED_OFFLOADED':
            return False
        self._test.store(self._test.server, b'%08d' % number)
        return True


class WalkTest(libvirt_base.LibvirtMigrationMixin, base.FakeDaxTestCase):

    MEMMAP = 'device'

    def setUp(self):
        super().setUp()
        self.emulator.answer(fixtures.MIGRATING_HELP)
        counters = {'drop-cache': True, 'cache-dropped': 0, 'cache-left': 0,
                    'last-error': 0}
        self.useFixture(base_fixtures.MockPatchObject(
            monitor, 'device_property',
            lambda _guest, _alias, name: counters[name]))
        # Nova asks by ssh; the fake computes share one directory.
        self.useFixture(base_fixtures.MockPatchObject(
            libvirt_driver.LibvirtDriver, '_is_path_shared_with',
            lambda *_args: True))
        # Nova's fixture calls its own function without the flags.
        remove = libvirt.Domain.managedSaveRemove
        self.useFixture(base_fixtures.MockPatchObject(
            libvirt.Domain, 'managedSaveRemove',
            lambda domain, flags=0: remove(domain, flags)))
        # A domain that was shut down keeps the id -1 there when it runs again,
        # by which Nova would not see that it was shut down once more.
        mark_running = libvirt.Connection._mark_running

        def mark_with_id(connection, domain):
            domain._id = connection._id_counter
            mark_running(connection, domain)

        self.useFixture(base_fixtures.MockPatchObject(
            libvirt.Connection, '_mark_running', mark_with_id))
        self.keep_uploads()
        for name in ('compute1', 'compute2'):
            self.start_compute(name)
        #: The flavors by their GiB: disks do not shrink.
        self.flavor_ids = {size: [
            self.put_flavor('root,ephemeral', size, 1, **{
                'fakedax:memmap': memmap}) for memmap in ('device', 'guest')]
            for size in (1, 2)}
        self.size, self.flavor = 1, self.flavor_ids[1][0]
        self.server = self.boot(self.flavor)

    def test_walk(self):
        walk.walk(_Walker(self), *walk.length(30))

    def _migrate_stub(self, *args, **kwargs):
        super()._migrate_stub(*args, **kwargs)
        [source], [domain] = (
            compute.driver._host.get_connection()._vms.values()
            for compute in (self.src, self.dest))
        # VIR_MIGRATE_PERSIST_DEST, and a paused guest stays paused.
        domain._transient, domain._state = False, source._state

    # The steps.

    def do(self, step):
        getattr(self, f'do_{step}')()
        self.server = self._wait_for_server_parameter(
            self.server, {'OS-EXT-STS:task_state': None})

    @property
    def status(self):
        return self.server['status']

    def do_stop(self):
        self._stop_server(self.server)

    def do_start(self):
        self._start_server(self.server)

    def do_soft_reboot(self):
        self._reboot_server(self.server)

    def do_hard_reboot(self):
        self._reboot_server(self.server, hard=True)

    def do_pause(self):
        self.act(self.server, 'pause')
        self._wait_for_state_change(self.server, 'PAUSED')

    def do_unpause(self):
        self.act(self.server, 'unpause')
        self._wait_for_state_change(self.server, 'ACTIVE')

    def do_suspend(self):
        self._suspend_server(self.server)

    def do_resume(self):
        self._resume_server(self.server)

    def do_rescue(self):
        self._rescue_server(self.server)

    def do_unrescue(self):
        self._unrescue_server(self.server)

    def do_rebuild(self):
        self._rebuild_server(self.server, self.image, self.status)

    def do_refused_rebuild(self):
        self.act(self.server, 'rebuild', imageRef=self.ordinary_image)
        self.failure(self.server, 'rebuild', 'compute_rebuild_instance')

    def do_snapshot(self):
        self._snapshot_server(self.server, 'walk')

    def do_shelve(self):
        self._shelve_server(self.server)

    def do_unshelve(self):
        self._unshelve_server(self.server)

    def do_live_migrate(self):
        hosts = ['compute1', 'compute2']
        here = self.server['OS-EXT-SRV-ATTR:host']
        hosts.remove(here)
        self.src, self.dest = self.computes[here], self.computes[hosts[0]]
        self._live_migrate(
            self.server, 'completed', server_expected_state=self.status)
        # As libvirt does.
        self.forget_domains(here)

    def do_migrate(self):
        self.before = (self.size, self.flavor, self.status)
        self._migrate_server(self.server)

    def do_resize(self):
        self.before = (self.size, self.flavor, self.status)
        size, wanted = next(
            (size, flavor) for size, flavors in self.flavor_ids.items()
            for flavor in flavors
            if size >= self.size and flavor != self.flavor)
        self._resize_server(self.server, wanted)
        self.size, self.flavor = size, wanted

    def forget_domains(self, host):
        for domain in self.domains(host):
            if domain.isActive():
                domain.destroy()
            domain.undefine()

    def do_confirm(self):
        self.finish('confirmResize', 'compute_confirm_resize')
        # LibvirtDriver._cleanup_resize does this on a host that is not
        # CONF.host, but all hosts of this process share that.
        here = self.server['OS-EXT-SRV-ATTR:host']
        for host in set(self.computes) - {here}:
            self.forget_domains(host)

    def do_revert(self):
        self.finish('revertResize', 'compute_finish_revert_resize')
        self.size, self.flavor, _status = self.before

    def finish(self, action, event):
        self.act(self.server, action)
        self._wait_for_instance_action_event(
            self.server, action, event, 'success')
        self._wait_for_state_change(self.server, self.before[2])

    # What must be right after each.

    def check(self, model):
        self.assertEqual(model.status, self.status)
        shelved = model.status == 'SHELVED_OFFLOADED'
        resized = model.status == 'VERIFY_RESIZE'
        here = self.server['OS-EXT-SRV-ATTR:host']
        for host in self.computes:
            states = [domain._state for domain in self.domains(host)]
            if host == here:
                self.assertEqual(1, len(states))
                self.assertIn(states[0], _STATES[model.status])
            else:
                # A resize keeps the old domain and disks.
                self.assertEqual([*_OFF] if resized else [], states)
        directories = sorted(
            os.path.basename(path).removeprefix(self.server['id']) for path in
            glob.glob(f'{self.instances_path}/{self.server["id"]}*'))
        self.assertEqual(
            [] if shelved else ['', '_resize'] if resized else [''],
            directories)
        allocations = self.allocations(self.server)
        if shelved:
            self.assertEqual({}, allocations)
            return
        self.assertEqual([self.compute_rp_uuids[here]], list(allocations))
        self.assertEqual(
            [] if model.status == 'RESCUE' else ['disk', 'disk.eph0'],
            self.pmems(self.server, here))
        self.assertEqual(self.size * units.Gi,
                         self.layout_of(self.server).size)
        self.layout_of(self.server, 'disk.eph0')
        wanted = (b'%08d' % model.content if model.content
                  else self.content[:8])
        self.assertEqual(wanted, self.stored(self.server, 8))
