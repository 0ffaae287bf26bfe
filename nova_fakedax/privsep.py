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

"""The privilege of this package: to open instances' files for reading.

libvirt gives an instance's files to the user that runs QEMU, so nova-compute
may not be allowed to open them. fsync(2) and posix_fadvise(2) take a
descriptor that is open for reading.
"""

from oslo_privsep import capabilities
from oslo_privsep import priv_context

fakedax_pctxt = priv_context.PrivContext(
    'nova_fakedax',
    cfg_section='nova_fakedax_privileged',
    pypath=f'{__name__}.fakedax_pctxt',
    capabilities=[
        capabilities.CAP_DAC_READ_SEARCH,
    ],
)
