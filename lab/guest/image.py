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

"""Building the test guest: kernel, initrd and disk image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import gzip
import os
import pathlib
import shutil
import tempfile

from lab.guest import debian
from lab.guest import disk
from lab.guest import driver
from lab.guest import modules
from lab.guest import tools
from lab import paths

#: Kernel command line of both ways to boot. The initrd finds root. The self
#: tests of the kernel's ciphers take a tenth of its start under TCG. Its check
#: of the timer panics where a loaded host is late. No device of the lab's
#: machines needs bounce buffers (guest-image-elements/fakedax).
COMMAND_LINE = ('console=ttyS0 quiet cryptomgr.notests no_timer_check '
                'swiotlb=512')

KERNEL_PACKAGE = 'linux-image-cloud-amd64'

#: Instead of a package: the kernel of :mod:`lab.guest.debugkernel`.
DEBUG_KERNEL = 'debug'

#: Enough for the guest and some MiB of files. The guest grows its root to the
#: disk, so a larger image would only take longer to upload, fetch and
#: allocate.
SIZE_MIB = 64

_SOURCES = pathlib.Path(__file__).parent

#: When a disk was last written to, as its build leaves it: seconds since 1970.
_BUILT = 0

#: Programs that grow the root and that busybox lacks; from the host.
_HOST_PROGRAMS = ('sfdisk', 'partx', 'resize2fs')


@dataclasses.dataclass(frozen=True)
class Guest:
    """A built guest. Its files are shared: boot only a copy of the disk."""

    directory: pathlib.Path

    @property
    def kernel(self) -> pathlib.Path:
        return self.directory / 'vmlinuz'

    @property
    def initrd(self) -> pathlib.Path:
        return self.directory / 'initrd'

    @property
    def disk(self) -> pathlib.Path:
        """Raw image that BIOS can boot; its /boot has kernel and initrd."""
        return self.directory / 'disk.raw'

    def copy_disk(self, to: pathlib.Path) -> None:
        """Copy the disk image, with its holes."""
        tools.run('cp', '--sparse=always', self.disk, to)

    @property
    def probe(self) -> pathlib.Path:
        """The guest's program of that name; it also runs on the host."""
        return self.directory / 'probe'


def build(size_mib: int = SIZE_MIB, kernel_package: str = KERNEL_PACKAGE,
          with_driver: bool = False, extra_modules: Sequence[str] = ()
          ) -> Guest:
    """The test guest, built unless the cache has it.

    It is built again when a file of this package has changed, or when apt
    has a newer kernel or agent.

    :param size_mib: size of the disk image, a multiple of 2 MiB
    :param kernel_package: a cloud kernel, or a package that depends on one;
        or :data:`DEBUG_KERNEL`
    :param with_driver: use the virtio-pmem driver of guest-image-elements
        instead of the kernel's own
    :param extra_modules: modules of the kernel to load after the usual ones
    :raises GuestBuildError: something is missing, or does not fit; or the
        disk was written to after it was built
    """
    disk.check_size(size_mib)
    kernel = _kernel(kernel_package)
    agent, = debian.find('qemu-guest-agent')
    key = paths.cache_key(
        str(size_mib), kernel.key, agent.checksum, *extra_modules,
        *(part for path in _source_files()
          for part in (str(path.relative_to(_SOURCES)), path.read_bytes())),
        *(part for path in with_driver and driver.source_files() or ()
          for part in (path.name, path.read_bytes())))
    target = paths.CACHE / 'guest' / key
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
                dir=target.parent, prefix='building-') as tmp:
            work = pathlib.Path(tmp)
            _build(size_mib, kernel, agent, work, with_driver, extra_modules)
            os.utime(Guest(work / 'out').disk, (_BUILT, _BUILT))
            try:
                (work / 'out').rename(target)
            except OSError:
                # Another process was first, with the same result.
                if not target.is_dir():
                    raise
    guest = Guest(target)
    _check_untouched(guest)
    return guest


def _check_untouched(guest: Guest) -> None:
    """Refuse a disk that was written to: every later test would get it.

    :raises GuestBuildError: it was; the next call builds it again
    """
    try:
        changed = guest.disk.stat().st_mtime != _BUILT
    except FileNotFoundError:
        # Another process has just removed it.
        changed = True
    if changed:
        shutil.rmtree(guest.directory, ignore_errors=True)
        raise tools.GuestBuildError(
            f'{guest.disk} was written to after it was built: something has '
            'booted it and not a copy. It was removed, and is built again '
            'when it is needed next.')


def _source_files() -> Iterator[pathlib.Path]:
    for path in sorted(_SOURCES.rglob('*')):
        if path.is_file() and path.suffix != '.pyc':
            yield path


def _copy(tree: pathlib.Path, into: pathlib.Path, *names: str) -> None:
    for name in names:
        shutil.copytree(tree / name, into / name, symlinks=True)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel that can be unpacked.

    :ivar key: changes when its content does
    :ivar unpack: makes the tree of its package in a directory
    :ivar headers: makes a build directory for its release in a directory
    """

    key: str
    unpack: Callable[[pathlib.Path], None]
    headers: Callable[[str, pathlib.Path], pathlib.Path]


def _kernel(name: str) -> _Kernel:
    if name == DEBUG_KERNEL:
        # python -m must be able to run it: it must not be imported before.
        from lab.guest import debugkernel
        built = debugkernel.build()
        return _Kernel(
            str(built),
            lambda into: _copy(built, into, 'boot', 'lib'),
            lambda version, into: built / 'build')
    packages = debian.find(*debian.kernel_parts(debian.kernel(name)))

    def unpack(into: pathlib.Path) -> None:
        for package in packages:
            debian.unpack(package, into)

    return _Kernel(' '.join(package.checksum for package in packages),
                   unpack, driver.unpack_headers)


def _build(size_mib: int, kernel: _Kernel, agent: debian.Package,
           work: pathlib.Path, with_driver: bool,
           extra_modules: Sequence[str]) -> None:
    out = work / 'out'
    out.mkdir()
    guest = Guest(out)

    package = work / 'kernel'
    package.mkdir()
    kernel.unpack(package)
    # Since Debian 13 modules are in /usr/lib.
    if not (package / 'lib').exists():
        (package / 'lib').symlink_to('usr/lib')
    version, = (path.name for path in (package / 'lib/modules').iterdir())
    # Debian's Linux 7 has it next to its modules, older ones in /boot.
    image = next(path for path in (
        package / f'boot/vmlinuz-{version}',
        package / f'lib/modules/{version}/vmlinuz') if path.exists())
    shutil.copy(image, guest.kernel)
    # depmod prefers modules in this directory to the kernel's own.
    updates = pathlib.Path('lib/modules', version, 'updates')
    if with_driver:
        driver.build(kernel.headers(version, work / 'headers'),
                     work / 'driver', package / updates)

    initrd = work / 'initrd'
    _skeleton(initrd, _SOURCES / 'initrd', ['new'])
    listing = initrd / 'etc/modules'
    listing.write_text('\n'.join([listing.read_text(), *extra_modules, '']))
    modules.install(
        [*_module_names(listing),
         *_module_names(listing.with_name('modules.scsi'))],
        package, version, initrd)
    guest.initrd.write_bytes(_cpio(initrd))

    root = work / 'root'
    _skeleton(root, _SOURCES / 'rootfs', ['mnt', 'root', 'run', 'tmp', 'var'])
    _add_applets(root)
    _add_probe(root)
    shutil.copy(root / 'bin/probe', guest.probe)
    if with_driver:
        # For tests that unload the driver and load it again.
        shutil.copytree(package / updates, root / 'lib/driver')
    debian.unpack(agent, work / 'agent')
    _add_programs(root, [work / 'agent/usr/sbin/qemu-ga',
                         *map(_host_program, _HOST_PROGRAMS)])
    for path in (guest.kernel, guest.initrd):
        shutil.copy(path, root / 'boot' / path.name)
    config = root / 'boot/grub/grub.cfg'
    config.write_text(
        config.read_text().replace('@COMMAND_LINE@', COMMAND_LINE))
    disk.create(guest.disk, size_mib, root)


def _module_names(listing: pathlib.Path) -> list[str]:
    return [line for line in listing.read_text().splitlines()
            if line and not line.startswith('#')]


def _skeleton(root: pathlib.Path, files: pathlib.Path,
              directories: Iterable[str]) -> None:
    """What the initrd and the root have in common: layout and busybox."""
    shutil.copytree(files, root)
    for name in ('bin', 'dev', 'etc', 'lib', 'proc', 'sys', 'usr',
                 *directories):
        (root / name).mkdir(exist_ok=True)
    for link, to in (('sbin', 'bin'), ('lib64', 'lib'), ('usr/bin', '../bin'),
                     ('usr/sbin', '../bin')):
        (root / link).symlink_to(to)
    shutil.copy(_host_program('busybox'), root / 'bin')


def _add_applets(root: pathlib.Path) -> None:
    for applet in tools.run(root / 'bin/busybox', '--list').split():
        link = root / 'bin' / applet
        if not link.exists():
            link.symlink_to('busybox')


def _add_probe(root: pathlib.Path) -> None:
    tools.run('gcc', '-std=gnu11', '-O2', '-Wall', '-static', '-s',
              '-o', root / 'bin/probe', _SOURCES / 'src/probe.c')


def _add_programs(root: pathlib.Path,
                  programs: Iterable[pathlib.Path]) -> None:
    for program in programs:
        link = root / 'bin' / program.name
        link.unlink(missing_ok=True)
        shutil.copy(program, link)
        for name, library in debian.libraries(program).items():
            shutil.copy(library, root / 'lib' / name)


def _host_program(name: str) -> pathlib.Path:
    path = shutil.which(name, path=os.environ.get('PATH', '') +
                        ':/usr/sbin:/sbin:/bin')
    if not path:
        raise tools.GuestBuildError(
            f'{name} is not installed; bindep.txt lists the packages that '
            f'the lab needs')
    return pathlib.Path(path)


def _cpio(tree: pathlib.Path) -> bytes:
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob('*'))
    with tempfile.NamedTemporaryFile(dir=tree.parent) as archive:
        tools.run('cpio', '--create', '--quiet', '--format=newc',
                  '--owner=0:0', f'--file={archive.name}', cwd=tree,
                  stdin='\n'.join(names))
        # Under TCG the time to unpack matters more than a few KiB.
        return gzip.compress(archive.read(), compresslevel=6)
