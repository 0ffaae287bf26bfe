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
"""A guest's QEMU as a process, and what it has mapped of an image."""

from collections.abc import Iterator
import ctypes
import errno
import os
import pathlib
import re

_PROC = pathlib.Path('/proc')

#: Of every architecture since Linux 5.10: arch/*/syscall.tbl.
_NR_PROCESS_MADVISE = 440
_MADV_PAGEOUT = 21

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    """struct iovec of linux/uio.h."""

    _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]


def of_server(server: str) -> int | None:
    """The process that runs a server, which libvirt starts with its UUID."""
    for process in _PROC.glob('[0-9]*'):
        try:
            arguments = (process / 'cmdline').read_bytes().split(b'\0')
        except OSError:
            # It has just ended.
            continue
        if server.encode() in arguments:
            return int(process.name)
    return None


def resident(pid: int, path: str) -> int:
    """The bytes of a file that a process has in its page tables.

    proc(5), ``/proc/[pid]/smaps``

    :raises OSError: the process has ended
    """
    found = 0
    of_file = False
    for line in _lines(pid, 'smaps'):
        if _range(line):
            of_file = _is_of(line, path)
        elif of_file and line.startswith('Rss:'):
            found += int(line.split()[1]) * 1024
    return found


def page_out(pid: int, path: str) -> None:
    """Have Linux reclaim the clean pages that a process has mapped of a file.

    process_madvise(2), MADV_PAGEOUT: what is dirty stays. The process goes on
    meanwhile, and faults pages in again that it needs.

    :raises OSError: the process has ended, or Linux does not allow it
    """
    pidfd = os.pidfd_open(pid)
    try:
        for line in _lines(pid, 'maps'):
            if _is_of(line, path) and (found := _range(line)):
                begin, end = (int(part, 16) for part in found.groups())
                while begin < end:
                    vector = _IoVec(begin, end - begin)
                    done = _libc.syscall(
                        _NR_PROCESS_MADVISE, pidfd, ctypes.byref(vector),
                        ctypes.c_size_t(1), _MADV_PAGEOUT, 0)
                    if done <= 0:
                        error = ctypes.get_errno() or errno.EIO
                        raise OSError(error, os.strerror(error))
                    begin += done
    finally:
        os.close(pidfd)


def _lines(pid: int, name: str) -> Iterator[str]:
    with (_PROC / str(pid) / name).open() as lines:
        yield from lines


def _range(line: str) -> re.Match[str] | None:
    """The beginning and the end of a mapping, if the line is of one."""
    return re.match('([0-9a-f]+)-([0-9a-f]+) ', line)


def _is_of(line: str, path: str) -> bool:
    """Whether a mapping is of a file; its path is the end of the line."""
    return line.rstrip('\n').endswith(f' {os.path.realpath(path)}')
