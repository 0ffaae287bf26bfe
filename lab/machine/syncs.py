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

"""The sync calls that a process makes, seen from outside it."""

from collections.abc import Iterator
import contextlib
import pathlib
import re
import signal
import subprocess
import tempfile

from lab import errors

_CALLS = ('fsync', 'fdatasync', 'msync', 'syncfs', 'sync_file_range')

# With --decode-fds=path: fdatasync(12</instances/.../disk>) = 0
# But msync(0x7f2c40000000, 1073741824, MS_SYNC) = 0, which names no file.
_CALL = re.compile(
    r'^\d+ +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)')


class WatchError(errors.LabError):
    """The process cannot be watched."""


class Syncs:
    """Sync calls on the file; complete once the block of watch() has ended.

    :ivar succeeded: how many returned 0
    :ivar failed: how many did not
    """

    succeeded = 0
    failed = 0


def _mappings(pid: int, file_name: str) -> list[range]:
    """Where in its memory a process has mapped a file."""
    found = []
    for line in pathlib.Path(f'/proc/{pid}/maps').read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.endswith(file_name):
            start, end = (int(text, 16) for text in addresses.split('-'))
            found.append(range(start, end))
    return found


@contextlib.contextmanager
def watch(pid: int, file_name: str) -> Iterator[Syncs]:
    """Count the sync calls of a process on one file, by strace.

    An msync counts if the file was mapped where it begins when this began.

    :param pid: the process; all of its threads are watched
    :param file_name: the end of the file's path in the process's namespace
    :raises WatchError: strace cannot attach
    """
    syncs = Syncs()
    mappings: list[range] = []

    def is_of_file(call: str, arguments: str) -> bool:
        if call == 'msync':
            start = int(arguments.partition(',')[0], 16)
            return any(start in mapping for mapping in mappings)
        return f'{file_name}>' in arguments

    with tempfile.TemporaryDirectory() as directory:
        trace = pathlib.Path(directory) / 'trace'
        strace = subprocess.Popen(
            ['strace', '--follow-forks', '--decode-fds=path',
             f'--trace={",".join(_CALLS)}', f'--output={trace}',
             f'--attach={pid}'],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            # strace says so when it has stopped all threads there are.
            assert strace.stderr
            first = strace.stderr.readline()
            if 'attached' not in first:
                raise WatchError(f'strace of process {pid}: {first.strip()}')
            mappings += _mappings(pid, file_name)
            yield syncs
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate()
        for line in trace.read_text().splitlines():
            match = _CALL.match(line)
            if match and is_of_file(match['call'], match['arguments']):
                if match['result'] == '0':
                    syncs.succeeded += 1
                else:
                    syncs.failed += 1
