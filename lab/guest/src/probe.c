/*
 * What tests and the demo ask of a file system in the guest.
 *
 * Licensed under the Apache License, Version 2.0 (the "License"); you may
 * not use this file except in compliance with the License. You may obtain
 * a copy of the License at
 *
 *      http://www.apache.org/licenses/LICENSE-2.0
 *
 * Unless required by applicable law or agreed to in writing, software
 * distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 * WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 * License for the specific language governing permissions and limitations
 * under the License.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/aio_abi.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* linux/fs.h has one of 1 KiB. */
#undef BLOCK_SIZE
#define BLOCK_SIZE 4096
#define BLOCK_WORDS (BLOCK_SIZE / sizeof(uint64_t))
#define BLOCKS_PER_MIB (1024 * 1024 / BLOCK_SIZE)

static const char usage[] =
    "usage: probe fsync|fdatasync FILE COUNT [PROCESSES]\n"
    "           write 4 KiB in place and sync them, COUNT times; latencies in\n"
    "           us. Each of several processes has a file of its own\n"
    "       probe dirty FILE MIB write|mmap [COUNTER]\n"
    "           write FILE, MIB long, over and over until killed; count the\n"
    "           blocks in the file COUNTER\n"
    "       probe dirtied COUNTER\n"
    "           how far is it, and when is now?\n"
    "       probe write FILE MIB GENERATION\n"
    "           make FILE, MIB long, of blocks that name their generation\n"
    "       probe verify FILE MIB GENERATION\n"
    "           is FILE what write made?\n"
    "       probe reads FILE MIB COUNT [read|mmap|write]\n"
    "           read COUNT blocks of the first MIB of FILE, at random, or write\n"
    "           them\n"
    "       probe work FILE MIB RATE LOG\n"
    "           until killed: read RATE blocks a second of the first MIB of\n"
    "           FILE, at random, as late as it takes; tell LOG of each second\n"
    "             READS P99 MAX\n"
    "           the latter two in us\n"
    "       probe churn FILE MIB LOG\n"
    "           from what write made of generation 1, until killed: look at\n"
    "           blocks in turn, write one, fsync, and tell LOG\n"
    "             ack BLOCK GENERATION BLOCKS-LOOKED-AT\n"
    "             bad BLOCK GENERATION FOUND\n"
    "       probe generations FILE MIB\n"
    "           the generation of each block, - where it is torn\n"
    "       probe tick LOG\n"
    "           until killed: sleep for 1 ms, and tell LOG of each time that\n"
    "           it took over 5 ms, in us\n"
    "       probe commit DIRECTORY TASKS LOG\n"
    "           until killed: each task commits records one after another, as\n"
    "           databases do, and tells LOG\n"
    "             ack TASK GENERATION 0\n"
    "       probe committed DIRECTORY TASKS\n"
    "           the generations that are there, a task a line; - where a\n"
    "           record is torn, 0 where there is none\n"
    "       probe hammer DEVICE TASKS COUNT\n"
    "           write to the disk and sync it, COUNT times in all, in the\n"
    "           ways there are; errors do not count. DEVICE may be a pattern:\n"
    "           after an error, what it matches then is opened\n"
    "       probe durable DEVICE LOG\n"
    "           write a block that is synced (FUA) without waiting for it, tell\n"
    "           LOG \"out\", wait, and tell LOG the result\n"
    "       probe dax FILE\n"
    "           does the kernel use DAX for FILE?\n"
    "       probe access FILE r|rw\n"
    "           may this process open FILE, and lock it as QEMU does? The\n"
    "           number of the error of each, or 0\n";

static void fail(const char *what, const char *name)
{
    fprintf(stderr, "probe: %s %s: %s\n", what, name, strerror(errno));
    exit(1);
}

static uint64_t number(const char *what, const char *text, uint64_t max)
{
    char *end;
    uint64_t value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno || *text < '0' || *text > '9' || *end || value < 1 ||
        value > max) {
        fprintf(stderr, "probe: %s %s: must be a whole number, 1 to %" PRIu64
                "\n", what, text, max);
        exit(2);
    }
    return value;
}

static int open_file(const char *name, int flags)
{
    int fd = open(name, flags | O_CLOEXEC, 0644);

    if (fd < 0) {
        fail("open", name);
    }
    return fd;
}

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static void *memory(const char *name, size_t size, int flags, int fd)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

    if (p == MAP_FAILED) {
        fail("map", name);
    }
    return p;
}

typedef int sync_function(int fd);

/* Write and sync, COUNT times; returns how many failed. */
static uint64_t sync_loop(sync_function *sync_file, const char *name,
                          uint64_t count, uint64_t *took)
{
    uint64_t errors = 0;
    int first_error = 0;
    char block[BLOCK_SIZE] = "";
    int fd = open_file(name, O_WRONLY | O_CREAT);

    /* fdatasync leaves the journal alone where nothing is allocated. */
    if (sync_file == fdatasync &&
        (pwrite(fd, block, sizeof(block), 0) != sizeof(block) || fsync(fd))) {
        fail("write", name);
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t started;

        memset(block, (int)i, sizeof(block));
        if (pwrite(fd, block, sizeof(block), 0) != sizeof(block)) {
            fail("write", name);
        }
        started = now_us();
        if (sync_file(fd)) {
            errors++;
            first_error = first_error ? first_error : errno;
        }
        took[i] = now_us() - started;
    }
    close(fd);
    if (errors) {
        fprintf(stderr, "probe: sync %s: %s\n", name, strerror(first_error));
    }
    return errors;
}

/* In a process of its own once all are there; its errors are added up. */
static void sync_process(sync_function *sync_file, const char *name,
                         uint64_t number, uint64_t count, uint64_t *took,
                         uint64_t *shared)
{
    char own[PATH_MAX];
    pid_t pid = fork();

    if (pid < 0) {
        fail("fork for", name);
    }
    if (pid) {
        return;
    }
    snprintf(own, sizeof(own), "%s.%" PRIu64, name, number);
    while (!__atomic_load_n(&shared[0], __ATOMIC_ACQUIRE)) {
        sched_yield();
    }
    __atomic_add_fetch(&shared[1], sync_loop(sync_file, own, count, took),
                       __ATOMIC_RELEASE);
    exit(0);
}

static int probe_sync(sync_function *sync_file, const char *name,
                      uint64_t count, uint64_t processes)
{
    uint64_t total = count * processes, started, sum = 0, errors;
    uint64_t *shared = memory(name, (total + 2) * sizeof(*shared),
                              MAP_SHARED | MAP_ANONYMOUS, -1);
    uint64_t *took = shared + 2;
    int status;

    if (processes == 1) {
        started = now_us();
        shared[1] = sync_loop(sync_file, name, count, took);
    } else {
        for (uint64_t i = 0; i < processes; i++) {
            sync_process(sync_file, name, i, count, took + i * count,
                         shared);
        }
        started = now_us();
        __atomic_store_n(&shared[0], 1, __ATOMIC_RELEASE);
        while (wait(&status) > 0) {
            if (status) {
                fprintf(stderr, "probe: a process ended by %d\n", status);
                return 1;
            }
        }
    }
    started = now_us() - started;
    errors = shared[1];
    for (uint64_t i = 0; i < total; i++) {
        sum += took[i];
    }
    qsort(took, total, sizeof(*took), by_value);
    printf("fsyncs=%" PRIu64 " errors=%" PRIu64 " min_us=%" PRIu64
           " p50_us=%" PRIu64 " p99_us=%" PRIu64 " max_us=%" PRIu64
           " total_us=%" PRIu64 " elapsed_us=%" PRIu64 "\n", total, errors,
           took[0], took[total / 2], took[total * 99 / 100],
           took[total - 1], sum, started);
    return errors ? 1 : 0;
}

/* A count that one process keeps and another reads. */
static uint64_t *counter(const char *name)
{
    int fd = open_file(name, O_RDWR | O_CREAT);
    uint64_t *mapped;

    if (ftruncate(fd, sizeof(*mapped))) {
        fail("truncate", name);
    }
    mapped = memory(name, sizeof(*mapped), MAP_SHARED, fd);
    close(fd);
    return mapped;
}

static int probe_dirty(const char *name, uint64_t mib, const char *how,
                       const char *counter_name)
{
    uint64_t uncounted = 0;
    uint64_t *count = counter_name ? counter(counter_name) : &uncounted;
    size_t size = mib << 20;
    int fd = open_file(name, O_RDWR | O_CREAT);
    bool mapped = !strcmp(how, "mmap");
    char block[BLOCK_SIZE];
    char *map;

    if (!mapped && strcmp(how, "write")) {
        fprintf(stderr, "probe: %s: must be write or mmap\n", how);
        return 2;
    }
    if (posix_fallocate(fd, 0, size)) {
        fail("allocate", name);
    }
    map = mapped ? memory(name, size, MAP_SHARED, fd) : NULL;
    for (uint64_t turn = 0;; turn++) {
        memset(block, (int)turn, sizeof(block));
        for (size_t at = 0; at < size; at += BLOCK_SIZE) {
            if (mapped) {
                memcpy(map + at, block, BLOCK_SIZE);
            } else if (pwrite(fd, block, BLOCK_SIZE, at) != BLOCK_SIZE) {
                fail("write", name);
            }
            __atomic_store_n(count, *count + 1, __ATOMIC_RELAXED);
        }
    }
}

static int probe_dirtied(const char *name)
{
    uint64_t blocks = __atomic_load_n(counter(name), __ATOMIC_RELAXED);

    printf("bytes=%" PRIu64 " at_us=%" PRIu64 "\n", blocks * BLOCK_SIZE,
           now_us());
    return 0;
}

/*
 * A block is its generation, its index, and words that follow from both
 * (splitmix64), so that an old block, a misplaced one and a torn one can be
 * told apart without a second copy.
 */
static void fill_block(uint64_t *block, uint64_t generation, uint64_t index)
{
    uint64_t state = generation << 32 ^ index;

    block[0] = generation;
    block[1] = index;
    for (size_t i = 2; i < BLOCK_WORDS; i++) {
        uint64_t z = state += 0x9e3779b97f4a7c15;

        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        block[i] = z ^ z >> 31;
    }
}

static bool is_block(const uint64_t *block, uint64_t generation,
                     uint64_t index)
{
    uint64_t expected[BLOCK_WORDS];

    fill_block(expected, generation, index);
    return !memcmp(block, expected, BLOCK_SIZE);
}

static int probe_write(const char *name, uint64_t mib, uint64_t generation)
{
    uint64_t blocks = mib * BLOCKS_PER_MIB;
    uint64_t block[BLOCK_WORDS];
    /* Written in place: a second generation lands on the pages of the first. */
    int fd = open_file(name, O_WRONLY | O_CREAT);

    for (uint64_t i = 0; i < blocks; i++) {
        fill_block(block, generation, i);
        if (pwrite(fd, block, BLOCK_SIZE, i * BLOCK_SIZE) != BLOCK_SIZE) {
            fail("write", name);
        }
    }
    if (ftruncate(fd, blocks * BLOCK_SIZE)) {
        fail("truncate", name);
    }
    if (fsync(fd)) {
        fail("fsync", name);
    }
    close(fd);
    printf("blocks=%" PRIu64 " generation=%" PRIu64 "\n", blocks, generation);
    return 0;
}

static int probe_verify(const char *name, uint64_t mib, uint64_t generation)
{
    uint64_t blocks = mib * BLOCKS_PER_MIB;
    uint64_t good = 0, other = 0, first_bad = 0;
    uint64_t block[BLOCK_WORDS];
    struct stat st;
    int fd = open_file(name, O_RDONLY);

    if (fstat(fd, &st)) {
        fail("stat", name);
    }
    if ((uint64_t)st.st_size != blocks * BLOCK_SIZE) {
        fprintf(stderr, "probe: %s has %" PRIu64 " bytes, not %" PRIu64 "\n",
                name, (uint64_t)st.st_size, blocks * BLOCK_SIZE);
        return 1;
    }
    for (uint64_t i = 0; i < blocks; i++) {
        if (pread(fd, block, BLOCK_SIZE, i * BLOCK_SIZE) != BLOCK_SIZE) {
            fail("read", name);
        }
        if (is_block(block, generation, i)) {
            good++;
            continue;
        }
        if (good == i) {
            first_bad = i;
        }
        if (is_block(block, block[0], i)) {
            other++;
        }
    }
    close(fd);
    printf("blocks=%" PRIu64 " good=%" PRIu64 " other_generation=%" PRIu64
           " corrupt=%" PRIu64, blocks, good, other, blocks - good - other);
    if (good < blocks) {
        printf(" first_bad=%" PRIu64, first_bad);
    }
    printf("\n");
    return good < blocks;
}

static int probe_reads(const char *name, uint64_t mib, uint64_t count,
                       const char *how)
{
    uint64_t blocks = mib * BLOCKS_PER_MIB;
    bool writes = !strcmp(how, "write"), maps = !strcmp(how, "mmap");
    uint64_t started;
    char block[BLOCK_SIZE] = "";
    int fd = open_file(name, writes || maps ? O_RDWR : O_RDONLY);
    const char *mapped = maps ? memory(name, mib << 20, MAP_SHARED, fd) : NULL;

    if (!writes && !maps && strcmp(how, "read")) {
        fputs(usage, stderr);
        return 2;
    }
    /* The same blocks each time, so that runs can be compared. */
    srandom(1);
    started = now_us();
    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = random() % blocks * BLOCK_SIZE;

        if (maps) {
            memcpy(block, mapped + at, BLOCK_SIZE);
        } else if ((writes ? pwrite(fd, block, BLOCK_SIZE, at)
                           : pread(fd, block, BLOCK_SIZE, at)) != BLOCK_SIZE) {
            fail(how, name);
        }
    }
    printf("reads=%" PRIu64 " elapsed_us=%" PRIu64 "\n", count,
           now_us() - started);
    close(fd);
    return 0;
}

static void sleep_until(uint64_t when_us)
{
    struct timespec t = { .tv_sec = when_us / 1000000,
                          .tv_nsec = when_us % 1000000 * 1000 };

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static int probe_work(const char *name, uint64_t mib, uint64_t rate,
                      const char *log_name)
{
    uint64_t blocks = mib * BLOCKS_PER_MIB, second = now_us(), done = 0;
    uint64_t *took = calloc(rate, sizeof(*took));
    int log = open_file(log_name, O_WRONLY | O_CREAT | O_APPEND);
    int fd = open_file(name, O_RDONLY);
    char block[BLOCK_SIZE];

    if (!took) {
        fail("memory for", name);
    }
    /* Guests that began together must not read together. */
    srandom(second);
    for (;;) {
        uint64_t started = now_us();

        if (started < second + done * 1000000 / rate) {
            sleep_until(second + done * 1000000 / rate);
            started = now_us();
        }
        if (pread(fd, block, BLOCK_SIZE, random() % blocks * BLOCK_SIZE) !=
            BLOCK_SIZE) {
            fail("read", name);
        }
        took[done++] = now_us() - started;
        /* What a second did not do is not done later. */
        if (done == rate || now_us() >= second + 1000000) {
            qsort(took, done, sizeof(*took), by_value);
            sleep_until(second + 1000000);
            if (dprintf(log, "%" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
                        (done * 1000000 + 500000) / (now_us() - second),
                        took[done * 99 / 100], took[done - 1]) < 0) {
                fail("write", log_name);
            }
            second = now_us();
            done = 0;
        }
    }
}

/* One write(2), so that a line is whole wherever it is cut off. */
static void tell(int log, const char *what, uint64_t index,
                 uint64_t generation, uint64_t third)
{
    char line[96];
    int length = snprintf(line, sizeof(line),
                          "%s %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", what,
                          index, generation, third);

    if (write(log, line, length) != length) {
        fail("write", "LOG");
    }
}

/* How many blocks churn looks at for each that it writes. */
#define LOOK_AT 512

static int probe_churn(const char *name, uint64_t mib, const char *log_name)
{
    uint64_t blocks = mib * BLOCKS_PER_MIB;
    uint64_t *generations = calloc(blocks, sizeof(*generations));
    uint64_t block[BLOCK_WORDS];
    uint64_t next = 0, looked_at = 0, chosen;
    int fd = open_file(name, O_RDWR);
    int log = open_file(log_name, O_WRONLY | O_APPEND);

    if (!generations) {
        fail("memory for", name);
    }
    srandom(now_us());
    for (uint64_t i = 0; i < blocks; i++) {
        generations[i] = 1;
    }
    for (;;) {
        for (int i = 0; i < LOOK_AT; i++, next = (next + 1) % blocks) {
            if (pread(fd, block, BLOCK_SIZE, next * BLOCK_SIZE) !=
                BLOCK_SIZE) {
                fail("read", name);
            }
            looked_at++;
            if (!is_block(block, generations[next], next)) {
                tell(log, "bad", next, generations[next], block[0]);
            }
        }
        chosen = random() % blocks;
        fill_block(block, ++generations[chosen], chosen);
        if (pwrite(fd, block, BLOCK_SIZE, chosen * BLOCK_SIZE) !=
            BLOCK_SIZE) {
            fail("write", name);
        }
        if (fsync(fd)) {
            fail("fsync", name);
        }
        tell(log, "ack", chosen, generations[chosen], looked_at);
    }
}

static int probe_generations(const char *name, uint64_t mib)
{
    uint64_t block[BLOCK_WORDS];
    int fd = open_file(name, O_RDONLY);

    for (uint64_t i = 0; i < mib * BLOCKS_PER_MIB; i++) {
        if (pread(fd, block, BLOCK_SIZE, i * BLOCK_SIZE) != BLOCK_SIZE) {
            fail("read", name);
        }
        if (is_block(block, block[0], i)) {
            printf("%" PRIu64 "\n", block[0]);
        } else {
            puts("-");
        }
    }
    close(fd);
    return 0;
}

static int probe_tick(const char *log_name)
{
    const struct timespec millisecond = { .tv_nsec = 1000000 };
    int log = open_file(log_name, O_WRONLY | O_CREAT | O_APPEND);
    uint64_t before = now_us(), took;

    for (;;) {
        nanosleep(&millisecond, NULL);
        took = now_us() - before;
        before += took;
        if (took > 5000 && dprintf(log, "%" PRIu64 "\n", took) < 0) {
            fail("write", log_name);
        }
    }
}

/* Records of a task: the last ones in a ring, and a file that is replaced. */
#define RECORDS 16
#define REPLACE_EVERY 4
/* Small files that come and go, so that there is metadata to commit. */
#define SMALL_FILES 6

static void commit_file(const char *name, int flags, uint64_t at,
                        const uint64_t *block)
{
    int fd = open_file(name, O_WRONLY | O_CREAT | flags);

    if (pwrite(fd, block, BLOCK_SIZE, at * BLOCK_SIZE) != BLOCK_SIZE) {
        fail("write", name);
    }
    if (fsync(fd)) {
        fail("fsync", name);
    }
    close(fd);
}

static void commit_task(const char *directory, uint64_t task, int log)
{
    char name[PATH_MAX], new[PATH_MAX];
    uint64_t block[BLOCK_WORDS];
    int fd;

    for (uint64_t generation = 1;; generation++) {
        fill_block(block, generation, task);
        snprintf(name, sizeof(name), "%s/%" PRIu64 ".records", directory,
                 task);
        commit_file(name, 0, generation % RECORDS, block);
        if (generation % REPLACE_EVERY == 0) {
            snprintf(name, sizeof(name), "%s/%" PRIu64 ".newest", directory,
                     task);
            snprintf(new, sizeof(new), "%s/%" PRIu64 ".new", directory, task);
            commit_file(new, O_TRUNC, 0, block);
            if (rename(new, name)) {
                fail("rename", new);
            }
            fd = open_file(directory, O_RDONLY | O_DIRECTORY);
            if (fsync(fd)) {
                fail("fsync", directory);
            }
            close(fd);
        }
        tell(log, "ack", task, generation, 0);
        for (int i = 0; i < SMALL_FILES; i++) {
            snprintf(name, sizeof(name), "%s/%" PRIu64 ".small.%d", directory,
                     task, i);
            if (generation % 2) {
                close(open_file(name, O_WRONLY | O_CREAT));
            } else if (unlink(name) && errno != ENOENT) {
                fail("remove", name);
            }
        }
    }
}

static int probe_commit(const char *directory, uint64_t tasks,
                        const char *log_name)
{
    int log = open_file(log_name, O_WRONLY | O_APPEND | O_CREAT);
    int status;

    for (uint64_t task = 1; task < tasks; task++) {
        pid_t pid = fork();

        if (pid < 0) {
            fail("fork for", directory);
        }
        if (!pid) {
            commit_task(directory, task, log);
        }
    }
    commit_task(directory, 0, log);
    while (wait(&status) > 0) {
    }
    return 1;
}

/*
 * The kernel flushes for fdatasync(2) by a bio without data, and for O_DSYNC
 * by one with data (FUA), as far as it is direct. A block is written in one way
 * only, and by nobody else: what is in the page cache fails a direct write.
 */
/* The first of the blocks. */
#define HAMMERED 1024

static int hammer_open(const char *pattern, bool direct)
{
    int fd = -1;
    glob_t found;

    if (!glob(pattern, 0, NULL, &found)) {
        for (size_t i = 0; i < found.gl_pathc && fd < 0; i++) {
            fd = open(found.gl_pathv[i], O_WRONLY | O_CLOEXEC |
                      (direct ? O_DIRECT | O_DSYNC : 0));
        }
        globfree(&found);
    }
    return fd;
}

static void hammer_task(const char *pattern, uint64_t task, uint64_t count,
                        uint64_t *errors)
{
    char *block = aligned_alloc(BLOCK_SIZE, BLOCK_SIZE);
    uint64_t done = 0;
    bool direct = false;
    int fd = -1;

    if (!block) {
        fail("memory for", pattern);
    }
    memset(block, (int)task, BLOCK_SIZE);
    while (done < count) {
        if (fd < 0) {
            direct = (done + task) % 3 == 0;
            fd = hammer_open(pattern, direct);
        }
        if (fd >= 0 &&
            pwrite(fd, block, BLOCK_SIZE, (HAMMERED + 2 * task + direct) *
                   BLOCK_SIZE) == BLOCK_SIZE && !fdatasync(fd)) {
            done++;
            if (done % 20) {
                continue;
            }
        } else {
            /* The driver is out, or has failed: somebody mends that. */
            __atomic_add_fetch(errors, 1, __ATOMIC_RELAXED);
            usleep(500000);
        }
        if (fd >= 0) {
            close(fd);
            fd = -1;
        }
    }
    exit(0);
}

static int probe_hammer(const char *name, uint64_t tasks, uint64_t count)
{
    uint64_t *errors = memory(name, sizeof(*errors),
                              MAP_SHARED | MAP_ANONYMOUS, -1);
    uint64_t ended = 0;
    int status;

    for (uint64_t task = 0; task < tasks; task++) {
        pid_t pid = fork();

        if (pid < 0) {
            fail("fork for", name);
        }
        if (!pid) {
            hammer_task(name, task, count / tasks, errors);
        }
    }
    while (wait(&status) > 0) {
        ended += !status;
    }
    printf("syncs=%" PRIu64 " errors=%" PRIu64 " ended=%" PRIu64 "\n",
           count / tasks * ended, *errors, ended);
    return ended != tasks;
}

static int probe_durable(const char *name, const char *log_name)
{
    char *block = aligned_alloc(BLOCK_SIZE, BLOCK_SIZE);
    int fd = open_file(name, O_WRONLY | O_DIRECT | O_DSYNC);
    int log = open_file(log_name, O_WRONLY | O_APPEND | O_CREAT);
    struct iocb control = {
        .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_fildes = fd,
        .aio_buf = (uintptr_t)block, .aio_nbytes = BLOCK_SIZE,
    }, *controls[] = { &control };
    struct io_event event;
    aio_context_t context = 0;

    if (!block) {
        fail("memory for", name);
    }
    memset(block, 'D', BLOCK_SIZE);
    if (syscall(SYS_io_setup, 1, &context) ||
        syscall(SYS_io_submit, context, 1, controls) != 1) {
        fail("submit", name);
    }
    dprintf(log, "out\n");
    /* A suspend interrupts it. */
    while (syscall(SYS_io_getevents, context, 1, 1, &event, NULL) != 1) {
        if (errno != EINTR) {
            fail("wait for", name);
        }
    }
    dprintf(log, "%lld\n", (long long)event.res);
    return 0;
}

static void print_generation(int fd, uint64_t at, uint64_t task)
{
    uint64_t block[BLOCK_WORDS];
    ssize_t length = fd < 0 ? 0 : pread(fd, block, BLOCK_SIZE,
                                        at * BLOCK_SIZE);

    if (!length || (length == BLOCK_SIZE && !block[0])) {
        printf(" 0");
    } else if (length == BLOCK_SIZE && is_block(block, block[0], task)) {
        printf(" %" PRIu64, block[0]);
    } else {
        printf(" -");
    }
}

static int probe_committed(const char *directory, uint64_t tasks)
{
    char name[PATH_MAX];

    for (uint64_t task = 0; task < tasks; task++) {
        for (int which = 0; which < 2; which++) {
            int fd;

            snprintf(name, sizeof(name), "%s/%" PRIu64 ".%s", directory, task,
                     which ? "newest" : "records");
            fd = open(name, O_RDONLY | O_CLOEXEC);
            for (uint64_t at = 0; at < (which ? 1 : RECORDS); at++) {
                print_generation(fd, at, task);
            }
            if (fd >= 0) {
                close(fd);
            }
        }
        puts("");
    }
    return 0;
}

static int probe_dax(const char *name)
{
    struct statx st;
    bool dax;

    if (statx(AT_FDCWD, name, 0, STATX_BASIC_STATS, &st)) {
        fail("stat", name);
    }
    dax = st.stx_attributes & STATX_ATTR_DAX;
    printf("%s\n", dax ? "yes" : "no");
    return dax ? 0 : 1;
}

static int probe_access(const char *name, const char *how)
{
    bool writes = !strcmp(how, "rw");
    struct flock lock = {
        .l_type = writes ? F_WRLCK : F_RDLCK,
        .l_whence = SEEK_SET,
        .l_start = 300,
        .l_len = 1,
    };
    int fd;

    if (!writes && strcmp(how, "r")) {
        fputs(usage, stderr);
        return 2;
    }
    fd = open(name, (writes ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0) {
        printf("open=%d\n", errno);
        return 0;
    }
    printf("open=0 lock=%d\n", fcntl(fd, F_OFD_SETLK, &lock) ? errno : 0);
    return 0;
}

int main(int argc, char **argv)
{
    const char *action = argc > 2 ? argv[1] : "";

    if ((!strcmp(action, "fsync") || !strcmp(action, "fdatasync")) &&
        (argc == 4 || argc == 5)) {
        return probe_sync(strcmp(action, "fsync") ? fdatasync : fsync,
                          argv[2], number("COUNT", argv[3], 10000000),
                          argc == 4 ? 1 : number("PROCESSES", argv[4], 1024));
    }
    if (!strcmp(action, "dirty") && (argc == 5 || argc == 6)) {
        return probe_dirty(argv[2], number("MIB", argv[3], 1 << 20), argv[4],
                           argc == 6 ? argv[5] : NULL);
    }
    if (!strcmp(action, "dirtied") && argc == 3) {
        return probe_dirtied(argv[2]);
    }
    if (!strcmp(action, "churn") && argc == 5) {
        return probe_churn(argv[2], number("MIB", argv[3], 1 << 20), argv[4]);
    }
    if (!strcmp(action, "commit") && argc == 5) {
        return probe_commit(argv[2], number("TASKS", argv[3], 1024), argv[4]);
    }
    if (!strcmp(action, "committed") && argc == 4) {
        return probe_committed(argv[2], number("TASKS", argv[3], 1024));
    }
    if (!strcmp(action, "hammer") && argc == 5) {
        return probe_hammer(argv[2], number("TASKS", argv[3], 1024),
                            number("COUNT", argv[4], 10000000));
    }
    if (!strcmp(action, "durable") && argc == 4) {
        return probe_durable(argv[2], argv[3]);
    }
    if (!strcmp(action, "generations") && argc == 4) {
        return probe_generations(argv[2], number("MIB", argv[3], 1 << 20));
    }
    if (!strcmp(action, "reads") && (argc == 5 || argc == 6)) {
        return probe_reads(argv[2], number("MIB", argv[3], 1 << 20),
                           number("COUNT", argv[4], 10000000),
                           argc == 5 ? "read" : argv[5]);
    }
    if (!strcmp(action, "work") && argc == 6) {
        return probe_work(argv[2], number("MIB", argv[3], 1 << 20),
                          number("RATE", argv[4], 1000000), argv[5]);
    }
    if (!strcmp(action, "write") && argc == 5) {
        return probe_write(argv[2], number("MIB", argv[3], 1 << 20),
                           number("GENERATION", argv[4], UINT32_MAX));
    }
    if (!strcmp(action, "verify") && argc == 5) {
        return probe_verify(argv[2], number("MIB", argv[3], 1 << 20),
                            number("GENERATION", argv[4], UINT32_MAX));
    }
    if (!strcmp(action, "tick") && argc == 3) {
        return probe_tick(argv[2]);
    }
    if (!strcmp(action, "dax") && argc == 3) {
        return probe_dax(argv[2]);
    }
    if (!strcmp(action, "access") && argc == 4) {
        return probe_access(argv[2], argv[3]);
    }
    fputs(usage, stderr);
    return 2;
}
