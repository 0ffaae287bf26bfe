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

from nova import exception
from nova import objects
from nova.virt.libvirt import config as vconfig
from oslotest import base
import testscenarios

from nova_fakedax import admission
from nova_fakedax import domain
from nova_fakedax import evacuation
from nova_fakedax import spec
from nova_fakedax import volumes
from tests import fixtures

load_tests = testscenarios.load_tests_apply_scenarios

#: Of a guest whose addresses hold too little.
TOO_LARGE = mock.Mock(side_effect=exception.InvalidInput(reason='too large'))


class AdmissionTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        objects.register_all()

    def flavor(self, disks='root', **extra_specs):
        if disks is not None:
            extra_specs['fakedax:disks'] = disks
        return objects.Flavor(
            memory_mb=512, root_gb=1, ephemeral_gb=1, extra_specs=extra_specs)

    def instance(self, disks='root', properties=None, **extra_specs):
        return objects.Instance(
            uuid=fixtures.UUID, image_ref='6f1c',
            system_metadata=properties or {'image_fakedax_guest': 'true'},
            flavor=self.flavor(disks, **extra_specs))


class CheckBuildTestCase(AdmissionTestCase):

    def refused(self, error, instance, *reasons_against):
        return self.assertRaises(
            error, admission.check_build, instance, reasons_against,
            mock.Mock()).format_message()


class CheckBuildTest(CheckBuildTestCase):

    def test_an_instance_that_can_be_built(self):
        admission.check_build(self.instance(), [], mock.Mock())

    def test_an_ordinary_instance_is_not_checked(self):
        admission.check_build(
            self.instance(None, {}, **{'hw:cpu_realtime': 'yes'}),
            ['no reason'], mock.Mock(side_effect=AssertionError))

    def test_a_host_that_cannot_says_why_and_nova_tries_another(self):
        self.assertIn('too old; too full', self.refused(
            exception.ComputeResourcesUnavailable, self.instance(),
            'too old', 'too full'))

    def test_disks_that_the_guest_could_not_address(self):
        instance = self.instance()
        check = mock.Mock()
        admission.check_build(instance, [], check)
        check.assert_called_once_with(instance.flavor)
        self.assertRaises(exception.InvalidInput, admission.check_build,
                          instance, [], TOO_LARGE)

    def test_a_conflict_in_the_flavor(self):
        self.assertIn(
            "hw:locked_memory='true' is incompatible with fakedax:disks",
            self.refused(exception.InvalidInput, self.instance(
                **{'hw:locked_memory': 'true'})))

    def test_an_image_that_does_not_know_fake_dax(self):
        message = self.refused(
            exception.ImageUnacceptable,
            self.instance(properties={'fakedax_guest': 'true'}))
        self.assertIn('fakedax_guest', message)
        self.assertIn('6f1c', message)


class VolumesTest(CheckBuildTestCase):

    def volume(self, root=False, **said):
        return volumes.Volume(fixtures.UUID, root, said)

    def build(self, value, *attached, disks=None, properties=None,
              encryption=None):
        extra_specs = {'fakedax:volumes': value}
        instance = self.instance(disks, properties, **extra_specs)
        admission.check_build(
            instance, [], mock.Mock(), attached,
            encryption or mock.Mock(side_effect=AssertionError))

    def refused(self, error, *args, **kwargs):
        return self.assertRaises(
            error, self.build, *args, **kwargs).format_message()

    def test_a_server_that_boots_from_a_volume(self):
        self.build('boot', self.volume(root=True))
        self.build('all', self.volume(root=True), self.volume())

    def test_the_property_is_read_from_the_volume(self):
        # Nova keeps a volume's image metadata as it does an image's.
        self.assertIn(
            'the property fakedax_guest of its image metadata',
            self.refused(exception.ImageUnacceptable, 'boot',
                         self.volume(root=True), properties={'x': 'y'}))

    def test_a_data_volume_needs_no_guest_that_knows_fake_dax(self):
        self.build('all', self.volume(), properties={'x': 'y'})

    def test_what_the_flavor_is_not_for(self):
        self.assertIn('the server boots from an image', self.refused(
            exception.InvalidInput, 'boot'))
        self.assertIn('the server boots from a volume', self.refused(
            exception.InvalidInput, 'none', self.volume(root=True),
            disks='root'))

    def test_a_volume_that_cannot_be_mapped(self):
        bad = {'driver_volume_type': 'rbd'}
        self.assertIn('librbd', self.refused(
            volumes.VolumeRefused, 'all', self.volume(**bad)))
        # One that is an ordinary disk may be anything.
        self.build('boot', self.volume(root=True), self.volume(**bad))

    def test_encryption_is_asked_for_where_there_is_some(self):
        said = {'data': {'encrypted': True}}
        encryption = mock.Mock(return_value={'provider': 'luks'})
        self.assertIn('LUKS', self.refused(
            volumes.VolumeRefused, 'boot', self.volume(root=True, **said),
            encryption=encryption))
        encryption.assert_called_once_with(said)
        encryption.return_value = {'provider': 'plain'}
        self.build('boot', self.volume(root=True, **said),
                   encryption=encryption)

    def test_a_resize_is_checked_likewise(self):
        instance = self.instance(None)
        flavor = self.flavor('root', **{'fakedax:volumes': 'boot'})

        def check(*attached, paths=()):
            admission.check_resize(
                instance, flavor, paths, mock.Mock(), attached)

        check(self.volume(root=True))
        check(paths=['/i/disk'])
        for attached, why in (
            ([self.volume(root=True, multiattach=True)], 'several servers'),
            # 512 MiB of RAM hold the memmap of 28 GiB.
            ([volumes.Volume(fixtures.UUID, True, {}, 30)], '480 MiB of it'),
        ):
            self.assertIn(why, str(self.assertRaises(
                exception.InstanceFaultRollback, check, *attached
            ).inner_exception))


class UnknownValueTest(CheckBuildTestCase):
    """No host can run the flavor, so Nova must not try another."""

    scenarios = [(repr(disks), {'disks': disks}) for disks in (
        'root,root', '')]

    def test_the_build_ends_at_once(self):
        # ComputeManager gives up at once for this exception.
        self.assertIn(
            f"'{self.disks}' is not a value of fakedax:disks; allowed: "
            f"'root'",
            self.refused(exception.InvalidInput, self.instance(self.disks)))


class CheckRebuildTest(AdmissionTestCase):

    def refused(self, instance, evacuated_from=None):
        """The user is told, and the instance stays as it is."""
        return self.assertRaises(
            exception.InstanceFaultRollback, admission.check_rebuild,
            instance, [], mock.Mock(), evacuated_from,
        ).inner_exception.format_message()

    def test_to_an_image_that_does_not_know_fake_dax(self):
        admission.check_rebuild(
            self.instance(), [], mock.Mock(), None)
        self.assertIn('fakedax_guest', self.refused(
            self.instance(properties={'image_min_ram': '0'})))

    def test_evacuation_of_a_guest_that_may_still_run(self):
        hosts = mock.Mock(spec=evacuation.Hosts)
        hosts.check_gone.side_effect = evacuation.EvacuationRefused(
            host='other', reason='it runs')
        self.assertIn('it runs', self.refused(self.instance(), hosts))

    def test_an_ordinary_instance_is_not_checked(self):
        admission.check_rebuild(
            self.instance(None), ['no reason'], mock.Mock(), mock.Mock())

    def test_addresses_that_hold_too_little(self):
        self.assertIn('too large', self.assertRaises(
            exception.InstanceFaultRollback, admission.check_rebuild,
            self.instance(), [], TOO_LARGE, None,
        ).inner_exception.format_message())


class CheckResizeTest(AdmissionTestCase):

    PATHS = ('/i/disk', '/i/disk.eph0', '/i/disk.config')

    def check(self, flavor, instance=None, paths=PATHS, check=None):
        admission.check_resize(
            instance or self.instance(), flavor, paths, check or mock.Mock())

    def refused(self, *args, **kwargs):
        inner = self.assertRaises(
            exception.InstanceFaultRollback, self.check, *args, **kwargs,
        ).inner_exception
        self.assertIsInstance(inner, exception.ResizeError)
        return inner.format_message()

    def test_each_kind_to_each(self):
        for old in None, 'root', 'ephemeral', 'root,ephemeral':
            for new in None, 'root', 'ephemeral', 'root,ephemeral':
                self.check(self.flavor(new), self.instance(old))

    def test_to_disks_that_the_guest_could_not_address(self):
        self.assertIn('too large', self.refused(
            self.flavor(), check=TOO_LARGE))

    def test_to_a_conflict(self):
        self.assertIn("hw:pmem='x' is incompatible", self.refused(
            self.flavor(**{'hw:pmem': 'x'})))

    def test_an_image_whose_guest_does_not_know_fake_dax(self):
        ordinary = self.instance(None, {'image_os_type': 'linux'})
        self.assertIn("the image's property fakedax_guest is ''",
                      self.refused(self.flavor(), ordinary))
        self.check(self.flavor('ephemeral'), ordinary)

    def test_an_image_that_is_incompatible(self):
        self.assertIn('hw_mem_encryption', self.refused(
            self.flavor(), self.instance(None, {
                'image_fakedax_guest': 'true',
                'image_hw_mem_encryption': 'true'})))

    def test_a_root_disk_that_is_a_volume(self):
        self.assertIn(
            "the instance's is a volume or there is none", self.refused(
                self.flavor(), self.instance(None), ['/i/disk.eph0']))
        self.check(self.flavor('ephemeral'), self.instance(None), [])


class CheckDisksTest(AdmissionTestCase):

    def test_a_disk_that_the_guest_lacks_is_named(self):
        device = domain.LibvirtConfigGuestVirtioPMEM()
        device.alias, device.target_size = 'ua-fakedax-root', 2048
        guest = vconfig.LibvirtConfigGuest()
        guest.add_device(device)
        admission.check_disks(
            spec.FakeDaxSpec.from_flavor(self.flavor()), guest)
        wanted = spec.FakeDaxSpec.from_flavor(self.flavor('root,ephemeral'))
        message = self.assertRaises(
            exception.InvalidInput, admission.check_disks, wanted, guest
        ).format_message()
        self.assertIn('names the ephemeral disk', message)
