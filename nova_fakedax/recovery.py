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

"""Moves that a dead nova-compute has left half done.

The source's host decides, since it has the old images and, until it leaves,
the guest. Where the guest runs says what to do: a move is finished if it runs
at the destination, and undone otherwise. Where that is not certain, nothing is
done.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
import dataclasses
import glob
import typing as ty

from nova.compute import power_state
from nova.compute import rpcapi
from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception
from nova.network import neutron
from nova import objects
from nova.scheduler.client import report
from nova.scheduler import utils as scheduler_utils
from nova import servicegroup
from nova.virt.libvirt import utils as libvirt_utils

from nova_fakedax import departure
from nova_fakedax import filelock
from nova_fakedax import resize

#: The statuses of a migration that has ended as Nova wants it to end, or that
#: waits for its user.
_ENDED = ('completed', 'confirmed', 'reverted', 'cancelled', 'failed', 'done',
          'finished')

_LIVE = 'live-migration'

#: vm_state by the power state of a guest at the source.
_STATES = {power_state.RUNNING: vm_states.ACTIVE,
           power_state.PAUSED: vm_states.PAUSED}

#: The tasks of a resize that the source's nova-compute carries out; the others
#: are the destination's.
_AT_SOURCE = (task_states.RESIZE_MIGRATING, task_states.RESIZE_REVERTING)


class RecoveryRefused(Exception):
    """Says why a move is left as it is, and what to do first."""


class NoSuchMove(Exception):
    """Names the server that has no unfinished move from this host."""


@dataclasses.dataclass(frozen=True)
class Move:
    """A move that was not finished.

    :ivar instance: the server, a nova.objects.Instance
    :ivar migration: its last nova.objects.Migration
    """

    instance: objects.Instance
    migration: objects.Migration

    @property
    def live(self) -> bool:
        return bool(self.migration.migration_type == _LIVE)


@dataclasses.dataclass(frozen=True)
class Step:
    """What ends a move.

    :ivar finishes: whether it finishes the move, or undoes it
    :ivar reason: a clause that says what was found
    :ivar do: does it
    """

    finishes: bool
    reason: str
    do: Callable[[], None]


def moves(
    context: nova_context.RequestContext, host: str,
    servers: Collection[str] = (),
) -> list[Move]:
    """The unfinished moves of servers with disks on fake DAX from a host.

    :param servers: UUIDs; empty for all
    :raises NoSuchMove: one of them has none
    """
    last: dict[str, objects.Migration] = {}
    for migration in objects.MigrationList.get_by_filters(
            context, {'source_compute': host}):
        known = last.get(migration.instance_uuid)
        if known is None or known.id < migration.id:
            last[migration.instance_uuid] = migration
    found = [
        Move(instance, migration) for uuid, migration in sorted(last.items())
        if (not servers or uuid in servers)
        and migration.status not in _ENDED
        and (instance := _instance(context, uuid)) and _is_open(
            instance, migration)]
    for server in servers:
        if server not in [move.instance.uuid for move in found]:
            others = ', '.join(move.instance.uuid for move in moves(
                context, host)) or 'no server'
            raise NoSuchMove(
                f"server '{server}' with disks on fake DAX has no unfinished "
                f"move from host {host}; {others} has one. Allowed: UUIDs, on "
                f"the host that the server was leaving")
    return found


def _instance(
    context: nova_context.RequestContext, uuid: str,
) -> objects.Instance | None:
    try:
        return objects.Instance.get_by_uuid(context, uuid, expected_attrs=[
            'flavor', 'info_cache', 'migration_context', 'system_metadata'])
    except exception.InstanceNotFound:
        # It was deleted.
        return None


def _is_open(
    instance: objects.Instance, migration: objects.Migration,
) -> bool:
    """Whether Nova and its user cannot go on by themselves."""
    return (resize.concerns(instance.flavor, instance.old_flavor)
            and instance.host in (migration.source_compute,
                                  migration.dest_compute)
            and (instance.task_state is not None
                 or instance.vm_state == vm_states.ERROR))


def step(
    context: nova_context.RequestContext, move: Move, driver: ty.Any,
) -> Step:
    """What ends a move, as the hosts are now.

    :param driver: the LibvirtDriver of the source, which is this host
    :raises RecoveryRefused: nothing may be done
    """
    return _Recovery(context, move, driver).step()


class _Recovery:

    def __init__(
        self, context: nova_context.RequestContext, move: Move,
        driver: ty.Any,
    ) -> None:
        self._context = context
        self._move = move
        self._instance = move.instance
        self._migration = move.migration
        self._driver = driver
        self._source = move.migration.source_compute
        self._dest = move.migration.dest_compute

    def step(self) -> Step:
        self._check_nobody_is_at_it()
        here, there = self._runs_here(), self._runs_there()
        if there is None:
            raise RecoveryRefused(
                f'the libvirt of {self._dest} does not answer, so the guest '
                f'may run there; try again when it does')
        if here and there and self._source != self._dest:
            raise RecoveryRefused(
                f'the guest runs on {self._source} and on {self._dest}; end '
                f'the one whose image is not locked (nova-fakedax status '
                f'shows it), and try again')
        if self._move.live:
            return self._live_step(there)
        return self._cold_step(there)

    def _live_step(self, there: bool) -> Step:
        if there:
            self._check_up(self._dest)
            return Step(True, f'its guest runs on {self._dest}',
                        self._finish_live)
        self._check_no_volumes()
        return Step(False, f'its guest does not run on {self._dest}',
                    self._undo_live)

    def _cold_step(self, there: bool) -> Step:
        if self._instance.host == self._source:
            raise RecoveryRefused(
                f'its disks have not left {self._source}; restart '
                f'nova-compute there, which undoes the move at its start')
        if there:
            return Step(
                True, f'its guest runs on {self._dest}; confirm or revert it',
                self._finish_cold)
        self._check_no_volumes()
        self._check_old_images()
        self._check_up(self._source)
        return Step(
            False, f'its guest does not run on {self._dest}; it starts on '
            f'{self._source} with its old images', self._undo_cold)

    # What must be so.

    def _check_nobody_is_at_it(self) -> None:
        """Check that no nova-compute, nor libvirt, works on the move."""
        task = self._instance.task_state
        host = (self._source if self._move.live or task in _AT_SOURCE
                else self._dest)
        if task is not None and self._is_up(host):
            raise RecoveryRefused(
                f"the server is at '{task}', which nova-compute of {host} may "
                f"still work on: wait. If that has been restarted since, set "
                f"the state first: openstack server set --state error "
                f"{self._instance.uuid}")
        if self._has_job():
            raise RecoveryRefused(
                'libvirt still migrates the guest; wait, or abort that: virsh '
                f'domjobabort {self._instance.name}')

    def _check_up(self, host: str) -> None:
        if not self._is_up(host):
            raise RecoveryRefused(
                f'nova-compute of {host} does not run, and must do its part; '
                f'start it, and try again')

    def _check_old_images(self) -> None:
        directory = libvirt_utils.get_instance_path(self._instance)
        old = glob.glob(f'{directory}_resize/disk*')
        if not old:
            raise RecoveryRefused(
                f'there are no old images in {directory}_resize, and the '
                f'guest does not run on {self._dest}; start it there: '
                f'openstack server set --state active, openstack server '
                f'reboot --hard')
        # The new ones are here, too, if the hosts share the instances path.
        for path in old + glob.glob(f'{directory}/disk*'):
            if filelock.is_image_owned(path):
                raise RecoveryRefused(
                    f'a guest has {path} locked; end its QEMU first')

    def _check_no_volumes(self) -> None:
        """A server's volumes are attached to the destination by now."""
        if any(mapping.is_volume for mapping in
               objects.BlockDeviceMappingList.get_by_instance_uuid(
                   self._context, self._instance.uuid)):
            raise RecoveryRefused(
                f'it has volumes, which are attached to {self._dest}, and its '
                f'guest does not run there; start it there: openstack server '
                f'set --state active, openstack server reboot --hard')

    def _is_up(self, host: str) -> bool:
        try:
            service = objects.Service.get_by_compute_host(self._context, host)
        except exception.NotFound:
            return False
        return bool(servicegroup.API().service_is_up(service))

    def _guest(self) -> ty.Any:
        try:
            return self._driver._host.get_guest(self._instance)
        except exception.InstanceNotFound:
            return None

    def _has_job(self) -> bool:
        guest = self._guest()
        return bool(guest and guest.is_active()
                    and guest.get_job_info().type
                    != libvirt().VIR_DOMAIN_JOB_NONE)

    def _runs_here(self) -> bool:
        guest = self._guest()
        return bool(guest and guest.is_active())

    def _runs_there(self) -> bool | None:
        if self._dest == self._source:
            return self._runs_here()
        return departure.runs_at(
            self._driver._host,
            departure.uris(self._migration, self._driver._live_migration_uri),
            self._instance)

    # What is done.

    def _finish_live(self) -> None:
        departure.finish(
            self._context, self._instance, self._migration, self._driver)

    def _undo_live(self) -> None:
        """Give the server back to its source.

        As ComputeManager._rollback_live_migration, which does not run when
        nova-compute has died: ComputeManager._reset_live_migration leaves the
        allocations and port bindings as they are.
        """
        placement = report.report_client_singleton()
        if placement.get_allocations_for_consumer(
                self._context, self._migration.uuid):
            placement.move_allocations(
                self._context, self._migration.uuid, self._instance.uuid)
        neutron.API().setup_networks_on_host(
            self._context, self._instance, host=self._dest, teardown=True)
        self._migration.status = 'failed'
        self._migration.save()
        state = self._driver.get_info(
            self._instance).state if self._guest() else power_state.SHUTDOWN
        self._set_state(_STATES.get(state, vm_states.STOPPED), state)

    def _finish_cold(self) -> None:
        """Do what is last in ComputeManager._finish_resize."""
        self._migration.status = 'finished'
        self._migration.save()
        self._set_state(vm_states.RESIZED, power_state.RUNNING)

    def _undo_cold(self) -> None:
        """Let the source revert the move.

        The second half of a revert, ComputeManager.finish_revert_resize. For
        the first, at the destination, there is no guest to destroy.

        :raises RecoveryRefused: the source has no room for it any more
        """
        self._claim_source()
        self._instance.task_state = task_states.RESIZE_REVERTING
        self._instance.save()
        self._migration.status = 'reverting'
        self._migration.save()
        rpcapi.ComputeAPI().finish_revert_resize(
            self._context, self._instance, self._migration, self._source,
            self._request_spec())

    def _claim_source(self) -> None:
        """Let the migration hold what the server had at the source.

        ComputeManager.finish_resize gives that up when it fails, since Nova
        means the server to be started at the destination.

        :raises RecoveryRefused: there is no room for it any more
        """
        placement = report.report_client_singleton()
        if placement.get_allocations_for_consumer(
                self._context, self._migration.uuid):
            return
        node = objects.ComputeNode.get_by_host_and_nodename(
            self._context, self._source, self._migration.source_node)
        flavor = self._instance.old_flavor
        resources = scheduler_utils.resources_from_flavor(
            self._instance, flavor)
        if not placement.put_allocations(
                self._context, self._migration.uuid, {
                    'allocations': {node.uuid: {'resources': resources}},
                    'project_id': self._instance.project_id,
                    'user_id': self._instance.user_id,
                    'consumer_generation': None}):
            raise RecoveryRefused(
                f'placement has no room on {self._source} for its old flavor, '
                f'{flavor.name}; make room, and try again')

    def _request_spec(self) -> objects.RequestSpec | None:
        """With the old flavor, as nova.compute.api.API.revert_resize has it.

        :returns: None if the cell's conductor cannot reach the API database
        """
        try:
            request_spec = objects.RequestSpec.get_by_instance_uuid(
                self._context, self._instance.uuid)
            if request_spec.flavor.id != self._instance.old_flavor.id:
                request_spec.flavor = self._instance.old_flavor
                request_spec.save()
        except exception.NovaException:
            return None
        return request_spec

    def _set_state(self, vm_state: str, state: int) -> None:
        self._instance.vm_state = vm_state
        self._instance.power_state = state
        self._instance.task_state = None
        self._instance.save()


def libvirt() -> ty.Any:
    # Imported here because libvirt-python is optional, as for Nova.
    import libvirt as bindings
    return bindings
