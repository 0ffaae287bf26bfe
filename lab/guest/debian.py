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

"""Files from Debian packages that are not installed on this machine."""

import dataclasses
import functools
import os
import pathlib
import shlex
import tempfile

from lab.guest import tools
from lab import paths


@dataclasses.dataclass(frozen=True)
class Package:
    """One version of a package, as apt would download it."""

    name: str
    #: File name of the archive; it holds the version and architecture.
    archive: str
    #: apt's own checksum of the archive, such as ``SHA256:9f86...``.
    checksum: str


# apt takes a second of CPU time to answer, and every test asks.
@functools.cache
def find(*names: str) -> tuple[Package, ...]:
    """The packages, in the versions that apt would install.

    As apt said the first time that this process asked.

    :raises GuestBuildError: apt does not know one of them
    """
    # Each line is: 'URI' FILE SIZE CHECKSUM (apt-get(8), --print-uris).
    listing = tools.run('apt-get', 'download', '--print-uris', *names)
    lines = [shlex.split(line) for line in listing.splitlines()]
    found = {line[1].partition('_')[0]: line for line in lines
             if len(line) == 4}
    if missing := [name for name in names if name not in found]:
        raise tools.GuestBuildError(
            f'apt knows no archive of {", ".join(missing)}; try: '
            f'apt-get update')
    return tuple(Package(name, found[name][1], found[name][3])
                 for name in names)


@functools.cache
def depends(name: str, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """The dependencies of a package whose names start with a prefix.

    As apt said the first time that this process asked.
    """
    listing = tools.run('apt-cache', 'depends', '--important', name)
    lines = (line.strip(' |').partition(': ')
             for line in listing.splitlines())
    return tuple(package for kind, _, package in lines
                 if kind == 'Depends' and package.startswith(prefixes))


def kernel(name: str) -> str:
    """The package that has the kernel: ``name`` or what it depends on.

    ``linux-image-cloud-amd64`` is empty and depends on the newest kernel.
    """
    return next(iter(depends(name, ('linux-image-',))), name)


def kernel_parts(name: str) -> tuple[str, ...]:
    """The packages that hold a kernel and its modules.

    Of Debian's Linux 7, linux-image-VERSION only depends on them.
    """
    version = name.removeprefix('linux-image-')
    return (name, *(part for part in depends(
        name, ('linux-base-', 'linux-binary-', 'linux-modules-'))
        if part.endswith(version)))


def unpack(package: Package, into: pathlib.Path) -> None:
    """Download the package, unless the cache has it, and unpack it."""
    cached = paths.CACHE / 'packages' / package.archive
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as tmp:
            # apt's own user has no access to root's cache.
            tools.run('apt-get', '-o', 'APT::Sandbox::User=root',
                      'download', package.name, cwd=tmp)
            (pathlib.Path(tmp) / package.archive).rename(cached)
    into.mkdir(parents=True, exist_ok=True)
    tools.run('dpkg-deb', '--extract', cached, into)


def libraries(program: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """The shared libraries that ``program`` loads here, by their names.

    They are the host's, which fit: the guest's programs come from packages
    of the same Debian release.

    :raises GuestBuildError: one is not installed
    """
    found = {}
    for line in tools.run('ldd', program).splitlines():
        match line.split():
            case [name, '=>', 'not', 'found']:
                raise tools.GuestBuildError(
                    f'{program} needs {name}, which is not installed')
            case [name, '=>', path, _]:
                found[name] = pathlib.Path(path)
            case [path, _] if path.startswith('/'):
                found[pathlib.Path(path).name] = pathlib.Path(path)
    return found
