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

"""How many guests fit on hosts, and how well they work there.

A model, not a measurement, of few concepts, from the bottom up:

* :mod:`.lru`: what of file data a cache holds, and how many reads miss
* :mod:`.guest`: a guest of a flavor, and how its host sees it with each kind
  of disk
* :mod:`.host`: what guests find on one host, and whether that is good enough
* :mod:`.fleet`: guests of several flavors, placed on many hosts
* :mod:`.question`: guests as an operator describes them
* :mod:`.density`: the plan for what a bench has measured
* :mod:`.cloud`: flavors, servers and hosts as a cloud's API has them

Memory is in MiB, time in seconds, shares are from 0 to 1. Nothing here but
``cloud`` does I/O.
"""
