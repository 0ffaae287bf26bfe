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

"""Keystone's keys, users and endpoints, which other services need."""

import subprocess
from typing import Any

from cryptography import fernet

from lab.deploy import clients
from lab.deploy import config
from lab.deploy import credentials
from lab import errors
from lab import paths

_KEYSTONE = paths.STATE / 'keystone'

#: They exist once bootstrap() and fill() have ended.
_BOOTSTRAPPED = _KEYSTONE / 'bootstrapped'
_FILLED = _KEYSTONE / 'filled'

_SERVICES = {
    'block-storage': ('cinder', '/v3'),
    'compute': ('nova', '/v2.1'),
    'image': ('glance', ''),
    'network': ('neutron', ''),
    'placement': ('placement', ''),
}


class CatalogError(errors.LabError):
    """Keystone cannot be prepared."""


def make_keys() -> None:
    """Make the keys that Keystone signs with, as keystone-manage does.

    0 is the next key, 1 the one in use: keystone.common.fernet_utils.
    """
    for name in ('fernet-keys', 'credential-keys'):
        directory = _KEYSTONE / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for index in ('0', '1'):
            key = directory / index
            if not key.exists():
                key.touch(mode=0o600)
                key.write_bytes(fernet.Fernet.generate_key())


def bootstrapped() -> bool:
    """Whether bootstrap() was done."""
    return _BOOTSTRAPPED.exists()


def bootstrap() -> None:
    """Make the admin; needs the database, but not Keystone.

    :raises CatalogError: keystone-manage failed
    """
    url = f'http://127.0.0.1:{config.PORTS["keystone"]}/v3'
    # In the environment: every user can read a command line.
    done = subprocess.run(
        [config.PYTHON, config.BASE / 'bin/keystone-manage',
         '--config-file', config.ETC / 'keystone/keystone.conf', 'bootstrap',
         '--bootstrap-public-url', url, '--bootstrap-internal-url', url,
         '--bootstrap-admin-url', url, '--bootstrap-region-id', 'RegionOne'],
        env={'OS_BOOTSTRAP_PASSWORD': credentials.load()['admin'],
             'PATH': '/usr/bin:/bin', 'PYTHONWARNINGS': 'ignore'},
        capture_output=True, text=True)
    if done.returncode:
        raise CatalogError(f'keystone-manage bootstrap: {done.stderr}')
    _BOOTSTRAPPED.touch()


def filled() -> bool:
    """Whether fill() was done."""
    return _FILLED.exists()


def fill() -> None:
    """Make users, services and endpoints that are missing.

    :raises openstack.exceptions.SDKException: Keystone refuses
    """
    # Any: its type allows version 2 of the API as well.
    identity: Any = clients.connect().identity
    passwords = credentials.load()
    roles = {role.name: role for role in identity.roles()}
    service = _project(identity, 'service')
    for name in ('cinder', 'glance', 'neutron', 'nova', 'placement'):
        user = _user(identity, name, passwords[name], service)
        for role in ('admin', 'service'):
            identity.assign_project_role_to_user(service, user, roles[role])
    demo = _project(identity, 'demo')
    user = _user(identity, 'demo', passwords['demo'], demo)
    for role in ('member', 'reader'):
        identity.assign_project_role_to_user(demo, user, roles[role])
    known = {each.type: each for each in identity.services()}
    for kind, (name, path) in _SERVICES.items():
        entry = known.get(kind) or identity.create_service(
            type=kind, name=name)
        present = {endpoint.interface for endpoint in
                   identity.endpoints(service_id=entry.id)}
        for interface in {'public', 'internal', 'admin'} - present:
            identity.create_endpoint(
                service_id=entry.id, interface=interface,
                url=f'http://127.0.0.1:{config.PORTS[name]}{path}',
                region_id='RegionOne')
    _FILLED.touch()


def _project(identity: Any, name: str) -> Any:
    return identity.find_project(
        name, domain_id='default') or identity.create_project(
            name=name, domain_id='default')


def _user(identity: Any, name: str, password: str, project: Any) -> Any:
    return identity.find_user(
        name, domain_id='default') or identity.create_user(
            name=name, domain_id='default', password=password,
            default_project_id=project.id)
