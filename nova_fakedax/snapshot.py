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

"""Copying the image of a running guest.

Nova takes a snapshot of a running guest by QEMU's block jobs, which do not see
what the guest stores through a mapping. So the guest is paused while its image
is copied: for a moment where the file system can clone a file (XFS), for as
long as the copy takes where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import os
import struct
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
from oslo_log import log as logging
from oslo_utils import timeutils

from nova_fakedax import imagebackend
from nova_fakedax import layout

LOG = logging.getLogger(__name__)

# ioctl_ficlonerange(2); the fcntl module has no name for it. Its argument is
# a struct file_clone_range: descriptor, offset, length, offset in the clone.
_FICLONERANGE = 0x4020940d
_FILE_CLONE_RANGE = 'qQQQ'

#: The tasks of ComputeManager while a snapshot of a running guest is taken.
_TASKS = frozenset({
    task_states.IMAGE_SNAPSHOT, task_states.IMAGE_SNAPSHOT_PENDING,
    task_states.IMAGE_BACKUP, task_states.IMAGE_PENDING_UPLOAD,
    task_states.IMAGE_UPLOADING})


def stop_vcpus(host: libvirt_host.Host, guest: libvirt_guest.Guest) -> bool:
    """Pause the guest, so that nothing is stored to its images.

    The device completes the flushes under way and syncs the images
    (qemu-device/SPEC.rst).

    :returns: whether the guest ran, and must be resumed
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
    """Pause the guest meanwhile; one that was paused before stays so."""
    with timeutils.StopWatch() as watch:
        ran = stop_vcpus(host, guest)
        try:
            yield
        finally:
            if ran:
                guest.resume()
                LOG.info('Guest paused for %.1f s while its image was copied',
                         watch.elapsed(), instance=instance)


@contextlib.contextmanager
def nothing_stored(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, guest: libvirt_guest.Guest,
    image_meta: objects.ImageMeta,
) -> Iterator[None]:
    """Freeze the guest's file systems if its agent can, and pause it.

    :param driver: the LibvirtDriver that runs the guest
    :raises nova.exception.NovaException: they cannot be frozen, and the
        image property os_require_quiesce demands it
    """
    frozen = freeze(driver, context, instance, image_meta)
    try:
        with vcpus_stopped(driver._host, guest, instance):
            yield
    finally:
        if frozen:
            thaw(driver, context, instance, image_meta)


def freeze(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, image_meta: objects.ImageMeta,
) -> bool:
    """Freeze the guest's file systems if its agent can.

    As LibvirtDriver.quiesce, which FakeDaxDriver overrides, for it is what
    nova-api calls.

    :param driver: as for :func:`nothing_stored`
    :returns: whether they are frozen
    :raises nova.exception.NovaException: as for :func:`nothing_stored`
    """
    try:
        driver._set_quiesced(context, instance, image_meta, True)
    except exception.NovaException as exc:
        if driver._requires_quiesce(image_meta):
            raise
        LOG.info("The guest's file systems are not frozen: %s", exc,
                 instance=instance)
        return False
    return True


def thaw(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance, image_meta: objects.ImageMeta,
) -> None:
    """Let a guest go on that :func:`freeze` has frozen.

    :raises nova.exception.NovaException: its agent does not answer
    """
    driver._set_quiesced(context, instance, image_meta, False)


def take(
    path: str, out_path: str, image_format: str,
    nothing_stored: contextlib.AbstractContextManager[None],
) -> None:
    """Copy the content of a running guest's image.

    :param path: the image
    :param out_path: the copy; after an error the caller removes it
    :param image_format: that of the copy, as qemu-img names it
    :param nothing_stored: entered while the image must not change
    :raises nova.exception.ImageUnacceptable: qemu-img cannot copy it
    :raises imagebackend.CopyFailed: it cannot be copied
    :raises nova_fakedax.layout.InvalidLayout: the guest has damaged its info
        block
    """
    content = layout.read(path)
    # Before the guest is paused, which must not wait for others' downloads.
    with imagebackend.disk_ops(), _clone_file(path, out_path) as clone:
        with nothing_stored:
            cloned = _clone(path, content, clone)
            if not cloned:
                imagebackend.extract(
                    content.qemu_filename(path), out_path, image_format)
        if cloned:
            # Now, and not when somebody needs it: see _clone().
            imagebackend.extract(
                f'/proc/{os.getpid()}/fd/{clone.fileno()}', out_path,
                image_format)


@contextlib.contextmanager
def _clone_file(path: str, out_path: str) -> Iterator[ty.IO[bytes]]:
    """An empty file next to the copy.

    Has no name, so that it ends with this process, however that ends.

    :raises imagebackend.CopyFailed: it cannot be made, or another file has an
        error
    """
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(out_path)) as clone:
            yield clone
    except OSError as exc:
        raise imagebackend.CopyFailed(path=path, reason=exc.strerror)


def _clone(
    path: str, content: layout.Layout, clone: ty.IO[bytes],
) -> bool:
    """Let an empty file share the blocks of an image's content.

    As long as the clone exists the image has no blocks of its own
    (layout.allocate): each store of the guest takes a new one, and kills QEMU
    if none is free. So there must be space for all of the image, and for the
    copy.

    :returns: whether it does; if not the file stays empty
    """
    if layout.available(path) < 2 * os.path.getsize(path):
        LOG.debug('%s is copied, not cloned: there is not enough space '
                  'for the guest to overwrite all of it', path)
        return False
    with open(path, 'rb') as image:
        try:
            fcntl.ioctl(clone, _FICLONERANGE, struct.pack(
                _FILE_CLONE_RANGE, image.fileno(), content.offset,
                content.size, 0))
        except OSError as exc:
            # The error of a file system that cannot clone differs from one
            # to the next, and the copy meets any other error again.
            LOG.debug('%(path)s is copied, not cloned: %(exc)s',
                      {'path': path, 'exc': exc})
            return False
    return True


def resume_interrupted(
    driver: ty.Any, context: nova_context.RequestContext,
    instance: objects.Instance,
) -> None:
    """Resume a guest that has been paused since nova-compute died.

    ComputeManager._init_instance gives up the snapshot, but leaves a guest
    paused that no user has paused.
    """
    if instance.vm_state != vm_states.ACTIVE or (
            instance.task_state not in _TASKS):
        return
    try:
        guest = driver._host.get_guest(instance)
        if guest.get_power_state(driver._host) != power_state.PAUSED:
            return
        LOG.warning('The guest was paused for a snapshot that nova-compute '
                    'did not finish; resuming it', instance=instance)
        guest.resume()
    except (exception.InstanceNotFound, libvirt_host.libvirt.libvirtError):
        # nova-compute must start whatever becomes of one instance.
        LOG.exception('Cannot resume the guest', instance=instance)
        return
    # A guest whose agent does not answer was not frozen.
    with contextlib.suppress(exception.NovaException):
        thaw(driver, context, instance, instance.image_meta)
