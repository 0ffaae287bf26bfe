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

from collections.abc import Callable
import errno
import os
import typing as ty

from oslo_privsep import capabilities
from oslo_privsep import priv_context

T = ty.TypeVar('T')

fakedax_pctxt = priv_context.PrivContext(
    'nova_fakedax',
    cfg_section='nova_fakedax_privileged',
    pypath=f'{__name__}.fakedax_pctxt',
    capabilities=[
        capabilities.CAP_DAC_READ_SEARCH,
    ],
)


class HelperError(PermissionError):
    """Only the helper may open the file, and it does not run."""


def run(
    local: Callable[[str], T], privileged: Callable[[str], T], path: str,
) -> T:
    """Do something with a file, with privilege if that is needed.

    :param privileged: the same as ``local``, in the helper
    :raises HelperError: nothing was done
    """
    try:
        return local(path)
    except PermissionError:
        pass
    try:
        return privileged(path)
    except FileNotFoundError as exc:
        if not os.path.exists(path):
            raise
        # Of the helper's command, such as sudo.
        raise _helper_error(path, exc)
    except PermissionError as exc:
        raise _helper_error(path, exc)
    except OSError:
        raise
    except Exception as exc:
        # oslo.privsep has no common class for what keeps a helper from
        # running.
        raise _helper_error(path, exc)


def _helper_error(path: str, exc: Exception) -> HelperError:
    return HelperError(
        errno.EACCES, f'{str(exc) or type(exc).__name__} '
        f'(of the privsep helper)', path)
