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

"""The test guest: one small disk image that boots on every kind of flavor.

A Debian cloud kernel with a busybox root, QEMU's guest agent and the program
``probe``, which tests and the demo run in it. It boots from kernel and initrd
images, or with BIOS and GRUB from the disk. Its root is on pmem if it has
pmem, on an ordinary disk otherwise.

Knows how to build and cache the guest; does not know what runs it.
"""

from lab.guest.image import build
from lab.guest.image import COMMAND_LINE
from lab.guest.image import Guest
from lab.guest.image import KERNEL_PACKAGE
from lab.guest.tools import GuestBuildError

__all__ = [
    'COMMAND_LINE',
    'Guest',
    'GuestBuildError',
    'KERNEL_PACKAGE',
    'build',
]
