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


"""Cinder's driver of the lab's block devices: lab/deploy/loops.py.

cinder-volume imports it by its name in cinder.conf. A volume is a raw file on
the shared storage. To connect it to a host is to give the host a loop device
of the file; Nova's driver for local block devices then finds it there.
"""

import os
import pathlib
import shutil
from typing import Any

from cinder import exception
from cinder.image import image_utils
from cinder import interface
from cinder.volume import driver
from cinder.volume import volume_utils
from oslo_utils import units

from lab.deploy import host
from lab.deploy import loops
from lab.deploy import storage

#: Where Cinder has the files.
_FILES = storage.MOUNT / loops.FILES.relative_to(host.INSTANCES)


@interface.volumedriver
class LoopDriver(driver.VolumeDriver):
    """A backend of files; a snapshot is a copy of one."""

    VERSION = '1.0'
    CI_WIKI_NAME = 'None'

    def do_setup(self, context: Any) -> None:
        _FILES.mkdir(parents=True, exist_ok=True)

    def check_for_setup_error(self) -> None:
        pass

    def _update_volume_stats(self) -> None:
        usage = shutil.disk_usage(_FILES)
        self._stats = {
            'volume_backend_name': self.configuration.volume_backend_name,
            'vendor_name': 'nova-fakedax', 'driver_version': self.VERSION,
            'storage_protocol': 'loop', 'multiattach': True,
            'total_capacity_gb': usage.total / units.Gi,
            'free_capacity_gb': usage.free / units.Gi,
            # The files are sparse.
            'thin_provisioning_support': True,
            'max_over_subscription_ratio': 20.0,
            'provisioned_capacity_gb': sum(
                each.stat().st_size for each in _FILES.iterdir()) / units.Gi}

    def local_path(self, volume: Any) -> str:
        """The file of a volume or a snapshot."""
        return str(_FILES / volume.name)

    def create_volume(self, volume: Any) -> None:
        with open(self.local_path(volume), 'wb') as file:
            file.truncate(volume.size * units.Gi)

    def delete_volume(self, volume: Any) -> None:
        pathlib.Path(self.local_path(volume)).unlink(missing_ok=True)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        if volume.volume_attachment:
            # Nova has no way to tell a local device's host of it.
            raise exception.ExtendVolumeError(
                reason='a volume cannot be extended while it is attached')
        os.truncate(self.local_path(volume), new_size * units.Gi)

    def create_snapshot(self, snapshot: Any) -> None:
        self._copy(snapshot.volume, snapshot, snapshot.volume_size)

    def delete_snapshot(self, snapshot: Any) -> None:
        self.delete_volume(snapshot)

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> None:
        self._copy(snapshot, volume, volume.size)

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> None:
        self._copy(src_vref, volume, volume.size)

    def _copy(self, source: Any, target: Any, gib: int) -> None:
        path = self.local_path(target)
        self._execute('cp', '--sparse=always', self.local_path(source), path)
        os.truncate(path, gib * units.Gi)

    def copy_image_to_volume(self, context: Any, volume: Any,
                             image_service: Any, image_id: str,
                             disable_sparse: bool = False) -> None:
        path = self.local_path(volume)
        image_utils.fetch_to_raw(
            context, image_service, image_id, path,
            self.configuration.volume_dd_blocksize, size=volume.size,
            disable_sparse=disable_sparse)
        # It has the image's size.
        os.truncate(path, volume.size * units.Gi)

    def copy_volume_to_image(self, context: Any, volume: Any,
                             image_service: Any, image_meta: Any) -> None:
        volume_utils.upload_volume(context, image_service, image_meta,
                                   self.local_path(volume), volume)

    def ensure_export(self, context: Any, volume: Any) -> None:
        """Do nothing: to connect a volume is all that it takes."""

    def create_export(self, context: Any, volume: Any,
                      connector: Any) -> None:
        """Do nothing, as :meth:`ensure_export`."""

    def remove_export(self, context: Any, volume: Any) -> None:
        """Do nothing, as :meth:`ensure_export`."""

    def initialize_connection(self, volume: Any, connector: Any,
                              **_kwargs: Any) -> dict[str, Any]:
        path = loops.attach(_node(connector), volume.name)
        return {'driver_volume_type': 'local',
                'data': {'device_path': str(path)}}

    def terminate_connection(self, volume: Any, connector: Any,
                             **_kwargs: Any) -> bool:
        """Disconnect; whether the host still needs it for another server."""
        if not connector:
            # A force detach.
            for node in host.HOSTS:
                loops.detach(node, volume.name)
            return False
        hosts = [each.connector['host'] for each in volume.volume_attachment
                 if each.connector]
        if hosts.count(connector['host']) > 1:
            return True
        loops.detach(_node(connector), volume.name)
        return False


def _node(connector: Any) -> host.Host:
    for node in host.HOSTS:
        if node.name == connector['host']:
            return node
    raise exception.InvalidInput(
        reason=f'{connector["host"]} is no host of the lab')
