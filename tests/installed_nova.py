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

"""Nova's own tests, from an installed Nova."""

import importlib.metadata
import pathlib

from nova.conf import paths
from nova.tests import fixtures as nova_fixtures

API_PASTE = 'etc/nova/api-paste.ini'


def find_api_paste() -> None:
    """Tell Nova's tests where a wheel has put api-paste.ini.

    They look for it in Nova's source tree ($pybasedir). The default is
    changed since they reset the configuration for each test.
    """
    [option] = [option for option in paths.ALL_OPTS
                if option.name == 'pybasedir']
    if pathlib.Path(option.default, API_PASTE).exists():
        return
    [found] = [path for path in importlib.metadata.files('nova') or []
               if path.as_posix().endswith(API_PASTE)]
    option.default = str(
        pathlib.Path(str(found.locate())).resolve().parents[2])


def let_readers_pass_writers() -> None:
    """Keep Nova's tests from waiting for themselves forever.

    nova.tests.fixtures.nova.CellDatabases has a lock that admits no reader
    while a writer waits. A reader (nova.test.TestCase._run_periodics) waits
    for another greenlet that has to read as well; if a writer, such as a
    request to the API, has come in between, nothing goes on. Seen in
    test_numa_live_migration's test_bug_1894095_post_drop.
    """
    nova_fixtures.ReaderWriterLock.has_pending_writers = False
