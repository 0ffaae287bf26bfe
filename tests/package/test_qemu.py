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

"""QEMU's packages with the device, over Debian's own.

They take too long for CI to build: where qemu-device/package has not built
them, nothing is tested.
"""

import os
import pathlib
import shutil
import subprocess

from lab import paths
from tests.package import base

HELP = 'qemu-system-x86_64 -device virtio-pmem-pci,help'

#: Of the device, and not of QEMU's own.
PROPERTY = 'drop-cache='


class UpgradeTest(base.RootTestCase):

    suite = 'trixie'
    # One of each kind that has to be of the same version.
    names = ('qemu-system-x86', 'qemu-system-modules-spice',
             'qemu-block-extra', 'qemu-utils')

    def setUp(self) -> None:
        built = subprocess.run(
            [paths.ROOT / 'qemu-device/package', '--release', self.suite,
             '--cached'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A test's home directory is not the user's.
            env=os.environ | {'XDG_CACHE_HOME': str(paths.CACHE.parent)},
            text=True)
        if built.returncode:
            self.skipTest(built.stderr.strip())
        super().setUp()
        for package in pathlib.Path(built.stdout.strip()).glob('*.deb'):
            shutil.copy(package, self.shared)

    def version(self) -> str:
        """The one version of all binary packages of QEMU's source."""
        versions = set(self.output_of(
            "dpkg-query -W -f '${source:Package} ${Version}\\n' | "
            "sed -n 's/^qemu //p'").split())
        [version] = versions - {self.data_version()}
        return version

    def data_version(self) -> str:
        """That of what is the same on all architectures."""
        return self.output_of(
            "dpkg-query -W -f '${Version}' qemu-system-data")

    def test_upgrade_and_back(self) -> None:
        debians = self.data_version()
        self.assertNotIn(PROPERTY, self.output_of(HELP))

        log = self.output_of(
            'apt-get install --yes --only-upgrade /mnt/*.deb')
        self.assertIn(' 0 newly installed, 0 to remove', log)
        self.assertEqual(f'{debians}+fakedax1', self.version())
        self.assertIn(PROPERTY, self.output_of(HELP))
        # Modules of another build are not loaded.
        self.assertIn('qxl-vga', self.output_of(
            'qemu-system-x86_64 -device help'))
        self.output_of('''
            qemu-img create -q -f raw /tmp/image 64M
            echo quit | qemu-system-x86_64 -display none -S -monitor stdio \
                -machine q35,accel=tcg -m 256M,slots=1,maxmem=1G \
                -object memory-backend-file,id=image,share=on,size=64M,\
mem-path=/tmp/image \
                -device virtio-pmem-pci,memdev=image''')

        self.output_of('''
            cd /var/cache/apt/archives
            apt-get install --yes --allow-downgrades ./qemu-*.deb''')
        self.assertNotIn(PROPERTY, self.output_of(HELP))
        self.output_of('test -z "$(dpkg --audit)"')
