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

"""The virtio-pmem driver of guest-image-elements, built for one kernel."""

import pathlib
import re
import shutil

from lab.guest import debian
from lab.guest import tools
from lab import paths

SOURCE = next((paths.ROOT / 'guest-image-elements/fakedax-driver/static'
               '/usr/src').glob('fakedax-driver-*'))

#: What ``modinfo --field version`` says of both modules.
VERSION = re.findall(
    '#define VIRTIO_PMEM_VERSION "(.*)"',
    (SOURCE / 'virtio_pmem.h').read_text())[0]

MODULES = ('nd_virtio', 'virtio_pmem')


def source_files() -> list[pathlib.Path]:
    """The inputs of the modules."""
    return sorted(path for path in SOURCE.iterdir() if path.is_file())


def build(headers: pathlib.Path, work: pathlib.Path,
          into: pathlib.Path) -> None:
    """Build the modules, without debug information.

    :param headers: a kernel's build directory
    :param work: a directory that does not exist
    :param into: the directory that gets the two files
    :raises GuestBuildError: they do not compile; has the compiler's message
    """
    shutil.copytree(SOURCE, work)
    tools.run('make', '-C', work, f'BUILD={headers}', 'modules')
    into.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        tools.run('strip', '--strip-debug', '-o', into / f'{name}.ko',
                  work / f'{name}.ko')


def unpack_headers(version: str, into: pathlib.Path) -> pathlib.Path:
    """Unpack a Debian kernel's headers, without installing them.

    :param version: kernel release, as ``uname -r`` gives it
    :returns: the build directory for :func:`build`
    """
    name = f'linux-headers-{version}'
    depends = debian.depends(name, ('linux-headers-', 'linux-kbuild-'))
    for package in debian.find(name, *depends):
        debian.unpack(package, into)
    # Debian 12's kbuild for 6.1 is in /usr/lib, where its links expect /lib.
    if not (into / 'lib').is_symlink():
        for kbuild in (into / 'usr/lib').glob('linux-kbuild-*'):
            (into / 'lib').mkdir(exist_ok=True)
            link = into / 'lib' / kbuild.name
            if not link.exists():
                link.symlink_to(kbuild)
    build = into / 'usr/src' / name
    makefile = build / 'Makefile'
    makefile.write_text(makefile.read_text().replace(
        'include /usr/src/', f'include {into}/usr/src/'))
    return build
