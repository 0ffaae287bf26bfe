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

"""Whether another host's guest is gone, as the storage's locks show.

An evacuation starts a guest whose host no longer answers. If that host still
runs it, two guests write to one image, unless the lock of the image keeps the
second one out. So it must be known that locks reach from one host to the
other, and not only be assumed: each nova-compute holds a lock on a file of its
host on the storage, and notes whose locks it has seen there.
"""

from __future__ import annotations

import os

from nova import exception
from nova.i18n import _
from nova import objects
from oslo_log import log as logging

from nova_fakedax import filelock
from nova_fakedax import hostcache
from nova_fakedax import imagebackend

LOG = logging.getLogger(__name__)

#: Below the instances path, so that hosts share it if they share images.
DIRECTORY = 'fakedax-hosts'


class EvacuationRefused(exception.NovaException):
    msg_fmt = _('Fake DAX: the server cannot be evacuated from host %(host)s: '
                '%(reason)s')


class Hosts:
    """The hosts that share this host's storage.

    :param instances_path: as ``[DEFAULT]instances_path``
    :param host: this host, as ``[DEFAULT]host``
    :ivar here: the same
    """

    def __init__(self, instances_path: str, host: str) -> None:
        self._locks = os.path.join(instances_path, DIRECTORY, 'locks')
        self._seen = os.path.join(instances_path, DIRECTORY, 'seen', host)
        self.here = host
        self._descriptor: int | None = None

    def look(self) -> None:
        """Show others that this host is alive, and note whom it sees.

        Not a reason to fail if that cannot be: evacuations are refused then.
        """
        try:
            for directory in (self._locks, self._seen):
                os.makedirs(directory, exist_ok=True)
            self._hold()
            for host in set(os.listdir(self._locks)) - {
                    self.here, *os.listdir(self._seen)}:
                if filelock.is_held(os.path.join(self._locks, host)):
                    with open(os.path.join(self._seen, host), 'wb'):
                        LOG.info('Locks of host %s reach this host', host)
        except OSError as exc:
            LOG.warning('Servers with disks on fake DAX cannot be evacuated '
                        'from this host or to it: %s', exc)

    def _hold(self) -> None:
        if self._descriptor is None:
            try:
                self._descriptor = filelock.hold(
                    os.path.join(self._locks, self.here))
            except filelock.Locked:
                # By the nova-compute before this one, which still ends.
                LOG.debug('Another process holds the lock of this host')

    def release(self) -> None:
        """Do what the end of the process does."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check_gone(self, instance: objects.Instance) -> None:
        """Check that nobody runs an instance of another host any more.

        Then drop what this host has cached of its images, since the other
        has written to them.

        :raises EvacuationRefused: says why somebody may
        """
        host = instance.host
        try:
            self._check_host(host)
            for path in imagebackend.image_paths(instance):
                if filelock.is_image_owned(path):
                    raise EvacuationRefused(host=host, reason=_(
                        'its guest still has %s locked; power the host off, '
                        'or end its QEMU') % path)
                hostcache.invalidate(path)
        except OSError as exc:
            raise EvacuationRefused(host=host, reason=exc)

    def _check_host(self, host: str) -> None:
        if not os.path.exists(os.path.join(self._seen, host)):
            raise EvacuationRefused(host=host, reason=_(
                'host %(here)s has never seen a lock of it below %(locks)s, '
                'so its guest may still run; allowed: hosts that share '
                'the instances path, on storage whose locks reach all of '
                'them, and whose device locks images') % {
                    'here': self.here, 'locks': self._locks})
        if filelock.is_held(os.path.join(self._locks, host)):
            raise EvacuationRefused(host=host, reason=_(
                'its nova-compute still runs; stop it, or power the host '
                'off'))
