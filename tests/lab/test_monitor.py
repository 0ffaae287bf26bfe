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

"""Monitors of one thread, used by others at the same time."""

from concurrent import futures
import json
import pathlib
import socket
import tempfile
import threading

from oslotest import base

from lab.machine import monitor


class MonitorTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = pathlib.Path(directory.name) / 'monitor'
        self.listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listening.close)
        self.listening.bind(str(path))
        self.listening.listen()
        #: Nobody is answered before both have asked.
        self.both = threading.Barrier(2, timeout=20)
        self.monitors = [self.connect(path) for _number in range(2)]

    def connect(self, path: pathlib.Path) -> monitor.Monitor:
        made = monitor.Monitor(str(path))
        threading.Thread(target=self.serve, daemon=True).start()
        made.connect(negotiate=False)
        self.addCleanup(made.close)
        return made

    def serve(self) -> None:
        connection, _address = self.listening.accept()
        with connection:
            while command := connection.recv(65536):
                request = json.loads(command)
                self.both.wait()
                connection.sendall(json.dumps({
                    'return': request['execute'], 'id': request['id'],
                }).encode() + b'\n')

    def test_two_threads_use_two_monitors_of_a_third(self) -> None:
        with futures.ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(each.cmd, f'query-{number}')
                     for number, each in enumerate(self.monitors)]
            self.assertEqual(['query-0', 'query-1'],
                             [each.result(20) for each in asked])

    def test_closed_twice(self) -> None:
        self.monitors[0].close()
        self.monitors[0].close()
