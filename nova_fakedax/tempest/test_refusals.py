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

"""What cannot work is refused with a message that says what is allowed."""

import dataclasses

from tempest.common import waiters
from tempest import config
from tempest.lib import decorators
from tempest.lib import exceptions
import testtools

from nova_fakedax.tempest import base

CONF = config.CONF

DISKS = 'fakedax:disks'
ROOT = {DISKS: 'root'}


@dataclasses.dataclass(frozen=True)
class Refused:
    """A build that must fail.

    :ivar said: part of the server's fault
    :ivar extra_specs: of its flavor
    :ivar sizes: of its flavor, as of base.FakeDaxTest.flavor
    :ivar properties: of its image
    """

    said: str
    extra_specs: dict[str, str]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    properties: dict[str, str] = dataclasses.field(
        default_factory=lambda: {'fakedax_guest': 'true'})


BUILDS = (
    Refused("property fakedax_guest is ''; allowed: 'true'", ROOT,
            properties={}),
    Refused("ephemeral disk is 0 GiB; allowed: 1 GiB or more",
            {DISKS: 'ephemeral'}),
    Refused("but not fakedax:disks; allowed", {'fakedax:memmap': 'device'}),
    Refused("the flavor's RAM is 96 MiB, and with fakedax:memmap='guest' "
            "4 GiB of disk take 64 MiB of it; allowed: 128 MiB or more",
            ROOT | {'fakedax:memmap': 'guest'}, {'ram': 96, 'disk': 4}),
    Refused("hw:locked_memory='true' is incompatible with fakedax:disks",
            ROOT | {'hw:locked_memory': 'true', 'hw:mem_page_size': 'small'}),
    Refused("quota:disk_read_iops_sec='100' is incompatible with "
            "fakedax:disks", ROOT | {'quota:disk_read_iops_sec': '100'}),
)


class FlavorTest(base.FakeDaxTest):
    """What nova-api says about extra specs."""

    def assert_bad_request(self, key: str, value: str, *said: str) -> None:
        flavor = self.flavor({})
        error = self.assertRaises(
            exceptions.BadRequest,
            self.os_admin.flavors_client.set_flavor_extra_spec, flavor,
            **{key: value})
        for part in said:
            self.assertIn(part, str(error))

    @decorators.idempotent_id('8501635e-531b-410c-a35b-680537b645d8')
    def test_unknown_key_is_refused_with_the_known_ones(self) -> None:
        self.assert_bad_request(
            'fakedax:disk', 'root', "'fakedax:disk'", DISKS)

    @decorators.idempotent_id('f9e406b5-f051-4ba2-9af2-944ed6fab631')
    def test_bad_value_is_refused_with_the_good_ones(self) -> None:
        for value in 'rot', 'root,root', '':
            self.assert_bad_request(
                DISKS, value, f"'{value}'",
                "'root', 'ephemeral', 'root,ephemeral'")


class BuildTestCase(base.FakeDaxTest):

    def create(self, flavor: str, image: str) -> str:
        created: str = self.server(flavor, image, wait_until=None)['id']
        return created

    def fault(self, server_id: str) -> str:
        self.wait(server_id, 'ERROR')
        server = self.servers_client.show_server(server_id)['server']
        said: str = server.get('fault', {}).get('message', '')
        return said

    def assert_nothing_left(self, server_id: str) -> None:
        self.servers_client.delete_server(server_id)
        waiters.wait_for_server_termination(self.servers_client, server_id)
        self.assertEqual(
            {}, self.os_admin.placement_client.list_allocations(
                server_id)['allocations'])


class BuildTest(BuildTestCase):

    @decorators.idempotent_id('821633ca-310b-4e99-8d6c-2bc35f9dfac8')
    def test_build_fails_with_what_is_allowed(self) -> None:
        created = [
            (each, self.create(self.flavor(each.extra_specs, **each.sizes),
                               self.empty_image(**each.properties)))
            for each in BUILDS]
        other = {each.said: said for each, said in (
            (each, self.fault(server_id)) for each, server_id in created)
            if each.said not in said}
        self.assertEqual({}, other)
        for _each, server_id in created:
            self.assert_nothing_left(server_id)


class OldMicroversionTest(BuildTestCase):
    """The API has checked extra specs since 2.86."""

    compute_min_microversion = '2.85'
    compute_max_microversion = '2.85'

    @decorators.idempotent_id('6c317130-dd2d-476e-a102-33ffb5b3987e')
    def test_build_fails_with_the_values_that_are_allowed(self) -> None:
        server_id = self.create(self.flavor({DISKS: 'rot'}),
                                self.empty_image(fakedax_guest='true'))
        self.assertIn("'rot' is not a value of fakedax:disks; allowed: "
                      "'root', 'ephemeral', 'root,ephemeral'",
                      self.fault(server_id))
        self.assert_nothing_left(server_id)


class ServerTest(base.FakeDaxTest):
    """A server that exists goes on after what was refused."""

    @decorators.idempotent_id('a33b860b-923a-447e-8352-5aca4b5af9b9')
    @testtools.skipUnless(CONF.compute_feature_enabled.resize,
                          'Resize is not available.')
    def test_resize_of_a_guest_that_does_not_know_fake_dax(self) -> None:
        server_id = self.server(self.flavor({}), self.empty_image())['id']
        self.servers_client.resize_server(server_id, self.flavor_ref())
        self.assert_refused(server_id, 'resize', 'fakedax_guest')
        self.wait(server_id, 'ACTIVE')

    @decorators.idempotent_id('b1e4a4e9-b57e-4a30-975c-93666ad70dee')
    def test_rebuild_from_an_unfit_image_keeps_the_disk(self) -> None:
        server_id, asked = self.boot()
        before = asked.report()
        self.servers_client.rebuild_server(server_id, self.empty_image())
        self.assert_refused(server_id, 'rebuild', 'fakedax_guest')
        self.wait(server_id, 'ACTIVE')
        self.assert_goes_on(before, asked)
