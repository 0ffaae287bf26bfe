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

"""A test of one libvirt and one image."""

import pathlib
import shutil
import tempfile
from typing import Any

from oslo_utils import units
from oslotest import base

from lab.machine import emulators
from nova_fakedax import domain
from nova_fakedax import layout
from tests.libvirt import guests
from tests.libvirt import hosts


class OneHostTestCase(base.BaseTestCase):

    #: What the test's host is.
    HOST: type[hosts.Host] = hosts.Host

    def setUp(self) -> None:
        super().setUp()
        # Short: the path of a UNIX socket has at most 107 bytes.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='libvirt-'))
        self.addCleanup(shutil.rmtree, self.directory)
        self.image = self.directory / 'instance/disk'
        self.image.parent.mkdir()
        self.host = self.HOST(1, self.directory)
        up = self.host.up({}, 1)
        up.__enter__()
        self.addCleanup(up.__exit__, None, None, None)

    def make_image(self, source: pathlib.Path, size: int) -> None:
        """Make the image, with a memmap.

        :param size: bytes of content
        """
        layout.make(str(self.image), str(source), size, True)

    def connect(self) -> Any:
        """A connection to libvirt, until the test ends."""
        connected = self.host.libvirt()
        connection = connected.__enter__()
        self.addCleanup(connected.__exit__, None, None, None)
        return connection


class BootViewTestCase(OneHostTestCase):
    """A test of what libvirt does to an image that has a boot view."""

    def setUp(self) -> None:
        super().setUp()
        source = self.directory / 'source'
        source.write_bytes(b'content')
        self.make_image(source, 4 * units.Mi)
        self.connection = self.connect()

    def xml(self, *models: str) -> str:
        """A guest that boots from the image by its boot view.

        :param models: of the host's security drivers, those that must leave
            the view alone
        """
        made = guests.guest('guest', self.image)
        made.os_boot_dev = ['hd']
        domain.convert(made, str(self.image.parent), lambda _path: True,
                       emulators.project(), models)
        xml: str = made.to_xml()
        return xml
