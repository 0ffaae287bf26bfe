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

"""A container with systemd on a root file system, by systemd-nspawn."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re
import subprocess
import time

from lab import wait

#: What a command has, and nothing of this process's own.
ENVIRONMENT = {
    'HOME': '/root', 'LC_ALL': 'C.UTF-8', 'TERM': 'dumb',
    'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
    'DEBIAN_FRONTEND': 'noninteractive', 'PYTHONWARNINGS': 'ignore'}


class ContainerError(Exception):
    """A container does not start, or a command failed there."""


class Container:
    """A machine of its own, but for the kernel; its network is a loopback.

    Its file system is an overlay, which only the container sees.

    :param lowers: the root file systems below, the uppermost first
    :param state: an empty directory; ``upper`` in it has what is written
    :param bind: directories here by their paths there
    """

    def __init__(self, lowers: Sequence[pathlib.Path], state: pathlib.Path,
                 bind: Mapping[pathlib.Path, str] | None = None) -> None:
        self._lowers = lowers
        self._state = state
        self._bind = bind or {}
        self._console = state / 'console.log'
        self._cgroup: pathlib.Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        for name in ('upper', 'work', 'root'):
            (state / name).mkdir()

    def start(self, seconds: float = 120) -> None:
        """Boot it, and wait until systemd has done so.

        :raises ContainerError: it does not boot
        """
        self._cgroup = _make_cgroup()
        root = self._state / 'root'
        lowers = ':'.join(map(str, self._lowers))
        command = ' '.join([
            'exec systemd-nspawn --quiet --boot --machine=cloud --register=no',
            '--keep-unit --private-network --capability=all --console=pipe',
            '--resolv-conf=off --link-journal=no', f'--directory={root}',
            *(f'--bind={here}:{there}'
              for here, there in self._bind.items())])
        with self._console.open('wb') as console:
            self._process = subprocess.Popen(
                # Of what is there, nothing outlives this process.
                ['setpriv', '--pdeathsig', 'KILL', 'unshare', '--mount',
                 '--propagation', 'private', '--pid', '--fork',
                 '--kill-child', '--mount-proc', 'sh', '-euc', f'''
                    echo $$ >{self._cgroup}/cgroup.procs
                    mount -t overlay overlay {root} -o lowerdir={lowers},\
upperdir={self._state}/upper,workdir={self._state}/work
                    echo cloud >{root}/etc/hostname
                    echo 127.0.0.1 cloud >>{root}/etc/hosts
                    {command}'''],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                # An interrupt is for whoever stops it.
                start_new_session=True,
                # systemd has given up the older hierarchy.
                env=ENVIRONMENT | {'SYSTEMD_NSPAWN_UNIFIED_HIERARCHY': '1'})
        wait.until('systemd-nspawn to start systemd', self._find_leader,
                   seconds, state=self._console.read_text)
        wait.until('systemd to boot', self._booted, seconds, interval=0.5,
                   state=lambda: self.run(
                       'systemctl list-jobs --no-pager', check=False))

    def _find_leader(self) -> bool:
        assert self._process
        if self._process.poll() is not None:
            raise ContainerError(
                f'systemd-nspawn: {self._console.read_text()}')
        # unshare, systemd-nspawn, systemd.
        for nspawn in _children(self._process.pid):
            for child in _children(nspawn):
                if _name(child) == 'systemd':
                    self._leader = child
                    return True
        return False

    def _booted(self) -> bool:
        # "degraded" is what a service that failed makes of it.
        state = self.run('systemctl is-system-running', check=False)
        return state.strip() in ('running', 'degraded')

    def run(self, script: str, *, check: bool = True, input: str = '',
            environment: Mapping[str, str] | None = None) -> str:
        """Run a shell script as root; return what it prints.

        :raises ContainerError: it fails, and ``check``
        """
        done = subprocess.run(
            ['nsenter', '--target', str(self._leader), '--all', 'sh', '-euc',
             'cd; eval "$1"', '-', script], input=input, text=True,
            env=ENVIRONMENT | dict(environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if check and done.returncode:
            raise ContainerError(f'ended with {done.returncode}: '
                                 f'{script}\n{done.stdout}')
        return done.stdout

    def read(self, path: str) -> str:
        """The text of a file there."""
        return self.run(f'cat {path}')

    def write(self, path: str, text: str) -> None:
        """Write a file there; its owner and mode stay, if it exists."""
        self.run(f'cat >{path}', input=text)

    def power_off(self) -> None:
        """Shut it down in order, so that what it wrote is whole."""
        assert self._process
        self.run('systemctl poweroff', check=False)
        self._process.wait()
        self.stop()

    def stop(self) -> None:
        """End it at once, whatever it does, and leave nothing."""
        if self._process:
            self._process.kill()
            self._process.wait()
        if self._cgroup:
            _remove_cgroup(self._cgroup)
            self._cgroup = None


def _children(pid: int) -> list[int]:
    """The processes that a process has started, proc(5)."""
    try:
        return [int(child) for child in pathlib.Path(
            f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


def _name(pid: int) -> str:
    try:
        return pathlib.Path(f'/proc/{pid}/comm').read_text().strip()
    except FileNotFoundError:
        return ''


def _mounted(kind: str) -> pathlib.Path | None:
    """Where a hierarchy of cgroups is mounted.

    :param kind: how its line in /proc/mounts goes on, a regular expression
    """
    found = re.search(rf'^\S+ (\S+) {kind}',
                      pathlib.Path('/proc/self/mounts').read_text(),
                      re.MULTILINE)
    return pathlib.Path(found[1]) if found else None


def _make_cgroup() -> pathlib.Path:
    """A cgroup of its own: containers that share one use the same names."""
    root = _mounted('cgroup2 ')
    if not root:
        raise ContainerError('no cgroup2 is mounted')
    [own] = re.findall(r'^0::/(.*)$', pathlib.Path(
        '/proc/self/cgroup').read_text(), re.MULTILINE)
    cgroup = root / own / f'fakedax-{os.getpid()}'
    cgroup.mkdir()
    return cgroup


def _remove_cgroup(cgroup: pathlib.Path) -> None:
    """Also what systemd-nspawn makes of that name for systemd.

    :raises OSError: a process stays in it
    """
    root, systemd = _mounted('cgroup2 '), _mounted('cgroup .*name=systemd')
    _remove_tree(cgroup)
    if root and systemd:
        _remove_tree(systemd / cgroup.relative_to(root))


def _remove_tree(cgroup: pathlib.Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            for directory, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(directory)
            return
        except OSError:
            # The kernel ends the processes of a PID namespace with its first.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
