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

"""A suite that has moved on, and a mirror that does not answer."""

import hashlib
import os
import pathlib
import tempfile
from unittest import mock

from oslotest import base as oslotest_base

from tests.package import base
from tests.package import container

PACKAGES = '''\
Package: nova-compute
Version: 2:34.0.0-4
Architecture: all
Depends: {depends}
Filename: nova-compute.deb
Size: 1

'''


class LookTest(oslotest_base.BaseTestCase):

    def look(self, series: str = '2:34.', depends: str = 'nova-compute',
             mirror: str | None = None) -> None:
        """Look for nova-compute on a mirror in a directory."""
        directory = pathlib.Path(tempfile.mkdtemp())
        packages = PACKAGES.format(depends=depends).encode()
        name = 'main/binary-amd64/Packages'
        listed = directory / 'dists/sid' / name
        listed.parent.mkdir(parents=True)
        listed.write_bytes(packages)
        (directory / 'dists/sid/Release').write_text(
            f'Suite: sid\nSHA256:\n {hashlib.sha256(packages).hexdigest()}'
            f' {len(packages)} {name}\n')
        mirror = mirror or f'file:{directory}'
        source = f'deb [trusted=yes arch=amd64] {mirror} sid main'
        with mock.patch.object(base, 'source', return_value=source):
            base.look('sid', ('nova-compute',), series)

    def test_a_suite_that_has_it(self) -> None:
        self.look()

    def test_another_series(self) -> None:
        exc = self.assertRaises(base.NotThere, self.look, series='2:33.')
        self.assertEqual('sid has nova-compute 2:34.0.0-4, not 2:33.*',
                         str(exc))

    def test_packages_that_do_not_fit_together(self) -> None:
        exc = self.assertRaises(base.NotThere, self.look, depends='gone')
        self.assertIn('Depends: gone but it is not installable', str(exc))

    def test_no_answer_is_an_error(self) -> None:
        """Not a reason to skip a test: nothing would tell that none ran."""
        exc = self.assertRaises(RuntimeError, self.look,
                                mirror='http://127.0.0.1:9')
        self.assertIn('cannot read sid', str(exc))


class CgroupTest(oslotest_base.BaseTestCase):
    """Of a container, in which everything runs."""

    def test_nothing_stays_of_it(self) -> None:
        if os.geteuid():
            self.skipTest('only root can make a cgroup')
        cgroup = container._make_cgroup()
        self.addCleanup(container._remove_cgroup, cgroup)
        made = [cgroup]
        systemd = container._mounted('cgroup .*name=systemd')
        if systemd:
            made.append(systemd / cgroup.relative_to(
                container._mounted('cgroup2 ')))
        for path in made:
            (path / 'payload').mkdir(parents=True)
        container._remove_cgroup(cgroup)
        self.assertEqual([], [path for path in made if path.exists()])
