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

"""Copying the image of a guest that is there.

QEMU's block jobs, by which Nova takes a snapshot of a guest that runs, do not
see what the guest stores through a mapping. So its vCPUs stand still while
its image is copied: for a moment where the file system can clone a file (XFS),
for as long as the copy takes where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import os
import tempfile
import typing as ty

from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging
from oslo_utils import timeutils

from nova_fakedax import layout

LOG = logging.getLogger(__name__)

# ioctl_ficlone(2); the fcntl module has no name for it.
_FICLONE = 0x40049409

#: What ComputeManager does while a snapshot is taken of a guest that runs.
_TASKS = frozenset({
    task_states.IMAGE_SNAPSHOT, task_states.IMAGE_SNAPSHOT_PENDING,
    task_states.IMAGE_BACKUP, task_states.IMAGE_PENDING_UPLOAD,
    task_states.IMAGE_UPLOADING})


def stop_vcpus(host: libvirt_host.Host, guest: libvirt_guest.Guest) -> bool:
    """Let nothing be stored to the guest's images.

    The device ends the flushes under way and syncs the images
    (qemu-device/SPEC.rst).

    :returns: whether the guest ran, and is to run again
    """
    if guest.get_power_state(host) != power_state.RUNNING:
        return False
    guest.pause()
    return True


@contextlib.contextmanager
def vcpus_stopped(
    host: libvirt_host.Host, guest: libvirt_guest.Guest,
    instance: objects.Instance,
) -> Iterator[None]:
    """Let the guest stand still meanwhile; one that was paused stays so."""
    with timeutils.StopWatch() as watch:
        ran = stop_vcpus(host, guest)
        try:
            yield
        finally:
            if ran:
                guest.resume()
                LOG.info('The guest stood still for %.1f s while its image '
                         'was copied', watch.elapsed(), instance=instance)


@contextlib.contextmanager
def nothing_stored(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, guest: libvirt_guest.Guest,
    image_meta: objects.ImageMeta,
) -> Iterator[None]:
    """Freeze the guest's file systems if its agent can; stop its vCPUs.

    :param driver: the LibvirtDriver that runs the guest
    :raises nova.exception.NovaException: they cannot be frozen, and the
        image's os_require_quiesce wants it
    """
    frozen = False
    try:
        driver.quiesce(context, instance, image_meta)
        frozen = True
    except exception.NovaException as exc:
        if driver._requires_quiesce(image_meta):
            raise
        LOG.info("The guest's file systems are not frozen: %s", exc,
                 instance=instance)
    try:
        with vcpus_stopped(driver._host, guest, instance):
            yield
    finally:
        if frozen:
            driver.unquiesce(context, instance, image_meta)


def take(
    path: str, out_path: str, image_format: str,
    nothing_stored: contextlib.AbstractContextManager[None],
) -> None:
    """Copy an image whose guest is there, in a format of qemu-img.

    :param path: the image, raw
    :param out_path: the copy; what is there after an error the caller removes
    :param nothing_stored: entered while the image must stay as it is
    :raises oslo_concurrency.processutils.ProcessExecutionError: it cannot be
        copied
    """
    # Without a name: it is gone with this process, however that ends.
    with tempfile.TemporaryFile(dir=os.path.dirname(out_path)) as clone:
        with nothing_stored:
            cloned = _clone(path, clone)
            if not cloned:
                libvirt_utils.extract_snapshot(
                    path, 'raw', out_path, image_format)
        if cloned:
            # Copied as well, and soon: see _clone().
            libvirt_utils.extract_snapshot(
                f'/proc/{os.getpid()}/fd/{clone.fileno()}', 'raw', out_path,
                image_format)


def _clone(path: str, clone: ty.IO[bytes]) -> bool:
    """Let an empty file share the blocks of an image.

    As long as there is a clone the image has no blocks of its own
    (layout.allocate): each store of the guest takes one more, and kills QEMU
    if there is none. So there must be enough for all of them beside the copy.

    :returns: whether the file system can; if not the file stays empty
    """
    if layout.available(path) < 2 * os.path.getsize(path):
        LOG.debug('%s is copied, not cloned: there is not enough space '
                  'for the guest to store all of it anew', path)
        return False
    with open(path, 'rb') as image:
        try:
            fcntl.ioctl(clone, _FICLONE, image.fileno())
        except OSError as exc:
            # Which error a file system that cannot do it gives differs, and
            # what else may be wrong the copy meets as well.
            LOG.debug('%(path)s is copied, not cloned: %(exc)s',
                      {'path': path, 'exc': exc})
            return False
    return True


def resume_interrupted(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance,
) -> None:
    """Let a guest run on that stands still since nova-compute died.

    ComputeManager._init_instance gives the snapshot up, and leaves alone a
    guest that is paused without having been asked to.
    """
    if instance.vm_state != vm_states.ACTIVE or (
            instance.task_state not in _TASKS):
        return
    try:
        guest = driver._host.get_guest(instance)
        if guest.get_power_state(driver._host) != power_state.PAUSED:
            return
        LOG.warning('The guest stood still for a snapshot that nova-compute '
                    'did not finish; it runs on', instance=instance)
        guest.resume()
    except (exception.InstanceNotFound, libvirt_host.libvirt.libvirtError):
        # nova-compute must start whatever becomes of one instance.
        LOG.exception('Cannot let the guest run on', instance=instance)
        return
    # One whose agent does not answer was not frozen.
    with contextlib.suppress(exception.NovaException):
        driver.unquiesce(context, instance, instance.image_meta)
