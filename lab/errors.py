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

"""What the lab tells a person when something does not work."""

from collections.abc import Iterator
import contextlib

import click


class LabError(click.ClickException):
    """Something in the lab does not work; the message says what.

    It is for a person, so a command prints it without a traceback, and ends
    with exit status 1.
    """


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Turn an answer of OpenStack, or Ctrl-C, into an error for a person.

    :raises LabError: in place of openstacksdk's exception or the interrupt
    """
    # Importing it takes half a second, which "--help" need not.
    from openstack import exceptions
    try:
        yield
    except exceptions.SDKException as error:
        raise LabError(str(error)) from error
    except KeyboardInterrupt:
        raise LabError(
            'interrupted: run the same command again to continue, or '
            '"lab/cloud down" to remove what is there') from None
