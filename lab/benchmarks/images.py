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

"""Images for benchmarks that run a QEMU of their own."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess

from lab.benchmarks import results
from lab import guest
from nova_fakedax import layout


@contextlib.contextmanager
def sparse(name: str, size_mib: int, *, memmap: bool = False,
           content: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """A disk as a sparse image on the file system of .lab/.

    :param size_mib: of the guest's disk
    :param memmap: with the disk's page descriptors in front
    :param content: a raw image, by default the test guest's disk
    """
    planned = layout.planned(size_mib << 20, memmap)
    content = content or guest.build().disk
    results.DIRECTORY.mkdir(parents=True, exist_ok=True)
    image = results.DIRECTORY / f'{name}.raw'
    try:
        with image.open('wb') as file:
            file.truncate(planned.file_size)
            if memmap:
                os.pwrite(file.fileno(), layout.info_block(planned),
                          layout.INFO_BLOCK_OFFSET)
        subprocess.run(
            ['dd', f'if={content}', f'of={image}', f'bs={layout.ALIGNMENT}',
             f'seek={planned.offset // layout.ALIGNMENT}',
             'conv=notrunc,sparse', 'status=none'], check=True)
        yield image
    finally:
        image.unlink(missing_ok=True)
