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

"""How libvirt labels an image where SELinux confines guests.

The kernel of this machine may not have SELinux, so libvirt asks a library
(selinux.c) in place of libselinux. It labels files; nothing is enforced.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import os
import pathlib
import subprocess

import libvirt
from lxml import etree

from tests.libvirt import base
from tests.libvirt import hosts

_ATTRIBUTE = 'trusted.test.selinux'

#: The policy's files that libvirt reads: for a guest's process with KVM and
#: with TCG, and for its files, writable and not.
_CONTEXTS = {
    'DOMAIN': 'system_u:system_r:svirt_t:s0\n'
              'system_u:system_r:svirt_tcg_t:s0\n',
    'IMAGE': 'system_u:object_r:svirt_image_t:s0\n'
             'system_u:object_r:virt_content_t:s0\n',
}


@dataclasses.dataclass(frozen=True)
class SelinuxHost(hosts.Host):
    """A host whose libvirt takes it for one with SELinux."""

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            'LIBVIRTD_PRELOAD': str(self.state / 'selinux.so'),
            **{f'TEST_SELINUX_{name}': str(self.state / name)
               for name in _CONTEXTS}}

    def _render(self, number_of_hosts: int) -> None:
        super()._render(number_of_hosts)
        for name, text in _CONTEXTS.items():
            (self.state / name).write_text(text)
        subprocess.run(
            ['cc', '-shared', '-fPIC', '-Wall', '-Werror', '-o',
             self.state / 'selinux.so',
             pathlib.Path(__file__).with_name('selinux.c')], check=True)
        conf = self.state / 'etc/qemu.conf'
        conf.write_text(conf.read_text().replace(
            'security_driver = "none"', 'security_driver = "selinux"').replace(
            'remember_owner = 0', 'remember_owner = 1'))


class SelinuxTest(base.BootViewTestCase):

    HOST = SelinuxHost

    def label(self) -> str:
        """The image's, '' if it has none."""
        with contextlib.suppress(OSError):
            return os.getxattr(self.image, _ATTRIBUTE).decode()
        return ''

    @contextlib.contextmanager
    def guest(self, *models: str) -> Iterator[str]:
        """A guest while it runs; the label that its own files have."""
        running = self.connection.createXML(
            self.xml(*models), libvirt.VIR_DOMAIN_START_PAUSED)
        try:
            yield etree.fromstring(running.XMLDesc()).findtext(
                "seclabel[@model='selinux']/imagelabel")
        finally:
            running.destroy()

    def test_the_guest_may_write_to_its_image(self) -> None:
        for _again in range(2):
            with self.guest('dac', 'selinux') as own:
                self.assertIn(':svirt_image_t:', own)
                self.assertEqual(own, self.label())
            self.assertIn(':virt_image_t:', self.label())

    def test_libvirt_leaves_it_labelled_as_read_only_otherwise(self) -> None:
        """What the boot view without a label is for."""
        with self.guest():
            pass
        self.assertIn(':virt_content_t:', self.label())
