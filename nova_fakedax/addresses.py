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

"""Whether a guest's physical addresses hold its RAM and its images.

QEMU maps the images above the RAM, and ends at once if they reach beyond the
guest's addresses ("phys-bits too low", pc_memory_init() of hw/i386/pc.c). The
images have been made by then, which may take long.
"""

from __future__ import annotations

from collections.abc import Sequence

from lxml import etree
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import host as libvirt_host
from oslo_config import cfg
from oslo_utils import units

from nova_fakedax import disk
from nova_fakedax import layout
from nova_fakedax import spec
from nova_fakedax import volumes

_GIB: int = units.Gi

#: The address bits of QEMU's x86 CPUs, but for those that have the host's
#: (TCG_PHYS_ADDR_BITS of target/i386/cpu.h).
_DEFAULT_BITS = 40

#: With so few bits a guest with a CPU of AMD must end where the addresses of
#: HyperTransport begin (AMD_HT_START of hw/i386/pc.c).
_AMD_HT_START = 1012 * _GIB


def check(
    conf: cfg.ConfigOpts, host: libvirt_host.Host, flavor: objects.Flavor,
    cpu: vconfig.LibvirtConfigGuestCPU | None, machine_type: str | None,
    attached: Sequence[volumes.Volume] = (),
) -> None:
    """Check that a guest of this flavor can be started on this host.

    :param conf: nova's configuration
    :param host: the connection to libvirt
    :param cpu: as LibvirtDriver._get_guest_cpu_config makes it
    :param machine_type: as nova.virt.libvirt.utils.get_machine_type has it
    :param attached: all volumes of the instance
    :raises nova.exception.InvalidInput: names the size, the limit and what
        raises it
    """
    bits = _bits(conf, host, cpu)
    if bits is None or not _is_pc(machine_type):
        return
    limit = 1 << bits
    if bits <= _DEFAULT_BITS and not _has_intel_cpu(conf, host):
        limit = min(limit, _AMD_HT_START)
    images = _images(conf, flavor, attached)
    end = _end(str(machine_type), flavor.memory_mb * units.Mi, images)
    if end > limit:
        # Short: a fault has 255 characters, and begins with 100 of Nova's.
        raise exception.InvalidInput(reason=_(
            '%(what)s of %(images)d GiB end at %(end)d GiB; the '
            'guest addresses %(limit)d GiB (%(bits)d bits); '
            'hw_maxphysaddr_mode and hw_maxphysaddr_bits of the image raise '
            'that') % {
                'what': ('disks on fake DAX and spare_volumes_gib'
                         if _has_room(conf, flavor) else 'disks on fake DAX'),
                'images': sum(images) // _GIB, 'end': end // _GIB,
                'limit': limit // _GIB, 'bits': bits})


def _is_pc(machine_type: str | None) -> bool:
    """Whether the machine has the memory map that _end() follows."""
    return machine_type in ('pc', 'q35') or str(machine_type).startswith(
        ('pc-i440fx-', 'pc-q35-'))


def _bits(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
    cpu: vconfig.LibvirtConfigGuestCPU | None,
) -> int | None:
    """The bits of the guest's physical addresses, None if not known."""
    mode = cpu.mode if cpu else None
    wanted = cpu.maxphysaddr if cpu else None
    if wanted and wanted.mode == 'emulate':
        return wanted.bits or None
    if wanted or mode in ('host-passthrough', 'maximum'):
        found = host.get_capabilities().host.cpu.maxphysaddr
        return (found.bits or None) if found else None
    if mode == 'host-model':
        return _host_model_bits(conf, host)
    return _DEFAULT_BITS


def _host_model_bits(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> int | None:
    """The bits that libvirt gives to a CPU of the host's model.

    Since 9.3 those of the host, as it says there.
    https://libvirt.org/formatdomaincaps.html#cpu-configuration
    """
    arch = host.get_capabilities().host.cpu.arch
    try:
        capabilities = host.get_connection().getDomainCapabilities(
            None, arch, None, conf.libvirt.virt_type, 0)
    except libvirt_host.libvirt.libvirtError:
        return None
    found = etree.fromstring(capabilities).find(
        "./cpu/mode[@name='host-model']/maxphysaddr")
    if found is None:
        return _DEFAULT_BITS
    return int(found.get('bits') or found.get('limit') or 0) or None


def _has_intel_cpu(conf: cfg.ConfigOpts, host: libvirt_host.Host) -> bool:
    """Whether it is certain that the guest's CPU is none of AMD."""
    vendor = host.get_capabilities().host.cpu.vendor
    return bool(conf.libvirt.virt_type == 'kvm' and vendor == 'Intel')


def _images(
    conf: cfg.ConfigOpts, flavor: objects.Flavor,
    attached: Sequence[volumes.Volume],
) -> list[int]:
    """The bytes of the images: at least, as ephemeral disks can be many.

    A root volume is there in place of a root disk. Volumes that may be
    attached later count as :mod:`.conf` has them.
    """
    wanted = spec.FakeDaxSpec.from_flavor(flavor)
    roles = wanted.roles - (
        {disk.ROOT} if any(volume.root for volume in attached) else set())
    sizes = [
        layout.planned(getattr(flavor, role.flavor_field) * _GIB,
                       wanted.memmap).file_size
        for role in sorted(roles)]
    sizes += [(volume.size or 0) * _GIB for volume in attached
              if wanted.wants_volume(volume.root)]
    if _has_room(conf, flavor):
        sizes += [conf.fakedax.spare_volumes_gib * _GIB,
                  *[0] * (conf.fakedax.spare_volumes - 1)]
    return sizes


def _has_room(conf: cfg.ConfigOpts, flavor: objects.Flavor) -> bool:
    """Whether guests of a flavor have room for more volumes."""
    wanted = spec.FakeDaxSpec.from_flavor(flavor)
    return bool(
        wanted.wants_volume(root=False) and conf.fakedax.spare_volumes)


def _end(machine_type: str, ram: int, images: Sequence[int]) -> int:
    """Where the last of a guest's addresses is.

    As pc_max_used_gpa() and pc_get_device_memory_range() of hw/i386/pc.c,
    pc_q35_init() and pc_init1() compute it.
    """
    q35 = 'q35' in machine_type
    below, split, pci_hole = (
        (2 * _GIB, 0xb0000000, 32 * _GIB) if q35
        else (3 * _GIB, 0xe0000000, 2 * _GIB))
    end = 4 * _GIB + (ram - below if ram >= split else 0)
    # Each device may need as much to be aligned.
    end = _aligned(end) + sum(images) + len(images) * _GIB
    return _aligned(end) + pci_hole


def _aligned(size: int) -> int:
    return -(-size // _GIB) * _GIB
