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
"""The program: its options, and its commands by name."""

from __future__ import annotations

import argparse
import logging
import sys
import typing as ty

from cliff import app
from cliff import commandmanager
from nova import conf as nova_conf
from oslo_config import cfg

from nova_fakedax.cmd import check
from nova_fakedax.cmd import evict
from nova_fakedax.cmd import exporter
from nova_fakedax.cmd import flush
from nova_fakedax.cmd import plan
from nova_fakedax.cmd import recover
from nova_fakedax.cmd import status
from nova_fakedax import conf

COMMANDS: dict[str, type] = {
    'check': check.Check,
    'evict': evict.Evict,
    'exporter': exporter.Exporter,
    'flush': flush.Flush,
    'plan': plan.Plan,
    'recover': recover.Recover,
    'status': status.Status,
}


class NovaFakeDax(app.App):
    """The cliff application."""

    def __init__(self) -> None:
        manager = commandmanager.CommandManager('nova_fakedax.cli')
        for name, command in COMMANDS.items():
            manager.add_command(name, command)
        super().__init__(
            description='Ask a compute host about disks on fake persistent '
                        'memory.',
            version=None, command_manager=manager, deferred_help=True)

    def build_option_parser(
        self, description: str | None, version: str | None,
        argparse_kwargs: dict[str, ty.Any] | None = None,
    ) -> argparse.ArgumentParser:
        parser = super().build_option_parser(
            description, version, argparse_kwargs)
        parser.add_argument(
            '--config-file', action='append', metavar='FILE', default=[],
            help="Nova's configuration; can be repeated. [default: that of "
                 "nova-compute, such as /etc/nova/nova.conf]")
        parser.add_argument(
            '--config-dir', action='append', metavar='DIR', default=[],
            help='A directory of more files of it; can be repeated. '
                 '[default: likewise]')
        return parser

    def initialize_app(self, argv: list[str]) -> None:
        """Read nova's configuration.

        :raises SystemExit: it cannot be read
        """
        # What they log is for a nova-compute that goes on running.
        for name in ('nova', 'os_vif', 'oslo_service'):
            logging.getLogger(name).setLevel(logging.ERROR)
        conf.register_opts(nova_conf.CONF)
        try:
            nova_conf.CONF(
                [], project='nova', prog='nova-compute',
                default_config_files=self.options.config_file or None,
                default_config_dirs=self.options.config_dir or None)
        except cfg.Error as exc:
            sys.exit(f'nova-fakedax: {exc}')
