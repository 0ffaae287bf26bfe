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

import threading
import time

from nova.tests import fixtures as nova_fixtures
from oslotest import base

from tests import installed_nova


class LetReadersPassWritersTest(base.BaseTestCase):

    def test_a_second_reader_is_let_in_while_a_writer_waits(self) -> None:
        """Without it, the first reader would wait for the second forever."""
        installed_nova.let_readers_pass_writers()
        lock = nova_fixtures.ReaderWriterLock()
        wrote, read = threading.Event(), threading.Event()

        def write() -> None:
            with lock.write_lock():
                wrote.set()

        def read_too() -> None:
            with lock.read_lock():
                read.set()

        with lock.read_lock():
            threading.Thread(target=write, daemon=True).start()
            while not lock._pending_writers:
                time.sleep(0.01)
            threading.Thread(target=read_too, daemon=True).start()
            self.assertTrue(read.wait(30))
            self.assertFalse(wrote.is_set())
        self.assertTrue(wrote.wait(30))
