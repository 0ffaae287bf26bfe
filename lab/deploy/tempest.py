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

import pathlib

from lab.deploy import clients
from lab.deploy import config
from lab.deploy import servers
from lab import guest

_NAME = 'fakedax-tempest'

_EXTRA_SPECS = {'fakedax:disks': 'root', 'trait:CUSTOM_FAKEDAX': 'required'}


def configure() -> pathlib.Path:
    """Make the images and flavors that tempest needs, and write its file.

    The cloud must be up.

    :returns: the path of tempest.conf
    """
    cloud = clients.connect()
    built = guest.build()
    # The guest reads its config drive on this bus only.
    images = [servers.image(cloud, name, built, hw_cdrom_bus='scsi',
                            hw_scsi_model='virtio-scsi').id
              for name in (_NAME, f'{_NAME}-alt')]
    flavors = [servers.flavor(cloud, name, ram=ram,
                              extra_specs=_EXTRA_SPECS).id
               for name, ram in ((_NAME, 256), (f'{_NAME}-alt', 320))]
    path = config.ETC / 'tempest/tempest.conf'
    config.render('tempest.conf.j2', path, config.values() | {
        'flavors': flavors, 'images': images})
    return path
