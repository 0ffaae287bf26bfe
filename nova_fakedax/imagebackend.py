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

"""The raw backend that makes images for fake DAX."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import functools
import glob
import os
import typing as ty

from nova.compute import utils as compute_utils
from nova import conf as nova_conf
from nova import exception
from nova.i18n import _
from nova.privsep import qemu
from nova import utils
from nova.virt import images
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_utils import fileutils

from nova_fakedax import hostcache
from nova_fakedax import layout
from nova_fakedax import spec

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

IMAGE_TYPE = 'fakedax'


#: Makes what keeps a guest from storing meanwhile.
NothingStored = Callable[[], contextlib.AbstractContextManager[None]]


def disk_ops() -> contextlib.AbstractContextManager[None]:
    """Wait for one of ``[compute]max_concurrent_disk_ops``, and hold it.

    ComputeManager.init_host replaces the semaphore. Who holds it may not call
    what takes it: nova.virt.images.convert_image, for one.
    """
    return ty.cast(contextlib.AbstractContextManager[None],
                   compute_utils.disk_ops_semaphore)


def extract(source: str, target: str, out_format: str) -> None:
    """Copy raw content, by a caller who holds disk_ops().

    Follows nova.virt.libvirt.utils.extract_snapshot and
    nova.virt.images._convert_image, which waits for disk_ops().

    :param source: as qemu-img names it
    :param out_format: as Nova names it
    :raises nova.exception.ImageUnacceptable: qemu-img cannot copy it
    """
    out_format = {'iso': 'raw', 'ploop': 'parallels'}.get(
        out_format, out_format)
    try:
        qemu.unprivileged_convert_image(
            source, target, 'raw', out_format, CONF.instances_path,
            CONF.libvirt.snapshot_compression and out_format == 'qcow2')
    except processutils.ProcessExecutionError as exc:
        raise exception.ImageUnacceptable(
            image_id=source, reason=_(
                'Unable to convert image to %(format)s: %(exc)s') % {
                    'format': out_format, 'exc': exc})


def image_paths(instance: ty.Any) -> list[str]:
    """The backing files of an instance's disks on fake DAX.

    :param instance: a nova.objects.Instance
    """
    wanted = spec.FakeDaxSpec.from_instance(instance)
    directory = libvirt_utils.get_instance_path(instance)
    return [path for path in sorted(glob.glob(f'{directory}/disk*'))
            if wanted.wants(path)]


class CopyFailed(exception.NovaException):
    msg_fmt = _('Cannot copy %(path)s: %(reason)s')


class NoSpace(exception.NovaException):
    msg_fmt = _('Cannot allocate %(size)d bytes for %(path)s: %(reason)s')


class FlushFailed(exception.NovaException):
    msg_fmt = _('Cannot flush %(path)s: %(reason)s; what the guest has '
                'stored since its last fsync may be lost')


def flush(instance: ty.Any, volumes: Iterable[str] = ()) -> None:
    """Flush an instance's images, once its guest does not run.

    After QEMU's end only this host's memory may have what the guest stored.

    :param volumes: the paths of its volumes on fake DAX
    :raises FlushFailed: names the image
    """
    for path in [*image_paths(instance), *volumes]:
        try:
            hostcache.flush(path)
        except hostcache.HelperError as exc:
            # No reason to fail: the device has synced what it flushed.
            LOG.warning('Cannot flush %(exc)s; syncing all file systems '
                        'instead', {'exc': exc}, instance=instance)
            hostcache.sync_all()
        except OSError as exc:
            raise FlushFailed(path=path, reason=exc.strerror)


def flush_early(
    instance: ty.Any, volumes: Iterable[str] = (),
) -> FlushFailed | None:
    """Flush an instance's images while its guest may run.

    So that QEMU's own sync has little to write when QEMU ends. libvirt gives
    up on a process that does not end within 40 seconds or so, and a stop, hard
    reboot or delete would fail (virProcessKillPainfully).

    :param volumes: as for :func:`flush`
    :returns: what failed, for who has to report it: Linux tells each error to
        those who have the file open then, and to the first who opens it later
    """
    failed = None
    for path in [*image_paths(instance), *volumes]:
        try:
            hostcache.flush(path)
        except hostcache.HelperError as exc:
            # A stop will warn of it, and do what is left.
            LOG.debug('Cannot flush %(exc)s before the guest ends',
                      {'exc': exc}, instance=instance)
        except OSError as exc:
            failed = FlushFailed(path=path, reason=exc.strerror)
            LOG.error('%s', failed, instance=instance)
    return failed


def fill_holes(instance: ty.Any) -> None:
    """Allocate the holes of an instance's images.

    :raises NoSpace: names the image
    """
    for path in image_paths(instance):
        try:
            if filled := utils.tpool_wrap(layout).fill_holes(path):
                LOG.info('Allocated %(size)d bytes of %(path)s, which was a '
                         'sparse file', {'size': filled, 'path': path},
                         instance=instance)
        except OSError as exc:
            raise NoSpace(size=os.path.getsize(path), path=path,
                          reason=exc.strerror)


class FakeDaxImage(imagebackend.Flat):
    """A raw image with the layout that the flavor wants (:mod:`.layout`)."""

    def __init__(
        self, instance: ty.Any = None, disk_name: str | None = None,
        path: str | None = None,
        disk_info_mapping: dict[str, ty.Any] | None = None,
    ) -> None:
        super().__init__(instance, disk_name, path, disk_info_mapping)
        #: Entered while the content is copied.
        self.nothing_stored: NothingStored = contextlib.nullcontext
        self._memmap = spec.FakeDaxSpec.from_instance(instance).memmap

    def cache(
        self, fetch_func: ty.Any, filename: str, size: int | None = None,
        safe: bool = False, *args: ty.Any, **kwargs: ty.Any,
    ) -> None:
        """Make the image, or give one that is there what the flavor wants.

        Follows nova.virt.libvirt.imagebackend.Image.cache, through which
        LibvirtDriver._create_image makes every disk, and through which a
        resize or cold migration brings each disk that it has copied.

        :param size: in bytes
        :raises NoSpace: the file system has too little space for it
        :raises nova.exception.InvalidDiskFormat: it was not made raw
        :raises nova_fakedax.layout.InvalidLayout: its info block is not valid

        On an error an image that this call has made is removed.
        """
        made = (contextlib.nullcontext() if self.exists()
                else fileutils.remove_path_on_error(self.path))
        with made:
            super().cache(fetch_func, filename, size, safe, *args, **kwargs)
            if self.driver_format != 'raw':
                raise exception.InvalidDiskFormat(
                    disk_format=self.driver_format)
            self.resize_image(size or 0)

    def create_image(
        self, prepare_template: ty.Any, base: str, size: int | None,
        safe: bool = False, *args: ty.Any, **kwargs: ty.Any,
    ) -> None:
        """Make the image with its content where the layout has it.

        Follows nova.virt.libvirt.imagebackend.Flat.create_image, which copies
        a downloaded image and lets Nova make a file system in place.
        """
        if self.exists():
            super().create_image(
                prepare_template, base, size, safe, *args, **kwargs)
            return
        if 'image_id' in kwargs:
            if not os.path.exists(base):
                prepare_template(target=base, *args, **kwargs)
            imagebackend._update_utime_ignore_eacces(base)
            self.verify_base_size(base, size)
            # Or Nova's image cache could remove it meanwhile.
            utils.synchronized(
                self._get_lock_name(base), external=True,
                lock_path=self.lock_path)(self._make)(base, size)
        else:
            template = f'{self.path}.template'
            # One may be left from a crash.
            fileutils.delete_if_exists(template)
            with fileutils.remove_path_on_error(template):
                prepare_template(target=template, *args, **kwargs)
                self._make(template, size)
            os.unlink(template)
        self.correct_format()

    def _make(self, source: str, size: int | None) -> None:
        """Make the image of a raw file."""
        source_format = images.qemu_img_info(source).file_format
        if source_format != 'raw':
            raise exception.InvalidDiskFormat(disk_format=source_format)
        size = size or os.path.getsize(source)
        with self._faults(size):
            utils.tpool_wrap(layout).make(
                self.path, source, size, self._memmap)

    def resize_image(self, size: int) -> None:
        """Give the image at least so much content, and the layout."""
        with self._faults(size):
            utils.tpool_wrap(layout).fit(self.path, size, self._memmap)

    @contextlib.contextmanager
    def _faults(self, size: int) -> Iterator[None]:
        """Turn the errors of layout's functions into Nova's.

        These run in a native thread where Nova runs with eventlet, since they
        copy and so may take long.
        """
        try:
            yield
        except OSError as exc:
            raise NoSpace(
                size=layout.planned(size, self._memmap).file_size,
                path=self.path, reason=exc.strerror)

    def get_disk_size(self, name: str) -> int:
        """The bytes that the guest's disk has."""
        if name == self.path:
            return layout.read(name).size
        return int(super().get_disk_size(name))

    def _get_driver_format(self) -> str:
        # What the guest stores must not be taken for another format's header.
        return 'raw'

    def snapshot_extract(self, target: str, out_format: str) -> None:
        """Copy the content while its guest stores nothing.

        Follows nova.virt.libvirt.imagebackend.Flat.snapshot_extract, whose
        caller has paused the guest before it waits for disk_ops().
        """
        source = layout.read(self.path).qemu_filename(self.path)
        with disk_ops(), self.nothing_stored():
            extract(source, target, out_format)


class FakeDaxBackend(imagebackend.Backend):
    """Chooses FakeDaxImage for disks that a flavor puts on fake DAX."""

    def __init__(self, use_cow: bool) -> None:
        super().__init__(use_cow)
        self.BACKEND[IMAGE_TYPE] = FakeDaxImage
        #: What keeps the guest of an instance from storing.
        self.nothing_stored: Callable[
            [ty.Any], contextlib.AbstractContextManager[None]] = (
                lambda _instance: contextlib.nullcontext())

    def by_name(
        self, instance: ty.Any, name: str, image_type: str | None = None,
        disk_info_mapping: dict[str, ty.Any] | None = None,
    ) -> imagebackend.Image:
        # LibvirtDriver passes the configured image type in every call, so
        # configuration alone cannot make the choice.
        if spec.FakeDaxSpec.from_flavor(instance.flavor).wants(name):
            image_type = IMAGE_TYPE
        return super().by_name(instance, name, image_type, disk_info_mapping)

    def by_libvirt_path(
        self, instance: ty.Any, path: str, image_type: str | None = None,
    ) -> imagebackend.Image:
        if spec.FakeDaxSpec.from_instance(instance).wants(path):
            image_type = IMAGE_TYPE
        image = super().by_libvirt_path(instance, path, image_type)
        if isinstance(image, FakeDaxImage):
            image.nothing_stored = functools.partial(
                self.nothing_stored, instance)
        return image
