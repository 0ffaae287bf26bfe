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

import collections
import dataclasses
import itertools
import math
import random

from oslotest import base
import testscenarios

from nova_fakedax.planner import density
from nova_fakedax.planner import fleet
from nova_fakedax.planner import guest
from nova_fakedax.planner import host
from nova_fakedax.planner import lru
from nova_fakedax.planner import question

#: Pages of 1 MiB; smaller ones do not change shares.
MIB = 1024
SSD = host.Storage(0.0005, 20000, 500)
#: A storage that nobody waits for.
INSTANT = host.Storage(0.0)
ANYTHING = host.Limits(lost=1.0)


class Cache:
    """A cache that drops the least recently used unit."""

    def __init__(self, units):
        self.units, self.content = units, collections.OrderedDict()

    def read(self, unit):
        """Read a unit; whether it was missed."""
        missed = unit not in self.content
        self.content[unit] = None
        self.content.move_to_end(unit)
        if len(self.content) > self.units:
            self.content.popitem(last=False)
        return missed


def simulate(readers, mib, seconds, draw, unit_mib=1):
    """Misses of each stratum of each of the readers, by playing them.

    Page by page of 1 MiB, each second at random. The first half of the time
    fills the cache.
    """
    cache = Cache(mib // unit_mib)
    reads, misses = collections.Counter(), collections.Counter()
    step = 0.05
    for tick in range(int(seconds / step)):
        now = tick * step
        for kind, of in enumerate(readers):
            for number in range(of.count):
                # They take turns.
                phase = (now + number * of.spells.period / of.count
                         ) % of.spells.period
                if phase >= of.spells.seconds:
                    continue
                for index, stratum in enumerate(of.strata):
                    wanted = stratum.reads * step
                    wanted = int(wanted) + (draw.random() < wanted % 1)
                    for _read in range(wanted):
                        page = draw.randrange(int(stratum.mib))
                        missed = cache.read(
                            (kind, number, index, page // unit_mib))
                        if now > seconds / 2:
                            reads[kind, index] += 1
                            misses[kind, index] += missed
    return {key: misses[key] / count for key, count in reads.items()}


class LruTest(testscenarios.WithScenarios, base.BaseTestCase):
    """The approximation, against a cache that is played.

    Each share of misses may be off by 0.03.
    """

    scenarios = [
        ('alike', {
            'readers': [lru.Readers(5, (lru.Stratum(40, 100),))],
            'mib': 130}),
        ('hot and less hot', {
            'readers': [lru.Readers(
                4, (lru.Stratum(20, 40), lru.Stratum(80, 20)))],
            'mib': 200}),
        ('of two kinds', {
            'readers': [lru.Readers(3, (lru.Stratum(50, 50),)),
                        lru.Readers(6, (lru.Stratum(50, 5),))],
            'mib': 250}),
        ('a curve of three', {
            'readers': [lru.Readers(2, (
                lru.Stratum(10, 100), lru.Stratum(50, 50),
                lru.Stratum(200, 20)))],
            'mib': 220}),
        ('by turns', {
            'readers': [lru.Readers(
                8, (lru.Stratum(50, 100),), spells=lru.Spells(0.25, 10))],
            'mib': 180}),
        ('by turns, that are short', {
            'readers': [lru.Readers(
                8, (lru.Stratum(50, 20),), spells=lru.Spells(0.25, 1))],
            'mib': 180}),
        ('some by turns', {
            'readers': [lru.Readers(
                8, (lru.Stratum(50, 100),), spells=lru.Spells(0.25, 10)),
                lru.Readers(2, (lru.Stratum(60, 30),))],
            'mib': 250}),
        ('with read-ahead', {
            'readers': [lru.Readers(
                8, (lru.Stratum(56, 50),), 4 * MIB,
                spells=lru.Spells(0.25, 5))],
            'mib': 200, 'unit_mib': 4}),
    ]
    unit_mib = 1

    def test_misses(self):
        # Its pages are of 1 MiB.
        readers = [dataclasses.replace(of, unit_kib=max(of.unit_kib, MIB))
                   for of in self.readers]
        time = lru.characteristic_time(readers, self.mib)
        played = simulate(self.readers, self.mib, 1000, random.Random(18),
                          self.unit_mib)
        for (kind, index), share in played.items():
            planned = lru.misses(
                readers[kind].strata[index], readers[kind], time)
            self.assertAlmostEqual(share, planned, delta=0.03)


class LimitsOfLruTest(base.BaseTestCase):

    def test_what_fits_is_not_missed(self):
        for share in 1.0, 0.5:
            readers = [lru.Readers(3, (lru.Stratum(50, 10),),
                                   spells=lru.Spells(share))]
            time = lru.characteristic_time(readers, 150)
            self.assertEqual(math.inf, time)
            self.assertEqual(0, lru.misses(
                readers[0].strata[0], readers[0], time))

    def test_without_space_all_is_missed(self):
        readers = [lru.Readers(3, (lru.Stratum(50, 10),))]
        self.assertEqual(1, lru.misses(
            readers[0].strata[0], readers[0],
            lru.characteristic_time(readers, 0)))

    def test_what_is_read_alike_is_missed_as_it_does_not_fit(self):
        readers = [lru.Readers(10, (lru.Stratum(200, 100),))]
        for mib in 1, 500, 1999:
            self.assertAlmostEqual(1 - mib / 2000, lru.misses(
                readers[0].strata[0], readers[0],
                lru.characteristic_time(readers, mib)), places=4)

    def test_ten_to_the_five_guests_are_as_ten(self):
        few, many = ([lru.Readers(count, (lru.Stratum(10, 5),
                                          lru.Stratum(100, 1)))]
                     for count in (10, 100000))
        self.assertAlmostEqual(lru.characteristic_time(few, 300),
                               lru.characteristic_time(many, 3000000))

    def test_what_is_in_swap_and_left_in_memory(self):
        # 20 MiB are in swap, and 5 of them are left: 80 + 5 of 60 + 25.
        readers = [lru.Readers(
            1, (lru.Stratum(100, 10, swap=lru.Swap(1000, 0.25)),))]
        time = lru.characteristic_time(readers, 60)
        self.assertAlmostEqual(0.2, lru.misses(
            readers[0].strata[0], readers[0], time), places=4)
        self.assertAlmostEqual(20, lru.swapped(readers, time, 60), places=2)

    def test_all_but_nothing_fits(self):
        readers = [lru.Readers(7, (lru.Stratum(0.1, 10),
                                   lru.Stratum(0.3, 2)))]
        time = lru.characteristic_time(readers, 2.8 - 1e-12)
        self.assertAlmostEqual(0, lru.misses(
            readers[0].strata[1], readers[0], time))

    def test_rates_that_are_far_apart(self):
        readers = [lru.Readers(1, (lru.Stratum(100, 1e5),
                                   lru.Stratum(100, 1e-3)))]
        time = lru.characteristic_time(readers, 150)
        self.assertAlmostEqual(0.5, lru.misses(
            readers[0].strata[1], readers[0], time), places=3)


class GuestTest(base.BaseTestCase):
    """How a host sees a guest."""

    hot = (lru.Stratum(200, 100),)

    def test_misses_in_the_guest_as_part_1_has_measured(self):
        # Measured with QEMU 10.0.13 and virtio-blk: 200 MiB, read 4 KiB at a
        # time, at random, by guests with so much RAM.
        for ram, measured in ((192, 0.47), (256, 0.17), (288, 0.007),
                              (320, 0.0)):
            load = guest.load(guest.Guest('a', ram, 90, self.hot),
                              guest.Disk.NONE)
            self.assertAlmostEqual(measured, load.uncached / 100, delta=0.025)

    def test_held_with_ordinary_disks(self):
        for touched, held in ((math.inf, 562), (300, 450), (0, 350)):
            of = guest.Guest('a', 512, 100, self.hot, touched, 50)
            for disk in guest.Disk.WRITEBACK, guest.Disk.NONE:
                self.assertEqual(held, guest.load(of, disk).held)

    def test_held_on_fake_dax(self):
        for ram in 128, 4096:
            of = guest.Guest('a', ram, 100, self.hot)
            load = guest.load(of, guest.Disk.FAKE_DAX, 128)
            self.assertEqual((150, self.hot, 128),
                             (load.held, load.strata, load.unit_kib))

    def test_what_the_guest_caches_is_not_read_again(self):
        load = guest.load(guest.Guest('a', 512, 100, self.hot),
                          guest.Disk.WRITEBACK)
        self.assertEqual(((), 0), (load.strata, load.uncached))

    def test_what_swap_can_take(self):
        swap = lru.Swap(1000, 0.25)
        load = guest.load(guest.Guest('a', 512, 100, self.hot, qemu=50),
                          guest.Disk.WRITEBACK, swap=swap)
        self.assertEqual(
            (150, [(200, 100), (212, 0)], 412 * 0.25),
            (load.held, [(stratum.mib, stratum.reads)
                         for stratum in load.strata], load.left))

    def test_what_is_idle(self):
        of = guest.Guest('a', 512, 100, idle=70, qemu=50)
        for disk, swapped in ((guest.Disk.FAKE_DAX, 70),
                              (guest.Disk.NONE, 70 + 412)):
            load = guest.load(of, disk, swap=lru.Swap(1000))
            self.assertEqual((80, [swapped]), (
                load.held, [stratum.mib for stratum in load.strata]))
        exc = self.assertRaises(ValueError, guest.Guest, 'a', 512, 100,
                                idle=151)
        self.assertIn('151 MiB are idle; allowed: at most what QEMU and '
                      'programs take, 150 MiB', str(exc))

    def test_programs_that_do_not_fit(self):
        exc = self.assertRaises(ValueError, guest.Guest, 'a', 512, 513)
        self.assertIn('programs take 513 MiB; allowed: at most its RAM, 512',
                      str(exc))

    def test_two_caches_one_behind_the_other(self):
        # Each of 4 guests caches 20 of its 60 pages, the host 100 of all.
        draw = random.Random(7)
        guests = [Cache(20) for _guest in range(4)]
        shared = Cache(100)
        misses = reads = 0
        for number in range(200000):
            of, page = draw.randrange(4), draw.randrange(60)
            missed = guests[of].read(page) and shared.read((of, page))
            if number > 50000:
                reads += 1
                misses += missed
        load = guest.load(guest.Guest('a', 30, 10, (
            lru.Stratum(60, 60),), qemu=1), guest.Disk.WRITEBACK)
        outcome = host.judge(
            host.Host(4 * load.held + 100, INSTANT), [(load, 4)], ANYTHING)
        self.assertAlmostEqual(misses / reads, outcome.services[0].misses,
                               delta=0.03)


class HostTest(base.BaseTestCase):
    """What guests find on a host."""

    def judge(self, memory, count, storage=SSD, limits=ANYTHING,
              host_cpus=math.inf, miss_cpu=0.0, **changes):
        of = dataclasses.replace(guest.Guest(
            'a', 512, 50, (lru.Stratum(200, 100),), qemu=50), **changes)
        load = guest.load(of, guest.Disk.FAKE_DAX, 128)
        return host.judge(host.Host(memory, storage, host_cpus, miss_cpu),
                          [(load, count)], limits)

    def test_memory(self):
        self.assertEqual(host.Limit.MEMORY, self.judge(999, 10).limit)
        self.assertIsNone(self.judge(1000, 10).limit)

    def test_cpu(self):
        self.assertIsNone(self.judge(3000, 10, host_cpus=5, cpus=0.5).limit)
        self.assertEqual(
            host.Limit.CPU,
            self.judge(3000, 10, host_cpus=4.9, cpus=0.5).limit)

    def test_misses_take_cpus(self):
        # 1000 reads, of which half are misses of 1 ms.
        for cpus, limit in ((5.51, None), (5.49, host.Limit.CPU)):
            self.assertEqual(limit, self.judge(
                2000, 10, INSTANT, host_cpus=cpus, miss_cpu=0.001,
                cpus=0.5).limit)

    def test_zram_takes_cpus(self):
        load = guest.load(
            guest.Guest('a', 512, 50, (lru.Stratum(400, 100),), qemu=50),
            guest.Disk.WRITEBACK, swap=lru.Swap(9999, 0.25, 0.0))
        for cpus, limit in ((0.9, None), (0.1, host.Limit.CPU)):
            self.assertEqual(limit, host.judge(
                host.Host(2000, SSD, cpus, 0.001), [(load, 8)],
                ANYTHING).limit)

    def test_a_guest_that_always_works_loses_what_it_waits(self):
        [service] = self.judge(2000, 10, host.Storage(0.002)).services
        self.assertAlmostEqual(0.5, service.misses, places=4)
        # 50 misses of 2 ms for each second of work.
        self.assertAlmostEqual(0.1 / 1.1, service.lost, places=4)

    def test_a_guest_with_nothing_else_to_do_catches_up(self):
        for seconds, lost in ((0.002, 0), (0.02, 0), (0.04, 0.5)):
            [service] = self.judge(
                2000, 10, host.Storage(seconds), work=0.0).services
            self.assertAlmostEqual(lost, service.lost, places=3)

    def test_a_storage_that_is_too_slow(self):
        for storage in (host.Storage(0.0, reads=250),
                        host.Storage(0.0001, reads=250),
                        host.Storage(0.0001, mib=250 / 8)):
            outcome = self.judge(2000, 10, storage, host.Limits())
            self.assertAlmostEqual(250, outcome.storage_reads, delta=0.1)
            self.assertEqual(host.Limit.STORAGE, outcome.limit)
            # 1000 reads, of which half are misses, are wanted.
            self.assertAlmostEqual(0.5, outcome.services[0].lost, places=3)

    def test_the_first_limit(self):
        for limits, limit in (
                (host.Limits(missed=0.49), host.Limit.MISSES),
                (host.Limits(missed=0.51), None),
                (host.Limits(lost=0.02), host.Limit.WAITING),
                (host.Limits(lost=0.03), None)):
            self.assertEqual(limit, self.judge(
                2000, 10, host.Storage(0.0005), limits).limit, limits)

    def test_what_no_memory_could_serve_is_the_guests_affair(self):
        load = guest.load(guest.Guest('a', 150, 50, (lru.Stratum(200, 100),)),
                          guest.Disk.NONE)
        outcome = host.judge(
            host.Host(2000, host.Storage(0.002)), [(load, 5)],
            host.Limits(lost=1, missed=0.01))
        self.assertEqual((None, 0.5), (
            outcome.limit, round(outcome.services[0].misses, 4)))

    def test_swap(self):
        for size, left, seconds, limit in (
                (1200, 0, None, None), (1100, 0, None, host.Limit.SWAP),
                (9999, 0.5, 0.0, host.Limit.MEMORY),
                (9999, 0.3, 0.0, None)):
            load = guest.load(
                guest.Guest('a', 512, 50, (lru.Stratum(100, 100),), qemu=50),
                guest.Disk.WRITEBACK,
                swap=lru.Swap(size, left, seconds))
            outcome = host.judge(
                host.Host(1648, SSD), [(load, 5)], ANYTHING)
            self.assertEqual(limit, outcome.limit, (size, left))

    def test_zram_costs_time_but_no_read_of_the_storage(self):
        load = guest.load(
            guest.Guest('a', 512, 50, (lru.Stratum(400, 100),), qemu=50),
            guest.Disk.WRITEBACK, swap=lru.Swap(9999, 0.25, 0.001))
        outcome = host.judge(host.Host(2000, SSD), [(load, 8)], ANYTHING)
        [service] = outcome.services
        self.assertEqual((0, 0), (service.misses, outcome.storage_reads))
        self.assertGreater(service.waits, 0)


class PropertiesTest(testscenarios.WithScenarios, base.BaseTestCase):
    """What must hold of every host and every guest."""

    scenarios = [(disk.name.lower(), {'disk': disk}) for disk in guest.Disk]

    def guests(self):
        draw = random.Random(3)
        for _guest in range(25):
            ram = draw.uniform(128, 4096)
            yield draw.uniform(4000, 40000), guest.Guest(
                'a', ram, draw.uniform(0.1, 1) * ram,
                tuple(lru.Stratum(draw.uniform(1, ram), draw.uniform(1, 300))
                      for _stratum in range(draw.randrange(1, 4))),
                spells=lru.Spells(draw.choice((1, 0.3))),
                work=draw.random())

    def most(self, memory, of, storage=SSD, **limits):
        load = guest.load(of, self.disk, 64)
        return host.most(host.Host(memory, storage),
                         lambda count: [(load, count)], host.Limits(**limits))

    def test_more_memory_never_fits_fewer(self):
        for memory, of in self.guests():
            self.assertGreaterEqual(self.most(memory * 1.2, of),
                                    self.most(memory, of))

    def test_a_larger_hot_set_never_fits_more(self):
        for memory, of in self.guests():
            larger = dataclasses.replace(of, hot=tuple(
                dataclasses.replace(stratum, mib=stratum.mib * 1.3)
                for stratum in of.hot))
            self.assertLessEqual(self.most(memory, larger),
                                 self.most(memory, of))

    def test_larger_programs_never_fit_more(self):
        for memory, of in self.guests():
            larger = dataclasses.replace(
                of, programs=(of.programs + of.ram) / 2)
            self.assertLessEqual(self.most(memory, larger),
                                 self.most(memory, of))

    def test_a_stricter_limit_never_fits_more(self):
        for memory, of in self.guests():
            self.assertLessEqual(self.most(memory, of, lost=0.01),
                                 self.most(memory, of, lost=0.1))

    def test_a_faster_storage_never_fits_fewer(self):
        for memory, of in self.guests():
            self.assertGreaterEqual(self.most(memory, of, INSTANT),
                                    self.most(memory, of))

    def test_one_more_than_fit_does_not_fit(self):
        for memory, of in self.guests():
            count, load = self.most(memory, of), guest.load(of, self.disk, 64)
            for number, fits in ((count, True), (count + 1, False)):
                if number:
                    self.assertEqual(fits, host.judge(
                        host.Host(memory, SSD), [(load, number)],
                        host.Limits()).limit is None)


class FleetTest(base.BaseTestCase):

    def mix(self, *weights):
        return [fleet.Share(guest.load(guest.Guest(
            f'flavor{number}', 1024 * (number + 1), 200 + 150 * number,
            (lru.Stratum(100, 50), lru.Stratum(500, 5))),
            guest.Disk.FAKE_DAX, 64), weight)
            for number, weight in enumerate(weights)]

    def test_one_flavor_on_one_host_is_the_most_that_fit(self):
        [share] = self.mix(1)
        for memory in 100, 2000, 9000, 64000:
            where = host.Host(memory, SSD)
            full = fleet.fill([where], [share], host.Limits())
            self.assertEqual(host.most(
                where, lambda count: [(share.load, count)], host.Limits()),
                full.count(0))

    def test_as_if_each_guest_was_judged(self):
        hosts = [host.Host(memory, SSD, cpus)
                 for memory in (5000, 8000, 20000) for cpus in (3, math.inf)]
        mix = [dataclasses.replace(share, load=dataclasses.replace(
            share.load, guest=dataclasses.replace(
                share.load.guest, cpus=0.1))) for share in self.mix(5, 2, 1)]
        limits = host.Limits()
        counts = [[0] * 3 for _host in hosts]
        for wanted in fleet._in_turn([5, 2, 1]):
            for number in sorted(range(len(hosts)), key=lambda number: -(
                    hosts[number].memory - sum(
                        share.load.held * count for share, count in
                        zip(mix, counts[number])))):
                counts[number][wanted] += 1
                if host.judge(hosts[number], [
                        (share.load, count) for share, count in
                        zip(mix, counts[number]) if count],
                        limits).limit is None:
                    break
                counts[number][wanted] -= 1
            else:
                break
        self.assertEqual(
            [tuple(of_host) for of_host in counts],
            [placed.counts for placed in fleet.fill(
                hosts, mix, limits).placed])

    def test_the_mix_is_kept(self):
        full = fleet.fill([host.Host(20000, SSD)] * 5, self.mix(6, 3, 1),
                          host.Limits())
        counts = [full.count(number) for number in range(3)]
        for count, share in zip(counts, (0.6, 0.3, 0.1)):
            self.assertAlmostEqual(share, count / sum(counts), delta=0.01)

    def test_why_no_more_fit(self):
        for where, limit in (
                (host.Host(1000, INSTANT), host.Limit.MEMORY),
                (host.Host(9000, host.Storage(0.001, mib=5)),
                 host.Limit.STORAGE),
                (host.Host(9000, host.Storage(0.1)), host.Limit.WAITING)):
            full = fleet.fill([where], self.mix(1), host.Limits())
            self.assertEqual(limit, full.limit)

    def test_ten_to_the_five_guests_on_a_thousand_hosts(self):
        hosts = [host.Host(44000 + number % 10, SSD)
                 for number in range(1000)]
        full = fleet.fill(hosts, self.mix(3, 2, 1), host.Limits())
        self.assertGreater(sum(full.count(number) for number in range(3)),
                           100000)
        counts = [sum(placed.counts) for placed in full.placed]
        self.assertLess(max(counts) - min(counts), 20)
        for placed in random.Random(1).sample(full.placed, 20):
            for of in placed.services.values():
                self.assertLessEqual(of.lost, 0.05)
            self.assertLessEqual(placed.held, placed.where.memory)


def row(**changes):
    """A row as lab/bench density has it. Its figures are made up."""
    return {
        'part': 'how-many', 'variant': 'same', 'mode': 'blk-writeback-fpr',
        'budget_mib': 2048, 'ram_mib': 512, 'hot_mib': 200,
        'reads_per_s': 100, 'read_ahead_kib': 128,
        'unreclaimable_mib': 500.0, 'miss_ms': 0.4, 'guests': 4,
        'guests_95': 4, 'stopped_by': 'killed', 'points': []} | changes


class DensityTest(testscenarios.WithScenarios, base.BaseTestCase):
    """The plan for made-up rows, of which each shows one rule."""

    scenarios = [
        ('until the memory is full', {'changes': {}, 'planned': (4, 4)}),
        ('direct, too', {
            'changes': {'mode': 'blk-none'}, 'planned': (4, 4)}),
        ('fake dax', {
            'changes': {'mode': 'pmem', 'unreclaimable_mib': 300,
                        'miss_ms': 0.01}, 'planned': (6, 6)}),
        ('until half of the rate is lost', {
            'changes': {'mode': 'blk-none', 'unreclaimable_mib': 90,
                        'ram_mib': 100, 'storage_reads_per_s': 1000},
            'planned': (21, 11)}),
        ('until half of what one alone gets is lost', {
            'changes': {'mode': 'blk-none', 'unreclaimable_mib': 90,
                        'ram_mib': 100, 'miss_ms': 20,
                        'storage_reads_per_s': 201},
            'planned': (8, 4)}),
        ('of which the others are idle', {
            'changes': {'mode': 'pmem', 'unreclaimable_mib': 150,
                        'storage_reads_per_s': 280, 'variant': 'mixed'},
            'planned': (13, 13)}),
        ('of which none is idle', {
            'changes': {'mode': 'pmem', 'unreclaimable_mib': 150,
                        'storage_reads_per_s': 280},
            'planned': (9, 7)}),
        ('with memory that is merged', {
            'changes': {'mode': 'blk-none-ksm', 'merged_mib': 150},
            'planned': (5, 5)}),
        ('with swap', {
            'changes': {'mode': 'blk-none-swap', 'swap_mib': 500},
            'planned': (5, 5)}),
        ('with zram', {
            'changes': {'mode': 'blk-none-zram', 'swap_left': 0.5},
            'planned': (7, 7)}),
        ('with zram for what is idle', {
            'changes': {'mode': 'pmem-zram', 'unreclaimable_mib': 172,
                        'idle_mib': 120, 'miss_ms': 0.01},
            'planned': (22, 22)}),
        ('until the processors are full', {
            'changes': {'mode': 'pmem', 'unreclaimable_mib': 150,
                        'miss_ms': 0.01, 'cpus': 0.7},
            'planned': (7, 7)}),
        ("on QEMU's device, with readahead", {
            'changes': {'mode': 'pmem-stock', 'unreclaimable_mib': 150,
                        'miss_ms': 0.1, 'storage_mib_per_s': 32},
            'planned': (8, 7)}),
    ]

    def test_planned(self):
        self.assertEqual(self.planned, tuple(
            of.planned for of in density.compare([row(**self.changes)])))


class ProcessorsTest(base.BaseTestCase):
    """Rows say how fast the processors are that they were measured on."""

    LIMITED = {'mode': 'pmem', 'unreclaimable_mib': 150, 'miss_ms': 0.01,
               'cpus': 0.7}

    def planned(self, *others):
        return density.compare([row(**self.LIMITED), *others])[0].planned

    def fleet(self, cpus, reads_per_s=100, **changes):
        return row(reads_per_s=reads_per_s, points=[
            {'guests': 5, 'rate': reads_per_s, 'cpus': cpus,
             'stopped_by': ''}]) | changes

    def test_of_fleets_that_cache_all_they_read(self):
        # As usual: 0.025 CPUs at rest, and 0.0005 for each read.
        self.assertEqual(7, self.planned())
        self.assertEqual(7, self.planned(
            self.fleet(5 * 0.075), self.fleet(5 * 0.050, reads_per_s=50)))
        # Twice that.
        self.assertEqual(4, self.planned(
            self.fleet(5 * 0.15), self.fleet(5 * 0.1, reads_per_s=50)))

    def test_fleets_that_tell_nothing(self):
        slow = self.fleet(5 * 0.1, reads_per_s=50)
        point = self.fleet(5 * 0.15)['points'][0]
        for other in (
                self.fleet(5 * 0.1, reads_per_s=50),
                self.fleet(5 * 0.15, mode='pmem'),
                self.fleet(5 * 0.15, mode='blk-none-zram'),
                self.fleet(5 * 0.15, ram_mib=289),
                row(points=[point | {'guests': 1}]),
                row(points=[point | {'stopped_by': 'rate'}]),
                # Of an older run.
                row(points=[{'guests': 5, 'rate': 100, 'stopped_by': ''}]),
                # Less for more reads.
                self.fleet(5 * 0.05)):
            self.assertEqual(7, self.planned(slow, other), other)


class ComparisonTest(base.BaseTestCase):
    """Against made-up rows."""

    def compare(self, **changes):
        return [(of.measured, round(of.difference, 2), of.close)
                for of in density.compare([row(**changes)])]

    def test_close(self):
        # Four are planned.
        self.assertEqual([(4, 0, True), (4, 0, True)], self.compare())

    def test_off(self):
        self.assertEqual([(5, -0.2, False), (3, 0.33, False)],
                         self.compare(guests=5, guests_95=3))

    def test_more_than_the_bench_had(self):
        self.assertEqual([(3, 0, True), (3, 0, True)], self.compare(
            guests=3, guests_95=3, stopped_by='none'))
        self.assertEqual([(3, 0, True), (2, 1, False)], self.compare(
            guests=3, guests_95=2, stopped_by='none'))

    def test_none_measured(self):
        self.assertEqual([(4, 0, True), (0, math.inf, False)],
                         self.compare(guests_95=0))

    def test_other_parts_are_left_out(self):
        self.assertEqual([], density.compare([{'part': 'frozen'}]))

    def test_rows_that_cannot_be_planned(self):
        lacks = row()
        del lacks['miss_ms']
        for bad, message in (
                (lacks, "row 1 has no 'miss_ms'"),
                (row(mode='nvme'), "row 1: mode is 'nvme'; allowed: what "
                                   "begins with blk-writeback, blk-none, "),
                (row(hot_mib='much'), 'row 1: ')):
            exc = self.assertRaises(
                ValueError, density.compare, [row(), bad])
            self.assertIn(message, str(exc))


class QuestionTest(base.BaseTestCase):

    def guests(self, *texts):
        return question.guests([question.describe(text) for text in texts])

    def test_a_guest(self):
        self.assertEqual([(guest.Guest(
            'web', 2048, 512, (lru.Stratum(300, 50), lru.Stratum(1024, 2)),
            600, 40, 70, 0.5, lru.Spells(0.2, 30), 0.1), 3)], self.guests(
                'name=web,ram=2048,programs=25%,hot=300@50+50%@2,touched=600,'
                'qemu=40,idle=70,cpus=0.5,busy=0.2,spell=30,work=0.1,count=3'))

    def test_defaults(self):
        self.assertEqual([(guest.Guest('a', 512, 100), 1)],
                         self.guests('name=a,ram=512,programs=100'))

    def test_bad_text(self):
        for text, message in (
                ('name=a,ram', "'ram' in 'name=a,ram'; allowed: FIELD=VALUE"),
                ('name=a,name=b', "'name=b' in"),
                ('name=a,disk=4', "'disk' is no field; allowed: name, hot, "
                                  "ram"),
                ('ram=4', 'has no name'),
                ('name=a,programs=4', "guest 'a': ram is missing; allowed: a "
                                      "number of at least 1"),
                ('name=a,ram=9G,programs=4', "guest 'a': ram: '9G'; allowed"),
                ('name=a,ram=9,programs=x%', "programs: 'x%'; allowed: a "
                                             "number of at least 1, or a "
                                             "share of ram, as 25%"),
                ('name=a,ram=50%,programs=4', "ram: '50%'; allowed"),
                ('name=a,ram=nan,programs=4', "ram: 'nan'; allowed"),
                ('name=a,ram=inf,programs=4', "ram: 'inf'; allowed"),
                ('name=a,ram=9,programs=4,busy=2', "busy: '2'; allowed: a "
                                                   "number from 1e-06 to 1"),
                ('name=a,ram=9,programs=4,hot=5', "hot, '5' (SIZE@READS), "
                                                  "reads a second: ''"),
                ('name=a,ram=9,programs=40', 'programs take 40 MiB')):
            exc = self.assertRaises(ValueError, self.guests, text)
            self.assertIn(message, str(exc))

    def test_twice_the_same(self):
        text = 'name=a,ram=512,programs=100'
        exc = self.assertRaises(ValueError, self.guests, text, text)
        self.assertIn("guest 'a' is described more than once", str(exc))

    def test_flavors_of_a_cloud(self):
        flavors = [{'name': name, 'ram': '512', 'count': '3'}
                   for name in ('small', 'large')]
        small, rest = ({'name': 'small', 'programs': '100', 'count': '9'},
                       {'name': '*', 'programs': '200'})
        self.assertEqual(
            [{'name': 'small', 'ram': '512', 'count': '3', 'programs': '100'},
             {'name': 'large', 'ram': '512', 'count': '3',
              'programs': '200'}], question.known(flavors, [rest, small]))
        for said, message in (
                ([small], 'nothing says what guests of these flavors use: '
                          'large;'),
                ([rest, {'name': 'huge'}],
                 "no active server has the flavor 'huge'; allowed: large, "
                 'small, or *')):
            exc = self.assertRaises(
                ValueError, question.known, flavors, said)
            self.assertIn(message, str(exc))


class InTurnTest(base.BaseTestCase):

    def test_evenly_spread(self):
        self.assertEqual([0, 1, 0, 2, 0, 0, 1, 0, 2, 0], list(
            itertools.islice(fleet._in_turn([3, 1, 1]), 10)))
