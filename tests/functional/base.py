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

"""A cloud of Nova's services, with images that are real files."""

import io
import os
import typing as ty

import fixtures as base_fixtures
from lxml import etree
from nova import context as nova_context
from nova import objects
from nova.scheduler import request_filter as nova_request_filter
from nova.tests.functional.libvirt import base
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova_fakedax import layout
from nova_fakedax import request_filter
from tests import fixtures
from tests.functional import fakelibvirt

TRAIT = 'CUSTOM_FAKEDAX'
FILTER = 'nova_fakedax.scheduler.FakeDaxFilter'

#: What nova.tests replaces by mocks, but these tests must run.
_REAL = {
    'nova.virt.libvirt.imagebackend.Backend.backend':
        imagebackend.Backend.backend,
    'nova.virt.libvirt.driver.LibvirtDriver._create_image':
        libvirt_driver.LibvirtDriver._create_image,
    'nova.virt.libvirt.driver.LibvirtDriver._create_ephemeral':
        staticmethod(libvirt_driver.LibvirtDriver._create_ephemeral),
    'nova.virt.libvirt.driver.LibvirtDriver._create_swap':
        staticmethod(libvirt_driver.LibvirtDriver._create_swap),
    'nova.virt.libvirt.utils.file_open': libvirt_utils.file_open,
    'nova.virt.libvirt.utils.fetch_image': libvirt_utils.fetch_image,
    'nova.virt.libvirt.utils.fetch_raw_image': libvirt_utils.fetch_raw_image,
}


class FakeDaxTestCase(base.ServersTestBase):
    """Nova's services and placement; computes with FakeDaxDriver."""

    microversion = 'latest'
    ADMIN_API = True
    # As in a real cloud, the API answers before the compute has begun.
    CAST_AS_CALL = False
    #: The fakedax:memmap of flavors, None to leave it out.
    MEMMAP: str | None = None
    #: Whether nova-scheduler is configured with FakeDaxFilter.
    FILTER_ENABLED = True

    def setUp(self) -> None:
        self.useFixture(fixtures.PrivsepFixture())
        self._remove_request_filter()
        super().setUp()
        for name, function in _REAL.items():
            self.useFixture(base_fixtures.MonkeyPatch(name, function))
        self.flags(default_ephemeral_format='ext4')
        # Ordinary disks are then qcow2, which a test can tell from raw.
        self.flags(use_cow_images=True)
        self.emulator = self.useFixture(fixtures.EmulatorFixture())
        self.useFixture(fakelibvirt.FakeLibvirtFixture(self.emulator.path))
        self.instances_path = libvirt_driver.CONF.instances_path
        self._let_guests_lock_images()
        self.content = os.urandom(1 << 20)
        self.volumes_path = self.useFixture(base_fixtures.TempDir()).path
        self.useFixture(base_fixtures.MockPatchObject(
            self.cinder, 'VOLUME_CONNECTION_INFO',
            dict(self.cinder.VOLUME_CONNECTION_INFO)))
        self.image = self.put_image('knows', fakedax_guest='true')
        self.ordinary_image = self.put_image('ordinary')

    def _let_guests_lock_images(self) -> None:
        """As an operator does: Nova's libvirt has AppArmor."""
        rules = self.useFixture(base_fixtures.TempDir()).join('nova-fakedax')
        with open(rules, 'w') as file:
            file.write(f'{os.path.realpath(self.instances_path)}/*/disk* k,')
        self.useFixture(base_fixtures.MonkeyPatch(
            'nova_fakedax.capability.APPARMOR_RULES', rules))

    def _remove_request_filter(self) -> None:
        """Remove the request filter, which configuration adds or does not."""
        self.useFixture(base_fixtures.MockPatchObject(
            nova_request_filter, 'ALL_REQUEST_FILTERS', [
                entry for entry in nova_request_filter.ALL_REQUEST_FILTERS
                if entry is not request_filter.require_fake_dax]))

    def _setup_compute_service(self) -> None:
        self.flags(compute_driver='fakedax.FakeDaxDriver')

    def _setup_scheduler_service(self) -> ty.Any:
        if self.FILTER_ENABLED:
            self.ADDITIONAL_FILTERS = [FILTER.rpartition('.')[2]]
            self.flags(
                available_filters=['nova.scheduler.filters.all_filters',
                                   FILTER], group='filter_scheduler')
        return super()._setup_scheduler_service()

    def _get_connection(
        self, host_info: ty.Any = None, pci_info: ty.Any = None,
        mdev_info: ty.Any = None, vdpa_info: ty.Any = None,
        libvirt_version: ty.Any = None, qemu_version: ty.Any = None,
        hostname: ty.Any = None,
    ) -> ty.Any:
        # Debian 13's libvirt; Nova's tests take the oldest that Nova allows.
        return super()._get_connection(
            host_info, pci_info, mdev_info, vdpa_info,
            libvirt_version or 11_003_000, qemu_version, hostname)

    def _wait_for_server_parameter(
        self, server: ty.Any, expected_params: ty.Any, max_retries: int = 10,
        *args: ty.Any, **kwargs: ty.Any,
    ) -> ty.Any:
        # Nova's 5 s are for images that are mocks. These are files, allocated
        # in full, however slow the disk is.
        return super()._wait_for_server_parameter(
            server, expected_params, max(max_retries, 120), *args, **kwargs)

    # What a user has.

    def put_image(self, name: str, **properties: str) -> str:
        """Put a raw image with the test's content into Glance."""
        return self.glance.create(None, {
            'id': getattr(uuids, f'image_{name}'), 'name': name,
            'disk_format': 'raw', 'container_format': 'bare',
            'size': len(self.content), 'status': 'active',
            'created_at': self.glance.timestamp,
            'updated_at': self.glance.timestamp, 'deleted': False,
            'deleted_at': None, 'is_public': True, 'min_ram': 0,
            'min_disk': 0, 'protected': False, 'visibility': 'public',
            'tags': [], 'properties': properties,
        }, io.BytesIO(self.content))['id']

    def put_volume(
        self, name: str, mib: int = 4, kind: str = 'gpfs',
        metadata: dict[str, str] | None = None, **data: ty.Any,
    ) -> str:
        """Put a volume into Cinder, a real file.

        :param kind: how it is connected: ``gpfs`` is a file, without a mount;
            ``local`` a block device, which a file does for here
        :param metadata: its image metadata, as of a volume made of an image
        :param data: more of what Cinder says of the connection
        """
        volume: str = getattr(uuids, f'volume_{name}')
        path = self.volume_path(volume)
        with open(path, 'wb') as file:
            file.write(self.content)
            file.truncate(mib * units.Mi)
        self.cinder.volumes[volume] = {
            'id': volume, 'display_name': name, 'size': 1,
            'multiattach': False, 'availability_zone': self.cinder.az,
            'bootable': metadata is not None,
            'volume_image_metadata': metadata or {}}
        self.cinder.VOLUME_CONNECTION_INFO[volume] = {
            'driver_volume_type': kind, 'data': {'device_path': path, **data}}
        return volume

    def volume_path(self, volume: str) -> str:
        return os.path.join(self.volumes_path, f'volume-{volume}')

    def boot_volumes(
        self, flavor: str, root: str | None, *data: str,
        state: str = 'ACTIVE',
    ) -> ty.Any:
        """Create a server with volumes.

        :param root: the volume that it boots from, None for an image
        :param data: other volumes
        :param state: that it gets into
        """
        server = self._build_server(
            image_uuid='' if root else self.image, networks='none',
            flavor_id=flavor)
        volumes = [(root, 0)] if root else []
        mappings = [
            {'source_type': 'volume', 'destination_type': 'volume',
             'uuid': volume, 'boot_index': index}
            for volume, index in [*volumes, *((each, -1) for each in data)]]
        if root:
            del server['imageRef']
        else:
            mappings.insert(0, {
                'source_type': 'image', 'destination_type': 'local',
                'uuid': self.image, 'boot_index': 0})
        server['block_device_mapping_v2'] = mappings
        return self._wait_for_state_change(
            self.api.post_server({'server': server}), state)

    def keep_uploads(self) -> dict[str, int]:
        """Keep what is uploaded, which Nova's fake Glance does not read.

        :returns: the bytes of each image that has been uploaded, by its id
        """
        sizes = {}
        update = self.glance.update

        def keep_and_update(
            context: ty.Any, image_id: str, metadata: ty.Any,
            data: ty.Any = None, **kwargs: ty.Any,
        ) -> ty.Any:
            if data is not None:
                self.glance._imagedata[image_id] = data.read(
                    len(self.content))
                sizes[image_id] = data.seek(0, os.SEEK_END)
            return update(context, image_id, metadata, data, **kwargs)

        self.useFixture(base_fixtures.MockPatchObject(
            self.glance, 'update', keep_and_update))
        return sizes

    def put_flavor(
        self, disks: str | None = 'root', disk: int = 1, ephemeral: int = 0,
        swap: int = 0, **extra_specs: str,
    ) -> str:
        """Make a flavor that names disks, but not the trait."""
        if disks is not None:
            extra_specs['fakedax:disks'] = disks
            if self.MEMMAP is not None:
                extra_specs.setdefault('fakedax:memmap', self.MEMMAP)
        return self._create_flavor(
            memory_mb=512, vcpu=2, disk=disk, ephemeral=ephemeral,
            swap=swap, extra_spec=extra_specs)

    def boot(self, flavor: str | None = None, **kwargs: ty.Any) -> ty.Any:
        """Create a server; by default its root disk is on fake DAX."""
        kwargs.setdefault('networks', 'none')
        kwargs.setdefault('image_uuid', self.image)
        return self._create_server(
            flavor_id=flavor or self.put_flavor(), **kwargs)

    def act(self, server: ty.Any, action: str, **body: ty.Any) -> None:
        self.api.post_server_action(server['id'], {action: body or None})

    # What an operator sees.

    def driver(self, hostname: str = 'compute1') -> ty.Any:
        return self.computes[hostname].driver

    def domains(self, hostname: str = 'compute1') -> list[ty.Any]:
        return list(self.driver(hostname)._host.get_connection()
                    ._vms.values())

    def xml(self, server: ty.Any, hostname: str = 'compute1') -> ty.Any:
        """The server's domain."""
        [domain] = [domain for domain in self.domains(hostname)
                    if domain.UUIDString() == server['id']]
        return etree.fromstring(domain.XMLDesc(0))

    def pmems(self, server: ty.Any, hostname: str = 'compute1') -> list[str]:
        """The names of the files that are memory, in order."""
        return [os.path.basename(path.text) for path in self.xml(
            server, hostname).findall(
                "./devices/memory[@model='virtio-pmem']/source/path")]

    def disks(
        self, server: ty.Any, hostname: str = 'compute1',
    ) -> list[tuple[str, bool]]:
        """The names of the files that are disks; whether read-only."""
        return [
            (os.path.basename(disk.find('./source').get('file')),
             disk.find('./readonly') is not None)
            for disk in self.xml(server, hostname).findall('./devices/disk')]

    def instance(self, server: ty.Any) -> ty.Any:
        """The server as Nova's database has it."""
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.cell_mappings['cell1']) as context:
            return objects.Instance.get_by_uuid(
                context, server['id'],
                expected_attrs=[
                    'flavor', 'device_metadata', 'system_metadata'])

    def path(self, server: ty.Any, name: str = 'disk') -> str:
        return os.path.join(self.instances_path, server['id'], name)

    def layout_of(self, server: ty.Any, name: str = 'disk') -> layout.Layout:
        """The layout of an image that can be mapped."""
        found = layout.read(self.path(server, name))
        self.assertEqual(
            found.file_size, layout.mapped_size(self.path(server, name)))
        return found

    def store(self, server: ty.Any, data: bytes) -> None:
        """Store to the beginning of the root disk, as the guest does."""
        with open(self.path(server), 'r+b') as image:
            image.seek(layout.read(self.path(server)).offset)
            image.write(data)

    def stored(self, server: ty.Any, size: int, name: str = 'disk') -> bytes:
        """What is at the beginning of a disk."""
        with open(self.path(server, name), 'rb') as image:
            image.seek(layout.read(self.path(server, name)).offset)
            return image.read(size)

    def slices(
        self, server: ty.Any, hostname: str = 'compute1',
    ) -> dict[str, layout.Layout]:
        """The parts of files that are disks, by the files' names."""
        return {
            os.path.basename(disk.find('./source').get('file')):
                layout.Layout(int(part.get('offset')), int(part.get('size')))
            for disk in self.xml(server, hostname).findall('./devices/disk')
            for part in disk.findall(
                "./source/slices/slice[@type='storage']")}

    def traits(self, hostname: str = 'compute1') -> set[str]:
        return set(self._get_provider_traits(self.compute_rp_uuids[hostname]))

    def allocations(self, server: ty.Any) -> ty.Any:
        return self.placement.get(
            f"/allocations/{server['id']}").body['allocations']

    def failure(self, server: ty.Any, action: str, event: str) -> str:
        """What the user is told of an action that failed."""
        return self._wait_for_action_fail_completion(
            server, action, event)['details']

    def assert_nothing_left(self, server: ty.Any) -> None:
        """Assert that no domain, file or allocation of the server is left."""
        for hostname in self.computes:
            self.assertEqual([], self.domains(hostname))
        self.assertFalse(os.path.exists(
            os.path.join(self.instances_path, server['id'])))
        self.assertEqual({}, self.allocations(server))
