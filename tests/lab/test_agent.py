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

"""The guest agent, when its line loses bytes."""

import json
import pathlib
import socket
import tempfile
import threading

from oslotest import base

from lab.machine import agent


class LineTestCase(base.BaseTestCase):
    """An agent whose parser still has the start of a command."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = pathlib.Path(directory.name) / 'agent'
        self.listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listening.close)
        self.listening.bind(str(path))
        self.listening.listen()
        self.left = '{"execute": "guest-ping", "argumen'
        threading.Thread(target=self.serve, daemon=True).start()
        transport = agent.SocketTransport(path)
        self.addCleanup(transport.close)
        self.agent = agent.Agent(transport)

    def serve(self):
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                # A client waits for each answer, so this is one command.
                while command := connection.recv(65536):
                    answer = self.answer(json.loads(command))
                    connection.sendall(json.dumps(answer).encode() + b'\n')

    def answer(self, request):
        left, self.left = self.left, ''
        if left:
            # What the agent once read of two commands.
            answer = {'error': {
                'class': 'GenericError', 'desc':
                "QMP input member 'argumenxecute' is unexpected"}}
        else:
            answer = {'return': request.get('arguments', {}).get('id', {})}
        return answer | {'id': request['id']}

    def test_agent_is_ready_when_it_is_in_step_again(self):
        self.agent.wait_ready(10)
        self.assertEqual('', self.left)
