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


"""A guest whose RAM is huge pages (hw:mem_page_size=large).

Asked of libvirt without starting the guest: this machine need have no huge
pages.
"""

import dataclasses
import json
import pathlib
import re
import typing as ty

from nova.virt.libvirt import config as vconfig
from oslo_utils import units

from lab.machine import emulators
from nova_fakedax import domain
from tests.libvirt import base
from tests.libvirt import guests
from tests.libvirt import hosts


@dataclasses.dataclass(frozen=True)
class HugePagesHost(hosts.Host):
    """A host that has hugetlbfs mounted."""

    @property
    def huge_pages(self) -> pathlib.Path:
        return self.directory / 'huge'

    def _render(self, number_of_hosts: int) -> None:
        super()._render(number_of_hosts)
        with (self.state / 'etc/qemu.conf').open('a') as conf:
            conf.write(f'hugetlbfs_mount = "{self.huge_pages}"\n')
        # In its namespace, so that the mount ends with it.
        self.huge_pages.mkdir()
        hold = self.state / 'hold.sh'
        hold.write_text(hold.read_text().replace(
            'exec "$@"', 'mount -t hugetlbfs -o pagesize=2M none '
            f'{self.huge_pages}\nexec "$@"'))


class HugePagesTest(base.OneHostTestCase):

    HOST = HugePagesHost

    def backends(self, guest: vconfig.LibvirtConfigGuest
                 ) -> list[dict[str, ty.Any]]:
        """What libvirt tells QEMU of the guest's memory."""
        command = self.connect().domainXMLToNative(
            'qemu-argv', guest.to_xml())
        return [json.loads(each) for each in re.findall(
            r"-object '(\{\"qom-type\":\"memory-backend.*?\})'", command)]

    def test_the_image_is_mapped_as_without_them(self) -> None:
        source = self.directory / 'source'
        source.write_bytes(b'content')
        self.make_image(source, 4 * units.Mi)
        made = guests.guest('guest', self.image)
        made.os_boot_dev = ['hd']
        made.membacking = vconfig.LibvirtConfigGuestMemoryBacking()
        page = vconfig.LibvirtConfigGuestMemoryBackingPage()
        page.size_kb = 2 * units.Ki
        page.nodeset = [0]
        made.membacking.hugepages = [page]
        domain.convert(made, str(self.image.parent), lambda _path: True,
                       emulators.project())
        ram, image = self.backends(made)
        self.assertIn(str(self.host.huge_pages), ram['mem-path'])
        # Not all of it read into memory, either (prealloc).
        self.assertEqual(
            {'qom-type': 'memory-backend-file', 'id': 'memua-fakedax-root',
             'mem-path': str(self.image), 'share': True,
             'size': self.image.stat().st_size}, image)
