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

"""The kernel modules that a guest loads, and their dependencies."""

from collections.abc import Iterable
import gzip
import lzma
import pathlib

from lab.guest import tools


def install(names: Iterable[str], package: pathlib.Path, version: str,
            root: pathlib.Path) -> None:
    """Put modules from an unpacked kernel package into a tree.

    They are stored uncompressed: the guest's modprobe may not be able to
    unpack them. Modules that are built into the kernel are left out.

    :param version: kernel release, as ``uname -r`` gives it
    :raises GuestBuildError: the kernel has no such module
    """
    tools.run('depmod', '-b', package, version)
    source = package / 'lib' / 'modules' / version
    target = root / 'lib' / 'modules' / version
    needed = _closure(names, source)
    for path in needed:
        # Built-in lists and dependency files name modules without suffix.
        module = target / path.removesuffix('.xz').removesuffix('.gz')
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_bytes(_read(source / path))
    for listing in ('modules.builtin', 'modules.order'):
        (target / listing).write_bytes((source / listing).read_bytes())
    tools.run('depmod', '-b', root, version)


def _closure(names: Iterable[str], source: pathlib.Path) -> list[str]:
    depends = {}
    for line in (source / 'modules.dep').read_text().splitlines():
        path, _, needs = line.partition(':')
        depends[path] = needs.split()
    by_name = {_name(path): path for path in depends}
    builtin = {_name(path) for path in
               (source / 'modules.builtin').read_text().splitlines()}
    closure: dict[str, None] = {}
    for name in names:
        name = name.replace('-', '_')
        if name in by_name:
            path = by_name[name]
            # modules.dep lists indirect dependencies too (modules.dep(5)).
            closure.update(dict.fromkeys([path, *depends[path]]))
        elif name not in builtin:
            raise tools.GuestBuildError(
                f'kernel {source.name} has no module {name}')
    return list(closure)


def _name(path: str) -> str:
    return pathlib.PurePath(path).name.partition('.')[0].replace('-', '_')


def _read(path: pathlib.Path) -> bytes:
    match path.suffix:
        case '.xz':
            return lzma.decompress(path.read_bytes())
        case '.gz':
            return gzip.decompress(path.read_bytes())
        case '.ko':
            return path.read_bytes()
    raise tools.GuestBuildError(
        f'{path.name}: must be uncompressed, or compressed with xz or gzip')
