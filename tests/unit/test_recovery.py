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

"""tests/functional/test_recovery.py has what it does."""

import inspect

from nova.compute import manager
from nova.compute import rpcapi
from nova import config
from nova.network import neutron
from nova.scheduler.client import report
from oslotest import base


class NovaTest(base.BaseTestCase):
    """Fails when Nova changes what is relied upon."""

    def assert_does(self, function, *texts):
        source = inspect.getsource(getattr(manager.ComputeManager, function))
        for text in texts:
            self.assertIn(text, source)

    def test_a_live_migration_is_undone_as_undo_live_undoes_it(self):
        self.assert_does(
            '_rollback_live_migration', '_revert_allocation(',
            'self.network_api.setup_networks_on_host(',
            'host=dest, teardown=True)')
        self.assert_does('_revert_allocation', 'get_allocations_for_consumer(',
                         'reportclient.move_allocations(')

    def test_a_resize_ends_as_finish_cold_ends_it(self):
        self.assert_does(
            '_finish_resize', "migration.status = 'finished'",
            'instance.vm_state = vm_states.RESIZED')

    def test_the_source_reverts_a_resize_by_itself(self):
        self.assert_does(
            '_finish_revert_resize', '_revert_instance_flavor_host_node(',
            '_revert_allocation(', 'driver.finish_revert_migration(',
            'expected_task_state=task_states.RESIZE_REVERTING')

    def test_messages_of_nova_have_an_exchange_of_their_own(self):
        """As connect_to_nova() names it."""
        self.assertIn("rpc.set_defaults(control_exchange='nova')",
                      inspect.getsource(config.set_lib_defaults))

    def test_the_interfaces_take_what_they_are_given(self):
        for function, parameters in (
                (rpcapi.ComputeAPI.finish_revert_resize,
                 ['ctxt', 'instance', 'migration', 'host', 'request_spec']),
                (report.SchedulerReportClient.move_allocations,
                 ['context', 'source_consumer_uuid',
                  'target_consumer_uuid']),
                (neutron.API.setup_networks_on_host,
                 ['context', 'instance', 'host', 'teardown'])):
            self.assertEqual(parameters, [
                name for name in inspect.signature(function).parameters
                if name != 'self'], function)
