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

"""Images with data, one for each guest.

The data is what disks have: a page of it compresses to about a third, and a
quarter of the pages is the same in all guests, as if the distribution had
brought them.
"""

from collections.abc import Iterator
import contextlib
import mmap
import os
import pathlib
import subprocess

from lab.benchmarks.density import fleet
from lab.benchmarks.density import modes
from lab.benchmarks import images
from lab.benchmarks import results
from lab import progress

#: In the guest.
DATA = '/root/data'
_PAGE = 4096
_MARK = b'lab/bench density'
#: Bytes of a page that do not compress.
_RANDOM = 1300
#: One page in this many is the same in all guests.
_SHARED = 4
#: For the file system, besides the data.
_ROOM_MIB = 192


class Disks:
    """Makes images when they are asked for, and keeps them.

    :param data_mib: of the file in each
    """

    def __init__(self, data_mib: int, stack: contextlib.ExitStack) -> None:
        self._data_mib = data_mib
        self._stack = stack
        self._images: dict[tuple[bool, int], pathlib.Path] = {}

    def image(self, mode: modes.Mode, number: int = 0) -> pathlib.Path:
        """The image of a guest.

        Modes whose images are laid out alike share it. The caller sees to it
        that one QEMU at a time has it.
        """
        key = mode.memmap, number
        if key not in self._images:
            self._images[key] = (self._copy(mode.memmap, number) if number
                                 else self._first(mode.memmap))
        return self._images[key]

    def _first(self, memmap: bool) -> pathlib.Path:
        layout = 'memmap' if memmap else 'plain'
        image = self._stack.enter_context(images.sparse(
            f'density-{layout}-0', self._data_mib + _ROOM_MIB, memmap=memmap))
        mode = modes.MODES['pmem' if memmap else 'blk-writeback']
        with (progress.step(f'an image with {self._data_mib} MiB of data, '
                            f'{layout}'),
              _source(self._data_mib) as source,
              fleet.boot(mode, image, 512, extra=[
                  '-blockdev', f'driver=file,node-name=data,filename={source},'
                               'read-only=on',
                  '-device', 'virtio-blk-pci,drive=data,serial=data']) as vm):
            vm.agent.run(
                'for disk in /sys/block/vd*; do '
                '[ "$(cat $disk/serial)" = data ] && break; done; '
                f'dd if=/dev/${{disk##*/}} of={DATA} bs=1M '
                f'count={self._data_mib} && sync', check=True, timeout=900)
        _make_private(image, 0)
        return image

    def _copy(self, memmap: bool, number: int) -> pathlib.Path:
        first = self.image(modes.MODES['pmem' if memmap else 'blk-writeback'])
        image = first.with_name(first.name.replace('-0.', f'-{number}.'))
        self._stack.callback(image.unlink, missing_ok=True)
        subprocess.run(['cp', '--sparse=always', '--reflink=auto', first,
                        image], check=True)
        _make_private(image, number)
        return image


@contextlib.contextmanager
def _source(mib: int) -> Iterator[pathlib.Path]:
    results.DIRECTORY.mkdir(parents=True, exist_ok=True)
    file = results.DIRECTORY / 'density-data'
    try:
        with file.open('wb') as opened:
            for number in range(mib << 20 >> 12):
                opened.write(b'%-32b%08x' % (_MARK, number)
                             + os.urandom(_RANDOM)
                             + bytes(_PAGE - 40 - _RANDOM))
        yield file
    finally:
        file.unlink(missing_ok=True)


def _make_private(image: pathlib.Path, number: int) -> None:
    """Name the guest in the pages of its data that no other guest has."""
    with image.open('r+b') as file, mmap.mmap(file.fileno(), 0) as mapped:
        at = mapped.find(_MARK)
        while at >= 0:
            page = int(mapped[at + 32:at + 40], 16)
            if at % _PAGE == 0 and page % _SHARED:
                mapped[at + 24:at + 32] = b'%08x' % number
            at = mapped.find(_MARK, at + _PAGE - at % _PAGE)
        mapped.flush()
