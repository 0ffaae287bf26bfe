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

"""What a missing record, and a commit block that came early, look like."""

import struct

from oslotest import base

from tests.paravirt import journal
from tests.paravirt import verdict

RECORDS = ' '.join(str(generation) for generation in
                   [32, 33, *range(18, 32)])


class MissingTestCase(base.BaseTestCase):

    def found(self, records: str, newest: str = '32') -> list[str]:
        return verdict.missing(f' {records} {newest}\n', {0: 33})

    def test_all_is_there(self) -> None:
        self.assertEqual([], self.found(RECORDS))

    def test_the_next_one_is_under_way(self) -> None:
        for seen in ('34', '18', '-'):
            self.assertEqual([], self.found(RECORDS.replace('18', seen)))

    def test_an_old_record(self) -> None:
        self.assertEqual(['task 0: record 33 is 17'],
                         self.found(RECORDS.replace('33', '17')))

    def test_a_torn_record(self) -> None:
        self.assertEqual(['task 0: record 20 is -'],
                         self.found(RECORDS.replace('20', '-')))

    def test_an_old_file(self) -> None:
        self.assertEqual(['task 0: newest is 28, not 32'],
                         self.found(RECORDS, '28'))

    def test_only_complete_lines_acknowledge(self) -> None:
        self.assertEqual({1: 7, 2: 40}, verdict.acknowledged(
            'ack 1 6 0\r\nack 2 40 0\r\nack 1 7 0\r\nack 1 8 0'))


class JournalTestCase(base.BaseTestCase):

    @staticmethod
    def block(kind: int, sequence: int) -> bytes:
        return struct.pack('>III', 0xc03b3998, kind, sequence).ljust(4096)

    def test_a_commit_with_its_descriptor_unsynced(self) -> None:
        self.assertEqual({7}, journal.early_commits(
            [self.block(1, 7), b'x' * 4096, self.block(2, 7)]))

    def test_a_commit_whose_descriptor_is_synced(self) -> None:
        pages = [self.block(2, 7), self.block(1, 8), b'x' * 4096]
        self.assertEqual(set(), journal.early_commits(pages))
        self.assertEqual({7}, journal.commits(pages))
