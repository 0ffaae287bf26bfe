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

"""An image's pages in the host's page cache."""

import os

from nova_fakedax import privsep


@privsep.fakedax_pctxt.entrypoint
def flush(path: str) -> None:
    """Write the file's dirty pages to its storage and wait for them.

    Covers what a guest stored through a mapping: fsync(2) writes all dirty
    pages of the file, whoever dirtied them.

    :raises OSError: the storage did not take them; what was acknowledged to
        the guest before is not affected, the rest may be lost
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
