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

"""What Keystone must know before the other services can work."""

import subprocess

from cryptography import fernet
from openstack import connection

from lab import clients
from lab import config
from lab import credentials
from lab import paths

_KEYSTONE = paths.STATE / 'keystone'

#: Made once a lab; tells that the rest of this module has been done.
_BOOTSTRAPPED = _KEYSTONE / 'bootstrapped'
_FILLED = _KEYSTONE / 'filled'

_SERVICES = {
    'compute': ('nova', '/v2.1'),
    'image': ('glance', ''),
    'network': ('neutron', ''),
    'placement': ('placement', ''),
}


class CatalogError(Exception):
    """Keystone could not be prepared."""


def make_keys() -> None:
    """The keys that Keystone signs with, as keystone-manage makes them.

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
    return _BOOTSTRAPPED.exists()


def bootstrap() -> None:
    """Make the admin; needs the database, not Keystone itself.

    :raises CatalogError: keystone-manage has failed
    """
    url = f'http://127.0.0.1:{config.PORTS["keystone"]}/v3'
    # By the environment: other users see a command line.
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
    return _FILLED.exists()


def fill() -> None:
    """Make users, services and endpoints; may be done again.

    :raises openstack.exceptions.SDKException: Keystone refuses
    """
    cloud = clients.connect()
    passwords = credentials.load()
    roles = {role.name: role for role in cloud.identity.roles()}
    service = _project(cloud, 'service')
    for name in ('glance', 'neutron', 'nova', 'placement'):
        user = _user(cloud, name, passwords[name], service)
        for role in ('admin', 'service'):
            cloud.identity.assign_project_role_to_user(
                service, user, roles[role])
    demo = _project(cloud, 'demo')
    user = _user(cloud, 'demo', passwords['demo'], demo)
    for role in ('member', 'reader'):
        cloud.identity.assign_project_role_to_user(demo, user, roles[role])
    known = {each.type: each for each in cloud.identity.services()}
    for kind, (name, path) in _SERVICES.items():
        entry = known.get(kind) or cloud.identity.create_service(
            type=kind, name=name)
        present = {endpoint.interface for endpoint in
                   cloud.identity.endpoints(service_id=entry.id)}
        for interface in {'public', 'internal', 'admin'} - present:
            cloud.identity.create_endpoint(
                service_id=entry.id, interface=interface,
                url=f'http://127.0.0.1:{config.PORTS[name]}{path}',
                region_id='RegionOne')
    _FILLED.touch()


def _project(cloud: connection.Connection, name: str):
    return cloud.identity.find_project(
        name, domain_id='default') or cloud.identity.create_project(
            name=name, domain_id='default')


def _user(cloud: connection.Connection, name: str, password: str, project):
    return cloud.identity.find_user(
        name, domain_id='default') or cloud.identity.create_user(
            name=name, domain_id='default', password=password,
            default_project_id=project.id)
