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
"""What this host can do, and why not."""

from __future__ import annotations

import argparse

from nova import conf as nova_conf
from nova.virt.libvirt import host as libvirt_host

from nova_fakedax import capability
from nova_fakedax.cmd import common

_CONF = nova_conf.CONF


class Check(common.HostLister):
    """Say what this host can do with disks on fake DAX, and why not.

    nova-compute finds the same at its start. The exit status is 1 if the host
    cannot run such servers.
    """

    def take_action(
        self, parsed_args: argparse.Namespace,
    ) -> tuple[tuple[str, ...], list[tuple[str, str, str]]]:
        # First, for the error of one who has no libvirt.
        with common.libvirt():
            # Whoever may only read is not told which emulator it has.
            host = libvirt_host.Host(common.uri(), read_only=False)
            against = capability.reasons_against(_CONF, host)
            moves, evacuations = (
                (against, against) if against else
                (capability.migration_reasons_against(_CONF, host),
                 capability.evacuation_reasons_against(_CONF, host)))
        self.failed = bool(against)
        return ('This host can', 'Answer', 'Why not'), [
            (what, 'no' if reasons else 'yes', '; '.join(reasons))
            for what, reasons in (
                ('run servers with disks on fake DAX', against),
                ('suspend them, and migrate them live', moves),
                ('take them, or give them, in an evacuation', evacuations))]
