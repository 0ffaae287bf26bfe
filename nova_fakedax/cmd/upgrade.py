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
"""``nova-fakedax-status upgrade check``, for each host after an upgrade.

As nova-status, by oslo.upgradecheck: the exit status is 0, 1 for warnings, 2
for failures.
"""

from __future__ import annotations

from importlib import metadata
import sys
import warnings

from nova import conf as nova_conf
from oslo_upgradecheck import upgradecheck
from packaging import requirements
import stevedore

_FILTER = 'FakeDaxFilter'
_MODULE = f'nova_fakedax.scheduler.{_FILTER}'
_DRIVER = 'fakedax.FakeDaxDriver'
_VALIDATORS = 'nova.api.extra_spec_validators'

_SUCCESS = upgradecheck.Code.SUCCESS
_WARNING = upgradecheck.Code.WARNING
_FAILURE = upgradecheck.Code.FAILURE


class Checks(upgradecheck.UpgradeCommands):
    """The checks, each by its title."""

    def _release(self) -> upgradecheck.Result:
        """Whether this release hooks the Nova that is installed.

        What it hooks is private to Nova and moves.
        """
        installed = metadata.version('nova')
        for line in metadata.requires('nova-fakedax') or []:
            wanted = requirements.Requirement(line)
            if wanted.name == 'nova' and not wanted.specifier.contains(
                    installed, prereleases=True):
                return upgradecheck.Result(
                    _FAILURE, f'nova {installed} is installed; this release '
                    f'of nova-fakedax is for nova{wanted.specifier}')
        return upgradecheck.Result(_SUCCESS)

    def _extra_specs(self) -> upgradecheck.Result:
        """Whether Nova's API knows the extra specs."""
        found = stevedore.ExtensionManager(_VALIDATORS).names()
        if 'fakedax' in found:
            return upgradecheck.Result(_SUCCESS)
        return upgradecheck.Result(
            _FAILURE, f'no entry point fakedax in {_VALIDATORS}: nova-api '
            'does not check the extra specs; install nova-fakedax again')

    def _scheduler(self) -> upgradecheck.Result:
        """Whether the filter is enabled, where nova-scheduler runs."""
        options = nova_conf.CONF.filter_scheduler
        missing = [text for text, found in (
            (f'enabled_filters lacks {_FILTER}',
             _FILTER in options.enabled_filters),
            (f'available_filters lacks {_MODULE}',
             _MODULE in options.available_filters)) if not found]
        if not missing:
            return upgradecheck.Result(_SUCCESS)
        return upgradecheck.Result(
            _WARNING, f'[filter_scheduler] {", ".join(missing)}. If '
            'nova-scheduler runs here, it can choose a host whose driver does '
            'not run fake DAX')

    def _driver(self) -> upgradecheck.Result:
        """Whether nova-compute uses the driver, where it runs."""
        configured = nova_conf.CONF.compute_driver
        if configured in (None, _DRIVER):
            # Without one no nova-compute starts here.
            return upgradecheck.Result(_SUCCESS)
        return upgradecheck.Result(
            _WARNING, f'[DEFAULT] compute_driver is {configured}, not '
            f'{_DRIVER}: servers with disks on fake DAX that are on this host '
            'cannot run')

    _upgrade_checks = (
        ('Release of Nova', _release),
        ('Extra specs', _extra_specs),
        ('Scheduler filter', _scheduler),
        ('Compute driver', _driver),
    )


def main() -> int:
    # Nova and its libraries warn of what is for their developers.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return int(upgradecheck.main(
            nova_conf.CONF, project='nova', upgrade_command=Checks(),
            argv=sys.argv[1:]))
