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

"""A backing file whose fsync the test holds, fails and counts.

Run as a program, this serves a FUSE file system with one file, ``image``,
which passes through to a host file. It reads commands from standard input and
reports each fsync on standard output. Two mounts of one host file act as two
hosts: each has its own page cache, and each sees the other's locks.

A second file, if given, holds what would survive a power cut: it receives a
write only when an fsync that began after the write has ended.
"""

import collections
import contextlib
import errno
import fcntl
import os
import pathlib
import queue
import stat
import struct
import subprocess
import sys
import threading
import time
import typing as ty

import mfusepy


class _FileSystem(mfusepy.Operations):

    use_ns = True

    def __init__(self, image: str, synced: str | None) -> None:
        self._synced = synced and os.open(synced, os.O_RDWR)
        #: Written since the last fsync began: offset and data, in order.
        self._unsynced: list[tuple[int, bytes]] = []
        self._fd = os.open(image, os.O_RDWR)
        self._lock = threading.Condition()
        self._slow = threading.Lock()
        self._held = False
        self._passes = 0
        #: How many fsyncs run, apart from those that are held.
        self._running = 0
        self._delay = 0.0
        self._write_delay = 0.0
        self._errors: collections.deque[int] = collections.deque()
        self._always = 0
        self._lock_error = 0
        self._read_error = 0
        self._write_error = 0

    def command(self, line: str) -> None:
        name, *args = line.split()
        with self._lock:
            if name == 'hold':
                self._held = True
                # One that began before must not end after hold() returned.
                self._lock.wait_for(lambda: not self._running)
            elif name == 'release':
                self._held = False
            elif name == 'pass':
                self._passes += 1
            elif name == 'delay':
                self._delay = float(args[0])
            elif name == 'delay-writes':
                self._write_delay = float(args[0])
            elif name == 'fail':
                self._errors.extend(int(arg) for arg in args)
            elif name == 'fail-always':
                self._always = int(args[0])
            elif name == 'fail-locks':
                self._lock_error = int(args[0])
            elif name == 'fail-reads':
                self._read_error = int(args[0])
            elif name == 'fail-writes':
                self._write_error = int(args[0])
            else:
                raise ValueError(f'unknown command: {line!r}')
            self._lock.notify_all()
        self._tell(f'did {name}')

    @staticmethod
    def _tell(text: str) -> None:
        # The test may have ended.
        with contextlib.suppress(BrokenPipeError):
            os.write(1, f'{text}\n'.encode())

    def getattr(
        self, path: str, fh: int | None = None
    ) -> dict[str, ty.Any]:
        if path == '/':
            return {'st_mode': stat.S_IFDIR | 0o755, 'st_nlink': 2}
        if path != '/image':
            raise mfusepy.FuseOSError(errno.ENOENT)
        status = os.fstat(self._fd)
        return {
            'st_mode': status.st_mode,
            'st_nlink': 1,
            'st_size': status.st_size,
            'st_blocks': status.st_blocks,
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        return ['.', '..', 'image']

    def open(self, path: str, flags: int) -> int:
        # Each open needs its own descriptor, because the descriptor holds the
        # lock. The image cannot be opened by its name: a test may have
        # mounted this file system there.
        return os.open(f'/proc/self/fd/{self._fd}', os.O_RDWR)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def lock(self, path: str, fh: int, cmd: int, lock: ty.Any) -> int:
        """Serve locks of open file descriptions.

        Because this method exists, the kernel keeps no locks for the mount.
        """
        asked = lock.contents
        if asked.l_type == fcntl.F_UNLCK and not asked.l_len:
            # libfuse sends this at each close, whoever holds the lock.
            return 0
        if self._lock_error:
            raise mfusepy.FuseOSError(self._lock_error)
        # These are real locks of this machine, so each "host" sees the
        # other's.
        flock = struct.pack('hhqqi4x', asked.l_type, os.SEEK_SET,
                            asked.l_start, asked.l_len, 0)
        try:
            flock = fcntl.fcntl(
                fh, fcntl.F_OFD_GETLK if cmd == fcntl.F_GETLK
                else fcntl.F_OFD_SETLK, flock)
        except OSError as exc:
            raise mfusepy.FuseOSError(exc.errno) from exc
        asked.l_type = struct.unpack('hhqqi4x', flock)[0]
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        if self._read_error:
            raise mfusepy.FuseOSError(self._read_error)
        return os.pread(self._fd, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        with self._lock:
            error = self._write_error
            delay = self._write_delay
        if delay:
            # One write at a time, as on a slow disk.
            with self._slow:
                time.sleep(delay)
        if error:
            self._tell(f'refuse {error}')
            raise mfusepy.FuseOSError(error)
        if self._synced is not None:
            with self._lock:
                self._unsynced.append((offset, data))
        return os.pwrite(self._fd, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.ftruncate(self._fd, length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        with self._lock:
            written, self._unsynced = self._unsynced, []
            self._tell(f'begin {datasync}')
            delay = self._delay
        time.sleep(delay)
        with self._lock:
            while self._held and not self._passes:
                self._lock.wait()
            self._passes -= self._held
            self._running += 1
            error = self._always
            if self._errors:
                error = self._errors.popleft()
            if self._synced is not None and not error:
                # Under the lock: once hold() has returned, this file does not
                # change.
                for start, data in written:
                    os.pwrite(self._synced, data, start)
        if self._synced is None and not error:
            os.fsync(self._fd)
        with self._lock:
            self._tell(f'end {error}')
            self._running -= 1
            self._lock.notify_all()
        if error:
            raise mfusepy.FuseOSError(error)
        return 0


def unmount(mount: str) -> None:
    """Unmount lazily: a killed QEMU may still have the file open."""
    subprocess.run(['fusermount3', '-u', '-z', mount], check=True)


def main() -> None:
    image, mount, *synced = sys.argv[1:]
    operations = _FileSystem(image, synced[0] if synced else None)

    def commands() -> None:
        for line in sys.stdin:
            operations.command(line)
        # The test has ended, and nothing else would end this process.
        operations.command('release')
        unmount(mount)

    threading.Thread(target=commands, daemon=True).start()
    mfusepy.FUSE(
        operations,
        mount,
        foreground=True,
        # Opening the file again keeps its page cache, as on a local disk.
        # Only a cache that is kept can become stale.
        kernel_cache=True,
        attr_timeout=3600,
        entry_timeout=3600,
    )


class BackingFile:
    """One mount of an image, with control over its fsync.

    :param synced: a copy of the image that receives only what was synced;
        see above
    :param within: a process, in whose mount namespace to mount it
    :ivar path: the file to give to QEMU, as that process sees it.
    :ivar begun: how many fsync and fdatasync calls have begun.
    :ivar ended: the errno of each one that has ended, 0 for success.
    :ivar ended_at: when its end was reported, in seconds since the epoch.
    :ivar datasync: for each begun call, whether it is fdatasync.
    :ivar refused: how many writes have failed.
    """

    def __init__(self, image: pathlib.Path, mount: pathlib.Path,
                 synced: pathlib.Path | None = None,
                 within: int | None = None) -> None:
        mount.mkdir(parents=True, exist_ok=True)
        self.path = mount / 'image'
        self.begun = 0
        self.ended: list[int] = []
        self.ended_at: list[float] = []
        self.datasync: list[bool] = []
        self.refused = 0
        self._mount = (
            mount if within is None
            else pathlib.Path(f'/proc/{within}/root', *mount.parts[1:]))
        self._within = within
        self._gone = False
        self._done: queue.Queue[str] = queue.Queue()
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [*(['nsenter', '--target', str(within), '--mount', '--']
               if within is not None else []),
             sys.executable, __file__, str(image), str(mount),
             *([str(synced)] if synced else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + 20
        while not os.path.ismount(self._mount):
            if self._process.poll() is not None:
                raise RuntimeError(
                    f'cannot mount {mount}: the FUSE process ended with '
                    f'status {self._process.returncode}'
                )
            if time.monotonic() > deadline:
                self.close()
                raise TimeoutError(f'{mount} was not mounted in 20 s')
            time.sleep(0.02)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, value = line.split()
            with self._changed:
                if what == 'begin':
                    self.begun += 1
                    self.datasync.append(value == '1')
                elif what == 'end':
                    self.ended.append(int(value))
                    self.ended_at.append(time.time())
                elif what == 'refuse':
                    self.refused += 1
                else:
                    self._done.put(value)
                self._changed.notify_all()

    def _command(self, command: str) -> None:
        if self._gone:
            return
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        self._done.get(timeout=10)

    def hold(self) -> None:
        """Hold every fsync that has not ended, until release()."""
        self._command('hold')

    def release(self) -> None:
        """Let the held fsyncs end."""
        self._command('release')

    def release_one(self) -> None:
        """Let one held fsync end."""
        self._command('pass')

    def delay(self, seconds: float) -> None:
        """Delay each fsync that begins from now on."""
        self._command(f'delay {seconds}')

    def delay_writes(self, seconds: float) -> None:
        """Delay each write to the file; writes go one at a time."""
        self._command(f'delay-writes {seconds}')

    def fail(self, *errors: int) -> None:
        """Make the next fsyncs end with these errnos, 0 for success."""
        self._command('fail ' + ' '.join(map(str, errors)))

    def fail_locks(self, error: int) -> None:
        """Make locking fail with ``error``; 0 ends that."""
        self._command(f'fail-locks {error}')

    def fail_always(self, error: int) -> None:
        """Make every fsync end with ``error``; 0 ends that."""
        self._command(f'fail-always {error}')

    def fail_reads(self, error: int) -> None:
        """Make reads of uncached pages fail with ``error``; 0 ends that."""
        self._command(f'fail-reads {error}')

    def fail_writes(self, error: int) -> None:
        """Make all writes to the file fail with ``error``; 0 ends that."""
        self._command(f'fail-writes {error}')

    def disconnect(self) -> None:
        """Lose the storage for good: ENOTCONN for whatever has the file open.

        The other methods do nothing after that.
        """
        assert self._within is None, 'not in another mount namespace'
        self._gone = True
        self._process.kill()
        self._process.wait()
        unmount(str(self._mount))

    def wait(
        self, condition: ty.Callable[[], bool], timeout: float = 20
    ) -> None:
        """Wait until ``condition``, which looks at the counts, is true."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(
                    f'after {timeout} s: {self.begun} fsyncs begun, '
                    f'{len(self.ended)} ended, the last ones with '
                    f'{self.ended[-5:]}'
                )

    def close(self) -> None:
        if self._process.poll() is None and os.path.ismount(self._mount):
            self.release()
            # The process unmounts itself when its standard input ends.
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


if __name__ == '__main__':
    main()
