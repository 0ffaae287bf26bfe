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

"""python3-nova-fakedax, next to Debian's own packages of Nova."""

import pathlib
import shutil
import subprocess
import tempfile

from oslotest import base as oslotest_base

from lab import paths
from tests.package import base

NOVA = ('nova-compute', 'nova-compute-kvm')

#: As nova-compute's unit names them.
CONFIGURATION = ('--config-file /etc/nova/nova.conf '
                 '--config-file /etc/nova/nova-compute.conf')

APPARMOR = '/etc/apparmor.d/abstractions/libvirt-qemu.d/nova-fakedax'

INSTALL = 'apt-get install --yes /mnt/*.deb'

#: What the install guide has an operator write.
CONFIGURE = '''
sed -i 's/^compute_driver *=.*/compute_driver = fakedax.FakeDaxDriver/' \
    /etc/nova/nova-compute.conf
cat >>/etc/nova/nova-compute.conf <<'EOF'
[filter_scheduler]
available_filters = nova.scheduler.filters.all_filters
available_filters = nova_fakedax.scheduler.FakeDaxFilter
enabled_filters = ComputeFilter,FakeDaxFilter
EOF
# This machine may have no KVM.
sed -i 's/^virt_type *=.*/virt_type = qemu/' /etc/nova/nova-compute.conf
'''

#: As nova-compute does, once it has reached a conductor; as its own user.
LOAD = f'''
cat >/mnt/load.py <<'EOF'
import sys

from nova import config
from nova.virt import driver

config.parse_args(sys.argv)
print(type(driver.load_compute_driver(None)))
EOF
runuser -u nova -- python3 /mnt/load.py {CONFIGURATION}
'''

#: As nova-compute does, with an image that only QEMU's user may read.
FLUSH = f'''
instance=/var/lib/nova/instances/instance
install -D -o libvirt-qemu -m 600 /dev/null $instance/disk
cat >/mnt/flush.py <<EOF
import shlex
import sys

from nova import config
from nova import utils
from nova_fakedax import hostcache
from oslo_privsep import priv_context

config.parse_args(sys.argv)
priv_context.init(root_helper=shlex.split(utils.get_root_helper()))
try:
    open('$instance/disk')
except PermissionError:
    hostcache.flush('$instance/disk')
    print('flushed')
EOF
runuser -u nova -- python3 /mnt/flush.py {CONFIGURATION}
'''


def build(output: pathlib.Path) -> pathlib.Path:
    done = subprocess.run(
        [paths.ROOT / 'etc/debian/build', '--output', output],
        check=True, stdout=subprocess.PIPE, text=True)
    return pathlib.Path(done.stdout.strip())


class InstalledTest(base.RootTestCase):

    # The one that has Nova 34.
    suite = 'sid'
    names = NOVA
    series = '2:34.'

    def setUp(self) -> None:
        super().setUp()
        self.package = build(self.shared)

    def test_nova_finds_the_driver_and_nothing_stays_behind(self) -> None:
        before = self.files()
        self.output_of(INSTALL)

        added = self.files() - before
        for path in (APPARMOR, '/etc/nova/rootwrap.d/fakedax.filters',
                     '/usr/bin/nova-fakedax', '/usr/bin/nova-fakedax-status',
                     '/usr/lib/python3/dist-packages/nova_fakedax.pth',
                     '/usr/share/nova-fakedax/nova-fakedax.conf.sample',
                     '/usr/share/nova-fakedax/grafana/nova-fakedax.json',
                     '/usr/share/nova-fakedax/metadefs/'
                     'compute-fakedax-flavor.json'):
            self.assertIn(path, added)

        self.output_of(f'''
            # Debian's own driver is what nova-compute has until now.
            runuser -u nova -- nova-fakedax-status {CONFIGURATION} \
                upgrade check >/mnt/unconfigured || test $? = 1
            {CONFIGURE}
            runuser -u nova -- nova-fakedax-status {CONFIGURATION} \
                upgrade check >/mnt/configured''')
        self.assertIn('compute_driver is libvirt.LibvirtDriver',
                      (self.shared / 'unconfigured').read_text())
        configured = (self.shared / 'configured').read_text()
        self.assertEqual(4, configured.count('Result: Success'), configured)

        self.assertIn('FakeDaxDriver', self.output_of(LOAD))
        self.assertIn('flushed', self.output_of(FLUSH))

        # libvirt asks polkit whether nova may use it.
        answers = self.output_of(f'''
            mkdir /run/dbus
            dbus-daemon --system --fork
            /usr/lib/polkit-1/polkitd --no-debug >/mnt/polkitd 2>&1 &
            libvirtd --daemon
            for attempt in $(seq 60); do
                ! test -S /run/libvirt/libvirt-sock || break
                sleep 0.5
            done
            runuser -u nova -- nova-fakedax {CONFIGURATION} check -f value
            exit $?''')
        self.assertIn('run servers with disks on fake DAX yes', answers)
        # By Debian's QEMU.
        self.assertIn('suspend them, and migrate them live no', answers)

        self.output_of('apt-get purge --yes python3-nova-fakedax')
        self.assertEqual(set(), self.files() & added)
        done = self.run_there(LOAD)
        self.assertNotEqual(0, done.returncode)
        self.assertIn("No module named 'nova.virt.fakedax'", done.stdout)


class RefusedTest(oslotest_base.BaseTestCase):

    def test_a_nova_of_another_series_is_not_accepted(self) -> None:
        """By this machine's Debian, whose own Nova is older."""
        directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, directory)
        done = subprocess.run(
            ['apt-get', 'install', '--simulate', '--no-install-recommends',
             '-o', 'Dir::State::status=/dev/null', build(directory)],
            capture_output=True, text=True)
        self.assertNotEqual(0, done.returncode, done.stdout)
        self.assertIn('python3-nova-fakedax : Depends: python3-nova (>= 2:34',
                      done.stdout + done.stderr)
