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

import inspect
import types
from unittest import mock

from nova import exception
from nova.virt.libvirt import imagebackend as libvirt_imagebackend
from oslotest import base
import testscenarios

from nova_fakedax import disk
from nova_fakedax import extra_specs
from nova_fakedax import spec

load_tests = testscenarios.load_tests_apply_scenarios

ROOT = frozenset({disk.ROOT})
EPHEMERAL = frozenset({disk.EPHEMERAL})
BOTH = ROOT | EPHEMERAL


class Flavor:
    """As nova.objects.Flavor: extra specs may not be loaded."""

    def __init__(self, extra_specs=None, root_gb=1, ephemeral_gb=1,
                 memory_mb=512):
        self.memory_mb = memory_mb
        self.root_gb = root_gb
        self.ephemeral_gb = ephemeral_gb
        if extra_specs is not None:
            self.extra_specs = extra_specs

    def __contains__(self, field):
        return hasattr(self, field)


def _read(**extra_specs):
    return spec.FakeDaxSpec.from_flavor(Flavor(
        {f'fakedax:{key}': value for key, value in extra_specs.items()}))


class FromFlavorTest(base.BaseTestCase):

    def test_a_flavor_without_such_extra_specs_asks_for_nothing(self):
        flavor = Flavor({'hw:cpu_policy': 'dedicated', 'fakedaxes': 'root',
                         'trait:CUSTOM_FAKEDAX': 'required'})
        self.assertFalse(spec.FakeDaxSpec.from_flavor(flavor))

    def test_a_flavor_whose_extra_specs_are_not_loaded_asks_for_nothing(self):
        self.assertFalse(spec.FakeDaxSpec.from_flavor(Flavor()))

    def test_no_disk_is_wanted_by_an_ordinary_flavor(self):
        self.assertFalse(spec.FakeDaxSpec().wants('disk'))


class KnownValueTest(base.BaseTestCase):

    scenarios = [
        ('root', {
            'value': 'root', 'roles': ROOT, 'wanted': ['disk']}),
        ('ephemeral', {
            'value': 'ephemeral', 'roles': EPHEMERAL,
            'wanted': ['disk.local', 'disk.eph0', 'disk.eph1']}),
        ('both', {
            'value': 'root,ephemeral', 'roles': BOTH,
            'wanted': ['disk', 'disk.local', 'disk.eph0', 'disk.eph1']}),
    ]

    def test_it_names_the_disks(self):
        self.assertEqual(self.roles, _read(disks=self.value).roles)
        self.assertTrue(_read(disks=self.value))

    def test_only_the_named_disks_are_wanted(self):
        wants = _read(disks=self.value).wants
        self.assertEqual(self.wanted, [name for name in (
            'disk', 'disk.local', 'disk.eph0', 'disk.eph1', 'disk.swap',
            'disk.config', 'disk.rescue', 'kernel') if wants(name)])


class UnknownValueTest(base.BaseTestCase):

    scenarios = [(repr(value), {'value': value}) for value in (
        '', 'root,root', 'ephemeral,root', 'root, ephemeral', 'Root', 'all',
        'true', ' root')]

    def test_it_is_refused_by_name(self):
        exc = self.assertRaises(spec.InvalidSpec, _read, disks=self.value)
        self.assertEqual(
            f"'{self.value}' is not a value of fakedax:disks; "
            f"allowed: 'root', 'ephemeral', 'root,ephemeral'", str(exc))


class UnknownKeyTest(base.BaseTestCase):

    scenarios = [(key, {'key': key}) for key in (
        'fakedax:disk', 'fakedax:', 'fakedax', 'fakedax:disks:root')]

    def test_it_is_refused_by_name(self):
        flavor = Flavor({self.key: 'root', 'fakedax:disks': 'root'})
        exc = self.assertRaises(
            spec.InvalidSpec, spec.FakeDaxSpec.from_flavor, flavor)
        self.assertEqual(
            f"'{self.key}' is not an extra spec of fake DAX; "
            f"allowed: fakedax:disks, fakedax:volumes, fakedax:memmap",
            str(exc))


class FromInstanceTest(base.BaseTestCase):

    def read(self, extra_specs):
        return spec.FakeDaxSpec.from_instance(
            mock.Mock(flavor=Flavor(extra_specs)))

    def test_the_flavor_names_the_disks(self):
        self.assertEqual(BOTH, self.read(
            {'fakedax:disks': 'root,ephemeral'}).roles)

    def test_an_instance_that_was_not_built_has_no_such_disks(self):
        self.assertFalse(self.read({'fakedax:disks': 'nonsense'}))

    def test_a_flavor_without_loaded_extra_specs_has_no_such_disks(self):
        self.assertFalse(self.read(None))


class MemmapTest(base.BaseTestCase):

    def read(self, **extra_specs):
        return spec.FakeDaxSpec.from_flavor(Flavor({
            f'fakedax:{key}': value for key, value in extra_specs.items()}))

    def test_the_flavor_says_where_the_memmap_is(self):
        self.assertTrue(self.read(disks='root', memmap='device').memmap)
        self.assertFalse(self.read(disks='root', memmap='guest').memmap)

    def test_where_it_is_by_default(self):
        self.assertTrue(self.read(disks='root').memmap)

    def test_another_value_is_refused(self):
        for value in '', 'Device', 'ram', 'true':
            exc = self.assertRaises(
                spec.InvalidSpec, self.read, disks='root', memmap=value)
            self.assertEqual(
                f"'{value}' is not a value of fakedax:memmap; allowed: "
                f"'device', 'guest'", str(exc))

    def test_it_is_refused_without_disks(self):
        self.assertIn('the flavor has fakedax:memmap, but not fakedax:disks',
                      str(self.assertRaises(
                          spec.InvalidSpec, self.read, memmap='guest')))


class VolumesTest(base.BaseTestCase):

    def wants(self, **extra_specs):
        """Whether the root volume and another are on fake DAX."""
        asked = _read(**extra_specs)
        return asked.wants_volume(root=True), asked.wants_volume(root=False)

    def test_none_unless_the_flavor_says_so(self):
        self.assertEqual((False, False), self.wants(disks='root'))
        self.assertEqual(
            (False, False), self.wants(disks='root', volumes='none'))

    def test_the_flavor_names_them(self):
        self.assertEqual((True, False), self.wants(volumes='boot'))
        self.assertEqual((True, True), self.wants(volumes='all'))

    def test_they_may_be_all_that_is_on_fake_dax(self):
        for value in 'boot', 'all':
            asked = _read(volumes=value)
            self.assertTrue(asked)
            self.assertEqual(frozenset(), asked.roles)
            self.assertFalse(asked.wants('disk'))
            flavor = Flavor({'fakedax:volumes': value}, root_gb=0,
                            ephemeral_gb=0)
            asked.check_flavor(flavor)

    def test_none_of_them_and_no_disks_are_refused(self):
        self.assertEqual(
            "the flavor has fakedax:volumes, but not fakedax:disks; allowed: "
            "fakedax:disks with 'root', 'ephemeral', 'root,ephemeral', or "
            "fakedax:volumes with 'boot', 'all'",
            str(self.assertRaises(
                spec.InvalidSpec, _read, volumes='none')))

    def test_another_value_is_refused(self):
        for value in '', 'root', 'Boot', 'data', 'true':
            exc = self.assertRaises(spec.InvalidSpec, _read, volumes=value)
            self.assertEqual(
                f"'{value}' is not a value of fakedax:volumes; allowed: "
                f"'none', 'boot', 'all'", str(exc))

    def test_what_it_boots_from(self):
        for asked, image, volume in (
            ({'disks': 'root'}, True, False),
            ({'disks': 'ephemeral'}, False, False),
            ({'volumes': 'boot'}, False, True),
            ({'volumes': 'all'}, False, True),
            ({'disks': 'root', 'volumes': 'boot'}, True, True),
        ):
            asked = _read(**asked)
            self.assertEqual(
                (image, volume),
                (asked.wants_root(False), asked.wants_root(True)))


class CheckBootTest(base.BaseTestCase):
    """No server silently gets an ordinary root disk."""

    def test_what_the_flavor_is_for(self):
        for asked, from_volume in (
            ({'disks': 'root'}, False),
            ({'disks': 'ephemeral'}, False),
            ({'disks': 'ephemeral'}, True),
            ({'volumes': 'boot'}, True),
            ({'volumes': 'all'}, True),
            # Volumes that are attached to it are on fake DAX, and no others.
            ({'volumes': 'all'}, False),
            ({'disks': 'root', 'volumes': 'boot'}, True),
            ({'disks': 'root', 'volumes': 'boot'}, False),
        ):
            _read(**asked).check_boot(from_volume)

    def refused(self, from_volume, **extra_specs):
        return str(self.assertRaises(
            spec.InvalidSpec, _read(**extra_specs).check_boot, from_volume))

    def test_a_volume_where_a_file_should_be(self):
        self.assertEqual(
            "fakedax:disks names the root disk, but the server boots from a "
            "volume; allowed: an image, or a flavor with "
            "fakedax:volumes='boot' as well",
            self.refused(True, disks='root,ephemeral'))

    def test_an_image_where_a_volume_should_be(self):
        for disks in {}, {'disks': 'ephemeral'}:
            self.assertEqual(
                "fakedax:volumes names the root volume, but the server boots "
                "from an image; allowed: a volume, or a flavor with "
                "fakedax:disks='root' as well",
                self.refused(False, volumes='boot', **disks))


class VolumesRamTest(base.BaseTestCase):
    """The memmap of a volume takes 16 MiB of RAM for each GiB."""

    def check(self, memory_mb, *gib, **extra_specs):
        flavor = Flavor({
            f'fakedax:{key}': value for key, value in extra_specs.items()},
            memory_mb=memory_mb, root_gb=2)
        spec.FakeDaxSpec.from_flavor(flavor).check_volumes_ram(
            flavor, [int(size * (1 << 30)) for size in gib])

    def refused(self, *args, **extra_specs):
        return str(self.assertRaises(
            spec.InvalidSpec, self.check, *args, **extra_specs))

    def test_as_much_as_they_take(self):
        self.check(64 + 16 * 30, 10, 20, volumes='all')
        self.assertEqual(
            "the flavor's RAM is 543 MiB, and 30 GiB of volumes and 0 GiB of "
            "disk take 480 MiB of it; allowed: 544 MiB or more, or volumes "
            "with a memmap of their own",
            self.refused(63 + 16 * 30, 10, 20, volumes='all'))

    def test_no_volumes_take_none(self):
        self.check(64, volumes='all')

    def test_a_part_of_a_mib_counts_as_one(self):
        self.check(65, 0.01, volumes='boot')
        self.refused(64, 0.01, volumes='boot')

    def test_disks_whose_memmap_is_in_the_guest_count_too(self):
        self.check(64 + 32, 2, volumes='all', disks='root')
        self.check(64 + 64, 2, volumes='all', disks='root', memmap='guest')
        self.refused(63 + 64, 2, volumes='all', disks='root', memmap='guest')


class TableTest(base.BaseTestCase):
    """A new extra spec is a row of the table."""

    def setUp(self):
        super().setUp()
        row = spec.ExtraSpec('fakedax:speed', ('slow', 'fast'), 'A test.')
        patch = mock.patch.dict(spec.EXTRA_SPECS, {row.key: row})
        patch.start()
        self.addCleanup(patch.stop)

    def refused(self, extra_specs):
        return str(self.assertRaises(
            spec.InvalidSpec, spec.FakeDaxSpec.from_flavor,
            Flavor(extra_specs)))

    def test_it_can_be_with_disks(self):
        self.assertEqual(ROOT, spec.FakeDaxSpec.from_flavor(Flavor({
            'fakedax:speed': 'slow', 'fakedax:disks': 'root'})).roles)

    def test_it_is_refused_without_disks(self):
        self.assertEqual(
            "the flavor has fakedax:speed, but not fakedax:disks; allowed: "
            "fakedax:disks with 'root', 'ephemeral', 'root,ephemeral', or "
            "fakedax:volumes with 'boot', 'all'",
            self.refused({'fakedax:speed': 'slow'}))

    def test_its_values_are_checked(self):
        self.assertEqual(
            "'warp' is not a value of fakedax:speed; allowed: 'slow', 'fast'",
            self.refused({'fakedax:speed': 'warp', 'fakedax:disks': 'root'}))

    def test_it_is_named_among_those_allowed(self):
        self.assertEqual(
            "'fakedax:x' is not an extra spec of fake DAX; "
            "allowed: fakedax:disks, fakedax:volumes, fakedax:memmap, "
            "fakedax:speed",
            self.refused({'fakedax:x': 'slow'}))

    def test_the_api_gets_a_validator_for_it(self):
        validators = {validator.name: validator
                      for validator in extra_specs.register()}
        self.assertEqual(['slow', 'fast'],
                         validators['fakedax:speed'].value['enum'])
        validators['fakedax:speed'].validate('fakedax:speed', 'fast')
        self.assertRaises(
            exception.ValidationError, validators['fakedax:speed'].validate,
            'fakedax:speed', 'warp')


class CheckFlavorTestCase(base.BaseTestCase):

    def check(self, disks, extra_specs=None, **sizes):
        flavor = Flavor({'fakedax:disks': disks, **(extra_specs or {})},
                        **sizes)
        spec.FakeDaxSpec.from_flavor(flavor).check_flavor(flavor)

    def refused(self, *args, **kwargs):
        return str(self.assertRaises(
            spec.InvalidSpec, self.check, *args, **kwargs))


class CheckFlavorTest(CheckFlavorTestCase):

    def test_a_disk_that_is_not_named_may_be_0_gib(self):
        self.check('root', ephemeral_gb=0)
        self.check('ephemeral', root_gb=0)

    def test_extra_specs_that_only_look_like_a_conflict(self):
        self.check('root', {
            'hw:pmem_x': 'yes', 'my:hw:pmem': 'yes', 'quota:cpu_shares': '9',
            'quota:vif_inbound_average': '9', 'disk_read_bytes_sec': '9',
            'resources1:CUSTOM_VGPU': '1', 'my_resources:VGPU': '1'})

    def test_each_conflict_of_the_table_is_tested(self):
        self.assertEqual(
            [], [conflict for conflict in spec.CONFLICTS if not any(
                conflict.keys.fullmatch(key)
                for key in [*CONFLICTS, 'trait:CUSTOM_FAKEDAX'])])

    def test_a_trait_that_every_host_for_it_has_cannot_be_forbidden(self):
        for group in ('', '1', '_A'):
            key = f'trait{group}:CUSTOM_FAKEDAX'
            self.check('root', {key: 'required'})
            self.assertEqual(
                f"{key}='forbidden' is incompatible with fakedax:disks: only "
                f"a host with this trait can run it",
                self.refused('root', {key: 'forbidden'}))
        self.check('root', {'trait:CUSTOM_FAKEDAX_MIGRATION': 'forbidden',
                            'trait:CUSTOM_OTHER': 'forbidden'})


#: Keys that no flavor can have with fakedax:disks, and why.
CONFLICTS = {
    'pci_passthrough:alias': 'pins the whole image',
    'resources:VGPU': 'pins the whole image',
    'accel:device_profile': 'pins the whole image',
    'hw:cpu_realtime': 'locked memory',
    'hw:locked_memory': 'locked memory',
    'hw:pmem': 'real and fake persistent memory',
    'resources1:VGPU': 'pins the whole image',
    'resources_GPU-1:VGPU': 'pins the whole image',
    'resources:CUSTOM_PMEM_NAMESPACE_4GB': 'real and fake persistent memory',
    'resources1:CUSTOM_PMEM_NAMESPACE_4GB': 'real and fake persistent memory',
    'hw:mem_encryption': 'encrypted guest memory',
    'hw:ephemeral_encryption': 'an encrypted image',
} | {
    f'quota:disk_{key}': 'nothing limits' for key in (
        'read_bytes_sec', 'read_iops_sec', 'write_bytes_sec',
        'write_iops_sec', 'total_bytes_sec', 'total_iops_sec',
        'total_iops_sec_max', 'io_limit')
}


class RamTest(CheckFlavorTestCase):
    """The memmap takes 16 MiB of the guest's RAM for each GiB of disk."""

    def test_too_little_is_refused_with_the_figures(self):
        self.assertEqual(
            "the flavor's RAM is 256 MiB, and with fakedax:memmap='guest' 20 "
            "GiB of disk take 320 MiB of it; allowed: 384 MiB or more, or "
            "fakedax:memmap='device'",
            self.refused('root', {'fakedax:memmap': 'guest'}, root_gb=20,
                         memory_mb=256))

    def test_as_much_as_it_takes(self):
        self.check('root', {'fakedax:memmap': 'guest'}, root_gb=20,
                   memory_mb=384)
        self.refused('root', {'fakedax:memmap': 'guest'}, root_gb=20,
                     memory_mb=383)

    def test_all_disks_on_fake_dax_count_and_no_others(self):
        for disks, ram in (('root', 224), ('ephemeral', 384),
                           ('root,ephemeral', 544)):
            for memory_mb, check in ((ram, self.check),
                                     (ram - 1, self.refused)):
                check(disks, {'fakedax:memmap': 'guest'}, root_gb=10,
                      ephemeral_gb=20, memory_mb=memory_mb)

    def test_on_the_device_it_takes_none(self):
        self.check('root', {'fakedax:memmap': 'device'}, root_gb=1000,
                   memory_mb=64)


class RootDiskOf0GibTest(CheckFlavorTestCase):

    scenarios = [(disks, {'disks': disks}) for disks in (
        'root', 'root,ephemeral')]

    def test_it_is_refused(self):
        self.assertEqual(
            "fakedax:disks names the root disk, but the flavor's disk is "
            "0 GiB; allowed: 1 GiB or more",
            self.refused(self.disks, root_gb=0))


class EphemeralDiskOf0GibTest(CheckFlavorTestCase):

    scenarios = [(disks, {'disks': disks}) for disks in (
        'ephemeral', 'root,ephemeral')]

    def test_it_is_refused(self):
        self.assertEqual(
            "fakedax:disks names the ephemeral disk, but the flavor's "
            "ephemeral disk is 0 GiB; allowed: 1 GiB or more",
            self.refused(self.disks, ephemeral_gb=0))


class ConflictTest(CheckFlavorTestCase):

    scenarios = testscenarios.multiply_scenarios(
        [(key, {'key': key, 'why': why}) for key, why in CONFLICTS.items()],
        [(disks, {'disks': disks}) for disks in ('root', 'ephemeral')])

    def test_it_is_refused_by_key_and_value(self):
        message = self.refused(self.disks, {self.key: 'Yes'})
        self.assertIn(
            f"{self.key}='Yes' is incompatible with fakedax:disks: ", message)
        self.assertIn(self.why, message)


class DiskLimitsOfNovaTest(base.BaseTestCase):

    def test_each_of_them_is_a_conflict(self):
        """Fails when Nova has more of them."""
        tuned = types.SimpleNamespace()
        libvirt_imagebackend.Image.disk_qos(
            None, tuned, {key: '9' for key in CONFLICTS})
        self.assertEqual(6, len(vars(tuned)))
        self.assertEqual(6, inspect.getsource(
            libvirt_imagebackend.Image.disk_qos).count("_sec'"))


class SwitchedOffConflictTest(CheckFlavorTestCase):

    scenarios = [(repr(value), {'value': value}) for value in (
        'no', 'False', '0', 'off', '')]

    def test_it_is_no_conflict(self):
        self.check('root', {'hw:cpu_realtime': self.value,
                            'hw:locked_memory': self.value})


class CheckImageTest(base.BaseTestCase):

    def test_each_conflict_of_an_image_is_tested(self):
        self.assertEqual(set(IMAGE_CONFLICTS), {
            conflict.image_property for conflict in spec.CONFLICTS} - {''})

    def test_an_ephemeral_disk_needs_no_such_image(self):
        _read(disks='ephemeral').check_image({})


#: Properties that no image can have with fakedax:disks, and why.
IMAGE_CONFLICTS = {
    'hw_locked_memory': 'locked memory',
    'hw_mem_encryption': 'encrypted guest memory',
    'hw_ephemeral_encryption': 'an encrypted image cannot be mapped',
}


class ImageConflictTest(base.BaseTestCase):

    scenarios = [(name, {'name': name, 'why': why})
                 for name, why in IMAGE_CONFLICTS.items()]

    def test_it_is_refused_by_property_and_value(self):
        for disks in ('root', 'ephemeral'):
            message = str(self.assertRaises(
                spec.InvalidImage, _read(disks=disks).check_image_conflicts,
                {self.name: 'Yes'}))
            self.assertIn(
                f"the image's property {self.name}='Yes' is incompatible "
                f"with fakedax:disks: ", message)
            self.assertIn(self.why, message)

    def test_it_can_be_switched_off(self):
        for value in ('no', 'False', False, '0', ''):
            _read(disks='root').check_image_conflicts({self.name: value})


class ImageForFakeDaxTest(base.BaseTestCase):

    scenarios = [(repr(value), {'value': value}) for value in (
        'true', 'True', 'yes', '1', 'on', True)]

    def test_it_is_taken(self):
        _read(disks='root').check_image({'fakedax_guest': self.value})


class OtherImageTest(base.BaseTestCase):

    scenarios = [(repr(properties), {'properties': properties})
                 for properties in (
                     {}, {'fakedax_guest': ''}, {'fakedax_guest': 'false'},
                     {'fakedax_guest': 'maybe'}, {'fakedax_guest': None},
                     {'fakedax_guests': 'true'})]

    def test_it_is_refused_by_property(self):
        value = self.properties.get('fakedax_guest', '')
        for disks in ('root', 'root,ephemeral'):
            exc = self.assertRaises(
                spec.InvalidImage, _read(disks=disks).check_image,
                self.properties)
            self.assertEqual(
                f"fakedax:disks names the root disk, but the image's "
                f"property fakedax_guest is '{value}'; allowed: 'true', for "
                f"an image whose guest mounts its root from /dev/pmem0",
                str(exc))


class CheckDisksTest(base.BaseTestCase):

    def test_the_disks_that_are_named_must_be_there(self):
        _read(disks='root,ephemeral').check_disks(BOTH)
        _read(disks='root').check_disks(BOTH)
        spec.FakeDaxSpec().check_disks(frozenset())

    def test_a_disk_that_is_no_file_is_refused(self):
        for role in BOTH:
            exc = self.assertRaises(
                spec.InvalidSpec, _read(disks='root,ephemeral').check_disks,
                BOTH - {role})
            self.assertEqual(
                f"fakedax:disks names the {role} disk, but the instance's is "
                f"a volume or there is none; allowed: a disk that Nova makes "
                f"as a file", str(exc))
