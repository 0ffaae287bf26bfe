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

"""Clean Debian root file systems, in which packages are installed."""

import fcntl
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from oslotest import base

from lab import paths

ROOTS = paths.CACHE / 'package-roots'

#: What this machine's apt needs to reach a mirror and to accept its dates.
REACH = re.compile(r'Acquire::(Check-(Date|Valid-Until)|https?::Proxy)\b')

KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'


def mirror() -> str:
    """The address of a mirror of Debian that this machine's apt uses."""
    done = subprocess.run(
        ['apt-get', 'indextargets', '--format', '$(REPO_URI)',
         'Label: Debian', 'Component: main', 'Created-By: Packages'],
        check=True, capture_output=True, text=True)
    return done.stdout.split()[0]


class NotThere(Exception):
    """A suite does not have what a test needs; the test is not at fault."""


def look(suite: str, names: tuple[str, ...], series: str) -> None:
    """Ask a mirror whether a suite has packages that fit together.

    :param series: how the version of the first one has to begin
    :raises NotThere: it does not
    :raises RuntimeError: the mirror cannot be asked
    """
    with tempfile.TemporaryDirectory() as directory:
        state = pathlib.Path(directory)
        for name in ('lists/partial', 'cache/archives/partial'):
            (state / name).mkdir(parents=True)
        (state / 'sources.list').write_text(source(suite) + '\n')
        (state / 'apt.conf').write_text(f'''
            Dir::Etc::SourceList "{state}/sources.list";
            Dir::Etc::SourceParts "/dev/null";
            Dir::Etc::Preferences "/dev/null";
            Dir::Etc::PreferencesParts "/dev/null";
            Dir::State::Lists "{state}/lists";
            Dir::State::Status "/dev/null";
            Dir::Cache "{state}/cache";
            APT::Sandbox::User "root";
            APT::Install-Recommends "false";
            ''')

        def apt(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                words, text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | {'APT_CONFIG': str(state / 'apt.conf'),
                                  'LC_ALL': 'C.UTF-8'})

        # Without the option, a mirror that does not answer is a warning.
        done = apt('apt-get', 'update', '--error-on=any')
        if done.returncode:
            raise RuntimeError(f'cannot read {suite}: {done.stdout}')
        found = re.search(r'Candidate: (\S+)',
                          apt('apt-cache', 'policy', names[0]).stdout)
        version = found[1] if found else 'none'
        if not version.startswith(series) or version == '(none)':
            raise NotThere(f'{suite} has {names[0]} {version}, not {series}*')
        done = apt('apt-get', 'install', '--simulate', *names)
        if done.returncode:
            raise NotThere(f'{suite} has {names[0]} {version}, which cannot '
                           f'be installed: {done.stdout}')


def source(suite: str) -> str:
    """The line of sources.list for a suite."""
    return f'deb [signed-by={KEYRING}] {mirror()} {suite} main'


def make_root(suite: str, *names: str, series: str = '') -> pathlib.Path:
    """A root of a suite with packages, and with their archives.

    It is made once, with what the suite had then.

    :param series: how the version of the first package has to begin
    :raises NotThere: the suite does not have the packages now
    :raises RuntimeError: it has them, but a download or an installation fails
    """
    root = ROOTS / f'{suite}-{paths.cache_key(*names)}'
    ROOTS.mkdir(parents=True, exist_ok=True)
    with open(ROOTS / f'{root.name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():
            return root
        look(suite, names, series)
        configuration = subprocess.run(
            ['apt-config', 'dump'], check=True, capture_output=True,
            text=True).stdout.splitlines()
        work = pathlib.Path(tempfile.mkdtemp(dir=ROOTS))
        try:
            done = subprocess.run(
                ['mmdebstrap', '--mode=root', '--variant=apt',
                 '--skip=cleanup/apt', '--dpkgopt=force-unsafe-io',
                 '--aptopt=APT::Keep-Downloaded-Packages "true"',
                 '--aptopt=APT::Install-Recommends "false"',
                 *(f'--aptopt={line}' for line in configuration
                   if REACH.match(line)),
                 f'--include=ca-certificates,{",".join(names)}',
                 suite, work / 'root', source(suite)],
                stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RuntimeError(f'mmdebstrap: {done.stdout[-4000:]}')
            (work / 'root').rename(root)
        finally:
            shutil.rmtree(work)
    return root


class RootTestCase(base.BaseTestCase):
    """A test with a root of its own, that is clean when it begins."""

    #: The suite, and the packages that are installed there.
    suite = ''
    names: tuple[str, ...] = ()
    #: How the version of the first of them begins.
    series = ''

    def setUp(self) -> None:
        super().setUp()
        if os.geteuid():
            self.skipTest('only root can make a root file system')
        try:
            self.lower = make_root(self.suite, *self.names,
                                   series=self.series)
        except NotThere as exc:
            self.skipTest(str(exc))
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)
        for name in ('upper', 'work', 'root', 'shared'):
            (self.directory / name).mkdir()
        # Nothing starts when it is installed.
        policy = self.directory / 'upper/usr/sbin/policy-rc.d'
        policy.parent.mkdir(parents=True)
        policy.write_text('#!/bin/sh\nexit 101\n')
        policy.chmod(0o755)

    @property
    def shared(self) -> pathlib.Path:
        """A directory that the root has as /mnt."""
        return self.directory / 'shared'

    def run_there(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the root, as root, without a network.

        What it starts ends with it. What it writes stays.
        """
        root = self.directory / 'root'
        return subprocess.run(
            ['unshare', '--mount', '--propagation', 'private', '--net',
             '--pid', '--fork', '--kill-child', 'sh', '-euc', f'''
                mount -t overlay overlay {root} -o \
lowerdir={self.lower},upperdir={self.directory}/upper,\
workdir={self.directory}/work
                mount -t proc proc {root}/proc
                mount -t tmpfs tmpfs {root}/run
                mount --bind {self.shared} {root}/mnt
                mount --rbind /dev {root}/dev
                exec chroot {root} sh -euc "$1"''', '-', script],
            # Not a file of this test's, or of its caller's home.
            env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL': 'C.UTF-8',
                 'DEBIAN_FRONTEND': 'noninteractive',
                 'PYTHONWARNINGS': 'ignore'},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)

    def output_of(self, script: str) -> str:
        """What a script prints that must not fail."""
        done = self.run_there(script)
        self.assertEqual(0, done.returncode, done.stdout)
        return done.stdout

    def files(self) -> set[str]:
        """The files there, but for what any installation leaves.

        apt and dpkg keep a record, and Python its bytecode of other packages.
        """
        return set(self.output_of(r'''
            find / -xdev \( -path /proc -o -path /run -o -path /mnt \
                -o -path /dev -o -path /tmp -o -path /var/log \
                -o -path /var/cache -o -path /var/lib/apt \
                -o -path /var/lib/dpkg -o -name __pycache__ \) \
                -prune -o -print''').splitlines())
