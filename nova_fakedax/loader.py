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

"""How Nova finds the driver.

``compute_driver = fakedax.FakeDaxDriver`` makes Nova import
``nova.virt.fakedax`` (nova.virt.driver.load_compute_driver prepends
``nova.virt.``). A file of that name would have to be in Nova's own directory,
which is not next to this package if nova is editable; a second ``nova/``
directory would hide Nova's. So ``nova_fakedax.pth`` imports this module when
the interpreter starts, and a finder answers for that one name.
"""

from collections.abc import Sequence
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types

NAME = 'nova.virt.fakedax'


class _Finder(importlib.abc.MetaPathFinder):

    def find_spec(
        self, fullname: str, path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        return importlib.util.spec_from_file_location(
            NAME, os.path.join(os.path.dirname(__file__), 'shim.py'))


def install() -> None:
    """Answer for the name, after every other finder.

    So a ``nova/virt/fakedax`` that a distribution has put into Nova's
    directory takes precedence.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
