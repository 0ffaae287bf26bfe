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

"""The blocks of ext4's journal, as JBD2 writes them.

Linux, include/linux/jbd2.h, journal_header_t: three numbers of 32 bits, most
significant byte first.
"""

from collections.abc import Iterable
import struct

_MAGIC = 0xc03b3998
_DESCRIPTOR = 1
_COMMIT = 2


def _transactions(pages: Iterable[bytes], wanted: int) -> set[int]:
    found = set()
    for page in pages:
        magic, kind, sequence = struct.unpack_from('>III', page)
        if magic == _MAGIC and kind == wanted:
            found.add(sequence)
    return found


def commits(pages: Iterable[bytes]) -> set[int]:
    """The transactions whose commit block is among the pages."""
    return _transactions(pages, _COMMIT)


def early_commits(unsynced: Iterable[bytes]) -> set[int]:
    """Transactions whose commit block was stored too early.

    The commit block and the descriptor block of the same transaction are both
    unsynced, so a power cut may leave one without the other.
    """
    pages = list(unsynced)
    return commits(pages) & _transactions(pages, _DESCRIPTOR)
