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

"""The configuration files: templates/, filled in with this lab's values."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import shutil
from typing import Any

import jinja2

from lab.deploy import credentials
from lab.deploy import host
from lab.deploy import storage
from lab import paths

ETC = paths.STATE / 'etc'

#: Ports on 127.0.0.1.
PORTS = {
    'epmd': 4370,
    'erlang': 25673,
    'rabbitmq': 5673,
    'gluster': 24107,
    'keystone': 5000,
    'placement': 8778,
    'glance': 9292,
    'neutron': 9696,
    'nova': 8774,
    'cinder': 8776,
}

#: The environment that all clones share, and the one of this clone over it.
BASE = (paths.STATE / 'venv/base').resolve()
PYTHON = paths.STATE / 'venv/bin/python'

#: The directory that comes first in cinder-volume's PATH.
PROGRAMS = ETC / 'cinder/bin'

_APIS = {
    'keystone': 'keystone.wsgi.api',
    'placement': 'placement.wsgi.api',
    'glance': 'glance.wsgi.api',
    'neutron': 'neutron.wsgi.api',
    'nova': 'nova.wsgi.osapi_compute',
    'cinder': 'cinder.wsgi.api',
}

#: Of Cinder, and the volume types of the same names: volumes that are files,
#: and volumes that are block devices of a host.
BACKENDS = ('file', 'block')

_WITH_VOLUMES = paths.STATE / 'cinder.on'

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent
                                   / 'templates'),
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    keep_trailing_newline=True)


def with_volumes() -> bool:
    """Whether the lab has Cinder, until it is down.

    Not everybody who brings it up waits for that.
    """
    if 'FAKEDAX_VOLUMES' in os.environ:
        paths.STATE.mkdir(exist_ok=True)
        _WITH_VOLUMES.touch()
    return _WITH_VOLUMES.exists()


def forget_volumes() -> None:
    """Have the next lab without Cinder."""
    _WITH_VOLUMES.unlink(missing_ok=True)


def database_url(name: str, directory: pathlib.Path = host.RUN) -> str:
    """The SQLAlchemy URL of a database behind the server's socket."""
    return (f'mysql+pymysql://root@localhost/{name}'
            f'?unix_socket={directory}/mysqld.sock&charset=utf8mb4')


def values(run: pathlib.Path = host.RUN, kvm: bool = False,
           ) -> dict[str, Any]:
    """The variables of the templates.

    :param run: directory of MariaDB's socket
    :param kvm: guests run with KVM, not TCG
    """
    return {
        'backends': BACKENDS,
        'base': BASE,
        'database_url': lambda name: database_url(name, run),
        'etc': ETC,
        'hosts': host.HOSTS,
        'instances': host.INSTANCES,
        'libvirt_port': host.LIBVIRT_PORT,
        'log': paths.STATE / 'log',
        'passwords': credentials.load(),
        'ports': PORTS,
        'python': PYTHON,
        'run': run,
        'state': paths.STATE,
        'virt_type': 'kvm' if kvm else 'qemu',
        'volumes': host.VOLUMES.name,
        'with_volumes': with_volumes(),
    }


def render(template: str, target: pathlib.Path,
           variables: Mapping[str, Any], mode: int = 0o600) -> None:
    """Write a file, unless it has this content already.

    An unchanged file keeps its time: services that read it go on running.

    :param mode: of the file; only its owner can read it by default
    """
    text = _TEMPLATES.get_template(template).render(variables)
    try:
        if target.read_text() == text:
            return
    except FileNotFoundError:
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + '.partial')
    partial.touch(mode=mode)
    partial.write_text(text)
    os.replace(partial, target)


def write(kvm: bool, emulators: Sequence[str]) -> None:
    """Write every service's configuration.

    :param kvm: guests run with KVM, not TCG
    :param emulators: one for each host, which runs servers on fake DAX; an
        empty one leaves the choice to libvirt
    """
    known = values(kvm=kvm)
    for name in ('cinder/cinder.conf', 'glance/glance-api.conf',
                 'keystone/keystone.conf', 'neutron/neutron.conf',
                 'nova/nova.conf', 'placement/placement.conf',
                 'gluster/brick.vol', 'gluster/client.vol',
                 'rabbitmq/rabbitmq.conf', 'clouds.yaml', 'shell.rc'):
        render(f'{name}.j2', ETC / name, known)
    for directory, module in _APIS.items():
        render('uwsgi.ini.j2', ETC / directory / 'uwsgi.ini',
               known | {'name': directory, 'module': module})
    for name in ('cinder/api-paste.ini', 'cinder/resource_filters.json',
                 'glance/glance-api-paste.ini', 'neutron/api-paste.ini',
                 'nova/api-paste.ini'):
        _copy(BASE / 'etc' / name, ETC / name)
    for name in ('mount', 'mount.nfs'):
        # Cinder looks for the second.
        render('mount.j2', PROGRAMS / name, known | {'shared': storage.MOUNT},
               mode=0o700)
    for node, emulator in zip(host.HOSTS, emulators, strict=True):
        for name in ('hold.sh', 'hosts', 'etc/libvirtd.conf', 'etc/qemu.conf',
                     'nova.conf'):
            template = f'node/{pathlib.Path(name).name}.j2'
            render(template, node.state / name, known | {
                'node': node, 'emulator': emulator and host.EMULATOR})
        render('node/ssh.j2', node.programs / 'ssh', known, mode=0o700)
        render('mount.j2', node.programs / 'mount',
               known | {'shared': host.INSTANCES}, mode=0o700)
        if emulator:
            write_emulator(node, emulator)
        node.drop_in.mkdir(exist_ok=True)


def write_emulator(node: host.Host, emulator: str) -> None:
    """Set the QEMU that runs a host's servers on fake DAX.

    nova-compute asks for its capabilities when it starts, libvirt whenever
    the file has changed.
    """
    render('node/qemu-fakedax.j2', node.emulator_script,
           {'emulator': emulator}, mode=0o700)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)
