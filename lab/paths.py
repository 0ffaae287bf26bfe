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

"""The directories of the lab: the clone, its state, the user's cache."""

import hashlib
import os
import pathlib

#: The clone.
ROOT = pathlib.Path(__file__).resolve().parent.parent

#: All state of the lab; git ignores it; safe to delete after ``down``.
STATE = ROOT / '.lab'

#: Downloads and builds, shared by every clone of this user.
CACHE = pathlib.Path(
    os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
) / 'nova-fakedax'


def cache_key(*inputs: str | bytes) -> str:
    """A short name for what is built from ``inputs``; 16 hex digits."""
    digest = hashlib.sha256()
    for data in inputs:
        raw = data.encode() if isinstance(data, str) else data
        # The length keeps ('ab', 'c') and ('a', 'bc') apart.
        digest.update(b'%d:' % len(raw) + raw)
    return digest.hexdigest()[:16]
