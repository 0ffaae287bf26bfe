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

"""Guests that stay paused while Cinder takes snapshots of their volumes.

nova-api has the guest of a running server quiesced before Cinder takes
snapshots of its volumes, and unquiesced after them
(nova.compute.api.API.snapshot_volume_backed). Nova then asks the guest's agent
to freeze its file systems. A guest with volumes on fake DAX is also paused, be
there an agent or not, and its volumes are flushed: storage takes a snapshot of
what it has, and what a guest has stored may be in its host's memory only.

Nothing tells nova-compute that nova-api has died. So the guest is resumed when
``[fakedax]quiesce_timeout`` is over, and when nova-compute starts. A mark in
the instance's system metadata tells such a guest from others that are paused.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import threading
import typing as ty

from nova.compute import power_state
from nova.compute import vm_states
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_concurrency import lockutils
from oslo_log import log as logging
from oslo_utils import excutils
from oslo_utils import uuidutils

from nova_fakedax import imagebackend
from nova_fakedax import snapshot

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: The key in system_metadata; each pause has a value of its own.
MARK = 'fakedax_quiesced'


def quiesce(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, image_meta: objects.ImageMeta,
    volumes: Sequence[str],
) -> None:
    """Pause a guest, with all that it has stored on its storage.

    :param driver: the LibvirtDriver that runs the guest
    :param volumes: the paths of its volumes on fake DAX
    :raises nova.exception.NovaException: the guest runs on, since its volumes
        cannot be flushed, or since its file systems cannot be frozen and the
        image property os_require_quiesce demands it
    """
    with _alone(instance):
        guest = driver._host.get_guest(instance)
        if guest.get_power_state(driver._host) != power_state.RUNNING:
            imagebackend.flush(instance, volumes)
            return
        # So that the guest is not paused for long.
        imagebackend.flush_early(instance, volumes)
        snapshot.freeze(driver, context, instance, image_meta)
        mark = instance.system_metadata[MARK] = uuidutils.generate_uuid()
        instance.save()
        try:
            guest.pause()
            # The device has, at the stop; QEMU's own has not.
            imagebackend.flush(instance, volumes)
        except Exception:
            with excutils.save_and_reraise_exception():
                _resume(driver, context, instance, image_meta)
        timer = threading.Timer(
            CONF.fakedax.quiesce_timeout, _give_up,
            (driver, context, instance, image_meta, mark))
        timer.daemon = True
        timer.start()


def unquiesce(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, image_meta: objects.ImageMeta,
    mark: str | None = None,
) -> None:
    """Let a guest run on that :func:`quiesce` has paused.

    One that its user has paused meanwhile stays so.

    :param driver: as for :func:`quiesce`
    :param mark: of the pause that is meant, None for any
    """
    with _alone(instance):
        # nova-api has the instance as it was before.
        instance.refresh()
        if mark is None or instance.system_metadata.get(MARK) == mark:
            _resume(driver, context, instance, image_meta)


def resume_interrupted(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance,
) -> None:
    """Resume a guest that was paused when nova-compute died.

    Whoever has paused it resumes it again, which does no harm.
    """
    if MARK not in instance.system_metadata:
        return
    LOG.warning('The guest was paused for snapshots of its volumes when '
                'nova-compute ended; resuming it', instance=instance)
    _unquiesce_somehow(driver, context, instance, instance.image_meta)


def check_migration(instance: objects.Instance) -> None:
    """Check that a guest is not paused: nobody would resume it elsewhere.

    :raises nova.exception.MigrationPreCheckError: it is
    """
    if MARK in instance.system_metadata:
        raise exception.MigrationPreCheckError(
            reason='Fake DAX: the guest is paused for snapshots of its '
                   'volumes; try again when they are complete')


def _resume(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, image_meta: objects.ImageMeta,
) -> None:
    # The guest may have been stopped or deleted meanwhile.
    with contextlib.suppress(exception.InstanceNotFound):
        guest = driver._host.get_guest(instance)
        if (instance.vm_state == vm_states.ACTIVE
                and MARK in instance.system_metadata
                and guest.get_power_state(driver._host)
                == power_state.PAUSED):
            guest.resume()
        # One whose agent does not answer was not frozen.
        with contextlib.suppress(exception.NovaException):
            snapshot.thaw(driver, context, instance, image_meta)
    if instance.system_metadata.pop(MARK, None):
        instance.save()


def _give_up(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, image_meta: objects.ImageMeta, mark: str,
) -> None:
    try:
        instance.refresh()
    except exception.InstanceNotFound:
        return
    if instance.system_metadata.get(MARK) == mark:
        LOG.warning(
            'nova-api has not had the guest resumed within %d s '
            '([fakedax]quiesce_timeout) since it was paused for snapshots of '
            'its volumes; resuming it', CONF.fakedax.quiesce_timeout,
            instance=instance)
        _unquiesce_somehow(driver, context, instance, image_meta, mark)


def _unquiesce_somehow(*args: ty.Any) -> None:
    try:
        unquiesce(*args)
    except Exception:
        # Nobody waits for it, and nova-compute must start.
        LOG.exception('Cannot resume the guest', instance=args[2])


def _alone(
    instance: objects.Instance,
) -> contextlib.AbstractContextManager[None]:
    """Hold a lock: nova-api may give up while the guest is being paused."""
    return ty.cast(
        contextlib.AbstractContextManager[None],
        lockutils.lock(f'fakedax-quiesce-{instance.uuid}'))
