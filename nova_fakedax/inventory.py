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
"""The disks on fake DAX of the guests that libvirt knows on this host.

For who has no nova-compute to ask: it need not run.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import typing as ty

from lxml import etree
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import guest as libvirt_guest

from nova_fakedax import disk
from nova_fakedax import domain
from nova_fakedax import monitor
from nova_fakedax import pagecache
from nova_fakedax import process

#: The device's counters (qemu-device/SPEC.rst).
_COUNTERS = ('requests', 'syncs', 'errors', 'sync-latency')


class NoSuchServer(Exception):
    """Names the server that is not here, and those that are."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A disk on fake DAX of a guest.

    :ivar server: the UUID of the guest's server
    :ivar disk: the disk
    :ivar guest: the guest, a nova.virt.libvirt.guest.Guest
    :ivar running: whether it runs
    """

    server: str
    disk: disk.FakeDaxDisk
    guest: libvirt_guest.Guest
    running: bool

    @property
    def name(self) -> str:
        """``root``, ``ephemeral0``, or the ID of a volume."""
        role, index = self.disk.id.role, self.disk.id.index
        if role == disk.VOLUME:
            return self.disk.id.volume
        return str(role) if role == disk.ROOT else f'{role}{index}'


@dataclasses.dataclass(frozen=True)
class Status:
    """How it is with an image.

    :ivar cached: what of it is in the host's page cache
    :ivar mapped: the bytes of these that QEMU has mapped, None if no QEMU runs
    :ivar locked: whether the guest's device holds the image's lock, None if
        that is not known
    :ivar requests: flushes that the guest asked for, None without our device
    :ivar syncs: those of the host that answered them
    :ivar errors: those of them that failed
    :ivar latency: of ``sync-latency``: the n-th counts the syncs that took 2^n
        to 2^(n+1) - 1 microseconds
    """

    cached: pagecache.Cached
    mapped: int | None = None
    locked: bool | None = None
    requests: int | None = None
    syncs: int | None = None
    errors: int | None = None
    latency: Sequence[int] | None = None

    @property
    def p50(self) -> float | None:
        """Half of the syncs took at most so many milliseconds."""
        return percentile(self.latency or [], 0.5)

    @property
    def p99(self) -> float | None:
        """99 of 100 did."""
        return percentile(self.latency or [], 0.99)


def images(
    connection: ty.Any, servers: Collection[str] = (),
) -> list[Image]:
    """The images of all guests, or of some servers.

    :param connection: a libvirt.virConnect
    :param servers: UUIDs, or libvirt's names; empty for all
    :raises NoSuchServer: one of them has no disk on fake DAX here
    """
    # Imported here because libvirt-python is optional, as for Nova.
    import libvirt

    found: list[Image] = []
    known: set[str] = set()
    for virt_domain in connection.listAllDomains():
        names = {virt_domain.UUIDString(), virt_domain.name()}
        try:
            of_guest = list(_images_of(virt_domain))
        except libvirt.libvirtError:
            # It has just gone.
            continue
        if of_guest:
            known |= names
            if not servers or names & set(servers):
                found += of_guest
    for server in servers:
        if server not in known:
            raise NoSuchServer(
                f"no server '{server}' with disks on fake DAX is on this "
                f"host; there {'are ' if known else 'is '}"
                f"{', '.join(sorted(known)) or 'none'}")
    # Of a server they are in order.
    return sorted(found, key=lambda image: image.server)


def _images_of(virt_domain: ty.Any) -> Iterator[Image]:
    xml = etree.fromstring(virt_domain.XMLDesc())
    parsed = vconfig.LibvirtConfigGuest()
    domain.parse_virtio_pmems(parsed, xml)
    for fake_dax_disk, _device in domain.fake_dax_disks(parsed):
        yield Image(virt_domain.UUIDString(), fake_dax_disk,
                    libvirt_guest.Guest(virt_domain),
                    bool(virt_domain.isActive()))


def status(image: Image) -> Status:
    """Look at an image, its QEMU and its device.

    :raises OSError: the image cannot be opened
    """
    cached = pagecache.of_file(image.disk.path)
    if not image.running:
        return Status(cached)
    try:
        counters = {name: monitor.device_property(
            image.guest, image.disk.id.alias, name) for name in _COUNTERS}
        locked = monitor.device_property(
            image.guest, image.disk.id.alias, 'locked')
    except monitor.MonitorError:
        # QEMU's own device, or the guest has just ended.
        return Status(cached, _mapped(image))
    return Status(
        cached, _mapped(image), locked, counters['requests'],
        counters['syncs'], counters['errors'], counters['sync-latency'])


def bucket_ends(latency: Sequence[int]) -> list[float]:
    """The milliseconds that the syncs of each bucket took at most.

    :param latency: as in :class:`Status`
    """
    return [float(2 << number) / 1000 for number in range(len(latency))]


def percentile(latency: Sequence[int], part: float) -> float | None:
    """The milliseconds that a part of the syncs took at most.

    :param latency: as in :class:`Status`
    :param part: such as 0.99
    :returns: the end of a bucket; None if there were no syncs
    """
    wanted = sum(latency) * part
    counted = 0
    for count, end in zip(latency, bucket_ends(latency)):
        counted += count
        if count and counted >= wanted:
            return end
    return None


def _mapped(image: Image) -> int | None:
    """The bytes of the image that are mapped by its QEMU."""
    pid = process.of_server(image.server)
    try:
        return None if pid is None else process.resident(pid, image.disk.path)
    except OSError:
        # It has just ended.
        return None
