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

"""How many more guests fit, and what that costs.

``modes`` are the kinds of disk and what an operator can do besides; ``host``
turns that on and off; ``disks`` makes images and ``fleet`` runs guests of
them. Each part of the benchmark is a module; ``command`` runs them and
``report`` shows the rows.
"""

from lab.benchmarks.density.command import density

__all__ = ['density']
