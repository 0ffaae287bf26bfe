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

import contextlib
import glob
import os
import typing as ty

from nova import exception
from nova.i18n import _
from nova import utils
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from oslo_utils import fileutils

from nova_fakedax import layout
from nova_fakedax import spec

IMAGE_TYPE = 'fakedax'


def image_paths(instance: ty.Any) -> list[str]:
    """The backing files of an instance's disks on fake DAX.

    :param instance: a nova.objects.Instance
    """
    wanted = spec.FakeDaxSpec.from_instance(instance)
    directory = libvirt_utils.get_instance_path(instance)
    return [path for path in sorted(glob.glob(f'{directory}/disk*'))
            if wanted.wants(path)]


class NoSpace(exception.NovaException):
    msg_fmt = _('Cannot allocate %(size)d bytes for %(path)s: %(reason)s')


class FakeDaxImage(imagebackend.Flat):
    """A raw image, aligned and allocated in full (:mod:`.layout`)."""

    def cache(
        self, fetch_func: ty.Any, filename: str, size: int | None = None,
        safe: bool = False, *args: ty.Any, **kwargs: ty.Any,
    ) -> None:
        """Make the image as Flat does, then allocate it in full.

        Follows nova.virt.libvirt.imagebackend.Image.cache, through which
        LibvirtDriver._create_image makes every disk.

        :param size: in bytes
        :raises NoSpace: the file system has too little space for it
        :raises nova.exception.InvalidDiskFormat: it was not made raw

        On an error an image that this call has made is removed.
        """
        made = (contextlib.nullcontext() if self.exists()
                else fileutils.remove_path_on_error(self.path))
        with made:
            super().cache(fetch_func, filename, size, safe, *args, **kwargs)
            if self.driver_format != 'raw':
                raise exception.InvalidDiskFormat(
                    disk_format=self.driver_format)
            try:
                # May take long, as it copies the blocks of a clone: in a
                # native thread where Nova runs with eventlet.
                utils.tpool_wrap(layout).allocate(self.path, size or 0)
            except OSError as exc:
                raise NoSpace(size=size or os.path.getsize(self.path),
                              path=self.path, reason=exc.strerror)


class FakeDaxBackend(imagebackend.Backend):
    """Chooses FakeDaxImage for disks that a flavor puts on fake DAX."""

    def __init__(self, use_cow: bool) -> None:
        super().__init__(use_cow)
        self.BACKEND[IMAGE_TYPE] = FakeDaxImage

    def by_name(
        self, instance: ty.Any, name: str, image_type: str | None = None,
        disk_info_mapping: dict[str, ty.Any] | None = None,
    ) -> imagebackend.Image:
        # LibvirtDriver passes the configured image type in every call, so
        # configuration alone cannot make the choice.
        if spec.FakeDaxSpec.from_flavor(instance.flavor).wants(name):
            image_type = IMAGE_TYPE
        return super().by_name(instance, name, image_type, disk_info_mapping)
