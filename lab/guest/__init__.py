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

A Debian cloud kernel with a busybox root, a real guest agent and a program,
``probe``, that tests and the demo call in it. It boots from kernel and
initrd images as well as by BIOS and GRUB from the disk, and takes its root
from pmem where there is pmem, from an ordinary disk otherwise.
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
