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

"""The options of the tests: what of a cloud they cannot find out."""

from oslo_config import cfg

GROUP = cfg.OptGroup('fakedax', title='Servers with disks on fake DAX')

OPTS = [
    cfg.StrOpt(
        'flavor_ref', default='',
        help='The id of a flavor with fakedax:disks=root. Tests make flavors '
             'like it, with a larger disk or other extra specs. Empty: '
             '[compute]flavor_ref.'),
    cfg.StrOpt(
        'image_ref', default='',
        help='The id of an image with the property fakedax_guest. Empty: '
             '[compute]image_ref.'),
    cfg.IntOpt(
        'hosts', default=0, min=0,
        help='How many hosts must report the trait CUSTOM_FAKEDAX; a test '
             'fails if there are fewer. 0: all tests are skipped if no host '
             'reports it.'),
    cfg.StrOpt(
        'guest_access', default='console',
        choices=[
            ('console', "by what the guest prints on its serial console: "
                        "user_data on a config drive has it report there, so "
                        "the guest needs cloud-init but no network"),
            ('ssh', 'by SSH, as [validation] has it')],
        help='How the tests learn what a guest sees.'),
    cfg.BoolOpt(
        'shared_storage', default=False,
        help='Whether the hosts share their instances path. Only then can '
             'servers with disks on fake DAX migrate while they run; '
             'otherwise the tests expect that it is refused.'),
    cfg.BoolOpt(
        'force_down', default=False,
        help="Whether a test may force a host's nova-compute down for some "
             'seconds, to see that a server that still runs is not '
             'evacuated.'),
    cfg.IntOpt(
        'data_mib', default=16, min=1,
        help='MiB of data that a guest writes to its root disk, and reads '
             'again and again.'),
]
