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

"""``lab/demo``: a real guest with its root on fake DAX, from nothing."""

from collections.abc import Mapping
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import click
import rich.box
import rich.console
import rich.table

from lab.deploy import clients
from lab.deploy import config
from lab.deploy import lifecycle
from lab.deploy import servers
from lab import errors
from lab import guest
from lab.machine import pagecache
from lab.machine import syncs
from lab import paths
from lab import progress

REPORT = paths.STATE / 'demo.json'

FLAVOR = 'fakedax.demo'
IMAGE = 'fakedax-demo'
SERVER = 'fakedax-demo'

#: How often the guest fsyncs, and how much it reads.
FSYNCS = 20
DATA_MIB = 200

_KEEP = '/root/keep'
_DATA = '/root/data'


class DemoError(errors.LabError):
    """The product does not do what the demo shows."""


@dataclasses.dataclass
class Report:
    """The results; the keys of ``.lab/demo.json``."""

    root_device: str = ''
    root_mount_options: str = ''
    root_mib: int = 0
    flavor_disk_gib: int = 0
    guest_fsyncs: int = 0
    host_syncs: int = 0
    guest_page_cache_mib: float = 0
    host_image_pages_mib: float = 0
    survived_reboot: bool = False
    #: Output of ``fakedax-guest`` after the last boot, if the guest has it.
    guest_says: list[str] = dataclasses.field(default_factory=list)
    setup_seconds: float = 0
    demo_seconds: float = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The image to boot, and what it needs.

    :ivar ram: MiB of the flavor
    :ivar disk: GiB of the flavor, to which the guest grows its root
    :ivar patience: seconds until the guest has booted
    """

    path: pathlib.Path
    disk_format: str
    properties: Mapping[str, str]
    ram: int
    disk: int
    patience: int


def _test_guest() -> Subject:
    return Subject(guest.build().disk, 'raw', servers.PROPERTIES,
                   ram=512, disk=1, patience=120)


def _distribution(path: pathlib.Path) -> Subject:
    """An image of guest-image-elements.

    :raises DemoError: qemu-img does not know its format
    """
    known = subprocess.run(
        ['qemu-img', 'info', '--output', 'json', path], capture_output=True,
        text=True)
    if known.returncode:
        raise DemoError(f'{path}: {known.stderr.strip()}')
    info = json.loads(known.stdout)
    return Subject(
        path, info['format'], servers.DISTRIBUTION_PROPERTIES, ram=1024,
        # Larger than the image, so that the root has to grow.
        disk=max(4, (info['virtual-size'] >> 30) + 2),
        # It may boot under TCG.
        patience=900)


def openstack(*arguments: str) -> str:
    """Run the openstack client as admin, and print the command.

    :returns: its output
    :raises DemoError: it failed; has its standard error
    """
    progress.say(f'$ openstack {shlex.join(arguments)}')
    done = subprocess.run(
        [config.PYTHON, config.BASE / 'bin/openstack', *arguments],
        env=os.environ | {
            'OS_CLOUD': 'admin',
            'OS_CLIENT_CONFIG_FILE': str(config.ETC / 'clouds.yaml'),
            'PYTHONWARNINGS': 'ignore'},
        capture_output=True, text=True)
    if done.returncode:
        raise DemoError(
            f'openstack {shlex.join(arguments)}: {done.stderr.strip()}')
    return done.stdout.strip()


def _make_flavor(subject: Subject) -> None:
    openstack('flavor', 'create', '--ram', str(subject.ram), '--disk',
              str(subject.disk), '--vcpus', '1', FLAVOR)
    openstack('flavor', 'set', FLAVOR, '--property', 'fakedax:disks=root',
              '--property', 'trait:CUSTOM_FAKEDAX=required')


def _make_image(subject: Subject) -> None:
    properties = [
        argument for key, value in subject.properties.items()
        for argument in ('--property', f'{key}={value}')]
    openstack('image', 'create', '--disk-format', subject.disk_format,
              '--container-format', 'bare', '--file', str(subject.path),
              *properties, IMAGE)


def _make_server() -> servers.Server:
    server_id = openstack(
        'server', 'create', '--flavor', FLAVOR, '--image', IMAGE, '--nic',
        'none', '--config-drive', 'true', '--wait', '--format', 'value',
        '--column', 'id', SERVER)
    return servers.Server(clients.connect(), server_id)


def _look_at_root(server: servers.Server, subject: Subject,
                  report: Report) -> None:
    """Check the root of the guest, once it has booted."""
    with progress.step('guest boots with GRUB, from the boot view'), \
            server.agent(subject.patience) as inside:
        # The service runs at the end of a boot; "start" waits for it.
        report.guest_says = inside.run(
            'if command -v fakedax-guest >/dev/null; then '
            'systemctl start fakedax-guest.service; fakedax-guest; fi',
            timeout=subject.patience).stdout.splitlines()
        mounts = inside.run('cat /proc/mounts', check=True).stdout
        size = inside.run('df -P -k / | tail -n 1', check=True).stdout
    report.root_mib = int(size.split()[1]) >> 10
    report.flavor_disk_gib = subject.disk
    device, options = next(
        (fields[0], fields[3])
        for fields in (line.split() for line in mounts.splitlines())
        if fields[1] == '/' and fields[0] != 'rootfs')
    report.root_device, report.root_mount_options = device, options
    progress.say(f'guest: {device} on / ({options})')
    for line in report.guest_says:
        progress.say(f'guest: {line}')
    if not device.startswith('/dev/pmem') or 'dax' not in options:
        raise DemoError(
            f'the root is {device} ({options}), not pmem with DAX')
    if any(line.startswith('wrong:') for line in report.guest_says):
        raise DemoError('fakedax-guest reports that something is wrong')
    # The file system uses some of it.
    if report.root_mib < 0.85 * 1024 * subject.disk:
        raise DemoError(f'the root has {report.root_mib} MiB: it did not '
                        f'grow to the {subject.disk} GiB of the flavor')


def _count_syncs(server: servers.Server, report: Report) -> None:
    """Check that an fsync in the guest syncs the image."""
    with server.agent() as inside, \
            progress.step(f'guest writes and fsyncs {FSYNCS} times'):
        with syncs.watch(
                server.emulator().pid, f'/{server.id}/disk') as seen:
            inside.run(
                f'for i in $(seq {FSYNCS}); do dd if=/dev/zero of={_KEEP} '
                f'bs=4k count=1 conv=fsync || exit; done', check=True)
        report.guest_fsyncs = FSYNCS
        report.host_syncs = seen.succeeded
    progress.say(f'host: QEMU synced the image {seen.succeeded} times')
    if seen.succeeded < 1 or seen.failed:
        raise DemoError(f'QEMU synced the image {seen.succeeded} times, and '
                        f'failed to do so {seen.failed} times')


def _compare_caches(server: servers.Server, report: Report) -> str:
    """Check that the host caches what the guest reads.

    :returns: the data's checksum
    """
    with server.agent() as inside:
        with progress.step(f'guest writes {DATA_MIB} MiB, reads it twice'):
            inside.run(f'dd if=/dev/urandom of={_DATA} bs=1M '
                       f'count={DATA_MIB} && sync', timeout=300, check=True)
            for _ in range(2):
                checksum = inside.run(
                    f'sha256sum {_DATA}', timeout=300, check=True).stdout
        meminfo = dict(
            line.split(':') for line in
            inside.run('cat /proc/meminfo', check=True).stdout.splitlines())
    cached_kib = sum(int(meminfo[key].split()[0])
                     for key in ('Cached', 'Buffers'))
    report.guest_page_cache_mib = round(cached_kib / 1024, 1)
    report.host_image_pages_mib = round(
        pagecache.cached_bytes(server.file('disk')) / (1 << 20), 1)
    if report.host_image_pages_mib < DATA_MIB:
        raise DemoError(
            f'the host caches {report.host_image_pages_mib} MiB of the '
            f'image, less than the {DATA_MIB} MiB that the guest read')
    return checksum


def _reboot(server: servers.Server, subject: Subject, checksum: str,
            report: Report) -> None:
    before = _boot_id(server)
    openstack('server', 'reboot', '--wait', SERVER)
    _look_at_root(server, subject, report)
    with server.agent() as inside:
        after = inside.run(f'sha256sum {_DATA}', timeout=300).stdout
    rebooted = _boot_id(server) != before
    report.survived_reboot = after == checksum and rebooted
    if not report.survived_reboot:
        raise DemoError(
            f'after the reboot the data is {after!r}, not {checksum!r}'
            if rebooted else 'the guest did not reboot')


def _boot_id(server: servers.Server) -> str:
    with server.agent() as inside:
        return inside.run(
            'cat /proc/sys/kernel/random/boot_id', check=True).stdout


def _delete(server: servers.Server) -> None:
    directory = server.file('.')
    openstack('server', 'delete', '--wait', SERVER)
    if directory.exists():
        raise DemoError(
            f'the deleted server left {sorted(os.listdir(directory))}')


def _versions(server: servers.Server) -> dict[str, str]:
    with server.host.libvirt() as libvirt:
        number = libvirt.getLibVersion()
    binary = server.emulator().exe()
    qemu = subprocess.run(
        [binary, '--version'], capture_output=True, text=True, check=True,
    ).stdout.splitlines()[0].split('(')[0].split()[-1]
    with server.agent() as inside:
        kernel = inside.run('uname -r', check=True).stdout.strip()
    return {
        'nova': importlib.metadata.version('nova'),
        'libvirt': '.'.join(str(number // step % 1000)
                            for step in (1000000, 1000, 1)),
        'qemu': qemu,
        'guest kernel': kernel,
        'host kernel': os.uname().release,
        'python': '.'.join(str(part) for part in sys.version_info[:3]),
    }


def _clean() -> None:
    """Delete what an interrupted demo has left."""
    connection = clients.connect()
    for server in connection.compute.servers(name=f'^{SERVER}$'):
        connection.compute.delete_server(server)
        connection.compute.wait_for_delete(server)
    # Any: its type allows version 1 of the API as well.
    glance: Any = connection.image
    for image in glance.images(name=IMAGE):
        glance.delete_image(image)
    flavor = connection.compute.find_flavor(FLAVOR)
    if flavor:
        connection.compute.delete_flavor(flavor)


def _show(report: Report) -> None:
    table = rich.table.Table(
        title='Root on fake DAX', box=rich.box.SIMPLE, show_header=False)
    versions = ', '.join(
        f'{name} {version}' for name, version in report.versions.items())
    for name, value in {
        'Guest root': f'{report.root_device} ({report.root_mount_options}), '
                      f'{report.root_mib} MiB of {report.flavor_disk_gib} GiB',
        'fsync': f'{report.guest_fsyncs} in the guest, '
                 f'{report.host_syncs} syncs of the image by QEMU',
        f'{DATA_MIB} MiB read in the guest':
            f'{report.guest_page_cache_mib} MiB in the guest\'s page cache, '
            f'{report.host_image_pages_mib} MiB of the image in the host\'s',
        'Reboot': 'the data survived' if report.survived_reboot
                  else 'the data is lost',
        'Time': f'{report.setup_seconds:.0f} s to set up, '
                f'{report.demo_seconds:.0f} s for the demo',
        'Versions': versions,
    }.items():
        table.add_row(name, value)
    rich.console.Console(width=100).print(table)


@click.command()
@click.option('--keep', is_flag=True,
              help='Leave the cloud up, with the flavor, image and server.')
@click.option('--kvm', is_flag=True,
              help='Run guests with KVM; the default is TCG.')
@click.option('--image', metavar='FILE', type=click.Path(
              exists=True, dir_okay=False, path_type=pathlib.Path),
              help='Boot this image, made by guest-image-elements/build or '
                   'convert, instead of the small test guest.')
def main(keep: bool, kvm: bool, image: pathlib.Path | None) -> None:
    """Boot a guest with its root on fake DAX, through a real OpenStack.

    Sets the machine up (Debian 12 or 13, as root), starts the lab's cloud,
    makes a flavor and an image, creates a server, and shows where its root
    is, what its fsync does on the host, who caches what it reads, and that
    root and data survive a reboot. Ends with a report, which is also written
    to .lab/demo.json.
    """
    started = float(os.environ.get('LAB_STARTED', time.time()))
    report = Report()
    with errors.messages(), contextlib.ExitStack() as stack:
        if image:
            subject = _distribution(image)
        else:
            with progress.step('test guest'):
                subject = _test_guest()
        if keep:
            lifecycle.up(kvm)
        else:
            stack.enter_context(lifecycle.borrowed(kvm))
        _clean()
        report.setup_seconds = round(time.time() - started, 1)
        if not keep:
            stack.callback(_clean)
        _run(subject, keep, report)
        report.demo_seconds = round(
            time.time() - started - report.setup_seconds, 1)
    REPORT.write_text(json.dumps(dataclasses.asdict(report), indent=2) + '\n')
    _show(report)


def _run(subject: Subject, keep: bool, report: Report) -> None:
    _make_flavor(subject)
    _make_image(subject)
    server = _make_server()
    _look_at_root(server, subject, report)
    report.versions = _versions(server)
    _count_syncs(server, report)
    checksum = _compare_caches(server, report)
    _reboot(server, subject, checksum, report)
    if keep:
        progress.say('the server is up; try "lab/cloud shell"')
    else:
        _delete(server)


if __name__ == '__main__':
    main(prog_name='lab/demo')
