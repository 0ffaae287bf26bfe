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

"""tempest's configuration for the lab's cloud."""

import os
import pathlib

from lab.deploy import clients
from lab.deploy import config
from lab.deploy import servers
from lab import guest

_NAME = 'fakedax-tempest'

_EXTRA_SPECS = {'fakedax:disks': 'root', 'trait:CUSTOM_FAKEDAX': 'required'}
#: For tempest's own tests of volumes.
_VOLUMES = {'fakedax:volumes': 'all'}


def configure() -> pathlib.Path:
    """Make the images and flavors that tempest needs, and write its file.

    The cloud must be up. Its volumes are of the type that
    ``FAKEDAX_VOLUME_TYPE`` in the environment names, block by default: Cinder
    cannot take a snapshot of a file while its server is on fake DAX.

    :returns: the path of tempest.conf
    """
    cloud = clients.connect()
    built = guest.build()
    # The guest reads its config drive on this bus only.
    images = [servers.image(cloud, name, built, hw_cdrom_bus='scsi',
                            hw_scsi_model='virtio-scsi').id
              for name in (_NAME, f'{_NAME}-alt')]
    extra_specs = _EXTRA_SPECS | (_VOLUMES if config.with_volumes() else {})
    flavors = [servers.flavor(cloud, name, ram=ram,
                              extra_specs=extra_specs).id
               for name, ram in ((_NAME, 256), (f'{_NAME}-alt', 320))]
    path = config.ETC / 'tempest/tempest.conf'
    config.render('tempest.conf.j2', path, config.values() | {
        'flavors': flavors, 'images': images,
        'backend': os.environ.get('FAKEDAX_VOLUME_TYPE', 'block')})
    return path
