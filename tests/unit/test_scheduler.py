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

from unittest import mock

import ddt
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.scheduler import filters
from nova.scheduler import request_filter as nova_request_filter
from oslotest import base

from nova_fakedax import request_filter
from nova_fakedax import scheduler
from tests import fixtures


def _request(extra_specs, root_gb=1, ephemeral_gb=1):
    objects.register_all()
    return objects.RequestSpec(flavor=objects.Flavor(
        extra_specs=extra_specs, root_gb=root_gb, ephemeral_gb=ephemeral_gb))


@ddt.ddt
class SchedulerTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.context = nova_context.RequestContext(is_admin=True)
        self.filter = scheduler.FakeDaxFilter()

    def _passes(self, request, **stats):
        # What nova.scheduler.host_manager.HostState keeps of the compute
        # node's statistics: strings.
        return self.filter.host_passes(
            mock.Mock(host='compute1', stats=stats), request)

    @ddt.data('root', 'ephemeral', 'root,ephemeral')
    def test_placement_is_asked_for_the_trait(self, disks):
        request = _request({'fakedax:disks': disks})
        self.assertTrue(request_filter.require_fake_dax(self.context, request))
        self.assertEqual({'CUSTOM_FAKEDAX'}, request.root_required)
        self.assertTrue(self._passes(request, fakedax_supported='true'))

    @ddt.data(({'fakedax:disks': 'nonsense'}, "'nonsense' is not a value of "
               "fakedax:disks; allowed: 'root', 'ephemeral', "
               "'root,ephemeral'"),
              ({'fakedax:nonsense': ''}, "'fakedax:nonsense' is not an extra "
               "spec of fake DAX; allowed: fakedax:disks"),
              ({'fakedax:disks': 'root', 'hw:pmem': '4GB'},
               "hw:pmem='4GB' is incompatible with fakedax:disks"))
    @ddt.unpack
    def test_a_flavor_that_no_host_can_run_is_refused(
            self, extra_specs, reason):
        request = _request(extra_specs)
        exc = self.assertRaises(
            exception.RequestFilterFailed, request_filter.require_fake_dax,
            self.context, request)
        self.assertIn(reason, exc.format_message())
        self.assertFalse(self._passes(request, fakedax_supported='true'))

    def test_a_disk_of_0_gib_is_refused(self):
        for sizes, disk in (({'root_gb': 0}, 'root'),
                            ({'ephemeral_gb': 0}, 'ephemeral')):
            exc = self.assertRaises(
                exception.RequestFilterFailed, request_filter.require_fake_dax,
                self.context,
                _request({'fakedax:disks': 'root,ephemeral'}, **sizes))
            self.assertIn(f'names the {disk} disk', exc.format_message())
            self.assertIn('allowed: 1 GiB or more', exc.format_message())

    @ddt.data({}, {'hw:cpu_policy': 'dedicated'}, {'fakedaxes:disks': 'x'},
              {'trait:CUSTOM_FAKEDAX': 'forbidden'})
    def test_other_flavors_are_left_alone(self, extra_specs):
        request = _request(extra_specs)
        self.assertFalse(
            request_filter.require_fake_dax(self.context, request))
        self.assertEqual(set(), request.root_required)
        self.assertTrue(self._passes(request))

    def test_what_was_required_before_still_is(self):
        request = _request({'fakedax:disks': 'root'})
        request.root_required.add('HW_CPU_X86_AVX')
        request_filter.require_fake_dax(self.context, request)
        self.assertEqual({'HW_CPU_X86_AVX', 'CUSTOM_FAKEDAX'},
                         request.root_required)

    @ddt.data(('migrating', True), ('rebuilding', False))
    @ddt.unpack
    def test_a_destination_must_be_able_to_take_it(self, task, required):
        request = _request({'fakedax:disks': 'root'})
        request.ignore_hosts = ['source']
        request.instance_uuid = fixtures.UUID
        mapping = mock.Mock(cell_mapping=mock.sentinel.cell)
        with mock.patch.object(
                objects.InstanceMapping, 'get_by_instance_uuid',
                return_value=mapping), \
            mock.patch.object(nova_context, 'target_cell'), \
            mock.patch.object(
                objects.Instance, 'get_by_uuid',
                return_value=mock.Mock(task_state=task)):
            request_filter.require_fake_dax(self.context, request)
        self.assertEqual(required, 'CUSTOM_FAKEDAX_MIGRATION'
                         in request.root_required)

    def test_no_host_passes_if_placement_was_not_asked(self):
        self.assertFalse(self._passes(
            _request({'fakedax:disks': 'root'}), fakedax_supported='true'))

    # Placement keeps the trait when the host goes back to another driver.
    @ddt.data({}, {'fakedax_supported': 'false'}, {'num_instances': '0'})
    def test_host_passes_only_while_its_driver_says_so(self, statistics):
        request = _request({'fakedax:disks': 'root'})
        request_filter.require_fake_dax(self.context, request)
        self.assertFalse(self._passes(request, **statistics))
        self.assertTrue(self._passes(_request({}), **statistics))

    def test_nova_asks_placement_through_it(self):
        request = _request({'fakedax:disks': 'root'})
        with mock.patch.object(nova_request_filter, 'ALL_REQUEST_FILTERS', [
                entry for entry in nova_request_filter.ALL_REQUEST_FILTERS
                if entry is request_filter.require_fake_dax]):
            nova_request_filter.process_reqspec(self.context, request)
        self.assertIn('CUSTOM_FAKEDAX', request.root_required)

    def test_nova_loads_the_filter_by_name(self):
        self.assertIn(
            scheduler.FakeDaxFilter,
            filters.HostFilterHandler().get_matching_classes(
                ['nova_fakedax.scheduler.FakeDaxFilter']))
