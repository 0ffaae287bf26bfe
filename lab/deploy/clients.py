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

"""Connections to the lab's cloud and to its databases."""

import openstack
from openstack import config as sdk_config
from openstack import connection
import pymysql

from lab.deploy import config
from lab.deploy import host

#: A service that answers no request for so long hangs. It waits for others for
#: at most a minute (Nova's ``rpc_response_timeout``).
_ANSWER_SECONDS = 180


def connect(user: str = 'admin') -> connection.Connection:
    """A connection to the cloud of the lab that is up.

    :param user: 'admin', or 'demo', an ordinary user with a project of its
        own
    :raises openstack.exceptions.ConfigException: there is no such user, or
        the lab was never up
    """
    region = sdk_config.OpenStackConfig(
        config_files=[str(config.ETC / 'clouds.yaml')], load_envvars=False,
    ).get_one(cloud=user, api_timeout=_ANSWER_SECONDS)
    return openstack.connection.Connection(config=region)


def database(name: str | None = None, run: object = host.RUN,
             ) -> pymysql.Connection:
    """A connection to MariaDB by its socket in ``run``.

    :raises pymysql.err.OperationalError: it does not answer
    """
    return pymysql.connect(
        unix_socket=f'{run}/mysqld.sock', user='root', database=name,
        autocommit=True, connect_timeout=5)
