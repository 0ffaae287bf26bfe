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

"""Whether this host can run instances with disks on fake DAX."""

from collections.abc import Sequence
import os
import typing as ty

from lxml import etree
from nova.virt.libvirt import host as libvirt_host
from oslo_config import cfg
from oslo_log import log as logging

from nova_fakedax import emulator
from nova_fakedax import hostcache
from nova_fakedax import privsep
from nova_fakedax import spec

LOG = logging.getLogger(__name__)

#: What all guests of libvirt may do on this host, besides the rules that its
#: helper makes for each: it does not let a guest lock the file of a memory
#: device. etc/apparmor/nova-fakedax is the file.
APPARMOR_RULES = '/etc/apparmor.d/abstractions/libvirt-qemu.d/nova-fakedax'


def reasons_against(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> list[str]:
    """Why this host cannot run such instances; empty if it can.

    :param conf: nova's configuration, with ``[fakedax]``
    :param host: the connection to libvirt
    """
    if conf.libvirt.virt_type not in ('kvm', 'qemu'):
        return [f"[libvirt]virt_type is '{conf.libvirt.virt_type}'; "
                f"allowed: 'kvm', 'qemu'"]
    reasons = []
    if conf.libvirt.images_type not in ('default', 'raw', 'flat', 'qcow2'):
        reasons.append(
            f"[libvirt]images_type is '{conf.libvirt.images_type}': images "
            f"on fake DAX are files; allowed: 'raw', 'flat', 'qcow2', "
            f"'default'")
    if not conf.force_raw_images:
        reasons.append(
            'force_raw_images is off: images on fake DAX are raw')
    if conf.libvirt.file_backed_memory:
        reasons.append(
            '[libvirt]file_backed_memory is set: Nova would count the images '
            'as guest memory')
    if conf.ephemeral_storage_encryption.enabled:
        reasons.append(
            '[ephemeral_storage_encryption]enabled is on: an encrypted image '
            'cannot be mapped into a guest')
    if not host.has_min_version(emulator.MIN_LIBVIRT):
        wanted = '.'.join(str(part) for part in emulator.MIN_LIBVIRT)
        reasons.append(
            f"libvirt is older than {wanted}, the first that can start "
            f"<memory model='virtio-pmem'>")
    if 'apparmor' in security_models(host) and not _may_lock(
            conf.instances_path):
        reasons.append(
            f'libvirt confines guests by AppArmor, and {APPARMOR_RULES} does '
            f'not let them lock files in {conf.instances_path}; see the '
            f'administrator guide')
    try:
        hostcache.probe(conf.instances_path)
    except OSError as exc:
        reasons.append(
            f'nova-compute cannot flush images: {exc}; see '
            f'[{privsep.fakedax_pctxt.cfg_section}]helper_command')
    try:
        emulator.probe(_emulator(conf, host))
    except emulator.ProbeError as exc:
        reasons.append(str(exc))
    return reasons


def security_models(host: libvirt_host.Host) -> list[str]:
    """By which libvirt confines guests: ``dac``, ``selinux``, ``apparmor``.

    https://libvirt.org/formatcaps.html, ``secmodel``
    """
    capabilities = etree.fromstring(host.get_connection().getCapabilities())
    return [node.text or '' for node in capabilities.findall(
        './host/secmodel/model')]


def _may_lock(instances_path: str) -> bool:
    """Whether the rules for AppArmor name the instances' directory.

    It may be a symbolic link, which AppArmor does not see.
    """
    try:
        with open(APPARMOR_RULES) as rules:
            return any(line.strip().startswith(
                f'{os.path.realpath(instances_path)}/') for line in rules)
    except OSError:
        return False


def migration_reasons_against(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> list[str]:
    """Why such instances cannot migrate from or to a host that runs them.

    :param conf: nova's configuration, with ``[fakedax]``
    :param host: the connection to libvirt
    """
    reasons = []
    if conf.libvirt.live_migration_permit_post_copy:
        reasons.append(
            '[libvirt]live_migration_permit_post_copy is on: the guest would '
            'run at the destination before the source has synced its images')
    path = _emulator(conf, host)
    if not emulator.probe(path).migrates:
        reasons.append(
            f"the device {emulator.DEVICE} of {path} does not migrate; set "
            f"[fakedax]emulator to a binary whose device does")
    return reasons


def evacuation_reasons_against(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> list[str]:
    """Why such instances cannot be evacuated from or to a host that runs them.

    :param conf: nova's configuration, with ``[fakedax]``
    :param host: the connection to libvirt
    """
    path = _emulator(conf, host)
    # QEMU's own device neither migrates nor locks images.
    if emulator.probe(path).migrates:
        return []
    return [f"the device {emulator.DEVICE} of {path} does not lock images; "
            f"set [fakedax]emulator to a binary whose device does"]


def log(
    reasons_against: Sequence[str], migration_reasons_against: Sequence[str],
) -> None:
    """Tell the operator what this host cannot do, and why."""
    if reasons_against:
        LOG.warning(
            'This host cannot run flavors with %(namespace)s:* extra '
            'specs and does not report the trait %(trait)s: %(reasons)s',
            {'namespace': spec.NAMESPACE, 'trait': spec.TRAIT,
             'reasons': '; '.join(reasons_against)})
    elif migration_reasons_against:
        LOG.info(
            'Live migration of instances with disks on fake DAX is off '
            'on this host: %s', '; '.join(migration_reasons_against))


def machines(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> frozenset[str]:
    """The machine types of the QEMU that runs such instances here.

    :param conf: nova's configuration, with ``[fakedax]``
    :param host: the connection to libvirt
    :raises emulator.ProbeError: it does not list them
    """
    return emulator.machines(_emulator(conf, host))


def _emulator(conf: cfg.ConfigOpts, host: libvirt_host.Host) -> str:
    return conf.fakedax.emulator or _default_emulator(conf, host)


def _default_emulator(
    conf: cfg.ConfigOpts, host: libvirt_host.Host,
) -> str:
    """The QEMU binary that libvirt chooses.

    https://libvirt.org/formatdomaincaps.html
    """
    arch = host.get_capabilities().host.cpu.arch
    try:
        capabilities = host.get_connection().getDomainCapabilities(
            None, arch, None, conf.libvirt.virt_type, 0)
    except libvirt_host.libvirt.libvirtError as exc:
        raise emulator.ProbeError(f'libvirt has no emulator: {exc}')
    return ty.cast(str, etree.fromstring(capabilities).findtext('path', ''))
