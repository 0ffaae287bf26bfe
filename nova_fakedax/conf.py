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

"""The ``[fakedax]`` options."""

from oslo_config import cfg

group = cfg.OptGroup(
    'fakedax',
    title='Fake persistent memory',
    help='Instances whose disks are fake persistent memory.')

opts = [
    cfg.StrOpt(
        'emulator',
        help="""
Path of the QEMU binary that runs instances with disks on fake DAX.

The binary must have the device ``virtio-pmem-pci``. Other instances, and all
instances if this is not set, run on the binary that libvirt chooses. Where
AppArmor or SELinux confines QEMU, its policy must allow the binary.
"""),
    cfg.IntOpt(
        'quiesce_timeout',
        default=300,
        min=1,
        help="""
Seconds for which a guest stays paused at most while Cinder takes snapshots.

nova-api has a guest with volumes on fake DAX paused before the snapshots of
its volumes, and resumed after them. If nova-api dies in between, nova-compute
resumes the guest when this time is over. It must be longer than the storage
takes for the snapshots of all volumes of a server.
"""),
    cfg.IntOpt(
        'spare_volumes',
        default=8, min=0, max=24,
        help="""
How many volumes can be attached to a server on fake DAX while it runs.

Counts for flavors with ``fakedax:volumes=all``. What a running guest can get
is fixed when it starts: this many memory slots and, on machine type q35, PCIe
root ports are kept free. The count begins again when the server is stopped
and started, or rebooted hard: volumes that are attached by then are not
counted. A guest takes no memory for what is spare.

Related options:

* ``[fakedax]spare_volumes_gib``
"""),
    cfg.IntOpt(
        'spare_volumes_gib',
        default=256, min=0,
        help="""
GiB of volumes that can be attached to a server on fake DAX while it runs.

The size of all those that ``[fakedax]spare_volumes`` allows together. It is a
part of the guest's physical addresses, kept free when the guest starts, and
takes neither memory nor disk space. A guest whose CPU has 40 bits of addresses
holds 1 TiB, RAM, disks on fake DAX and this included.

Related options:

* ``[fakedax]spare_volumes``
"""),
]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register the options; does nothing if they are."""
    conf.register_group(group)
    conf.register_opts(opts, group=group)


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """For the entry point ``oslo.config.opts``."""
    return [(group, opts)]
