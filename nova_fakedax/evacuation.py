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
import time

from nova import exception
from nova.i18n import _
from nova import objects
from oslo_log import log as logging

from nova_fakedax import filelock
from nova_fakedax import hostcache
from nova_fakedax import imagebackend
from nova_fakedax import spec

LOG = logging.getLogger(__name__)

#: Below the instances path, so that hosts share it if they share images.
DIRECTORY = 'fakedax-hosts'

#: Seconds after which a note of a lock that was seen is made again, so that it
#: says whether locks still reach this host.
_REFRESH = 300

#: Seconds by which the last sign of a host may be younger than the last time
#: that its lock was seen. Their clocks may differ, too.
_TOLERANCE = 3 * _REFRESH


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
            for host in set(os.listdir(self._locks)) - {self.here}:
                note = os.path.join(self._seen, host)
                noted = _last_change(note)
                if (time.time() - noted > _REFRESH and filelock.is_held(
                        os.path.join(self._locks, host))):
                    _touch(note)
                    if not noted:
                        LOG.info('Locks of host %s reach this host', host)
        except OSError as exc:
            LOG.warning('Servers with disks on fake DAX cannot be evacuated '
                        'from this host or to it: %s', exc)

    def _hold(self) -> None:
        lock = os.path.join(self._locks, self.here)
        try:
            if self._descriptor is None:
                self._descriptor = filelock.hold(lock)
            _touch(lock)
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

        Volumes need no lock: ComputeManager._rebuild_default_impl deletes the
        other host's attachments before it makes those of this one, so that
        Cinder can take the volumes from that host. Where they are files, their
        devices lock them all the same.

        :raises EvacuationRefused: says why somebody may
        """
        host = instance.host
        try:
            if spec.FakeDaxSpec.from_instance(instance).roles:
                self._check_seen(host)
            self._check_ended(host)
            for path in imagebackend.image_paths(instance):
                if filelock.is_image_owned(path):
                    raise EvacuationRefused(host=host, reason=_(
                        'its guest still has %s locked; power the host off, '
                        'or end its QEMU') % path)
                hostcache.invalidate(path)
        except OSError as exc:
            raise EvacuationRefused(host=host, reason=exc)

    def _check_seen(self, host: str) -> None:
        lock = os.path.join(self._locks, host)
        seen = _last_change(os.path.join(self._seen, host))
        if seen < _last_change(lock) - _TOLERANCE or not seen:
            raise EvacuationRefused(host=host, reason=_(
                'host %(here)s has %(never)s seen a lock of it below '
                '%(locks)s, so its guest may still run; allowed: hosts that '
                'share the instances path, on storage whose locks reach all '
                'of them, and whose device locks images') % {
                    'here': self.here, 'locks': self._locks,
                    'never': 'lately not' if seen else 'never'})

    def _check_ended(self, host: str) -> None:
        lock = os.path.join(self._locks, host)
        # There is none if the hosts do not share the instances path.
        if os.path.exists(lock) and filelock.is_held(lock):
            raise EvacuationRefused(host=host, reason=_(
                'its nova-compute still runs; stop it, or power the host '
                'off'))


def _last_change(path: str) -> float:
    """When a file was last touched, 0 if there is none."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0


def _touch(path: str) -> None:
    with open(path, 'ab'):
        # By the clock of this host, also where the storage has its own.
        now = time.time()
        os.utime(path, (now, now))
