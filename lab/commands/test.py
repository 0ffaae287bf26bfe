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

"""The tests, in parts; each part can be run alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import click
import subunit
import testtools

from lab.deploy import lifecycle
from lab.deploy import tempest
from lab import errors
from lab import paths
from lab import progress


#: Moves of a server with --storm.
STORM = 200

#: No test takes as long, but for a storm.
HANG_SECONDS = 900

#: Of what a failed test said, repeated at the end.
FAILURE_LINES = 20


@dataclasses.dataclass
class Count:
    """How many tests ended how."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    #: Of those that failed: the name, and what was said.
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __add__(self, other: 'Count') -> 'Count':
        return Count(self.passed + other.passed, self.failed + other.failed,
                     self.skipped + other.skipped,
                     self.failures + other.failures)

    def __str__(self) -> str:
        return (f'{self.passed} passed, {self.failed} failed, '
                f'{self.skipped} skipped')


#: Runs the tests of a part whose names match one of the regular expressions;
#: all of them if there is none. The second argument says whether the part has
#: the machine to itself.
Part = Callable[[Sequence[str], bool], Count]


def _scripts() -> list[str]:
    """The shell scripts of the project, by their first line."""
    found = subprocess.run(
        ['git', 'grep', '-lE', '^#! ?/bin/(ba)?sh', '--', ':!*.rst', ':!*.j2'],
        cwd=paths.ROOT, check=True, capture_output=True, text=True)
    return found.stdout.split()


def _hooks() -> list[str]:
    """The checks of the project by name, in the order they are listed in."""
    listed = (paths.ROOT / '.pre-commit-config.yaml').read_text()
    return re.findall(r'^ +- id: (\S+)$', listed, re.MULTILINE)


def _style(filters: Sequence[str], _alone: bool = True) -> Count:
    """What reads the project and runs nothing of it; one test a hook."""
    hooks = _hooks()
    wanted = [name for name in hooks if not filters or any(
        re.search(expression, name) for expression in filters)]
    if not wanted:
        return Count(failed=1, failures=[
            ('style', f'no check was run: there are {", ".join(hooks)}')])
    # The hooks call python by name, and pre-commit keeps a log.
    environment = os.environ | {
        'PATH': f'{pathlib.Path(sys.executable).parent}{os.pathsep}'
                f'{os.environ["PATH"]}',
        'PRE_COMMIT_HOME': str(paths.STATE / 'pre-commit')}
    count = Count()
    for name in wanted:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, '-m', 'pre_commit', 'run', '--all-files',
             '--color', 'never', name],
            cwd=paths.ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        # A hook that has no files to check is one that is written wrongly,
        # unless the caller's SKIP names it.
        failed = done.returncode or 'no files to check' in done.stdout
        outcome = ('failed' if failed else
                   'skipped' if 'Skipped' in done.stdout else 'ok')
        print(f'{name}: {outcome} [{time.monotonic() - started:.1f} s]',
              flush=True)
        if failed:
            print(done.stdout)
            count.failed += 1
            count.failures.append((name, done.stdout))
        elif outcome == 'skipped':
            count.skipped += 1
        else:
            count.passed += 1
    return count


class _Commands:
    """The commands that run now: one in each lane."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self.interrupted = False

    def run(self, command: Sequence[str], environment: dict[str, str],
            directory: pathlib.Path = paths.ROOT) -> int:
        """Run a command in a directory and return its status."""
        # In a process group, so that an interrupt reaches all processes of
        # the command, and each of them once.
        with subprocess.Popen(command, cwd=directory, env=environment,
                              stdin=subprocess.DEVNULL,
                              process_group=0) as process:
            self._processes.add(process)
            if self.interrupted:
                _interrupt(process)
            status = process.wait()
            self._processes.discard(process)
            return status

    def interrupt(self) -> None:
        """Interrupt them, and each one that begins later."""
        self.interrupted = True
        for process in list(self._processes):
            _interrupt(process)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)


_COMMANDS = _Commands()


def _stestr(directory: str, workers: int = 1) -> Part:
    """A part whose tests stestr finds below ``tests/``.

    :param workers: how many tests run at a time, if the part is alone
    """

    def run(filters: Sequence[str], alone: bool = True) -> Count:
        results = paths.STATE / 'stestr' / directory
        results.mkdir(parents=True, exist_ok=True)
        # What tests print is shown with those that fail, and only there.
        return _counted(directory, results, [
            sys.executable, '-m', 'stestr', '--test-path',
            f'./tests/{directory}', '--top-dir', '.', '--repo-url',
            str(results), 'run', '--suppress-attachments',
            *(['--concurrency', str(workers)] if workers > 1 and alone
              else ['--serial']), *filters])

    return run


def _counted(name: str, results: pathlib.Path, command: Sequence[str],
             directory: pathlib.Path = paths.ROOT) -> Count:
    """Run a command by which stestr runs tests, and count these.

    :param results: where stestr keeps what it saw
    :param directory: where the command runs
    """
    # The workers' interpreter: stestr asks for python3 by name otherwise.
    # A test that hangs is to say where, before CI's patience ends.
    environment = {'OS_TEST_TIMEOUT': str(HANG_SECONDS)} | os.environ | {
        'PYTHON': sys.executable,
        'OS_STDOUT_CAPTURE': '1', 'OS_STDERR_CAPTURE': '1'}
    before = _last_run(results)
    status = _COMMANDS.run(command, environment, directory)
    if _last_run(results) == before:
        # No test was run: not one that can be counted, so not green.
        return Count(failed=1, failures=[
            (name, 'no test was run: see above')])
    stestr = [sys.executable, '-m', 'stestr', '--repo-url', str(results)]
    count = _count(subprocess.run(
        [*stestr, 'last', '--subunit'], cwd=directory, env=environment,
        capture_output=True).stdout)
    # Where the time goes: CI's log is all that is left of its run.
    subprocess.run([*stestr, 'slowest'], cwd=directory, env=environment)
    if status and not count.failed:
        count.failed = 1
        count.failures.append(
            (name, f'stestr ended with {status}: see above'))
    return count


def _last_run(results: pathlib.Path) -> str:
    """What stestr calls its last run, empty if there was none."""
    try:
        return (results / '.stestr/next-stream').read_text()
    except FileNotFoundError:
        return ''


def _count(stream: bytes) -> Count:
    """Count the tests of a subunit stream (version 2)."""
    summary = testtools.StreamSummary()
    summary.startTestRun()
    subunit.ByteStreamToStreamResult(io.BytesIO(stream)).run(summary)
    summary.stopTestRun()
    failures = [(test.id(), said) for test, said in
                [*summary.errors, *summary.failures]]
    failures += [(test.id(), 'passed, which was not expected')
                 for test in summary.unexpectedSuccesses]
    skipped = len(summary.skipped)
    return Count(summary.testsRun - len(failures) - skipped, len(failures),
                 skipped, failures)


def _cloud(filters: Sequence[str], _alone: bool = True) -> Count:
    """The tests against the lab's cloud, which is left as it was found."""
    with errors.messages(), lifecycle.borrowed():
        # Two also next to another lane: they often wait for Nova.
        return _stestr('cloud', workers=2)(filters, True)


#: Of tempest's tests: this project's, but for those marked as slow.
_TEMPEST = r'^nova_fakedax\.(?!.*[[,]slow\b)'


def _tempest(filters: Sequence[str], _alone: bool = True) -> Count:
    """This project's tests for tempest, or those of tempest that match."""
    results = paths.STATE / 'stestr/tempest'
    results.mkdir(parents=True, exist_ok=True)
    with errors.messages(), lifecycle.borrowed():
        return _counted('tempest', results, [
            sys.executable, '-m', 'tempest.cmd.main', 'run',
            '--config-file', str(tempest.configure()), '--concurrency', '2',
            '--regex', '|'.join(filters) or _TEMPEST], results)


PARTS: dict[str, Part] = {
    'style': _style,
    'unit': _stestr('unit', workers=2),
    'lab': _stestr('lab'),
    'device': _stestr('device', workers=2),
    'guest': _stestr('guest'),
    'libvirt': _stestr('libvirt'),
    'paravirt': _stestr('paravirt'),
    'image': _stestr('image'),
    'package': _stestr('package'),
    'bench': _stestr('bench'),
    'cloud': _cloud,
    'tempest': _tempest,
    'functional': _stestr('functional', workers=2),
    'regression': _stestr('regression', workers=2),
}

#: Stages run one after the other, the lanes of a stage at the same time, and
#: the parts of a lane one after the other. A lane next to another keeps about
#: one core busy.
STAGES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (('style', 'unit', 'lab', 'device'),),
    (('guest', 'image', 'package', 'bench', 'functional'),
     ('paravirt', 'libvirt', 'cloud', 'tempest', 'regression')),
)


#: What is in them, for --list.
ABOUT = {
    'style': 'checks that read the project and run nothing of it',
    'unit': 'the modules of nova_fakedax, each alone',
    'lab': "the lab's commands, without what they start",
    'device': 'the device in QEMU, without a guest',
    'guest': 'a guest in QEMU, without libvirt',
    'libvirt': 'migrations between two libvirts that fail',
    'paravirt': "the guest's driver: crashes and faults",
    'image': 'the elements, and images built by them',
    'package': 'Debian packages in a clean root, next to Debian\'s Nova',
    'bench': 'the benchmarks that show the purpose, in short',
    'cloud': "servers in the lab's cloud, by OpenStack's API",
    'tempest': "the tests for tempest, in the lab's cloud",
    'functional': 'Nova in one process, with a libvirt that is not real',
    'regression': "Nova's own tests, with this driver",
}

_LAST = paths.STATE / 'test-last.json'


def _last() -> dict[str, str]:
    """How each part ended when all of its tests were run."""
    try:
        last: dict[str, str] = json.loads(_LAST.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return last


def _keep(results: Mapping[str, tuple[Count, float]]) -> None:
    _LAST.parent.mkdir(exist_ok=True)
    _LAST.write_text(json.dumps(_last() | {
        part: f'{count} [{seconds:.0f} s]'
        for part, (count, seconds) in results.items()}, indent=1))


def _list(context: click.Context, _parameter: click.Parameter,
          wanted: bool) -> None:
    if not wanted:
        return
    last = _last()
    for part, about in ABOUT.items():
        print(f'{part:<12} {about}')
        print(f'{"":<12} last time: {last.get(part, "not run here")}')
    context.exit()


class _Command(click.Command):
    """A command whose arguments after ``--`` are filters."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        ctx.obj = []
        if '--' in given:
            at = given.index('--')
            given, ctx.obj = given[:at], given[at + 1:]
        return super().parse_args(ctx, given)


def _run(part: str, filters: Sequence[str], alone: bool) -> tuple[
        Count, float]:
    """Run a part; the count, and the seconds that it took."""
    progress.say(f'part {part}')
    started = time.monotonic()
    try:
        count = PARTS[part](filters, alone)
    except click.ClickException as exc:
        exc.show()
        count = Count(failed=1, failures=[(part, exc.format_message())])
    seconds = time.monotonic() - started
    progress.say(f'part {part}: {count} [{seconds:.0f} s]')
    if _COMMANDS.interrupted:
        # What is said after the last part is not said then.
        _show_failures(count)
    return count, seconds


def _show_failures(count: Count) -> None:
    for name, said in count.failures:
        print(f'\nfailed: {name}')
        print(textwrap.indent(
            '\n'.join(said.splitlines()[-FAILURE_LINES:]), '    '),
            flush=True)


def _run_lane(parts: Sequence[str], filters: Sequence[str],
              alone: bool) -> dict[str, tuple[Count, float]]:
    return {part: _run(part, filters, alone) for part in parts
            if not _COMMANDS.interrupted}


def _run_stages(parts: Collection[str], filters: Sequence[str]) -> dict[
        str, tuple[Count, float]]:
    """Run parts, as :data:`STAGES` has it.

    :raises KeyboardInterrupt: after what ran has cleaned up
    """
    results: dict[str, tuple[Count, float]] = {}
    for stage in STAGES:
        lanes = [lane for lane in (
            [part for part in lane if part in parts] for lane in stage)
            if lane]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            try:
                for lane in [pool.submit(_run_lane, lane, filters,
                                         len(lanes) == 1) for lane in lanes]:
                    results |= lane.result()
            except BaseException:
                # What leaves the block waits for the lanes.
                _COMMANDS.interrupt()
                raise
    return results


def _raise_interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


@click.command(
    cls=_Command,
    context_settings={'help_option_names': ['-h', '--help']}, help=f"""\
Run the tests, or some parts of them.

The parts are {', '.join(PARTS)}; all of them without an argument. What
follows "--" are regular expressions: only tests whose names match one of them
are run, as in "lab/test device -- test_lock". The part tempest runs with them
any test of tempest, in place of this project's. The parts cloud and tempest
bring the lab's cloud up and leave it as they found it. The last line counts
the tests of all parts; the exit status is 1 if one failed.
""")
@click.option('--list', is_flag=True, is_eager=True, expose_value=False,
              callback=_list,
              help='Say what the parts are and how long they took.')
@click.option('--storm', is_flag=True,
              help=f'Have the cloud tests migrate a server {STORM} times '
                   'instead of 8.')
@click.argument('parts', nargs=-1, type=click.Choice(list(PARTS)),
                metavar='[PART]... [-- FILTER...]')
@click.pass_obj
def main(filters: list[str], storm: bool, parts: tuple[str, ...]) -> None:
    if filters and not parts:
        raise click.UsageError('say which part the filter is for')
    if storm:
        os.environ |= {'FAKEDAX_STORM': str(STORM), 'OS_TEST_TIMEOUT': '0'}
    # Also where a shell has started this in the background, without SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_interrupt)
    results = _run_stages(parts or PARTS, filters)
    total = sum((count for count, _seconds in results.values()), Count())
    if not filters:
        _keep(results)
    _show_failures(total)
    print()
    for part, (count, seconds) in results.items():
        print(f'{part:<12} {count} [{seconds:.0f} s]')
        for name, _said in count.failures:
            print(f'{"":<12} failed: {name}')
    print(total, flush=True)
    sys.exit(1 if total.failed else 0)


if __name__ == '__main__':
    main(prog_name='lab/test')
