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

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import zipfile

import fixtures
from oslotest import base

from nova_fakedax import loader

ROOT = pathlib.Path(__file__).parents[2]
DRIVER = 'class FakeDaxDriver: pass\n'
FIND = 'import nova.virt.fakedax as f; print(f.FakeDaxDriver.__module__)'


class FinderTest(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch('sys.meta_path', [
            finder for finder in sys.meta_path
            if not isinstance(finder, loader._Finder)]))

    def test_it_comes_last_and_once(self):
        before = list(sys.meta_path)
        loader.install()
        loader.install()
        self.assertEqual(before, sys.meta_path[:-1])
        self.assertIsInstance(sys.meta_path[-1], loader._Finder)

    def test_it_answers_for_one_name_only(self):
        finder = loader._Finder()
        for name in ('nova', 'nova.virt', 'nova.virt.libvirt', 'fakedax',
                     'nova.virt.fakedax.driver', 'nova.virt.fakedaxes',
                     'nova_fakedax', 'nova_fakedax.driver'):
            self.assertIsNone(finder.find_spec(name, None), name)
        spec = finder.find_spec('nova.virt.fakedax', ['/nova/virt'])
        self.assertEqual('nova.virt.fakedax', spec.name)
        self.assertTrue(spec.origin.endswith('/nova_fakedax/shim.py'))


class InterpreterTestCase(base.BaseTestCase):
    """Interpreters whose site-packages hold what the test puts there."""

    def setUp(self):
        super().setUp()
        directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.site = directory / 'site-packages'
        self.site.mkdir()

    def write(self, files, site=None):
        for name, content in files.items():
            path = (site or self.site) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def put_nova(self, site=None):
        self.write({'nova/__init__.py': '', 'nova/virt/__init__.py': '',
                    'nova/virt/libvirt.py': ''}, site)

    def put_package(self, driver=DRIVER):
        """The package with a driver that needs no Nova, and its .pth."""
        self.write({f'nova_fakedax/{name}':
                    (ROOT / 'nova_fakedax' / name).read_text()
                    for name in ('__init__.py', 'loader.py', 'shim.py')})
        self.write({'nova_fakedax/driver.py': driver})
        shutil.copy(ROOT / 'nova_fakedax.pth', self.site)

    def start(self, code, *more_sites):
        """Start an interpreter that knows only these site-packages (-S)."""
        sites = [str(self.site), *map(str, more_sites)]
        environment = {name: value for name, value in os.environ.items()
                       if name != 'PYTHONPATH'}
        return subprocess.run(
            [sys.executable, '-S', '-c', textwrap.dedent("""\
                import site, sys
                for directory in sys.argv[1].split(':'):
                    site.addsitedir(directory)
                exec(sys.argv[2])
                """), ':'.join(sites), code],
            cwd=self.site.parent, env=environment, text=True,
            capture_output=True)

    def run_code(self, code, *more_sites):
        """Run code and return what it prints; fail if anything complains."""
        done = self.start(code, *more_sites)
        self.assertEqual((0, ''), (done.returncode, done.stderr))
        return done.stdout.strip()


class InterpreterTest(InterpreterTestCase):

    def test_nova_finds_the_driver(self):
        self.put_nova()
        self.put_package()
        self.assertEqual('nova_fakedax.driver', self.run_code(FIND))

    def test_nova_may_be_elsewhere(self):
        self.put_package()
        elsewhere = self.site.parent / 'dist-packages'
        self.put_nova(elsewhere)
        for order in ([elsewhere], [elsewhere, self.site]):
            self.assertEqual(
                'nova_fakedax.driver', self.run_code(FIND, *order))

    def test_a_driver_in_novas_own_directory_comes_first(self):
        self.put_nova()
        self.put_package()
        self.write({'nova/virt/fakedax/__init__.py': DRIVER})
        self.assertEqual('nova.virt.fakedax', self.run_code(FIND))

    def test_the_start_of_the_interpreter_loads_no_driver_and_no_nova(self):
        self.put_nova()
        self.put_package('raise AssertionError')
        self.assertEqual(
            "['nova_fakedax', 'nova_fakedax.loader']",
            self.run_code('print(sorted(name for name in sys.modules '
                          'if name.startswith("nova")))'))

    def test_the_rest_of_nova_does_not_need_the_driver(self):
        self.put_nova()
        self.put_package('raise ImportError("half installed")')
        self.assertEqual('fine', self.run_code(
            'import nova.virt.libvirt; print("fine")'))
        done = self.start(FIND)
        self.assertEqual(1, done.returncode)
        self.assertIn('ImportError: half installed', done.stderr)

    def test_without_nova_the_interpreter_starts(self):
        self.put_package()
        self.assertEqual('fine', self.run_code('print("fine")'))
        self.assertIn("ModuleNotFoundError: No module named 'nova'",
                      self.start(FIND).stderr)

    def test_a_pth_file_left_behind_is_silent(self):
        self.put_nova()
        self.put_package()
        shutil.rmtree(self.site / 'nova_fakedax')
        self.assertEqual('fine', self.run_code(
            'import nova.virt.libvirt; print("fine")'))
        self.assertIn("ModuleNotFoundError: No module named "
                      "'nova.virt.fakedax'", self.start(FIND).stderr)

    def test_a_half_removed_package_does_not_stop_the_interpreter(self):
        for missing in ('__init__.py', 'loader.py', 'shim.py'):
            self.put_nova()
            self.put_package()
            (self.site / 'nova_fakedax' / missing).unlink()
            done = self.start('import nova.virt.libvirt; print("fine")')
            self.assertEqual((0, 'fine\n'), (done.returncode, done.stdout),
                             missing)


class PackagesTest(InterpreterTestCase):
    """What setup.py puts into a wheel and into an editable install."""

    def setUp(self):
        super().setUp()
        # A copy, so that nothing is left in the tree. pbr is told the version,
        # for which it would ask git.
        self.source = self.site.parent / 'source'
        self.source.mkdir()
        for name in ('setup.py', 'setup.cfg', 'pyproject.toml', 'README.md',
                     'LICENSE', 'requirements.txt', 'nova_fakedax.pth'):
            shutil.copy(ROOT / name, self.source)
        shutil.copytree(
            ROOT / 'nova_fakedax', self.source / 'nova_fakedax',
            ignore=shutil.ignore_patterns('__pycache__'))
        self.useFixture(fixtures.EnvironmentVariable('PBR_VERSION', '1.2.3'))

    def install(self, *command):
        """Run what makes a wheel; put the wheel into site-packages."""
        wheels = self.site.parent / 'wheels'
        wheels.mkdir()
        done = subprocess.run(
            [sys.executable, *command, str(wheels)], cwd=self.source,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)
        [wheel] = wheels.glob('*.whl')
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)
            return set(archive.namelist())

    def _assert_nova_finds_the_driver(self):
        # A driver that needs no Nova in the place of the real one.
        for package in self.source, self.site:
            driver = package / 'nova_fakedax' / 'driver.py'
            if driver.exists():
                driver.write_text(DRIVER)
        elsewhere = self.site.parent / 'dist-packages'
        self.put_nova(elsewhere)
        self.assertEqual(
            'nova_fakedax.driver', self.run_code(FIND, elsewhere))

    def test_a_wheel_has_the_pth_file_at_its_top(self):
        names = self.install(
            '-m', 'pip', 'wheel', '--quiet', '--no-deps',
            '--no-build-isolation', '--no-index', '.', '-w')
        self.assertIn('nova_fakedax.pth', names)
        self.assertIn('nova_fakedax/loader.py', names)
        self.assertFalse([name for name in names if name.startswith(
            ('nova/', 'tests', 'lab', 'build'))])
        self._assert_nova_finds_the_driver()

    def test_an_editable_install_has_the_pth_file_at_its_top(self):
        names = self.install('-c', textwrap.dedent("""\
            import sys
            from pbr import build
            build.build_editable(sys.argv[1])
            """))
        self.assertIn('nova_fakedax.pth', names)
        self.assertNotIn('nova_fakedax/loader.py', names)
        self._assert_nova_finds_the_driver()


class InstalledTest(base.BaseTestCase):
    """The environment that runs the tests."""

    def test_nova_finds_the_driver_here(self):
        done = subprocess.run(
            [sys.executable, '-c', FIND], text=True, capture_output=True,
            cwd='/')
        self.assertEqual('nova_fakedax.driver\n', done.stdout, done.stderr)

    def test_the_options_are_found_by_their_entry_point(self):
        [entry] = importlib.metadata.entry_points(
            group='oslo.config.opts', name='nova_fakedax')
        [(group, options)] = entry.load()()
        self.assertEqual('fakedax', group.name)
        self.assertEqual(
            ['emulator', 'quiesce_timeout', 'spare_volumes',
             'spare_volumes_gib'], sorted(option.name for option in options))
