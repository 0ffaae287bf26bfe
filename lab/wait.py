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

"""Waiting, with a limit, for something to become true."""

from collections.abc import Callable
from typing import TypeVar

import tenacity

from lab import errors

T = TypeVar('T')


class WaitError(errors.LabError):
    """What was waited for did not happen in time."""


def until(what: str, condition: Callable[[], T | None], seconds: float, *,
          interval: float = 0.1, state: Callable[[], object] | None = None,
          error: type[errors.LabError] = WaitError) -> T:
    """Wait until a condition is true; return what it returned.

    The condition is checked at least once. What it raises ends the wait.

    :param what: who has to do what, such as ``'MariaDB to answer'``
    :param seconds: how long to wait, at most
    :param interval: seconds between two checks
    :param state: says, after the last check, how things are
    :param error: the class of the error
    :raises LabError: it did not become true; of the class ``error``, with
        ``what``, ``seconds`` and ``state``
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_not_result(bool),
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_fixed(interval))
    try:
        found = retrying(condition)
    except tenacity.RetryError:
        last = f': {state()}' if state else ''
        raise error(f'waited {seconds:g} s for {what}{last}') from None
    assert found is not None
    return found
