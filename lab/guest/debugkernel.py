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

"""A kernel that checks its drivers: ``python -m lab.guest.debugkernel``.

Debian's source with KASAN, kmemleak and lockdep, and otherwise only with what
the test guest needs on QEMU's q35, so that it builds in minutes.
"""

import os
import pathlib
import shlex
import shutil
import tempfile

import click

from lab.guest import debian
from lab.guest import tools
from lab import paths

SOURCE_PACKAGE = 'linux-source-6.12'

#: Options on top of ``make allnoconfig``; each is checked after the merge.
CONFIG = """\
CONFIG_LOCALVERSION="-fakedax-debug"
# It would let allnoconfig take away what no program does without.
CONFIG_EXPERT=n

# The machine. Full preemption finds more; preempt=voluntary is Debian's.
CONFIG_64BIT=y
CONFIG_SMP=y
CONFIG_NR_CPUS=8
CONFIG_NUMA=y
CONFIG_ACPI=y
CONFIG_ACPI_NUMA=y
CONFIG_X86_64_ACPI_NUMA=y
CONFIG_PREEMPT=y
CONFIG_PREEMPT_DYNAMIC=y
CONFIG_HIGH_RES_TIMERS=y
CONFIG_NO_HZ_IDLE=y
CONFIG_VMAP_STACK=y
CONFIG_TRANSPARENT_HUGEPAGE=y
CONFIG_KERNEL_GZIP=y
CONFIG_RTC_CLASS=y
CONFIG_RTC_DRV_CMOS=y
CONFIG_RTC_INTF_DEV=y
CONFIG_RTC_INTF_SYSFS=y
CONFIG_ACPI_BUTTON=y
CONFIG_INPUT=y
CONFIG_INPUT_EVDEV=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_PRINTK=y
CONFIG_PRINTK_TIME=y
CONFIG_MAGIC_SYSRQ=y

# PCI, and devices that come and go.
CONFIG_PCI=y
CONFIG_PCI_MSI=y
CONFIG_PCIEPORTBUS=y
CONFIG_HOTPLUG_PCI=y
CONFIG_HOTPLUG_PCI_PCIE=y
CONFIG_HOTPLUG_PCI_ACPI=y
CONFIG_VIRTIO_MENU=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_CONSOLE=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_NET=y
CONFIG_HW_RANDOM=y
CONFIG_HW_RANDOM_VIRTIO=y

# Modules, so that others can take their place.
CONFIG_MODULES=y
CONFIG_MODULE_UNLOAD=y
CONFIG_LIBNVDIMM=m
CONFIG_BLK_DEV_PMEM=m
CONFIG_VIRTIO_PMEM=m
CONFIG_NVDIMM_PFN=y
CONFIG_SPARSEMEM_VMEMMAP=y
CONFIG_MEMORY_HOTPLUG=y
CONFIG_MEMORY_HOTREMOVE=y
CONFIG_ZONE_DEVICE=y
CONFIG_FS_DAX=y

# Disks and file systems.
CONFIG_BLOCK=y
CONFIG_BLK_DEV=y
CONFIG_BLK_DEV_LOOP=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_RD_GZIP=y
CONFIG_PARTITION_ADVANCED=y
CONFIG_MSDOS_PARTITION=y
CONFIG_EFI_PARTITION=y
CONFIG_EXT4_FS=y
CONFIG_XFS_FS=y
CONFIG_ISO9660_FS=y
CONFIG_VFAT_FS=y
CONFIG_NLS_CODEPAGE_437=y
CONFIG_NLS_ASCII=y
CONFIG_NLS_ISO8859_1=y
CONFIG_NLS_UTF8=y
CONFIG_DEVTMPFS=y
CONFIG_PROC_FS=y
CONFIG_PROC_SYSCTL=y
CONFIG_SYSFS=y
CONFIG_TMPFS=y
CONFIG_SWAP=y

# What Debian's programs call.
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=y
CONFIG_MULTIUSER=y
CONFIG_SYSVIPC=y
CONFIG_POSIX_MQUEUE=y
CONFIG_FILE_LOCKING=y
CONFIG_FHANDLE=y
CONFIG_FUTEX=y
CONFIG_EPOLL=y
CONFIG_EVENTFD=y
CONFIG_SIGNALFD=y
CONFIG_TIMERFD=y
CONFIG_INOTIFY_USER=y
CONFIG_SHMEM=y
CONFIG_AIO=y
CONFIG_IO_URING=y
CONFIG_NET=y
CONFIG_UNIX=y
CONFIG_INET=y
CONFIG_PACKET=y
CONFIG_NETDEVICES=y
CONFIG_NET_CORE=y

# Suspend and hibernation; /sys/power/pm_test stops either half-way.
CONFIG_PM=y
CONFIG_SUSPEND=y
CONFIG_HIBERNATION=y
CONFIG_PM_SLEEP=y
CONFIG_PM_DEBUG=y
CONFIG_PM_ADVANCED_DEBUG=y
CONFIG_PM_SLEEP_DEBUG=y

# Watching. Frame pointers make the many stack traces cheap under TCG. Leaks
# are searched for when a test writes "scan" to /sys/kernel/debug/kmemleak.
CONFIG_DEBUG_KERNEL=y
CONFIG_DEBUG_FS=y
CONFIG_DEBUG_FS_ALLOW_ALL=y
CONFIG_DEBUG_INFO_NONE=y
CONFIG_KALLSYMS=y
CONFIG_KALLSYMS_ALL=y
CONFIG_STACKTRACE=y
CONFIG_UNWINDER_FRAME_POINTER=y
CONFIG_INIT_STACK_NONE=y
CONFIG_KASAN=y
CONFIG_KASAN_GENERIC=y
CONFIG_KASAN_OUTLINE=y
CONFIG_KASAN_VMALLOC=y
CONFIG_DEBUG_KMEMLEAK=y
CONFIG_DEBUG_KMEMLEAK_DEFAULT_OFF=n
CONFIG_DEBUG_KMEMLEAK_AUTO_SCAN=n
CONFIG_DEBUG_KMEMLEAK_MEM_POOL_SIZE=40000
CONFIG_LOCKDEP=y
CONFIG_PROVE_LOCKING=y
CONFIG_PROVE_RCU=y
CONFIG_RCU_CPU_STALL_TIMEOUT=60
CONFIG_DEBUG_ATOMIC_SLEEP=y
CONFIG_DEBUG_LIST=y
CONFIG_DEBUG_SG=y
CONFIG_DETECT_HUNG_TASK=y
CONFIG_DEFAULT_HUNG_TASK_TIMEOUT=30
CONFIG_FAULT_INJECTION=y
CONFIG_FAULT_INJECTION_DEBUG_FS=y
CONFIG_FAULT_INJECTION_STACKTRACE_FILTER=y
CONFIG_FAILSLAB=y
CONFIG_FAIL_PAGE_ALLOC=y
CONFIG_FAIL_MAKE_REQUEST=y
"""

#: The kernel has in it who built it and when; that must not differ.
_SAME_EVERYWHERE = ('KBUILD_BUILD_USER=lab',
                    'KBUILD_BUILD_HOST=nova-fakedax',
                    'KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970')

#: Programs of packages that Debian does not always install.
_PROGRAMS = ('bc', 'bison', 'depmod', 'flex', 'gcc', 'make', 'xz')


def build() -> pathlib.Path:
    """The debug kernel, built unless the cache has it.

    The directory is like an unpacked kernel package of Debian, with ``boot``
    and ``lib/modules``, and has the headers in ``build``, for ``make -C
    DIR/build M=...``. A build takes ten minutes on two processors, and 3 GiB.

    :raises GuestBuildError: something is missing, or an option of the
        kernel is not available
    """
    package, = debian.find(SOURCE_PACKAGE)
    # Modules must be built by the kernel's compiler.
    compiler = tools.run('gcc', '--version').splitlines()[0]
    key = paths.cache_key(package.checksum, CONFIG, compiler,
                          *_SAME_EVERYWHERE)
    target = paths.CACHE / 'guest-debug-kernel' / key
    if not target.is_dir():
        _check_tools()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
                dir=target.parent, prefix='building-') as tmp:
            work = pathlib.Path(tmp)
            _build(package, work)
            try:
                (work / 'out').rename(target)
            except OSError:
                # Another process was first, with the same result.
                if not target.is_dir():
                    raise
    return target


def _check_tools() -> None:
    for program in _PROGRAMS:
        tools.run(program, '--version')
    try:
        tools.run('gcc', '-fsyntax-only', '-x', 'c', '-',
                  stdin='#include <gelf.h>\n')
    except tools.GuestBuildError as e:
        raise tools.GuestBuildError(
            'gelf.h, which objtool of the kernel needs, is not installed; '
            'try: apt-get install libelf-dev') from e


def _build(package: debian.Package, work: pathlib.Path) -> None:
    debian.unpack(package, work / 'package')
    archive = work / 'package/usr/src' / f'{SOURCE_PACKAGE}.tar.xz'
    tools.run('tar', '--extract', f'--file={archive}', cwd=work)
    source = work / SOURCE_PACKAGE

    _configure(source)
    _make(source, f'-j{os.cpu_count()}')
    version = _make(source, '-s', 'kernelrelease').strip()

    out = work / 'out'
    boot = out / 'boot'
    boot.mkdir(parents=True)
    for name, path in (('vmlinuz', 'arch/x86/boot/bzImage'),
                       ('config', '.config'), ('System.map', 'System.map')):
        shutil.copy(source / path, boot / f'{name}-{version}')
    _make(source, 'modules_install', f'INSTALL_MOD_PATH={out}')
    _install_headers(source, out / 'build')
    link = out / 'lib/modules' / version / 'build'
    link.unlink()
    link.symlink_to('../../../build')


def _configure(source: pathlib.Path) -> None:
    fragment = source / 'fragment.config'
    fragment.write_text(CONFIG)
    # Kconfig ignores options that it does not know or whose conditions are
    # not met, and the script only warns.
    tools.run('scripts/kconfig/merge_config.sh', '-n', fragment.name,
              cwd=source)
    got = dict(line.split('=', 1)
               for line in (source / '.config').read_text().splitlines()
               if '=' in line and not line.startswith('#'))
    wanted = [line for line in CONFIG.splitlines()
              if line.startswith('CONFIG_')]
    missing = [line for line in wanted
               for name, value in [line.split('=', 1)]
               if got.get(name, 'n') != value]
    if missing:
        raise tools.GuestBuildError(
            f'the kernel of {SOURCE_PACKAGE} cannot be configured with '
            f'{", ".join(missing)}')


def _install_headers(source: pathlib.Path, target: pathlib.Path) -> None:
    """Like Debian's headers packages: no sources, no object files."""
    script = 'scripts/package/install-extmod-build'
    _make(source, 'run-command',
          f'KBUILD_RUN_COMMAND={script} {shlex.quote(str(target))}')


def _make(source: pathlib.Path, *arguments: str) -> str:
    # The machine has other work in these minutes.
    return tools.run('nice', '-n', '15', 'make', *_SAME_EVERYWHERE,
                     *arguments, cwd=source)


@click.command()
def main() -> None:
    """Build the debug kernel unless the cache has it; print its directory."""
    print(build())


if __name__ == '__main__':
    main(prog_name='python -m lab.guest.debugkernel')
