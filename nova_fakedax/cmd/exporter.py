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
"""The figures of ``status``, for Prometheus."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import typing as ty

from cliff import command
import prometheus_client
from prometheus_client import core
from prometheus_client import registry

from nova_fakedax.cmd import common
from nova_fakedax import inventory

_LABELS = ('domain', 'uuid', 'disk')

#: What may be unknown is None, and then not exported.
_Figure = Callable[[inventory.Image, inventory.Status], ty.Any]

_GAUGES: Sequence[tuple[str, str, _Figure]] = (
    ('fakedax_image_size_bytes', 'Size of the file, with the memmap',
     lambda image, _status: image.disk.size),
    ('fakedax_image_cached_bytes', "What is in the host's page cache",
     lambda _image, status: status.cached.cached),
    ('fakedax_image_mapped_bytes', "What is in QEMU's page tables",
     lambda _image, status: status.mapped),
    ('fakedax_image_dirty_bytes', 'What is not on storage yet',
     lambda _image, status: status.cached.dirty),
    ('fakedax_image_writeback_bytes', 'What is being written',
     lambda _image, status: status.cached.writeback),
    ('fakedax_image_locked', "Whether the device holds the image's lock",
     lambda _image, status: status.locked),
)

_COUNTERS: Sequence[tuple[str, str, _Figure]] = (
    ('fakedax_flushes', 'Flushes that the guest asked for',
     lambda _image, status: status.requests),
    ('fakedax_syncs', 'Syncs of the host that answered flushes',
     lambda _image, status: status.syncs),
    ('fakedax_sync_errors', 'Syncs that failed',
     lambda _image, status: status.errors),
)


class Exporter(command.Command):
    """Serve the figures of status to Prometheus, until it is stopped.

    At http://ADDRESS:PORT/metrics. Each request asks libvirt, QEMU and Linux.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            '--listen', metavar='ADDRESS', default='127.0.0.1',
            help='The address to serve at: 0.0.0.0 for all of this host. '
                 '[default: %(default)s]')
        parser.add_argument(
            '--port', type=_port, default=9978,
            help='The port. [default: %(default)s]')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        metrics = prometheus_client.CollectorRegistry()
        metrics.register(Collector())
        place = f'{parsed_args.listen}:{parsed_args.port}'
        try:
            server, thread = prometheus_client.start_http_server(
                parsed_args.port, parsed_args.listen, metrics)
        except OSError as exc:
            raise RuntimeError(f'cannot listen on {place}: {exc.strerror}')
        self.app.stdout.write(f'serving http://{place}/metrics\n')
        self.app.stdout.flush()
        try:
            thread.join()
        except KeyboardInterrupt:
            server.shutdown()


def _port(text: str) -> int:
    """:raises argparse.ArgumentTypeError: names the value"""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a port from 1 to 65535")
    return int(text)


class Collector(registry.Collector):
    """Asks for the figures of all images, each time that they are wanted."""

    def describe(self) -> list[core.Metric]:
        """Let nobody ask for the figures just to learn their names."""
        return []

    def collect(self) -> Iterator[core.Metric]:
        statuses: list[tuple[inventory.Image, inventory.Status]] = []
        answers = core.GaugeMetricFamily(
            'fakedax_libvirt_up', 'Whether libvirt answers')
        failed = core.GaugeMetricFamily(
            'fakedax_image_unreadable', 'An image that cannot be opened',
            labels=_LABELS)
        try:
            with common.libvirt() as connection:
                for image in inventory.images(connection):
                    try:
                        statuses.append((image, inventory.status(image)))
                    except OSError:
                        failed.add_metric(_labels(image), 1)
        except RuntimeError:
            answers.add_metric([], 0)
        else:
            answers.add_metric([], 1)
        yield answers
        yield failed
        for kind, table in ((core.GaugeMetricFamily, _GAUGES),
                            (core.CounterMetricFamily, _COUNTERS)):
            for name, text, figure in table:
                family = kind(name, text, labels=_LABELS)
                for image, status in statuses:
                    value = figure(image, status)
                    if value is not None:
                        family.add_metric(_labels(image), value)
                yield family
        yield _latency(statuses)


def _labels(image: inventory.Image) -> tuple[str, str, str]:
    return str(image.guest.name), image.server, image.name


def _latency(
    statuses: Sequence[tuple[inventory.Image, inventory.Status]],
) -> core.Metric:
    """The device's counts as a histogram; it does not know their sum."""
    family = core.HistogramMetricFamily(
        'fakedax_sync_seconds', 'How long syncs took', labels=_LABELS)
    for image, status in statuses:
        if status.latency is not None:
            ends = [str(end / 1000) for end in
                    inventory.bucket_ends(status.latency)]
            counts = list(itertools.accumulate(status.latency))
            family.add_metric(
                _labels(image),
                [*zip(ends, counts), ('+Inf', counts[-1] if counts else 0)],
                None)
    return family
