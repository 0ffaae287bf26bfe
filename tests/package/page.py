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

"""What a page of the documentation has its reader type."""

from collections.abc import Iterator
import dataclasses
import pathlib
from typing import Any

from docutils import core
from docutils import nodes
from docutils.parsers import rst
from docutils.parsers.rst import directives
from docutils.parsers.rst import roles


class _Nothing(rst.Directive):
    """A directive of Sphinx that shows no text."""

    has_content = True

    def run(self) -> list[Any]:
        return []


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    :ivar section: the title of the innermost section that it stands in
    :ivar language: ``console``, ``ini``, or empty
    """

    section: str
    language: str
    text: str

    def commands(self) -> Iterator[tuple[str, str]]:
        """The commands of a console: the prompt, and the text."""
        command: list[str] = []
        for line in self.text.splitlines():
            if not command:
                prompt, _, line = line.partition(' ')
                if prompt not in ('#', '$'):
                    raise ValueError(f'no prompt in {self}')
            command.append(line)
            if not line.endswith('\\'):
                yield prompt, '\n'.join(command)
                command = []
        if command:
            raise ValueError(f'{self} ends in a continued line')


def blocks(path: pathlib.Path) -> list[Block]:
    """The blocks of code of a page, in their order."""
    for role in ('doc', 'ref'):
        roles.register_generic_role(role, nodes.inline)
    directives.register_directive('toctree', _Nothing)
    tree = core.publish_doctree(
        path.read_text(), source_path=str(path),
        # A directive or a role that is missing is an error here.
        settings_overrides={'syntax_highlight': 'none', 'halt_level': 3,
                            'report_level': 3, 'doctitle_xform': False})
    return [Block(_section(block), _language(block), block.astext())
            for block in tree.findall(nodes.literal_block)]


def _language(block: Any) -> str:
    return str(([name for name in block['classes'] if name != 'code']
                or [''])[0])


def _section(node: Any) -> str:
    while not isinstance(node, nodes.section):
        node = node.parent
    return str(node.children[0].astext())
