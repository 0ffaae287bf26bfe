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

"""The words that this project does not use, looked for in text files.

The table "Do not say" of ``doc/source/glossary.rst`` is the list. A text that
quotes others, or names something of theirs, is left alone where its line, or
the line before, says ``words: quoted``.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

GLOSSARY = ROOT / 'doc/source/glossary.rst'

_HEADING = 'Do not say\n==========\n'

# A row of the list-table: the pattern, what to say, and an example of either.
_ROW = re.compile(
    r'^ +\* - ``(?P<pattern>[^`]+)``\n'
    r' +- (?P<instead>.+(?:\n {7,}\S.*)*)\n'
    r' +- (?P<bad>[^\n]+) -> (?P<good>[^\n]+)$', re.MULTILINE)

# Texts are wrapped, in comments and in string literals too, and the words of
# an identifier are joined by underscores.
_GAP = r'[\s_#*/"\'\\-]+'

_QUOTED = 'words: quoted'


@dataclasses.dataclass(frozen=True)
class Word:
    """A row of the table."""

    #: A regular expression; a space in it matches whatever is between words.
    pattern: str
    instead: str
    bad: str
    good: str

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Find the word in a text, whatever its case, as a whole word."""
        spaced = self.pattern.replace(' ', _GAP)
        return re.finditer(
            f'(?<![a-z])(?:{spaced})(?![a-z])', text, re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A word that was found in a text."""

    line: int
    found: str
    instead: str


def read_table(text: str) -> list[Word]:
    """Read the words from the glossary's text.

    :raises ValueError: there is no table, or a row of it cannot be read
    """
    table = text.partition(_HEADING)[2]
    words = [Word(row['pattern'], ' '.join(row['instead'].split()),
                  row['bad'], row['good'])
             for row in _ROW.finditer(table)]
    # The row of headings counts, too.
    rows = len(re.findall(r'^ +\* - ', table, re.MULTILINE)) - 1
    if not words or len(words) != rows:
        raise ValueError(f'only {len(words)} of {rows} rows of the table '
                         f'"Do not say" can be read')
    return words


def _own(path: pathlib.Path, text: str) -> str:
    """The part of a file that is this project's text, line for line.

    The table itself is left out, and so is what a patch only takes away or
    shows around its changes.
    """
    if path.resolve() == GLOSSARY:
        return text.partition(_HEADING)[0]
    if path.suffix == '.patch':
        message, diff, changes = text.partition('\ndiff --git ')
        return message + diff + re.sub(
            r'^[- ].*$', '', changes, flags=re.MULTILINE)
    return text


def find(words: Sequence[Word], text: str) -> list[Finding]:
    """Find words in a text, in the order of its lines."""
    lines = text.splitlines()
    findings = []
    for word in words:
        for match in word.find(text):
            at = text.count('\n', 0, match.start())
            if any(_QUOTED in line for line in lines[max(0, at - 1):at + 1]):
                continue
            findings.append(Finding(
                at + 1, ' '.join(match[0].split()), word.instead))
    return sorted(findings, key=lambda finding: finding.line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found as FILE:LINE; 1 if anything was."""
    parser = argparse.ArgumentParser(
        prog='python -m tests.style.words',
        description='Find words that the glossary says not to use.')
    parser.add_argument('files', nargs='+', type=pathlib.Path, metavar='FILE')
    words = read_table(GLOSSARY.read_text())
    status = 0
    for path in parser.parse_args(arguments).files:
        for finding in find(words, _own(path, path.read_text())):
            print(f'{path}:{finding.line}: "{finding.found}": say '
                  f'{finding.instead}')
            status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
