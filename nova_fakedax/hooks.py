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

"""What this package changes in Nova beyond what a driver overrides.

Importing the package changes nothing in Nova. FakeDaxDriver installs the
hooks of nova-compute when Nova creates it, FakeDaxFilter that of
nova-scheduler. Each hook is idempotent and names the Nova function that it
follows.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import typing as ty

from nova import conf as nova_conf
from nova.scheduler import request_filter as nova_request_filter

from nova_fakedax import conf
from nova_fakedax import request_filter
from nova_fakedax import spec

if ty.TYPE_CHECKING:
    from lxml import etree
    from nova.compute import manager
    from nova.compute import resource_tracker
    from nova import context as nova_context
    from nova import objects
    from nova.virt.libvirt import config as vconfig
    from nova.virt.libvirt import guest as libvirt_guest


def install() -> None:
    """Install the hooks of nova-compute."""
    # Imported here: nova-scheduler must not load the libvirt driver, and the
    # compute manager loads this driver.
    from nova.compute import manager
    from nova.compute import resource_tracker
    from nova.virt.libvirt import config as vconfig
    from nova.virt.libvirt import migration as libvirt_migrate
    from nova.virt.libvirt import utils as libvirt_utils

    conf.register_opts(nova_conf.CONF)
    _wrap(vconfig.LibvirtConfigGuest, 'parse_dom', _parse_virtio_pmems)
    _wrap(libvirt_utils, 'find_disk', _find_root_disk)
    _wrap(libvirt_utils, 'copy_image', _copy_image)
    _wrap(libvirt_migrate, '_update_volume_xml', _update_volumes)
    _wrap(manager.ComputeManager, '_do_rebuild_instance', _do_rebuild)
    _wrap(resource_tracker.ResourceTracker,
          'delete_allocation_for_evacuated_instance', _delete_allocation)


def install_scheduler() -> None:
    """Install the hook of nova-scheduler.

    Adds to nova.scheduler.request_filter.ALL_REQUEST_FILTERS, which
    process_reqspec() of that module reads. No option of Nova does.
    """
    filters = nova_request_filter.ALL_REQUEST_FILTERS
    if request_filter.require_fake_dax not in filters:
        filters.append(request_filter.require_fake_dax)


def _wrap(owner: ty.Any, name: str, around: Callable[..., ty.Any]) -> None:
    """Replace a function of Nova with one that calls ``around``.

    Of a class the method is wrapped and the class not replaced, since its
    methods name the class in super().

    :param around: gets the function of Nova, and then its arguments
    """
    wrapped = getattr(owner, name)
    if hasattr(wrapped, 'fakedax_hook'):
        return

    @functools.wraps(wrapped)
    def hook(*args: ty.Any, **kwargs: ty.Any) -> ty.Any:
        return around(wrapped, *args, **kwargs)

    # functools.wraps() hands this on to whoever wraps the hook in turn.
    hook.fakedax_hook = around  # type: ignore[attr-defined]
    setattr(owner, name, hook)


def _parse_virtio_pmems(
    parse_dom: Callable[..., None], guest: vconfig.LibvirtConfigGuest,
    xmldoc: etree._Element,
) -> None:
    """Let every reader of a domain see its disks on fake DAX.

    Follows nova.virt.libvirt.config.LibvirtConfigGuest.parse_dom, which
    knows one model of memory device, nvdimm, and no slices of disks.
    """
    from nova_fakedax import domain

    parse_dom(guest, xmldoc)
    domain.parse_virtio_pmems(guest, xmldoc)
    domain.parse_slices(guest, xmldoc)


def _find_root_disk(
    find_disk: Callable[..., tuple[str, str | None]],
    guest: libvirt_guest.Guest,
) -> tuple[str, str | None]:
    """Let a snapshot find a root disk that is no ``<disk>``.

    Follows nova.virt.libvirt.utils.find_disk, which takes the first
    ``<disk>`` of a domain: the root disk's boot view, but without one that
    may be the config drive.

    :returns: the path of the root disk and its format
    """
    from nova_fakedax import domain

    root = domain.root_disk(guest.get_config())
    return (root.path, 'raw') if root else find_disk(guest)


def _copy_image(
    copy_image: Callable[..., None], src: str, dest: str,
    host: str | None = None, *args: ty.Any, **kwargs: ty.Any,
) -> None:
    """Copy a disk as the flavor needs it that the copy is for.

    Follows nova.virt.libvirt.utils.copy_image. Its cp(1) takes a file that is
    allocated in full for one without holes, and reads and writes all of it.
    """
    from nova_fakedax import resize

    if not resize.copy(dest, src, host, lambda made: copy_image(
            made, dest, host, *args, **kwargs)):
        copy_image(src, dest, host, *args, **kwargs)


def _update_volumes(
    update_volume_xml: Callable[..., etree._Element],
    xml_doc: etree._Element, migrate_data: ty.Any, *args: ty.Any,
) -> etree._Element:
    """Name volumes in a guest's XML as its destination does.

    Follows nova.virt.libvirt.migration._update_volume_xml, which knows the
    volumes that are a ``<disk>``.
    """
    from nova_fakedax import migration

    _instance, get_volume_config = args
    migration.move_volumes(xml_doc, migrate_data.bdms, get_volume_config)
    return update_volume_xml(xml_doc, migrate_data, *args)


def _do_rebuild(
    do_rebuild: Callable[..., None], manager: manager.ComputeManager,
    context: nova_context.RequestContext, instance: objects.Instance,
    orig_image_ref: str, image_meta: ty.Any, injected_files: ty.Any,
    new_pass: ty.Any, orig_sys_metadata: dict[str, str], *args: ty.Any,
) -> None:
    """Take back what the API has changed for a rebuild that is refused.

    Follows nova.compute.manager.ComputeManager._do_rebuild_instance, which
    knows what was there before, as the driver does not.
    """
    from nova_fakedax import rebuild

    try:
        do_rebuild(manager, context, instance, orig_image_ref, image_meta,
                   injected_files, new_pass, orig_sys_metadata, *args)
    except rebuild.RebuildRefused:
        # An evacuation brings no other image.
        if instance.host == manager.host:
            rebuild.undo(instance, orig_image_ref, orig_sys_metadata)
        raise


def _delete_allocation(
    delete: Callable[..., None], tracker: resource_tracker.ResourceTracker,
    context: nova_context.RequestContext, instance: objects.Instance,
    node: str, node_type: str = 'source',
) -> None:
    """Leave an instance its allocations when its rebuild fails.

    Follows nova.compute.resource_tracker.ResourceTracker.
    delete_allocation_for_evacuated_instance. ComputeManager.rebuild_instance
    calls it for each rebuild that fails, as if that were an evacuation to
    this host, where the instance is and stays.
    """
    if not (node_type == 'destination' and instance.host == tracker.host
            and spec.FakeDaxSpec.from_instance(instance)):
        delete(tracker, context, instance, node, node_type)
