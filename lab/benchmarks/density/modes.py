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

"""The kinds of disk, and what an operator can do besides."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib

from lab.machine import emulators
from lab.machine import qemu

#: As Nova has it, unless statistics of memory are turned off.
_BALLOON = ('-device', 'virtio-balloon-pci,id=balloon')
_REPORTING = ('-device',
              'virtio-balloon-pci,id=balloon,free-page-reporting=on')


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run guests.

    :ivar memmap: whether the image has the guest's page descriptors in front
    :ivar stock: on QEMU's own device
    :ivar reporting: free page reporting
    :ivar ksm: the host merges pages of guests that are the same
    :ivar swap: ``zram``, ``file``, or none
    :ivar cut_mib: the RAM that is enough for a hot set of 200 MiB, by
        lab/bench ram and the search of the first part
    :ivar fake_dax: whether the guest keeps no page cache
    """

    title: str
    disk: Callable[[pathlib.Path], list[str]]
    memmap: bool = False
    stock: bool = False
    reporting: bool = True
    ksm: bool = False
    swap: str = ''
    cut_mib: int = 320
    fake_dax: bool = False

    def emulator(self) -> str:
        return emulators.stock('10.0') if self.stock else emulators.project()

    def options(self, image: pathlib.Path) -> list[str]:
        """QEMU's options for the disk and the balloon."""
        return [*self.disk(image),
                *(_REPORTING if self.reporting else _BALLOON)]


def blk(image: pathlib.Path) -> list[str]:
    return qemu.virtio_blk(image)


def blk_none(image: pathlib.Path) -> list[str]:
    return qemu.virtio_blk(image, direct=True)


def pmem(image: pathlib.Path) -> list[str]:
    return qemu.pmem(image)


_fake_dax = functools.partial(Mode, disk=pmem, memmap=True, cut_mib=96,
                              fake_dax=True)

MODES = {
    'blk-writeback': Mode('virtio-blk, writeback', blk, reporting=False),
    'blk-none': Mode('virtio-blk, none', blk_none, reporting=False),
    'blk-writeback-fpr': Mode(
        'virtio-blk, writeback, free page reporting', blk),
    'blk-none-fpr': Mode('virtio-blk, none, free page reporting', blk_none),
    'blk-none-ksm': Mode(
        'virtio-blk, none, free page reporting, KSM', blk_none, ksm=True),
    'blk-none-zram': Mode(
        'virtio-blk, none, free page reporting, zram', blk_none, swap='zram'),
    'blk-none-swap': Mode(
        'virtio-blk, none, free page reporting, swap file', blk_none,
        swap='file'),
    'pmem-stock': Mode("QEMU's own virtio-pmem", pmem, stock=True,
                       reporting=False, cut_mib=176, fake_dax=True),
    'pmem': _fake_dax('fake DAX', reporting=False),
    'pmem-fpr': _fake_dax('fake DAX, free page reporting'),
    'pmem-zram': _fake_dax('fake DAX, free page reporting, zram',
                           swap='zram'),
}

#: What one who is in a hurry compares: as Nova has it, and fake DAX.
QUICK = ('blk-writeback-fpr', 'blk-none-fpr', 'pmem-fpr')

#: Of which fleets are made: what an operator can have who wants many. None
#: does better without free page reporting.
FLEETS = ('blk-writeback-fpr', 'blk-none-fpr', 'blk-none-ksm',
          'blk-none-zram', 'blk-none-swap', 'pmem-fpr', 'pmem-zram')

#: Of which a guest is stopped; free page reporting needs one that runs.
FROZEN = (*FLEETS, 'pmem-stock')

#: Of a mixed fleet. The host's cache as well as the guest's is no gain.
MIXED_FLEETS = FLEETS[1:]

#: Of guests with the same RAM, all busy.
SAME_FLEETS = ('blk-none-fpr', 'blk-none-ksm', 'blk-none-zram', 'pmem-fpr',
               'pmem-zram')

#: With a hot set that is large next to the rest of a guest.
LARGE_FLEETS = ('blk-none-fpr', 'blk-none-zram', 'blk-none-swap', 'pmem-fpr',
                'pmem-zram')

#: With guests so small that they keep little themselves. The host's cache can
#: do it for them, as with fake DAX, where ``cache`` is ``writeback``.
SMALL_FLEETS = ('blk-writeback-fpr', 'blk-none-fpr', 'pmem-fpr')

#: Of which the costs are measured: also of fake DAX that always has the host
#: read ahead, or never.
COSTS = {
    **{name: MODES[name]
       for name in ('blk-writeback', 'blk-none', 'pmem-stock', 'pmem')},
    'pmem-read-ahead': _fake_dax(
        'fake DAX, read-ahead=on', reporting=False,
        disk=functools.partial(qemu.pmem, properties='read-ahead=on')),
    'pmem-no-read-ahead': _fake_dax(
        'fake DAX, read-ahead=off', reporting=False,
        disk=functools.partial(qemu.pmem, properties='read-ahead=off')),
}
