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

"""What a refused rebuild must not have changed."""

from __future__ import annotations

from collections.abc import Mapping

from nova import exception
from nova import objects
from nova import utils


class RebuildRefused(exception.InstanceFaultRollback):
    """The instance stays as it is; holds why."""


def undo(
    instance: objects.Instance, image_ref: str,
    system_metadata: Mapping[str, str],
) -> None:
    """Give an instance back the image that its disks are of.

    Before the rebuild gets to the host, nova.compute.api.API.rebuild has saved
    the new image's id and properties as the instance's. It keeps the new image
    in the request specification, too, which a compute cannot change.

    :param image_ref: the id of the image before
    :param system_metadata: the instance's before, with the properties of
        that image
    """
    prefix = utils.SM_IMAGE_PROP_PREFIX
    image = {key: value for key, value in system_metadata.items()
             if key.startswith(prefix)}
    instance.system_metadata = {
        key: value for key, value in instance.system_metadata.items()
        if not key.startswith(prefix)} | image
    # Empty if the root disk is a volume.
    if instance.image_ref:
        instance.image_ref = image_ref
    # nova.compute.api.API._inherit_properties_from_image
    for name in ('os_type', 'architecture', 'vm_mode'):
        setattr(instance, name, image.get(prefix + name))
    for name in ('kernel_id', 'ramdisk_id'):
        setattr(instance, name, image.get(prefix + name, ''))
    instance.save()
