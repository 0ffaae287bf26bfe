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
"""Finish or undo moves whose nova-compute died."""

from __future__ import annotations

import argparse
import shlex
import typing as ty

from nova.conductor import rpcapi as conductor_rpcapi
from nova import conf as nova_conf
from nova import context as nova_context
from nova import objects
from nova.objects import base as objects_base
from nova import rpc
from nova import utils
from nova.virt import driver as virt_driver
import os_vif
import oslo_messaging
from oslo_privsep import priv_context

from nova_fakedax.cmd import common
from nova_fakedax import recovery

_CONF = nova_conf.CONF
_DRIVER = 'fakedax.FakeDaxDriver'

_WORDS = {True: ('to finish', 'finished'), False: ('to undo', 'undone')}


class Recover(common.HostLister):
    """Finish or undo moves whose nova-compute died.

    Run it on the host that the servers were leaving, after nova-compute has
    been restarted there and could not end the move. Where the guest runs says
    what to do; a move that is under way, and one whose guest may run on two
    hosts, is left as it is. The exit status is 1 if one was.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            'servers', nargs='*', metavar='SERVER',
            help='Servers with these UUIDs. [default: all that were leaving '
                 'this host; says what is to do, and does nothing]')
        parser.add_argument(
            '--dry-run', action='store_true',
            help='Say what is to do, and do nothing.')
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace,
    ) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        context = nova_context.get_admin_context()
        act = bool(parsed_args.servers) and not parsed_args.dry_run
        with common.libvirt():
            driver = connect_to_nova()
            try:
                rows: list[tuple[str, ...]] = [
                    (move.instance.uuid, move.migration.migration_type,
                     move.migration.dest_compute,
                     self._end(context, move, driver, act))
                    for move in recovery.moves(
                        context, _CONF.host, parsed_args.servers)]
            except oslo_messaging.MessagingException as exc:
                raise RuntimeError(f'Nova does not answer: {exc}')
        return ('Server', 'Move', 'To', 'Result'), rows

    def _end(
        self, context: nova_context.RequestContext, move: recovery.Move,
        driver: ty.Any, act: bool,
    ) -> str:
        """End a move, if that is wanted; return what came of it."""
        try:
            step = recovery.step(context, move, driver)
            if act:
                step.do()
        except recovery.RecoveryRefused as exc:
            self.failed = True
            return f'left: {exc}'
        return f'{_WORDS[step.finishes][act]}: {step.reason}'


def connect_to_nova() -> ty.Any:
    """Prepare what nova.cmd.compute.main prepares; return the driver.

    :raises RuntimeError: nova-compute has another driver
    """
    if _CONF.compute_driver != _DRIVER:
        raise RuntimeError(
            f"[DEFAULT]compute_driver is '{_CONF.compute_driver}'; allowed: "
            f"'{_DRIVER}'")
    priv_context.init(root_helper=shlex.split(utils.get_root_helper()))
    # As nova.config.set_lib_defaults; nobody listens to the exchange that
    # oslo.messaging has by default.
    rpc.set_defaults(control_exchange='nova')
    rpc.init(_CONF)
    objects.register_all()
    os_vif.initialize()
    objects_base.NovaObject.indirection_api = conductor_rpcapi.ConductorAPI()
    return virt_driver.load_compute_driver(None)
