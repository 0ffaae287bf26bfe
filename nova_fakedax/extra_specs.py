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

"""Validators for ``fakedax:*`` extra specs, for nova-api.

Loaded by nova.api.validation.extra_specs.validators through the entry point
group ``nova.api.extra_spec_validators``, whose value is a module with a
``register()``.
"""

from nova.api.validation.extra_specs import base
from nova import exception

from nova_fakedax import spec


class FakeDaxValidator(base.ExtraSpecValidator):
    """Leaves the check to :func:`nova_fakedax.spec.check_extra_spec`."""

    def validate(self, name: str, value: str) -> None:
        """Check an extra spec.

        :raises nova.exception.ValidationError: a 400 to the user
        """
        try:
            spec.check_extra_spec(name, value)
        except spec.InvalidSpec as exc:
            raise exception.ValidationError(f'Validation failed; {exc}.')


def register() -> list[base.ExtraSpecValidator]:
    """A validator for each row of the table, and one for all other keys."""
    validators = [
        FakeDaxValidator(
            name=row.key, description=row.description,
            value={'type': str, 'enum': list(row.values)})
        for row in spec.EXTRA_SPECS.values()]
    # Nova's own message for an unknown key does not say what is allowed.
    return [*validators, FakeDaxValidator(
        name=f'{spec.NAMESPACE}:{{unknown}}',
        description='Any other key of the namespace is refused.',
        parameters=[{'name': 'unknown', 'pattern': '.*'}],
        value={'type': str})]
