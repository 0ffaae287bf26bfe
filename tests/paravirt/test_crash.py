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

"""A power cut loses nothing that was acknowledged, and no file system.

A short form of ``python -m tests.paravirt.crash``, which makes hundreds of
images of each set-up and prints a table.
"""

import os

from oslotest import base
import testscenarios

from lab import guest
from lab.guest import driver
from tests.paravirt import committing
from tests.paravirt import crash

load_tests = testscenarios.load_tests_apply_scenarios

#: How many crash images to make of each set-up that must lose nothing.
IMAGES = int(os.environ.get('FAKEDAX_CRASH_IMAGES', '16'))

#: At most so many images of the set-up that must fail, and looks at it: the
#: first that is bad is enough.
AT_MOST = 400

#: Of the looks at the set-up that must fail, about half find an early commit.
LOOKS = 6


class CrashTestCase(base.BaseTestCase):

    kernel = '6.1'

    def commit(self, name: str, system: str = 'ext4'
               ) -> committing.Committing:
        """Start a guest with a driver, or skip: this machine may lack one."""
        try:
            committing.package(self.kernel)
        except guest.GuestBuildError as exc:
            self.skipTest(str(exc))
        started = committing.Committing(
            committing.Setup(self.kernel, name, system))
        started.__enter__()
        self.addCleanup(started.__exit__)
        return started

    def assertHolds(self, running: committing.Committing) -> None:
        row = crash.crash(running, IMAGES)
        self.assertEqual([], row.reasons)
        self.assertEqual(IMAGES, row.images)
        # The guest did commit, so there was something to lose.
        self.assertGreater(row.acknowledged, IMAGES)


class OurDriverTestCase(CrashTestCase):

    scenarios = [(kernel, {'kernel': kernel})
                 for kernel in committing.KERNELS]

    def test_a_commit_waits_for_its_blocks_and_ext4_holds(self) -> None:
        running = self.commit('fakedax')
        self.assertEqual(driver.VERSION, running.version())
        self.assertEqual(0, crash.early_commits(running, LOOKS))
        self.assertHolds(running)


class OldKernelTestCase(CrashTestCase):
    """On a kernel whose own driver is wrong."""

    def test_ext4_without_checksums_holds_on_our_driver(self) -> None:
        self.assertHolds(self.commit('fakedax', 'ext4-nocsum'))

    def test_xfs_holds_on_our_driver(self) -> None:
        self.assertHolds(self.commit('fakedax', 'xfs'))

    def test_a_commit_overtakes_its_blocks_on_the_kernels(self) -> None:
        """What the tests above would find without our driver."""
        running = self.commit('kernel')
        self.assertEqual('', running.version())
        self.assertEqual(
            1, crash.early_commits(running, AT_MOST, until_early=True))
        row = crash.crash(running, AT_MOST, until_bad=True)
        self.assertNotEqual([], row.reasons)


class FixedKernelTestCase(CrashTestCase):
    """On a kernel whose own driver is right since 6.12.112."""

    kernel = '6.12'

    def test_a_commit_waits_for_its_blocks(self) -> None:
        self.assertEqual(
            0, crash.early_commits(self.commit('kernel'), LOOKS))
