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

"""Cut the power of many guests: ``python -m tests.paravirt.crash``."""

import dataclasses
import json
import random
import sys
import time

import click
import rich.box
import rich.console
import rich.table

from lab import paths
from tests.paravirt import committing
from tests.paravirt import journal
from tests.paravirt import verdict

#: Those with our driver must lose nothing; the others show what can go wrong.
SETUPS = [
    committing.Setup('6.1', 'kernel', 'ext4'),
    committing.Setup('6.1', 'kernel', 'ext4-nocsum'),
    committing.Setup('6.1', 'kernel', 'xfs'),
    committing.Setup('6.1', 'kernel', 'ext4', 'blk'),
    committing.Setup('6.1', 'fakedax', 'ext4'),
    committing.Setup('6.1', 'fakedax', 'ext4-nocsum'),
    committing.Setup('6.1', 'fakedax', 'xfs'),
    committing.Setup('6.12', 'kernel', 'ext4'),
    committing.Setup('6.12', 'fakedax', 'ext4'),
    committing.Setup('6.12', 'fakedax', 'xfs'),
]

RESULTS = paths.STATE / 'crash.json'

_FIGURES = ('images', 'commits', 'early', 'unmountable', 'damaged', 'lost',
            'acknowledged')


@dataclasses.dataclass
class Row:
    """What became of all crash images of one set-up.

    :ivar commits: images whose cut left a commit block unsynced (ext4)
    :ivar early: those of them that left its descriptor block unsynced too
    :ivar lost: images on which something that was acknowledged is missing,
        even after a repair
    :ivar reasons: for each image that is not good, what is wrong
    """

    setup: committing.Setup
    images: int = 0
    commits: int = 0
    early: int = 0
    unmountable: int = 0
    damaged: int = 0
    lost: int = 0
    acknowledged: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    @property
    def good(self) -> int:
        return self.images - len(self.reasons)

    def count(self, seen: verdict.Verdict, reasons: list[str]) -> None:
        self.images += 1
        self.unmountable += seen is verdict.Verdict.UNMOUNTABLE
        self.damaged += seen is verdict.Verdict.DAMAGED
        self.lost += any(reason.startswith('task ') for reason in reasons)
        if seen is not verdict.Verdict.GOOD:
            self.reasons.append(
                f'{seen.value}: ' + '; '.join(filter(None, reasons)))


#: How many crash images to make of each cut.
IMAGES_OF_A_CUT = 4


#: How long a sync is held before the look for an early commit.
HELD_SECONDS = 0.5


def crash(guest: committing.Committing, images: int, until_bad: bool = False
          ) -> Row:
    """Make crash images while a sync is under way, and judge them.

    :param images: how many
    :param until_bad: stop early, when one of them is not good
    """
    row = Row(guest.setup)
    while row.images < images and not (until_bad and row.reasons):
        with guest.cut(random.randrange(6), random.uniform(0, 0.05)) as cut:
            unsynced = list(cut.unsynced.values())
            commits = bool(journal.commits(unsynced))
            early = bool(journal.early_commits(unsynced))
            for _ in range(min(IMAGES_OF_A_CUT, images - row.images)):
                kept = cut.some(random.uniform(0.1, 0.9))
                row.count(*guest.crash(cut, kept))
                row.commits += commits
                row.early += early
        time.sleep(random.uniform(0.01, 0.1))
    row.acknowledged = sum(guest.acks().values())
    return row


def early_commits(guest: committing.Committing, looks: int,
                  until_early: bool = False) -> int:
    """How often a commit block was stored before its descriptor was synced.

    :param looks: how often to look
    :param until_early: stop at the first
    """
    found = 0
    for number in range(looks):
        with guest.cut(number % 6, HELD_SECONDS) as cut:
            found += bool(journal.early_commits(cut.unsynced.values()))
        if found and until_early:
            break
    return found


@click.command()
@click.option('--images', default=400, show_default=True,
              type=click.IntRange(min=1), help='Crash images of each set-up.')
@click.option('--kernel', type=click.Choice(list(committing.KERNELS)),
              help='Run only set-ups with this kernel.')
@click.option('--driver', type=click.Choice(list(committing.DRIVERS)),
              help='Run only set-ups with this driver.')
@click.option('--file-system', 'system',
              type=click.Choice(list(verdict.FILE_SYSTEMS)),
              help='Run only set-ups with this file system.')
def main(images: int, kernel: str | None, driver: str | None,
         system: str | None) -> None:
    """Cut the power of guests that commit, and look at what is left.

    For each set-up a guest commits to a disk. At random moments, while a sync
    is under way, this makes images of what was synced and of a random part of
    the pages that were not. It mounts and checks each image, and looks for all
    that the guest has acknowledged. The exit status is 1 if an image of a
    set-up with the driver of guest-image-elements is not good.

    The table has a row for each set-up. It counts the images; those with a
    commit block unsynced, and with its descriptor block unsynced too (early);
    those that do not mount, that mount but need a repair, and that have lost
    what was acknowledged. .lab/crash.json has these numbers with the reasons.
    """
    rows = []
    for setup in SETUPS:
        if (kernel in (None, setup.kernel) and system in (None, setup.system)
                and driver in (None, setup.driver)):
            started = time.monotonic()
            rows.append(_crash(setup, images))
            print(f'{_title(setup)}: {rows[-1].good} of {images} are good '
                  f'[{time.monotonic() - started:.0f} s]', flush=True)
    if not rows:
        raise click.UsageError('no set-up matches; see SETUPS')
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([dataclasses.asdict(row) for row in rows],
                                  indent=2) + '\n')
    table = rich.table.Table(box=rich.box.SIMPLE)
    for heading in ('set-up', *_FIGURES):
        table.add_column(heading)
    for row in rows:
        table.add_row(_title(row.setup),
                      *(str(getattr(row, figure)) for figure in _FIGURES))
    rich.console.Console(width=120).print(table)
    sys.exit(any(row.reasons for row in rows
                 if row.setup.driver == 'fakedax'))


def _crash(setup: committing.Setup, images: int) -> Row:
    with committing.Committing(setup) as guest:
        return crash(guest, images)


def _title(setup: committing.Setup) -> str:
    if setup.kind == 'blk':
        return f'virtio-blk, {setup.kernel}, {setup.system}'
    return f"{setup.driver}'s driver, {setup.kernel}, {setup.system}"


if __name__ == '__main__':
    main(prog_name='python -m tests.paravirt.crash')
