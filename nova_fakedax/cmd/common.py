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
"""What commands share: libvirt, the choice of servers, and how rows look."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import contextlib
import typing as ty

from cliff import lister
from nova import conf as nova_conf
from oslo_utils import units

from nova_fakedax import inventory


class HostLister(lister.Lister):
    """A command that prints a table.

    :ivar failed: whether the exit status says so
    """

    failed = False

    def run(self, parsed_args: argparse.Namespace) -> int:
        return super().run(parsed_args) or int(self.failed)


class ServersLister(HostLister):
    """One whose rows are images of servers."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            'servers', nargs='*', metavar='SERVER',
            help="Only servers with this UUID or name of libvirt's domain. "
                 "[default: all of this host]")
        return parser


def uri() -> str:
    """libvirt's, as nova.virt.libvirt.driver.LibvirtDriver._uri has it."""
    return nova_conf.CONF.libvirt.connection_uri or 'qemu:///system'


@contextlib.contextmanager
def libvirt() -> Iterator[ty.Any]:
    """A connection to the host's libvirt.

    :raises RuntimeError: there is none
    """
    # Imported here because libvirt-python is optional, as for Nova.
    import libvirt as bindings

    # Its messages go to the user by exceptions.
    bindings.registerErrorHandler(lambda *_args: None, None)
    try:
        connection = bindings.open(uri())
    except bindings.libvirtError as exc:
        raise RuntimeError(f'cannot connect to libvirt at {uri()}: {exc}')
    try:
        yield connection
    finally:
        connection.close()


def mib(size: int | None) -> str:
    """Bytes as MiB; ``-`` if they are not known."""
    return '-' if size is None else f'{size / units.Mi:.1f}'


def amount(size: int) -> str:
    """Bytes in words, for a sentence."""
    return (f'{mib(size)} MiB' if size >= units.Mi
            else f'{size // units.Ki} KiB')


def known(value: object) -> str:
    return '-' if value is None else str(value)


def title(image: inventory.Image) -> tuple[str, str]:
    return image.server, image.name
