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
"""How it is with each image."""

from __future__ import annotations

import argparse
import time

from nova_fakedax.cmd import common
from nova_fakedax import inventory

COLUMNS = (
    'Server', 'Disk', 'Size MiB', 'Cached MiB', 'Mapped MiB', 'Dirty MiB',
    'Writeback MiB', 'Locked', 'Flushes', 'Syncs', 'Errors', 'p50 ms',
    'p99 ms')


class Status(common.ServersLister):
    """Show each image: what is cached of it, and its device's counters.

    Cached is what the host has in its page cache, mapped what of it QEMU has
    in its page tables, dirty what is not on storage yet. Locked says whether
    the guest's device holds the image's lock. Flushes are those of the guest,
    syncs those of the host that answered them; half of the syncs took p50 at
    most, 99 of 100 p99. "-" is what is not known: of a server that is off, of
    QEMU's own device, or of Linux before 6.5.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            '--watch', metavar='SECONDS', type=_seconds, nargs='?', const=2.0,
            help='Show it again and again, by default each 2 seconds, until '
                 'Ctrl-C.')
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace,
    ) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        with common.libvirt() as connection:
            return COLUMNS, [_row(image) for image in inventory.images(
                connection, parsed_args.servers)]

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            while True:
                if parsed_args.watch and self.app.stdout.isatty():
                    # Clear the screen, as watch(1) does.
                    self.app.stdout.write('\x1b[H\x1b[2J')
                status = super().run(parsed_args)
                if not parsed_args.watch:
                    return status
                time.sleep(parsed_args.watch)
        except KeyboardInterrupt:
            return 0


def _seconds(text: str) -> float:
    """:raises argparse.ArgumentTypeError: names the value"""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of seconds from 0.1 to 3600")
    return seconds


def _row(image: inventory.Image) -> tuple[str, ...]:
    try:
        found = inventory.status(image)
    except OSError as exc:
        return (*common.title(image), f'{exc.strerror}',
                *'-' * (len(COLUMNS) - 3))
    return (
        *common.title(image), common.mib(image.disk.size),
        common.mib(found.cached.cached), common.mib(found.mapped),
        common.mib(found.cached.dirty), common.mib(found.cached.writeback),
        {True: 'yes', False: 'no', None: '-'}[found.locked],
        *map(common.known, (found.requests, found.syncs, found.errors,
                            found.p50, found.p99)))
