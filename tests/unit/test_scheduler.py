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

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.scheduler import filters
from nova.scheduler import request_filter as nova_request_filter
from oslotest import base
import testscenarios

from nova_fakedax import request_filter
from nova_fakedax import scheduler
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios


def _request(extra_specs, root_gb=1, ephemeral_gb=1):
    objects.register_all()
    return objects.RequestSpec(flavor=objects.Flavor(
        extra_specs=extra_specs, memory_mb=512, root_gb=root_gb,
        ephemeral_gb=ephemeral_gb))


class SchedulerTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.context = nova_context.RequestContext(is_admin=True)
        self.filter = scheduler.FakeDaxFilter()

    def ask(self, request):
        """What happens before placement is asked for hosts."""
        return request_filter.require_fake_dax(self.context, request)

    def refused(self, request):
        return self.assertRaises(
            exception.RequestFilterFailed, self.ask, request).format_message()

    def passes(self, request, **stats):
        # nova.scheduler.host_manager.HostState keeps the statistics of a
        # compute node as strings.
        return self.filter.host_passes(
            mock.Mock(host='compute1', stats=stats), request)


class SchedulerTest(SchedulerTestCase):

    def test_a_disk_of_0_gib_is_refused(self):
        for sizes, disk in (({'root_gb': 0}, 'root'),
                            ({'ephemeral_gb': 0}, 'ephemeral')):
            message = self.refused(
                _request({'fakedax:disks': 'root,ephemeral'}, **sizes))
            self.assertIn(f'names the {disk} disk', message)
            self.assertIn('allowed: 1 GiB or more', message)

    def test_what_was_required_before_still_is(self):
        request = _request({'fakedax:disks': 'root'})
        request.root_required.add('HW_CPU_X86_AVX')
        self.ask(request)
        self.assertEqual({'HW_CPU_X86_AVX', 'CUSTOM_FAKEDAX'},
                         request.root_required)

    def test_no_host_passes_if_placement_was_not_asked(self):
        self.assertFalse(self.passes(
            _request({'fakedax:disks': 'root'}), fakedax_supported='true'))

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


class FakeDaxFlavorTest(SchedulerTestCase):

    scenarios = [(disks, {'disks': disks}) for disks in (
        'root', 'ephemeral', 'root,ephemeral')]

    def test_placement_is_asked_for_the_trait(self):
        request = _request({'fakedax:disks': self.disks})
        self.assertTrue(self.ask(request))
        self.assertEqual({'CUSTOM_FAKEDAX'}, request.root_required)
        self.assertTrue(self.passes(request, fakedax_supported='true'))


class OtherFlavorTest(SchedulerTestCase):

    scenarios = [(repr(extra_specs), {'extra_specs': extra_specs})
                 for extra_specs in (
                     {}, {'hw:cpu_policy': 'dedicated'},
                     {'fakedaxes:disks': 'x'},
                     {'trait:CUSTOM_FAKEDAX': 'forbidden'})]

    def test_it_is_left_alone(self):
        request = _request(self.extra_specs)
        self.assertFalse(self.ask(request))
        self.assertEqual(set(), request.root_required)
        self.assertTrue(self.passes(request))


class FlavorThatNoHostCanRunTest(SchedulerTestCase):

    scenarios = [
        ('value', {
            'extra_specs': {'fakedax:disks': 'nonsense'},
            'reason': "'nonsense' is not a value of fakedax:disks; allowed: "
                      "'root', 'ephemeral', 'root,ephemeral'"}),
        ('key', {
            'extra_specs': {'fakedax:nonsense': ''},
            'reason': "'fakedax:nonsense' is not an extra spec of fake DAX; "
                      "allowed: fakedax:disks, fakedax:volumes, "
                      "fakedax:memmap"}),
        ('conflict', {
            'extra_specs': {'fakedax:disks': 'root', 'hw:pmem': '4GB'},
            'reason': "hw:pmem='4GB' is incompatible with fakedax:disks"}),
    ]

    def test_it_is_refused(self):
        request = _request(self.extra_specs)
        self.assertIn(self.reason, self.refused(request))
        self.assertFalse(self.passes(request, fakedax_supported='true'))


class ImageThatNoHostCanRunTest(SchedulerTestCase):

    def test_it_is_refused(self):
        request = _request({'fakedax:disks': 'root'})
        request.image = objects.ImageMeta.from_dict(
            {'properties': {'hw_ephemeral_encryption': 'true'}})
        self.assertIn(
            "the image's property hw_ephemeral_encryption='True' is "
            "incompatible with fakedax:disks", self.refused(request))

    def test_any_other_image_is_left_to_the_host(self):
        for image in (None, objects.ImageMeta.from_dict({'properties': {}})):
            request = _request({'fakedax:disks': 'root'})
            request.image = image
            self.assertTrue(self.ask(request))


class DestinationTest(SchedulerTestCase):

    scenarios = [
        ('migrating', {'task': 'migrating', 'required': True}),
        ('rebuilding', {'task': 'rebuilding', 'required': False}),
    ]

    def test_it_must_be_able_to_take_a_live_migration(self):
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
                return_value=mock.Mock(task_state=self.task)):
            self.ask(request)
        self.assertEqual(self.required, 'CUSTOM_FAKEDAX_MIGRATION'
                         in request.root_required)


class HostWithAnotherDriverTest(SchedulerTestCase):
    """Placement keeps the trait when a host goes back to another driver."""

    scenarios = [(repr(statistics), {'statistics': statistics})
                 for statistics in (
                     {}, {'fakedax_supported': 'too old'},
                     {'num_instances': '0'})]

    def test_only_other_flavors_pass(self):
        request = _request({'fakedax:disks': 'root'})
        self.ask(request)
        self.assertFalse(self.passes(request, **self.statistics))
        self.assertTrue(self.passes(_request({}), **self.statistics))
