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

"""The databases: made once for all clones, then copied.

Making the tables takes Nova and the others most of a minute, and the tables
are the same each time. So the cache keeps a *template*, a tar of MariaDB's
data directory, which has nothing of one lab in it.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import contextlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

import pymysql

from lab.deploy import clients
from lab.deploy import config
from lab.deploy import host
from lab.deploy import services
from lab import errors
from lab import paths
from lab import progress
from lab import wait

_DATA = paths.STATE / 'mysql'
_KEY = paths.STATE / 'mysql.key'

_NAMES = ('cinder', 'glance', 'keystone', 'neutron', 'nova', 'nova_api',
          'nova_cell0', 'placement')

#: URLs of Nova's cells, which each service completes from its own
#: configuration: a template must not have a lab's password.
_CELL_TRANSPORT = '{scheme}://{username}:{password}@{hostname}:{port}/'
_CELL_DATABASE = '{scheme}://{username}@{hostname}/nova?{query}'
_CELL0_DATABASE = '{scheme}://{username}@{hostname}/nova_cell0?{query}'


class DatabaseError(errors.LabError):
    """The databases cannot be made."""


def prepare() -> None:
    """Put a data directory in place, unless there is one.

    :raises DatabaseError: a program that makes it failed
    """
    key = _key()
    if _DATA.exists() and _read(_KEY) == key:
        return
    template = paths.CACHE / f'database-{key}.tar'
    if not template.exists():
        _make_template(template)
    with progress.step('copying the empty databases'):
        shutil.rmtree(_DATA, ignore_errors=True)
        _DATA.mkdir()
        _run('database-copy', ['tar', '--extract', '--file', template,
                               '--directory', _DATA])
        _KEY.write_text(key)


def outdated() -> bool:
    """Whether other releases made the databases."""
    return _DATA.exists() and _read(_KEY) not in (None, _key())


def _key() -> str:
    server = subprocess.run(['mariadbd', '--version'], check=True,
                            capture_output=True).stdout
    return paths.cache_key(
        (paths.ROOT / 'lab/constraints.txt').read_bytes(), server,
        '.'.join(map(str, sys.version_info[:2])),
        pathlib.Path(__file__).read_bytes())


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _make_template(template: pathlib.Path) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    # Below /run: the path of the socket must be short.
    with tempfile.TemporaryDirectory(dir=host.RUN) as run, \
            tempfile.TemporaryDirectory(dir=paths.STATE) as work:
        data = pathlib.Path(work) / 'data'
        with progress.step('making an empty MariaDB'):
            _run('mariadb-install', [
                'mariadb-install-db', '--no-defaults', '--user=root',
                f'--datadir={data}', '--skip-test-db',
                '--auth-root-authentication-method=normal'])
        with _server(pathlib.Path(run), data):
            _fill(pathlib.Path(run))
        partial = template.with_suffix(f'.{os.getpid()}')
        try:
            _run('database-copy', ['tar', '--create', '--sparse', '--file',
                                   partial, '--directory', data, '.'])
            os.replace(partial, template)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _server(run: pathlib.Path, data: pathlib.Path) -> Iterator[None]:
    with _log('mariadb-template').open('wb') as log:
        server = subprocess.Popen(
            shlex.split(services.mariadbd(run, data)), stdout=log,
            stderr=log, start_new_session=True,
            env=os.environ | {'NOVA_FAKEDAX_LAB': 'yes'})

    def answers() -> bool:
        try:
            clients.database(run=run).close()
        except pymysql.err.OperationalError as error:
            if server.poll() is not None:
                raise DatabaseError(
                    f'MariaDB does not start: {error}; see '
                    f'{_log("mariadb-template")}') from error
            return False
        return True

    try:
        wait.until('MariaDB to answer', answers, 60,
                   state=lambda: f'see {_log("mariadb-template")}',
                   error=DatabaseError)
        yield
    finally:
        server.terminate()
        server.wait()


def _fill(run: pathlib.Path) -> None:
    known = config.values(run)
    etc = run / 'etc'
    for name in ('cinder/cinder.conf', 'glance/glance-api.conf',
                 'keystone/keystone.conf', 'neutron/neutron.conf',
                 'nova/nova.conf', 'placement/placement.conf'):
        config.render(f'{name}.j2', etc / name, known)
    with contextlib.closing(clients.database(run=run)) as database:
        cursor = database.cursor()
        for name in _NAMES:
            cursor.execute(
                f'CREATE DATABASE {name} CHARACTER SET utf8mb4')

    def manage(program: str, *arguments: str) -> None:
        project = program.partition('-')[0]
        name = 'glance-api' if project == 'glance' else project
        _run(f'database-{project}', [
            config.PYTHON, config.BASE / 'bin' / program, '--config-file',
            etc / project / f'{name}.conf', *arguments])

    def nova() -> None:
        manage('nova-manage', 'api_db', 'sync')
        manage('nova-manage', 'cell_v2', 'map_cell0',
               '--database_connection', _CELL0_DATABASE)
        manage('nova-manage', 'cell_v2', 'create_cell', '--name', 'cell1',
               '--transport-url', _CELL_TRANSPORT,
               '--database_connection', _CELL_DATABASE)
        # And that of cell 0.
        manage('nova-manage', 'db', 'sync')

    with progress.step('making the tables of Nova and the others'), \
            concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [
            # The longest first.
            pool.submit(nova),
            pool.submit(manage, 'neutron-db-manage', 'upgrade', 'heads'),
            pool.submit(manage, 'cinder-manage', 'db', 'sync'),
            pool.submit(manage, 'glance-manage', 'db_sync'),
            pool.submit(manage, 'keystone-manage', 'db_sync'),
            pool.submit(manage, 'placement-manage', 'db', 'sync'),
        ]
        for job in concurrent.futures.as_completed(jobs):
            job.result()


def _log(name: str) -> pathlib.Path:
    log = paths.STATE / 'log' / f'{name}.log'
    log.parent.mkdir(exist_ok=True)
    return log


def _run(name: str, command: Sequence[object]) -> None:
    log = _log(name)
    with log.open('ab') as output:
        done = subprocess.run(
            [str(word) for word in command], stdout=output, stderr=output,
            stdin=subprocess.DEVNULL)
    if done.returncode:
        tail = log.read_text(errors='replace').splitlines()[-15:]
        raise DatabaseError('\n'.join([
            f'failed: {shlex.join(map(str, command))}', *tail,
            f'(all of it: {log})']))
