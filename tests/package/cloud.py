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

"""A cloud in a container, of Debian's packages alone.

What somebody has who knows OpenStack and not this project: OpenStack's
installation guides, followed on one machine. Nothing here knows the project.
"""

import fcntl
import pathlib
import re
import shutil
import tempfile

from lab import paths
from lab import wait
from tests.package import base
from tests.package import container

#: In this order: what the version of the series is told by, first.
PACKAGES = (
    'nova-compute-qemu', 'nova-api', 'nova-conductor', 'nova-scheduler',
    'keystone', 'glance', 'placement-api', 'neutron-api', 'mariadb-server',
    'rabbitmq-server', 'python3-openstackclient', 'systemd', 'systemd-sysv',
    'dbus')

#: Of Nova.
SERIES = '2:34.'

#: What clouds without this project have, and what they are called.
_APIS = {
    'keystone': ('keystone', 5000),
    'glance': ('glance-api', 9292),
    'placement': ('placement-api', 8778),
    'neutron': ('neutron-api', 9696),
    'nova': ('nova-api', 8774),
}

_UNITS = (*(unit for unit, _ in _APIS.values()), 'nova-conductor',
          'nova-scheduler', 'nova-compute')

_PASSWORD = 'cloud'  # It has no network.

#: For the client.
CREDENTIALS = {
    'OS_AUTH_URL': 'http://127.0.0.1:5000/v3', 'OS_USERNAME': 'admin',
    'OS_PASSWORD': _PASSWORD, 'OS_PROJECT_NAME': 'admin',
    'OS_USER_DOMAIN_NAME': 'Default', 'OS_PROJECT_DOMAIN_NAME': 'Default',
    'OS_IDENTITY_API_VERSION': '3'}

SECONDS = 300


def set_options(there: container.Container, path: str, options: str) -> None:
    """Edit a file of options there, as an operator does.

    :param options: sections and options, which replace those of these names
    """
    there.write(path, merge(there.read(path), options))


def merge(text: str, options: str) -> str:
    """The text of a file of options, with other values.

    An option that stands twice in ``options`` has both values.
    """
    section = ''
    wanted: dict[str, list[str]] = {}
    for line in options.splitlines():
        if line.startswith('['):
            section = line.strip()
            wanted.setdefault(section, [])
        elif line.strip():
            wanted[section].append(line)
    result = []
    section = ''
    for line in text.splitlines():
        if line.startswith('['):
            section = line.strip()
            result += [line, *wanted.pop(section, [])]
            names = {each.partition('=')[0].strip() for each in result[
                result.index(line) + 1:]}
        elif not section or line.partition('=')[0].strip() not in names:
            result.append(line)
    for section, lines in wanted.items():
        result += [section, *lines]
    return '\n'.join(result) + '\n'


def _password(section: str, user: str) -> str:
    return f'''
[{section}]
auth_type = password
auth_url = http://127.0.0.1:5000/v3
www_authenticate_uri = http://127.0.0.1:5000/v3
username = {user}
password = {_PASSWORD}
project_name = service
user_domain_name = Default
project_domain_name = Default
region_name = RegionOne
'''


def _database(name: str) -> str:
    user = name.partition('_')[0]
    return (f'connection = mysql+pymysql://{user}:{_PASSWORD}@127.0.0.1/'
            f'{name}?charset=utf8mb4')


_BROKER = f'transport_url = rabbit://openstack:{_PASSWORD}@127.0.0.1:5672/'

#: RabbitMQ 4 has no other queues that last.
_QUEUES = '''
[oslo_messaging_rabbit]
rabbit_quorum_queue = true
rabbit_transient_quorum_queue = true
'''

#: Files and what they have to say.
_OPTIONS = {
    '/etc/keystone/keystone.conf': f'''
[database]
{_database('keystone')}
''',
    '/etc/glance/glance-api.conf': f'''
[DEFAULT]
enabled_backends = file:file
[database]
{_database('glance')}
[glance_store]
default_backend = file
[file]
filesystem_store_datadir = /var/lib/glance/images
[paste_deploy]
flavor = keystone
{_password('keystone_authtoken', 'glance')}
''',
    '/etc/placement/placement.conf': f'''
[placement_database]
{_database('placement')}
{_password('keystone_authtoken', 'placement')}
''',
    # Nova asks it even about servers without a port.
    '/etc/neutron/neutron.conf': f'''
[DEFAULT]
service_plugins =
{_BROKER}
notify_nova_on_port_status_changes = false
notify_nova_on_port_data_changes = false
[database]
{_database('neutron')}
{_password('keystone_authtoken', 'neutron')}
{_QUEUES}
''',
    # Neutron's defaults: Debian's have no network of the type that projects
    # get.
    '/etc/neutron/plugins/ml2/ml2_conf.ini': '''
[ml2]
type_drivers = local,flat,vlan,gre,vxlan,geneve
mechanism_drivers = openvswitch
extension_drivers = port_security
''',
    '/etc/nova/nova.conf': f'''
[DEFAULT]
my_ip = 127.0.0.1
# Seconds. Nova 34's nova-compute takes all of it to stop, by default 180.
graceful_shutdown_timeout = 10
manager_shutdown_timeout = 5
{_BROKER}
[api_database]
{_database('nova_api')}
[database]
{_database('nova')}
[conductor]
workers = 1
[scheduler]
workers = 1
[glance]
region_name = RegionOne
# It needs a module of QEMU that is only recommended.
[spice]
enabled = false
{_password('keystone_authtoken', 'nova')}
{_password('service_user', 'nova')}
send_service_user_token = true
{_password('placement', 'nova')}
{_password('neutron', 'nova')}
{_QUEUES}
'''}

_DATABASES = ('keystone', 'glance', 'placement', 'neutron', 'nova',
              'nova_api', 'nova_cell0')

_USERS = f'''
import openstack

cloud = openstack.connect()
identity = cloud.identity
service = identity.create_project(name='service', domain_id='default')
roles = {{role.name: role for role in identity.roles()}}
for name, kind, url in (
        ('nova', 'compute', 'http://127.0.0.1:8774/v2.1'),
        ('glance', 'image', 'http://127.0.0.1:9292'),
        ('neutron', 'network', 'http://127.0.0.1:9696'),
        ('placement', 'placement', 'http://127.0.0.1:8778')):
    user = identity.create_user(
        name=name, password='{_PASSWORD}', domain_id='default')
    for role in ('admin', 'service'):
        identity.assign_project_role_to_user(service, user, roles[role])
    entry = identity.create_service(name=name, type=kind)
    for interface in ('public', 'internal', 'admin'):
        identity.create_endpoint(
            service_id=entry.id, interface=interface, url=url,
            region_id='RegionOne')
'''


def _set_up(there: container.Container) -> None:
    """Make a cloud of a machine that has the packages and no more.

    :raises container.ContainerError: a step fails
    """
    there.run('rabbitmqctl await_startup')
    there.run(f'''
        rabbitmqctl add_user openstack {_PASSWORD}
        rabbitmqctl set_permissions openstack '.*' '.*' '.*' ''')
    there.run('mariadb', input=''.join(
        f'''CREATE DATABASE {name};
        GRANT ALL ON {name}.* TO '{name.partition('_')[0]}'@'localhost'
            IDENTIFIED BY '{_PASSWORD}';''' for name in _DATABASES))
    for path, options in _OPTIONS.items():
        set_options(there, path, options)
    # As many as one machine needs. uWSGI cuts connections that a client keeps
    # open, which the other files tell it already.
    there.run('''
        for file in /etc/*/*-uwsgi.ini; do
            sed -i 's/^processes *=.*/processes = 1/' $file
            grep -q '^add-header = Connection: close' $file ||
                echo 'add-header = Connection: close' >>$file
        done''')
    there.run('''
        as() { user=$1; shift; runuser -u "$user" -- "$@"; }
        as keystone keystone-manage db_sync
        keystone-manage fernet_setup \
            --keystone-user keystone --keystone-group keystone
        keystone-manage credential_setup \
            --keystone-user keystone --keystone-group keystone
        as glance glance-manage db_sync
        as placement placement-manage db sync
        as neutron neutron-db-manage --config-file /etc/neutron/neutron.conf \
            --config-file /etc/neutron/plugins/ml2/ml2_conf.ini upgrade heads
        as nova nova-manage api_db sync
        as nova nova-manage cell_v2 map_cell0
        as nova nova-manage cell_v2 create_cell --name cell1
        as nova nova-manage db sync
        ''')
    bootstrap = '''
        url=http://127.0.0.1:5000/v3
        keystone-manage bootstrap \
            --bootstrap-public-url $url --bootstrap-internal-url $url \
            --bootstrap-admin-url $url --bootstrap-region-id RegionOne
        chown keystone: /var/log/keystone/*'''
    there.run(bootstrap, environment={'OS_BOOTSTRAP_PASSWORD': _PASSWORD})
    there.run('systemctl unmask keystone && systemctl start keystone')
    wait.until('keystone to answer', lambda: answers(there, 'keystone'),
               SECONDS)
    there.run('python3 -', input=_USERS, environment=CREDENTIALS)
    there.run(f'systemctl unmask {" ".join(_UNITS)}')
    there.run(f'systemctl start {" ".join(_UNITS)}')
    until_ready(there)
    there.run('runuser -u nova -- nova-manage cell_v2 discover_hosts')


def answers(there: container.Container, name: str) -> bool:
    """Whether an API answers."""
    done = there.run(f'python3 - {_APIS[name][1]}', check=False, input='''
import http.client
import sys

connection = http.client.HTTPConnection(
    '127.0.0.1', int(sys.argv[1]), timeout=30)
connection.request('GET', '/')
print('status', connection.getresponse().status)
''')
    # 300: there are several versions.
    return bool(re.search('status [23]|status 401', done))


def until_ready(there: container.Container) -> None:
    """Wait until each API answers, and a compute service is up."""
    for name in _APIS:
        wait.until(f'{name} to answer', lambda name=name: answers(there, name),
                   SECONDS, interval=0.5)
    wait.until(
        'the compute service to be up',
        lambda: 'up' in openstack(
            there, 'compute service list --service nova-compute -c State'
                   ' -f value', check=False).split(),
        SECONDS, interval=1)


def openstack(there: container.Container, arguments: str, *,
              check: bool = True) -> str:
    """Run the client there, as the admin."""
    return there.run(f'openstack {arguments}', check=check,
                     environment=CREDENTIALS)


def make_cloud() -> tuple[pathlib.Path, ...]:
    """Root file systems of a cloud, one above the other.

    They are made once, and kept.

    :raises base.NotThere: Debian does not have the packages now
    """
    root = base.make_root('sid', *PACKAGES, series=SERIES)
    key = paths.cache_key(root.name, *(
        pathlib.Path(path).read_bytes()
        for path in (__file__, container.__file__)))
    layer = base.ROOTS / f'cloud-{key}'
    with open(base.ROOTS / 'cloud.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not layer.exists():
            work = pathlib.Path(tempfile.mkdtemp(dir=base.ROOTS))
            try:
                _make_layer(root, work)
                (work / 'upper').rename(layer)
            finally:
                shutil.rmtree(work)
    return layer, root


def _make_layer(root: pathlib.Path, work: pathlib.Path) -> None:
    there = container.Container([root], work)
    # They cannot run before they are configured.
    masks = work / 'upper/etc/systemd/system'
    masks.mkdir(parents=True)
    for unit in (*_UNITS, 'nova-api-metadata'):
        (masks / f'{unit}.service').symlink_to('/dev/null')
    try:
        there.start()
        _set_up(there)
        there.power_off()
    finally:
        there.stop()
