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

"""The passwords of one lab: random, and kept with its state."""

import json
import os
import secrets

from lab import paths

#: Users with a password: the two of clouds.yaml, and the services. Volumes are
#: encrypted with that of 'volumes'.
USERS = ('admin', 'cinder', 'demo', 'glance', 'neutron', 'nova', 'placement',
         'rabbitmq', 'volumes')

_FILE = paths.STATE / 'passwords.json'


def load() -> dict[str, str]:
    """Password by user, 64 hex digits; missing ones are made."""
    try:
        passwords: dict[str, str] = json.loads(_FILE.read_text())
    except FileNotFoundError:
        passwords = {}
    if missing := set(USERS) - set(passwords):
        passwords |= {user: secrets.token_hex(32) for user in missing}
        paths.STATE.mkdir(exist_ok=True)
        partial = _FILE.with_suffix('.partial')
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(passwords, indent=1))
        os.replace(partial, _FILE)
    return passwords
