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
from nova import exception
from oslotest import base

from nova_fakedax import disk
from nova_fakedax import extra_specs
from nova_fakedax import spec

ROOT = frozenset({disk.ROOT})
EPHEMERAL = frozenset({disk.EPHEMERAL})
BOTH = ROOT | EPHEMERAL


class Flavor:
    """As nova.objects.Flavor: extra specs may not be loaded."""

    def __init__(self, extra_specs=None, root_gb=1, ephemeral_gb=1):
        self.root_gb = root_gb
        self.ephemeral_gb = ephemeral_gb
        if extra_specs is not None:
            self.extra_specs = extra_specs

    def __contains__(self, field):
        return hasattr(self, field)


def _read(**extra_specs):
    return spec.FakeDaxSpec.from_flavor(Flavor(
        {f'fakedax:{key}': value for key, value in extra_specs.items()}))


@ddt.ddt
class FromFlavorTest(base.BaseTestCase):

    @ddt.data(('root', ROOT), ('ephemeral', EPHEMERAL),
              ('root,ephemeral', BOTH))
    @ddt.unpack
    def test_the_value_names_the_disks(self, value, roles):
        self.assertEqual(roles, _read(disks=value).roles)
        self.assertTrue(_read(disks=value))

    def test_a_flavor_without_such_extra_specs_asks_for_nothing(self):
        flavor = Flavor({'hw:cpu_policy': 'dedicated', 'fakedaxes': 'root',
                         'trait:CUSTOM_FAKEDAX': 'required'})
        self.assertFalse(spec.FakeDaxSpec.from_flavor(flavor))

    def test_a_flavor_whose_extra_specs_are_not_loaded_asks_for_nothing(self):
        self.assertFalse(spec.FakeDaxSpec.from_flavor(Flavor()))

    @ddt.data('', 'root,root', 'ephemeral,root', 'root, ephemeral', 'Root',
              'all', 'true', ' root')
    def test_an_unknown_value_is_refused_by_name(self, value):
        exc = self.assertRaises(spec.InvalidSpec, _read, disks=value)
        self.assertEqual(
            f"'{value}' is not a value of fakedax:disks; "
            f"allowed: 'root', 'ephemeral', 'root,ephemeral'", str(exc))

    @ddt.data('fakedax:disk', 'fakedax:', 'fakedax', 'fakedax:disks:root')
    def test_an_unknown_key_is_refused_by_name(self, key):
        flavor = Flavor({key: 'root', 'fakedax:disks': 'root'})
        exc = self.assertRaises(
            spec.InvalidSpec, spec.FakeDaxSpec.from_flavor, flavor)
        self.assertEqual(
            f"'{key}' is not an extra spec of fake DAX; "
            f"allowed: fakedax:disks", str(exc))


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
            "fakedax:disks with 'root', 'ephemeral', 'root,ephemeral'",
            self.refused({'fakedax:speed': 'slow'}))

    def test_its_values_are_checked(self):
        self.assertEqual(
            "'warp' is not a value of fakedax:speed; allowed: 'slow', 'fast'",
            self.refused({'fakedax:speed': 'warp', 'fakedax:disks': 'root'}))

    def test_it_is_named_among_those_allowed(self):
        self.assertEqual(
            "'fakedax:x' is not an extra spec of fake DAX; "
            "allowed: fakedax:disks, fakedax:speed",
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


@ddt.ddt
class WantsTest(base.BaseTestCase):

    @ddt.data(('root', ['disk']),
              ('ephemeral', ['disk.local', 'disk.eph0', 'disk.eph1']),
              ('root,ephemeral',
               ['disk', 'disk.local', 'disk.eph0', 'disk.eph1']))
    @ddt.unpack
    def test_only_the_named_disks_are_wanted(self, value, wanted):
        wants = _read(disks=value).wants
        self.assertEqual(wanted, [name for name in (
            'disk', 'disk.local', 'disk.eph0', 'disk.eph1', 'disk.swap',
            'disk.config', 'disk.rescue', 'kernel') if wants(name)])

    def test_no_disk_is_wanted_by_an_ordinary_flavor(self):
        self.assertFalse(spec.FakeDaxSpec().wants('disk'))


@ddt.ddt
class CheckFlavorTest(base.BaseTestCase):

    def _check(self, disks, **kwargs):
        extra_specs = {'fakedax:disks': disks, **kwargs.pop('extra', {})}
        flavor = Flavor(extra_specs, **kwargs)
        spec.FakeDaxSpec.from_flavor(flavor).check_flavor(flavor)

    @ddt.data('root', 'root,ephemeral')
    def test_a_root_disk_of_0_gib_is_refused(self, disks):
        exc = self.assertRaises(
            spec.InvalidSpec, self._check, disks, root_gb=0)
        self.assertEqual(
            "fakedax:disks names the root disk, but the flavor's disk is "
            "0 GiB; allowed: 1 GiB or more", str(exc))

    @ddt.data('ephemeral', 'root,ephemeral')
    def test_an_ephemeral_disk_that_there_is_not_is_refused(self, disks):
        exc = self.assertRaises(
            spec.InvalidSpec, self._check, disks, ephemeral_gb=0)
        self.assertEqual(
            "fakedax:disks names the ephemeral disk, but the flavor's "
            "ephemeral disk is 0 GiB; allowed: 1 GiB or more", str(exc))

    def test_a_disk_that_is_not_named_may_be_0_gib(self):
        self._check('root', ephemeral_gb=0)
        self._check('ephemeral', root_gb=0)

    @ddt.data(*spec.CONFLICTS)
    def test_a_conflict_is_refused_by_key_and_value(self, key):
        exc = self.assertRaises(
            spec.InvalidSpec, self._check, 'root', extra={key: 'Yes'})
        self.assertEqual(
            f"{key}='Yes' is incompatible with fakedax:disks: "
            f"{spec.CONFLICTS[key]}", str(exc))

    @ddt.data('pci_passthrough:alias', 'resources:VGPU', 'hw:cpu_realtime',
              'hw:locked_memory', 'hw:pmem', 'hw:mem_encryption',
              'accel:device_profile')
    def test_what_the_design_refuses_is_a_conflict(self, key):
        self.assertIn(key, spec.CONFLICTS)

    @ddt.data('no', 'False', '0', 'off', '')
    def test_a_conflict_that_is_switched_off_is_none(self, value):
        self._check('root', extra={'hw:cpu_realtime': value,
                                   'hw:locked_memory': value})


@ddt.ddt
class CheckImageTest(base.BaseTestCase):

    @ddt.data('true', 'True', 'yes', '1', 'on', True)
    def test_an_image_that_knows_fake_dax_is_taken(self, value):
        _read(disks='root').check_image({'fakedax_guest': value})

    @ddt.data({}, {'fakedax_guest': ''}, {'fakedax_guest': 'false'},
              {'fakedax_guest': 'maybe'}, {'fakedax_guest': None},
              {'fakedax_guests': 'true'})
    def test_another_image_is_refused_by_property(self, properties):
        value = properties.get('fakedax_guest', '')
        for disks in ('root', 'root,ephemeral'):
            exc = self.assertRaises(
                spec.InvalidImage, _read(disks=disks).check_image, properties)
            self.assertEqual(
                f"fakedax:disks names the root disk, but the image's "
                f"property fakedax_guest is '{value}'; allowed: 'true', for "
                f"an image whose guest mounts its root from /dev/pmem0",
                str(exc))

    def test_an_ephemeral_disk_needs_no_such_image(self):
        _read(disks='ephemeral').check_image({})


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


@ddt.ddt
class CheckResizeTest(base.BaseTestCase):

    @ddt.data(frozenset(), ROOT, EPHEMERAL, BOTH)
    def test_to_a_flavor_with_the_same_disks(self, roles):
        spec.FakeDaxSpec(roles).check_resize(spec.FakeDaxSpec(roles))

    @ddt.data((frozenset(), BOTH, 'root,ephemeral', ''),
              (ROOT, frozenset(), '', 'root'),
              (ROOT, EPHEMERAL, 'ephemeral', 'root'))
    @ddt.unpack
    def test_to_another_is_refused_by_both_values(
            self, old, new, given, allowed):
        exc = self.assertRaises(
            spec.InvalidSpec, spec.FakeDaxSpec(old).check_resize,
            spec.FakeDaxSpec(new))
        self.assertIn(
            f"fakedax:disks is '{given}' in the new flavor; allowed: "
            f"'{allowed}'", str(exc))
