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

"""Packaging: pbr, and one file next to the package.

``nova_fakedax.pth`` (see nova_fakedax/loader.py) goes to the top of
site-packages, by a wheel and by an editable install alike. setup.cfg cannot
say that: its data_files go to the prefix, whose site-packages differ
between Python versions and distributions.
"""

import pathlib
import shutil

import setuptools
from setuptools.command import build_py
from setuptools.command import editable_wheel

PTH = pathlib.Path(__file__).parent / 'nova_fakedax.pth'


class BuildPy(build_py.build_py):

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy(PTH, self.build_lib)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs + [str(pathlib.Path(self.build_lib) / PTH.name)]


class EditableWheel(editable_wheel.editable_wheel):

    def _install_namespaces(self, installation_dir, pth_prefix):
        # What is put here is packed at the top of the wheel.
        super()._install_namespaces(installation_dir, pth_prefix)
        shutil.copy(PTH, installation_dir)


class Distribution(setuptools.Distribution):

    def get_command_class(self, command):
        # pbr replaces what setup() is given as cmdclass.
        classes = {'build_py': BuildPy, 'editable_wheel': EditableWheel}
        return classes.get(command) or super().get_command_class(command)


setuptools.setup(
    setup_requires=['pbr'],
    pbr=True,
    distclass=Distribution,
)
