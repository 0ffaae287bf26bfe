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

"""What the tests share: flavors, images and servers with disks on fake DAX."""

import io
from typing import Any

from tempest.common import waiters
from tempest import config
from tempest.lib.common.utils import data_utils
from tempest.lib.common.utils import test_utils
from tempest.scenario import manager

from nova_fakedax.tempest import guest

CONF = config.CONF

TRAIT = 'CUSTOM_FAKEDAX'
MIGRATION_TRAIT = 'CUSTOM_FAKEDAX_MIGRATION'

_EVENT_SECONDS = 120


class FakeDaxTest(manager.ScenarioTest):
    """A test that needs hosts with the trait CUSTOM_FAKEDAX.

    :cvar hosts: the names of those hosts
    :cvar migration_hosts: those that servers can leave while they run
    """

    # The API has checked extra specs since, and says why an action failed.
    compute_min_microversion = '2.86'
    # Since then placement is asked for hosts by trait.
    placement_min_microversion = '1.18'

    hosts: set[str]
    migration_hosts: set[str]

    @classmethod
    def setup_credentials(cls) -> None:
        if CONF.fakedax.guest_access == 'console':
            # No network for the project: servers have no port, and a cloud
            # need not have routers.
            cls.set_network_resources()
        super().setup_credentials()

    @classmethod
    def resource_setup(cls) -> None:
        super().resource_setup()
        cls.hosts = cls.hosts_with(TRAIT)
        cls.migration_hosts = cls.hosts_with(MIGRATION_TRAIT)
        if not cls.hosts and not CONF.fakedax.hosts:
            raise cls.skipException(f'no host reports the trait {TRAIT}')

    @classmethod
    def hosts_with(cls, trait: str) -> set[str]:
        providers = cls.os_admin.resource_providers_client
        return {each['name'] for each in providers.list_resource_providers(
            required=trait)['resource_providers']}

    @classmethod
    def flavor_ref(cls) -> str:
        ref: str = CONF.fakedax.flavor_ref or CONF.compute.flavor_ref
        return ref

    @classmethod
    def image_ref(cls) -> str:
        ref: str = CONF.fakedax.image_ref or CONF.compute.image_ref
        return ref

    def flavor(self, extra_specs: dict[str, str] | None = None,
               more_disk: int = 0, **sizes: int) -> str:
        """Make a flavor like the one with disks on fake DAX.

        :param extra_specs: these instead of all that it has
        :param more_disk: GiB by which its root disk is larger
        :param sizes: ``disk`` and ``ephemeral`` (GiB), ``ram`` (MiB)
        """
        like = self.flavors_client.show_flavor(self.flavor_ref())['flavor']
        client = self.os_admin.flavors_client
        made = client.create_flavor(**{
            'name': data_utils.rand_name('fakedax'), 'vcpus': like['vcpus'],
            'ram': sizes.get('ram', like['ram']),
            'disk': sizes.get('disk', like['disk'] + more_disk),
            'OS-FLV-EXT-DATA:ephemeral': sizes.get('ephemeral', 0)},
        )['flavor']['id']
        self.addCleanup(client.delete_flavor, made)
        if extra_specs is None:
            extra_specs = like['extra_specs']
        if extra_specs:
            client.set_flavor_extra_spec(made, **extra_specs)
        return str(made)

    def empty_image(self, **properties: str) -> str:
        """Make an image from which a server starts, but no guest boots."""
        made = self.image_client.create_image(
            name=data_utils.rand_name('fakedax'), disk_format='raw',
            container_format='bare', visibility='private', **properties)['id']
        self.addCleanup(test_utils.call_and_ignore_notfound_exc,
                        self.image_client.delete_image, made)
        self.image_client.store_image_file(made, io.BytesIO(bytes(1 << 20)))
        return str(made)

    def server(self, flavor: str = '', image: str | None = None,
               wait_until: str | None = 'ACTIVE', **arguments: Any,
               ) -> dict[str, Any]:
        """Create a server without a network, deleted after the test.

        :param image: empty if it boots from a volume
        """
        created: dict[str, Any] = self.create_server(
            flavor=flavor or self.flavor_ref(),
            image_id=self.image_ref() if image is None else image,
            wait_until=wait_until,
            **{'networks': 'none'} | arguments)
        return created

    def boot(self, **arguments: Any) -> tuple[str, guest.Guest]:
        """Create a server whose guest can be asked; its id, and the guest.

        :param arguments: of :meth:`server`
        """
        if CONF.fakedax.guest_access == 'console':
            made = self.server(user_data=guest.user_data(), config_drive=True,
                               **arguments)
            return made['id'], guest.Console(self.servers_client, made['id'])
        key = self.create_keypair()
        group = self.create_security_group()
        made = self.create_server(
            key_name=key['name'], security_groups=[{'name': group['name']}],
            flavor=arguments.pop('flavor', self.flavor_ref()),
            image_id=arguments.pop('image', self.image_ref()),
            **arguments)
        address = self.get_server_ip(made)
        return made['id'], guest.Ssh(lambda: self.get_remote_client(
            address, private_key=key['private_key'], server=made))

    def wait(self, server_id: str, status: str) -> None:
        """Wait until a server has a status, and no task."""
        waiters.wait_for_server_status(
            self.servers_client, server_id, status,
            raise_on_error=status != 'ERROR')

    def assert_refused(self, server_id: str, action: str,
                       reason: str) -> None:
        """Assert that a server's last action of a kind failed, and why."""
        client = self.os_admin.servers_client

        def event() -> dict[str, Any]:
            request = next(
                each['request_id'] for each in
                client.list_instance_actions(server_id)['instanceActions']
                if each['action'] == action)
            events = client.show_instance_action(
                server_id, request)['instanceAction']['events']
            last: dict[str, Any] = events[0] if events else {}
            return last

        self.assertTrue(
            test_utils.call_until_true(
                lambda: bool(event().get('result')), _EVENT_SECONDS, 1),
            f'{action} of server {server_id} does not end')
        last = event()
        self.assertEqual('Error', last['result'], last)
        self.assertIn(reason, last['details'])

    def assert_on_fake_dax(self, report: guest.Report) -> None:
        """Assert that root is on pmem, with DAX: nothing of it is cached."""
        self.assertRegex(report.device, '^/dev/pmem0', report)
        self.assertRegex(report.options, r'(^|,)dax=(always|inode)(,|$)',
                         report)
        self.assertLess(report.cached_kib, report.data_kib // 4, report)

    def assert_kept(self, before: guest.Report, after: guest.Report) -> None:
        """Assert that a guest has the data of an earlier report.

        And all that had been acknowledged.
        """
        self.assertEqual(before.sum, after.sum)
        self.assertGreaterEqual(after.survived, before.acknowledged)

    def assert_goes_on(self, before: guest.Report,
                       asked: guest.Guest) -> guest.Report:
        """Assert that a guest has not booted, and can read and store."""
        after = asked.report()
        self.assertEqual(before.boot, after.boot)
        self.assert_on_fake_dax(after)
        self.assertEqual(before.sum, after.sum)
        self.assertGreater(after.acknowledged, before.acknowledged)
        return after


class TwoHostsTest(FakeDaxTest):
    """A test that needs two such hosts."""

    @classmethod
    def resource_setup(cls) -> None:
        super().resource_setup()
        if len(cls.hosts) < 2:
            raise cls.skipException(
                f'fewer than two hosts report the trait {TRAIT}')
