/*
 * Virtio PMEM device
 *
 * A host file, mapped into the guest. The guest makes it durable with flush
 * requests (Virtual I/O Device Specification 1.3, section 5.19). This file
 * replaces QEMU's file of the same name; the type names, the wire protocol and
 * the meaning of the existing properties are the same. SPEC.rst in this
 * directory says what the device promises and how it keeps its promises.
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "hw/core/cpu.h"
#include "hw/virtio/virtio-pmem.h"
#include "migration/register.h"
#include "migration/vmstate.h"
#include "qapi/error.h"
#include "qapi/qapi-builtin-visit.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-events-block-core.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/cutils.h"
#include "qemu/iov.h"
#include "qemu/lockable.h"
#include "qemu/madvise.h"
#include "qemu/units.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_pmem.h"
#include "trace.h"
#include "virtio-pmem-compat.h"
#include <sys/resource.h>
#include <sys/syscall.h>

/*
 * The largest ring there is. QEMU 10.0.13 gives every queue this size
 * whatever it asks for, and a ring does not migrate to a smaller one.
 */
#define VIRTIO_PMEM_QUEUE_SIZE 1024

/* How long and how often to try to reacquire an image that was given up */
#define VIRTIO_PMEM_RETRY_MS 10000
#define VIRTIO_PMEM_RETRY_PERIOD_MS 50

/*
 * In a migration: how much may be dirty while the speed of the storage is not
 * known, and how long to sleep before looking again.
 */
#define VIRTIO_PMEM_DIRTY_UNKNOWN_RATE (1 * MiB)
#define VIRTIO_PMEM_ITERATE_US (20 * 1000)

/* How often to count the dirty bytes */
#define VIRTIO_PMEM_WRITEBACK_PERIOD_MS 100

/*
 * How long to keep counting after a flush. A file system in use commits its
 * journal, which is a flush, every 5 seconds (ext4; others less often).
 */
#define VIRTIO_PMEM_WRITEBACK_AWAKE_MS 10000

/*
 * Readahead: how often to look at what was read, and how many pages show
 * whether readahead is of use
 */
#define VIRTIO_PMEM_READ_AHEAD_PERIOD_MS 1000
#define VIRTIO_PMEM_READ_AHEAD_PAGES 256

/* How long it stays off before it is tried again, and the same of a trial */
#define VIRTIO_PMEM_READ_AHEAD_OFF_MS 30000
#define VIRTIO_PMEM_TRIAL_PERIOD_MS 100
#define VIRTIO_PMEM_TRIAL_PAGES 64

/* Less is a mistake: after a sync of 1 MiB the next would wait for hours. */
#define VIRTIO_PMEM_MIN_SYNC_BPS 1024

struct VirtIOPMEMRequest {
    VirtQueueElement elem;
    QSIMPLEQ_ENTRY(VirtIOPMEMRequest) next;
};

/* Outlives the device if the device is unplugged meanwhile. */
struct VirtIOPMEMSync {
    VirtIOPMEM *pmem;
    HostMemoryBackend *memdev;
    /* Whether the vCPUs had stopped when it began */
    bool last;
    /* As the info block on storage says, before and after */
    VirtIOPMEMMemmap memmap;
    /* Whether to count the bytes that it writes, and their number */
    bool counted;
    uint64_t dirty;
    int error;
    uint64_t usecs;
};

/* Writeback started before a sync asks for it; it outlives the device, too */
struct VirtIOPMEMWriteback {
    VirtIOPMEM *pmem;
    HostMemoryBackend *memdev;
    uint64_t threshold;
    uint64_t dirty;
    int64_t count_usecs;
    bool started;
    int error;
};

typedef struct VirtIOPMEMReadAheadImage {
    HostMemoryBackend *memdev;
    uint64_t from;
    bool automatic;
} VirtIOPMEMReadAheadImage;

/* Pages that were read so far */
typedef struct VirtIOPMEMReads {
    /* By vCPUs, -1 if not known; by all of QEMU; by faults that waited */
    int64_t vcpus;
    int64_t all;
    int64_t faults;
} VirtIOPMEMReads;

/* What a worker thread is to judge, and its result */
typedef struct VirtIOPMEMReadAheadJudge {
    GArray *images;
    GArray *vcpus;
    /* As the static variable below has it, before and after */
    bool was_off;
    bool off;
    bool trial;
    bool may_try;
    bool changed;
    VirtIOPMEMReads base_reads;
    VirtIOPMEMReads reads;
    int64_t base_pages;
    int64_t pages;
    /* Whether it has counted the pages, and how long that took */
    bool counted;
    int64_t usecs;
} VirtIOPMEMReadAheadJudge;

/*
 * The readahead of all images: Linux counts what a thread reads, not what is
 * read of a file. Under QEMU's lock.
 */
static struct {
    QEMUTimer *timer;
    bool judging;
    /* It is off; it is on again for a trial; when that may be (in ms) */
    bool off;
    bool trial;
    int64_t off_until;
    /* At the last look that a thread was started for */
    VirtIOPMEMReads seen;
    /* A device was plugged in or out since the last count */
    bool changed;
    /* At the last count: what was read, and pages that were ever cached */
    VirtIOPMEMReads reads;
    int64_t pages;
} virtio_pmem_read_ahead;

/*
 * All realized devices. Changing the list takes QEMU's lock and the mutex, so
 * the migration thread may read it with the mutex alone.
 */
static QLIST_HEAD(, VirtIOPMEM) virtio_pmem_devices =
    QLIST_HEAD_INITIALIZER(virtio_pmem_devices);
static QemuMutex virtio_pmem_devices_mutex;

#include "virtio-pmem-image.c.inc"

static void virtio_pmem_queue_enable(VirtIODevice *vdev, uint32_t queue_index)
{
    VirtIOPMEM *pmem = VIRTIO_PMEM(vdev);

    pmem->ring_size = virtio_queue_get_num(vdev, 0);
    pmem->ring_packed = virtio_vdev_has_feature(vdev, VIRTIO_F_RING_PACKED);
    pmem->ring_layout_changed = false;
}

/*
 * Remembered even if it changes back: meanwhile QEMU may have mapped the ring
 * again, by the other layout.
 */
static void virtio_pmem_set_features(VirtIODevice *vdev, uint64_t features)
{
    VirtIOPMEM *pmem = VIRTIO_PMEM(vdev);

    if (virtio_has_feature(features, VIRTIO_F_RING_PACKED) !=
        pmem->ring_packed) {
        pmem->ring_layout_changed = true;
    }
}

/*
 * A driver must not change a queue's size or layout once the queue is
 * enabled, but it can: QEMU would then look for the ring beyond what it has
 * mapped of it, and fail an assertion.
 *
 * Return whether the ring may be touched. QEMU 7.2 does not always check
 * whether the device is broken.
 */
static bool virtio_pmem_check_ring(VirtIOPMEM *pmem)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(pmem);

    if (!vdev->broken && virtio_queue_get_num(vdev, 0) != pmem->ring_size) {
        virtio_error(vdev, "virtio-pmem: size of the enabled queue changed");
    }
    if (!vdev->broken && pmem->ring_layout_changed) {
        virtio_error(vdev,
                     "virtio-pmem: layout of the enabled queue changed");
    }
    return !vdev->broken;
}

/*
 * Answer all @requests with @ret, 0 or -1. Return whether the guest was told.
 *
 * The interrupt comes last. If it is an MSI, it writes a value that the guest
 * chose to an address that the guest chose, perhaps this device's registers.
 */
static bool virtio_pmem_answer(VirtIOPMEM *pmem, VirtIOPMEMRequests *requests,
                               int ret)
{
    struct virtio_pmem_resp resp = { .ret = cpu_to_le32(ret) };
    VirtIOPMEMRequest *req;
    unsigned int count = 0;
    bool valid;

    if (QSIMPLEQ_EMPTY(requests)) {
        return false;
    }
    /* If the device is broken, virtqueue_push() only unmaps the request. */
    valid = virtio_pmem_check_ring(pmem);
    while ((req = QSIMPLEQ_FIRST(requests))) {
        QSIMPLEQ_REMOVE_HEAD(requests, next);
        iov_from_buf(req->elem.in_sg, req->elem.in_num, 0, &resp,
                     sizeof(resp));
        virtqueue_push(pmem->rq_vq, &req->elem, sizeof(resp));
        g_free(req);
        count++;
    }
    trace_virtio_pmem_response(pmem, count, ret);
    if (valid) {
        virtio_notify(VIRTIO_DEVICE(pmem), pmem->rq_vq);
    }
    return valid;
}

static void virtio_pmem_discard(VirtIOPMEM *pmem)
{
    VirtIOPMEMRequest *req;
    unsigned int count = 0;

    QSIMPLEQ_CONCAT(&pmem->syncing, &pmem->waiting);
    while ((req = QSIMPLEQ_FIRST(&pmem->syncing))) {
        QSIMPLEQ_REMOVE_HEAD(&pmem->syncing, next);
        virtqueue_detach_element(pmem->rq_vq, &req->elem, 0);
        g_free(req);
        count++;
    }
    trace_virtio_pmem_discard(pmem, count);
}

static int virtio_pmem_sync_run(void *opaque)
{
    VirtIOPMEMSync *sync = opaque;
    struct virtio_pmem_cachestat stat;
    VirtIOPMEMMemmap memmap = virtio_pmem_find_memmap(sync->memdev);
    uint64_t from = 0;
    int64_t start;

    /*
     * Nothing in the memmap is worth a flush, but a migration needs it. A new
     * info block is not on storage yet.
     */
    if (!sync->last && memmap.checksum == sync->memmap.checksum) {
        from = memmap.end;
    }
    sync->memmap = memmap;
    if (sync->counted && !virtio_pmem_cachestat(sync->memdev, from, &stat)) {
        sync->dirty = stat.dirty * qemu_real_host_page_size();
    }
    start = g_get_monotonic_time();
    sync->error = virtio_pmem_write(sync->memdev, from);
    sync->usecs = g_get_monotonic_time() - start;
    return 0;
}

/*
 * Whether to stop the guest before it hears of an error. If it is not running,
 * there is nothing to stop: it hears of the error when it runs again.
 */
static bool virtio_pmem_error_stops(VirtIOPMEM *pmem)
{
    return pmem->werror == BLOCKDEV_ON_ERROR_STOP && runstate_is_running();
}

/* Report the error as the block layer does, but without a node name. */
static void virtio_pmem_report_error(VirtIOPMEM *pmem, int error)
{
    g_autofree char *path = object_get_canonical_path(OBJECT(pmem));

    error_report("virtio-pmem: cannot sync memory backend '%s': %s; "
                 "its content on storage is unknown and "
                 "every flush fails from now on",
                 virtio_pmem_id(pmem), strerror(error));
    virtio_pmem_send_io_error(path, virtio_pmem_error_stops(pmem)
                                    ? BLOCK_ERROR_ACTION_STOP
                                    : BLOCK_ERROR_ACTION_REPORT,
                              error == ENOSPC, strerror(error));
}

static void virtio_pmem_sync_account(VirtIOPMEM *pmem, VirtIOPMEMSync *sync)
{
    int bucket = sync->usecs ? 63 - clz64(sync->usecs) : 0;

    trace_virtio_pmem_sync_done(pmem, sync->error, sync->usecs);
    pmem->syncs++;
    pmem->sync_latency[MIN(bucket, VIRTIO_PMEM_LATENCY_BUCKETS - 1)]++;
    if (sync->error) {
        pmem->errors++;
        pmem->last_error = sync->error;
    }
}

/*
 * Delay the next sync by the time that these bytes take at sync-bps. A sync of
 * nothing counts as one page; otherwise a guest could have any number of them.
 */
static void virtio_pmem_charge(VirtIOPMEM *pmem, uint64_t bytes)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL);

    if (pmem->sync_bps) {
        bytes = MAX(bytes, qemu_real_host_page_size());
        pmem->sync_not_before = MAX(pmem->sync_not_before, now) +
            (double)bytes / pmem->sync_bps * NANOSECONDS_PER_SECOND;
    }
}

/* Return whether a sync may start now; if not, schedule it. */
static bool virtio_pmem_within_limit(VirtIOPMEM *pmem)
{
    if (qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL) >= pmem->sync_not_before) {
        return true;
    }
    timer_mod_ns(pmem->limit_timer, pmem->sync_not_before);
    return false;
}

static int virtio_pmem_writeback_run(void *opaque)
{
    VirtIOPMEMWriteback *writeback = opaque;
    struct virtio_pmem_cachestat stat;
    uint64_t from = virtio_pmem_find_memmap(writeback->memdev).end;
    int64_t start = g_get_monotonic_time();

    if (virtio_pmem_cachestat(writeback->memdev, from, &stat) < 0) {
        writeback->error = errno;
        return 0;
    }
    writeback->count_usecs = g_get_monotonic_time() - start;
    writeback->dirty = stat.dirty * qemu_real_host_page_size();
    if (writeback->dirty < writeback->threshold) {
        return 0;
    }
    writeback->started = true;
    if (virtio_pmem_start_writeback(writeback->memdev, from) < 0) {
        writeback->error = errno;
    }
    return 0;
}

static void virtio_pmem_writeback_schedule(VirtIOPMEM *pmem, int64_t msecs)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL);

    if (!pmem->last_error && now < pmem->writeback_until) {
        timer_mod(pmem->writeback_timer,
                  MAX(now + msecs, pmem->sync_not_before / SCALE_MS));
    }
}

static void virtio_pmem_writeback_done(void *opaque, int ret)
{
    VirtIOPMEMWriteback *writeback = opaque;
    VirtIOPMEM *pmem = writeback->pmem;

    if (pmem) {
        trace_virtio_pmem_writeback(pmem, writeback->dirty,
                                    writeback->started, writeback->error);
        pmem->writeback = NULL;
        pmem->writebacks += writeback->started;
        if (writeback->started) {
            virtio_pmem_charge(pmem, writeback->dirty);
        }
        if (writeback->error) {
            /*
             * The kernel does not support this, or it failed. The next sync
             * reports whether anything is lost, as it does for writeback that
             * the kernel starts by itself.
             */
            pmem->early_writeback = 0;
        } else {
            /* Counting a large cache is slow: spend at most 1 % on it. */
            virtio_pmem_writeback_schedule(
                pmem, MAX(VIRTIO_PMEM_WRITEBACK_PERIOD_MS,
                          writeback->count_usecs / 10));
        }
        aio_wait_kick();
    }
    object_unref(OBJECT(writeback->memdev));
    g_free(writeback);
}

static void virtio_pmem_writeback_start(void *opaque)
{
    VirtIOPMEM *pmem = opaque;
    VirtIOPMEMWriteback *writeback;

    writeback = g_new0(VirtIOPMEMWriteback, 1);
    writeback->pmem = pmem;
    writeback->memdev = pmem->memdev;
    writeback->threshold = pmem->early_writeback;
    object_ref(OBJECT(writeback->memdev));
    pmem->writeback = writeback;
    thread_pool_submit_aio(virtio_pmem_writeback_run, writeback,
                           virtio_pmem_writeback_done, writeback);
}

/*
 * A guest that flushes will flush again, and then wait for all that any of its
 * processes has stored by then. Keep that small.
 */
static void virtio_pmem_writeback_wake(VirtIOPMEM *pmem)
{
    if (!pmem->early_writeback) {
        return;
    }
    pmem->writeback_until = qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL) +
                            VIRTIO_PMEM_WRITEBACK_AWAKE_MS;
    if (!pmem->writeback && !timer_pending(pmem->writeback_timer)) {
        virtio_pmem_writeback_schedule(pmem, VIRTIO_PMEM_WRITEBACK_PERIOD_MS);
    }
}

/* Have Linux read ahead of a fault on an image, or read that page alone. */
static void virtio_pmem_read_ahead_advise(HostMemoryBackend *memdev,
                                          uint64_t from, bool on)
{
    uint8_t *ram = memory_region_get_ram_ptr(&memdev->mr);

    madvise(ram + from, memory_region_size(&memdev->mr) - from,
            on ? MADV_NORMAL : MADV_RANDOM);
}

/* All but what vCPUs have read */
static VirtIOPMEMReads virtio_pmem_count_reads(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return (VirtIOPMEMReads) {
        .vcpus = -1,
        .all = usage.ru_inblock * 512LL / qemu_real_host_page_size(),
        .faults = usage.ru_majflt,
    };
}

/*
 * The pages that threads have read, or -1 if the kernel does not tell: it may
 * not have such a file, a security policy may forbid it, or a thread may have
 * ended.
 */
static int64_t virtio_pmem_thread_reads(GArray *tids)
{
    int64_t bytes = 0;
    guint i;

    for (i = 0; i < tids->len; i++) {
        g_autofree char *path = g_strdup_printf("/proc/self/task/%d/io",
                                                g_array_index(tids, int, i));
        g_autofree char *text = NULL;
        const char *line;

        if (!g_file_get_contents(path, &text, NULL, NULL) ||
            !(line = strstr(text, "\nread_bytes: "))) {
            return -1;
        }
        bytes += g_ascii_strtoll(line + strlen("\nread_bytes: "), NULL, 10);
    }
    return bytes / qemu_real_host_page_size();
}

/*
 * The pages of images that were read. vCPUs read hardly anything else; other
 * threads read for other disks. Faults are for what vCPUs do not read: what
 * QEMU itself touches, and file systems that do not count what they read. KVM
 * has another thread complete faults, so for vCPUs they are not enough.
 */
static int64_t virtio_pmem_reads_between(const VirtIOPMEMReads *from,
                                         const VirtIOPMEMReads *to)
{
    return MAX(from->vcpus >= 0 && to->vcpus >= 0 ? to->vcpus - from->vcpus
                                                  : to->all - from->all,
               to->faults - from->faults);
}

/* How many pages have to be read to show whether readahead is of use */
static int64_t virtio_pmem_read_ahead_enough(bool trial)
{
    return trial ? VIRTIO_PMEM_TRIAL_PAGES : VIRTIO_PMEM_READ_AHEAD_PAGES;
}

/*
 * Look again after a while. Counting a large cache is slow: spend at most 1 %
 * on it.
 */
static void virtio_pmem_read_ahead_schedule(int64_t count_usecs)
{
    int64_t period = virtio_pmem_read_ahead.trial
                     ? VIRTIO_PMEM_TRIAL_PERIOD_MS
                     : VIRTIO_PMEM_READ_AHEAD_PERIOD_MS;
    VirtIOPMEM *pmem;

    QLIST_FOREACH(pmem, &virtio_pmem_devices, next) {
        if (pmem->read_ahead == ON_OFF_AUTO_AUTO) {
            timer_mod(virtio_pmem_read_ahead.timer,
                      qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL) +
                      MAX(period, count_usecs / 10));
            return;
        }
    }
}

/*
 * Count the pages that are cached or evicted. Return false if the kernel does
 * not tell; on overlayfs it says that there are none.
 */
static bool virtio_pmem_read_ahead_count(VirtIOPMEMReadAheadJudge *judge)
{
    int64_t start = g_get_monotonic_time();
    struct virtio_pmem_cachestat stat;
    guint i;

    for (i = 0; i < judge->images->len; i++) {
        if (virtio_pmem_cachestat(
                g_array_index(judge->images, VirtIOPMEMReadAheadImage,
                              i).memdev, 0, &stat) < 0) {
            return false;
        }
        judge->pages += stat.cache + stat.evicted;
    }
    judge->usecs = g_get_monotonic_time() - start;
    return judge->pages > 0;
}

/*
 * Linux remembers which pages it has evicted, so a page that is read for the
 * first time adds one to those that are cached or evicted, and a page that is
 * read again does not. Readahead is of use to a guest that reads what is new.
 * If most of what is read was evicted before, memory is short, and what is
 * read ahead evicts more of it.
 */
static void virtio_pmem_read_ahead_decide(VirtIOPMEMReadAheadJudge *judge,
                                          int64_t reads)
{
    int64_t new_pages = judge->pages - judge->base_pages;

    if (new_pages < 0) {
        /* Somebody has dropped pages, which Linux does not remember. */
        return;
    }
    judge->off = new_pages < reads / 2;
    /*
     * After several times the host's memory, Linux forgets the pages that it
     * has evicted, and all that is new looks old.
     */
    judge->trial = judge->off && judge->was_off && judge->may_try;
    judge->off &= !judge->trial;
    trace_virtio_pmem_read_ahead(reads, new_pages, !judge->off, judge->trial);
}

/* In a thread, as madvise() waits while a vCPU waits for storage. */
static int virtio_pmem_read_ahead_run(void *opaque)
{
    VirtIOPMEMReadAheadJudge *judge = opaque;
    int64_t reads;
    guint i;

    judge->reads.vcpus = virtio_pmem_thread_reads(judge->vcpus);
    /* A vCPU was unplugged, or the kernel no longer tells. */
    judge->changed |= judge->reads.vcpus < judge->base_reads.vcpus;
    reads = virtio_pmem_reads_between(&judge->base_reads, &judge->reads);
    if (!judge->changed &&
        reads < virtio_pmem_read_ahead_enough(judge->trial)) {
        /* Most was for other disks. */
        return 0;
    }
    judge->counted = virtio_pmem_read_ahead_count(judge);
    if (!judge->counted) {
        judge->off = false;
        judge->trial = false;
    } else if (!judge->changed) {
        virtio_pmem_read_ahead_decide(judge, reads);
    }
    for (i = 0; judge->off != judge->was_off && i < judge->images->len; i++) {
        VirtIOPMEMReadAheadImage *image =
            &g_array_index(judge->images, VirtIOPMEMReadAheadImage, i);

        if (image->automatic) {
            virtio_pmem_read_ahead_advise(image->memdev, image->from,
                                          !judge->off);
        }
    }
    return 0;
}

static void virtio_pmem_read_ahead_done(void *opaque, int ret)
{
    VirtIOPMEMReadAheadJudge *judge = opaque;
    VirtIOPMEM *pmem;

    QLIST_FOREACH(pmem, &virtio_pmem_devices, next) {
        if (pmem->read_ahead == ON_OFF_AUTO_AUTO) {
            pmem->reads_ahead = !judge->off;
        }
        if (virtio_pmem_read_ahead.changed) {
            /* The thread may not know this one, or what it is now. */
            virtio_pmem_read_ahead_advise(pmem->memdev, pmem->memmap.end,
                                          pmem->reads_ahead);
        }
    }
    if (judge->off != judge->was_off) {
        virtio_pmem_read_ahead.off_until =
            qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL) +
            VIRTIO_PMEM_READ_AHEAD_OFF_MS;
    }
    virtio_pmem_read_ahead.judging = false;
    virtio_pmem_read_ahead.off = judge->off;
    virtio_pmem_read_ahead.trial = judge->trial;
    if (judge->counted) {
        virtio_pmem_read_ahead.reads = judge->reads;
        virtio_pmem_read_ahead.pages = judge->pages;
    } else {
        virtio_pmem_read_ahead.changed |= judge->changed;
    }
    virtio_pmem_read_ahead_schedule(judge->usecs);
    g_array_free(judge->images, true);
    g_array_free(judge->vcpus, true);
    g_free(judge);
}

static void virtio_pmem_read_ahead_unref(gpointer image)
{
    object_unref(OBJECT(((VirtIOPMEMReadAheadImage *)image)->memdev));
}

static GArray *virtio_pmem_read_ahead_images(void)
{
    GArray *images = g_array_new(false, false,
                                 sizeof(VirtIOPMEMReadAheadImage));
    VirtIOPMEM *pmem;

    g_array_set_clear_func(images, virtio_pmem_read_ahead_unref);
    QLIST_FOREACH(pmem, &virtio_pmem_devices, next) {
        VirtIOPMEMReadAheadImage image = {
            .memdev = pmem->memdev,
            .from = pmem->memmap.end,
            .automatic = pmem->read_ahead == ON_OFF_AUTO_AUTO,
        };

        object_ref(OBJECT(pmem->memdev));
        g_array_append_val(images, image);
    }
    return images;
}

static GArray *virtio_pmem_read_ahead_vcpus(void)
{
    GArray *vcpus = g_array_new(false, false, sizeof(int));
    int last = 0;
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        /* TCG may run all of them in one thread. */
        if (cpu->thread_id != last) {
            last = cpu->thread_id;
            g_array_append_val(vcpus, last);
        }
    }
    return vcpus;
}

static void virtio_pmem_read_ahead_look(void *opaque)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL);
    VirtIOPMEMReads reads = virtio_pmem_count_reads();
    VirtIOPMEMReadAheadJudge *judge;

    if (now >= virtio_pmem_read_ahead.off_until) {
        virtio_pmem_read_ahead.trial = false;
    }
    if (virtio_pmem_reads_between(&virtio_pmem_read_ahead.seen, &reads) <
        virtio_pmem_read_ahead_enough(virtio_pmem_read_ahead.trial)) {
        virtio_pmem_read_ahead_schedule(0);
        return;
    }
    judge = g_new0(VirtIOPMEMReadAheadJudge, 1);
    judge->images = virtio_pmem_read_ahead_images();
    judge->vcpus = virtio_pmem_read_ahead_vcpus();
    judge->was_off = judge->off = virtio_pmem_read_ahead.off;
    judge->trial = virtio_pmem_read_ahead.trial;
    judge->may_try = now >= virtio_pmem_read_ahead.off_until;
    judge->changed = virtio_pmem_read_ahead.changed;
    judge->base_reads = virtio_pmem_read_ahead.reads;
    judge->base_pages = virtio_pmem_read_ahead.pages;
    judge->reads = reads;
    virtio_pmem_read_ahead.seen = reads;
    virtio_pmem_read_ahead.changed = false;
    virtio_pmem_read_ahead.judging = true;
    thread_pool_submit_aio(virtio_pmem_read_ahead_run, judge,
                           virtio_pmem_read_ahead_done, judge);
}

/* After a device was added to the list */
static void virtio_pmem_read_ahead_start(VirtIOPMEM *pmem)
{
    struct virtio_pmem_cachestat stat;

    if (pmem->read_ahead == ON_OFF_AUTO_AUTO &&
        virtio_pmem_cachestat(pmem->memdev, 0, &stat) < 0) {
        pmem->read_ahead = ON_OFF_AUTO_ON;
    }
    pmem->reads_ahead = pmem->read_ahead == ON_OFF_AUTO_AUTO
                        ? !virtio_pmem_read_ahead.off
                        : pmem->read_ahead == ON_OFF_AUTO_ON;
    virtio_pmem_read_ahead_advise(pmem->memdev, pmem->memmap.end,
                                  pmem->reads_ahead);
    virtio_pmem_read_ahead.changed = true;
    if (!virtio_pmem_read_ahead.timer) {
        virtio_pmem_read_ahead.timer = timer_new_ms(
            QEMU_CLOCK_VIRTUAL, virtio_pmem_read_ahead_look, NULL);
    }
    if (!virtio_pmem_read_ahead.judging &&
        !timer_pending(virtio_pmem_read_ahead.timer)) {
        virtio_pmem_read_ahead_schedule(0);
    }
}

/* After a device was removed from the list */
static void virtio_pmem_read_ahead_stop(void)
{
    virtio_pmem_read_ahead.changed = true;
}

static void virtio_pmem_sync_start(VirtIOPMEM *pmem);

static void virtio_pmem_stop_vm_bh(void *opaque)
{
    VirtIOPMEM *pmem = opaque;

    if ((pmem->stopping || pmem->held_back) && runstate_is_running()) {
        vm_stop(RUN_STATE_IO_ERROR);
    }
    object_unref(OBJECT(pmem));
}

/*
 * Stop the VM as soon as the main loop can. A request to the main loop
 * (qemu_system_vmstop_request) would be lost if "cont" came first.
 */
static void virtio_pmem_stop_vm(VirtIOPMEM *pmem)
{
    object_ref(OBJECT(pmem));
    aio_bh_schedule_oneshot(qemu_get_aio_context(), virtio_pmem_stop_vm_bh,
                            pmem);
}

/*
 * Stop the guest because of an error. Its requests are answered once no vCPU
 * runs, so it hears of the error only when somebody resumes it.
 */
static void virtio_pmem_stop_guest(VirtIOPMEM *pmem, int error)
{
    pmem->stopping = true;
    QSIMPLEQ_CONCAT(&pmem->syncing, &pmem->waiting);
    QSIMPLEQ_CONCAT(&pmem->waiting, &pmem->syncing);
    /* First, so that BLOCK_IO_ERROR is sent before STOP. */
    virtio_pmem_report_error(pmem, error);
    virtio_pmem_stop_vm(pmem);
}

static void virtio_pmem_sync_done(void *opaque, int ret)
{
    VirtIOPMEMSync *sync = opaque;
    VirtIOPMEM *pmem = sync->pmem;

    if (pmem) {
        /* The guest can have its device ejected by the interrupt. */
        object_ref(OBJECT(pmem));
        virtio_pmem_sync_account(pmem, sync);
        if (!sync->last) {
            /* A stop is not the guest's doing. */
            virtio_pmem_charge(pmem, sync->dirty);
        }
        if (sync->error && sync->last) {
            pmem->stop_error = sync->error;
        }
        if (!sync->error) {
            pmem->memmap = sync->memmap;
        }
        pmem->sync = NULL;
        if (sync->error && virtio_pmem_error_stops(pmem)) {
            virtio_pmem_stop_guest(pmem, sync->error);
        } else {
            if (sync->error) {
                virtio_pmem_report_error(pmem, sync->error);
            }
            virtio_pmem_answer(pmem, &pmem->syncing, sync->error ? -1 : 0);
            virtio_pmem_sync_start(pmem);
        }
        object_unref(OBJECT(pmem));
        aio_wait_kick();
    }
    object_unref(OBJECT(sync->memdev));
    g_free(sync);
}

/*
 * Start one sync for all the requests that wait, unless one is running: that
 * one began before they came, so it cannot answer them. Two must not run at a
 * time: Linux reports an error once for each open file, perhaps to the sync
 * that does not answer for the lost page.
 */
static void virtio_pmem_sync_start(VirtIOPMEM *pmem)
{
    VirtIOPMEMRequest *req;
    VirtIOPMEMSync *sync;

    if (pmem->sync || pmem->stopping) {
        return;
    }
    if (pmem->last_error && !QSIMPLEQ_EMPTY(&pmem->waiting)) {
        /*
         * Linux marks as clean the pages that it could not write, so another
         * sync would succeed without writing them.
         */
        if (virtio_pmem_answer(pmem, &pmem->waiting, -1)) {
            pmem->stop_error = 0;
        }
    }
    if (!pmem->last_sync_wanted &&
        (QSIMPLEQ_EMPTY(&pmem->waiting) || !virtio_pmem_within_limit(pmem))) {
        return;
    }

    trace_virtio_pmem_sync_start(pmem);
    QSIMPLEQ_CONCAT(&pmem->syncing, &pmem->waiting);
    QSIMPLEQ_FOREACH(req, &pmem->syncing, next) {
        pmem->merged += req != QSIMPLEQ_FIRST(&pmem->syncing);
    }
    sync = g_new0(VirtIOPMEMSync, 1);
    sync->pmem = pmem;
    sync->memdev = pmem->memdev;
    sync->last = pmem->last_sync_wanted;
    sync->memmap = pmem->memmap;
    sync->counted = pmem->sync_bps && !sync->last;
    object_ref(OBJECT(sync->memdev));
    pmem->sync = sync;
    pmem->last_sync_wanted = false;
    thread_pool_submit_aio(virtio_pmem_sync_run, sync, virtio_pmem_sync_done,
                           sync);
}

static void virtio_pmem_limit_passed(void *opaque)
{
    virtio_pmem_sync_start(opaque);
}

/*
 * Read the type of @req and check that there is room for the answer.
 *
 * The answer must go to RAM. For other memory the element holds a bounce
 * buffer, and releasing it writes to another device's registers.
 */
static bool virtio_pmem_parse(VirtIOPMEMRequest *req, uint32_t *type)
{
    struct virtio_pmem_req head;
    ram_addr_t offset;
    unsigned int i;

    if (iov_to_buf(req->elem.out_sg, req->elem.out_num, 0, &head,
                   sizeof(head)) < sizeof(head)) {
        return false;
    }
    *type = le32_to_cpu(head.type);
    for (i = 0; i < req->elem.in_num; i++) {
        if (!memory_region_from_host(req->elem.in_sg[i].iov_base, &offset)) {
            return false;
        }
    }
    return iov_size(req->elem.in_sg, req->elem.in_num) >=
           sizeof(struct virtio_pmem_resp);
}

static void virtio_pmem_handle_output(VirtIODevice *vdev, VirtQueue *vq)
{
    VirtIOPMEM *pmem = VIRTIO_PMEM(vdev);
    VirtIOPMEMRequests unknown = QSIMPLEQ_HEAD_INITIALIZER(unknown);
    VirtIOPMEMRequest *req;
    uint32_t type;

    if (!virtio_pmem_check_ring(pmem)) {
        return;
    }
    /*
     * Nothing is answered in this loop, so a guest that keeps adding requests
     * runs out of descriptors.
     */
    do {
        virtio_queue_set_notification(vq, 0);
        while ((req = virtqueue_pop(vq, sizeof(VirtIOPMEMRequest)))) {
            if (!virtio_pmem_parse(req, &type)) {
                virtio_error(vdev, "virtio-pmem: malformed request");
                virtqueue_detach_element(vq, &req->elem, 0);
                g_free(req);
                break;
            }
            trace_virtio_pmem_request(pmem, type, pmem->sync);
            if (type != VIRTIO_PMEM_REQ_TYPE_FLUSH) {
                QSIMPLEQ_INSERT_TAIL(&unknown, req, next);
                continue;
            }
            pmem->requests++;
            QSIMPLEQ_INSERT_TAIL(&pmem->waiting, req, next);
            virtio_pmem_writeback_wake(pmem);
        }
        virtio_queue_set_notification(vq, 1);
        /* To QEMU 7.2, a packed ring is not empty when the device is broken. */
    } while (!vdev->broken && !virtio_queue_empty(vq));

    virtio_pmem_answer(pmem, &unknown, -1);
    virtio_pmem_sync_start(pmem);
}

/*
 * Begin the last sync of every device, once the vCPUs have stopped: then a stop
 * takes as long as the slowest disk, not as long as all of them together.
 */
static void virtio_pmem_begin_last_syncs(void)
{
    VirtIOPMEM *pmem;

    QLIST_FOREACH(pmem, &virtio_pmem_devices, next) {
        pmem->stopping = false;
        if (!pmem->last_sync_begun && !pmem->given_up && !pmem->incoming) {
            pmem->last_sync_begun = true;
            pmem->last_sync_wanted = true;
            virtio_pmem_sync_start(pmem);
        }
    }
}

/* Wait until no request is in flight and all of the image is durable. */
static void virtio_pmem_quiesce(VirtIOPMEM *pmem)
{
    uint64_t errors = pmem->errors;

    trace_virtio_pmem_quiesce(pmem);
    if (!pmem->last_sync_begun) {
        virtio_pmem_begin_last_syncs();
    }
    AIO_WAIT_WHILE(NULL, pmem->sync || pmem->writeback);
    pmem->last_sync_begun = false;
    if (pmem->errors > errors) {
        pmem->stop_error = pmem->last_error;
    }
    trace_virtio_pmem_quiesced(pmem, pmem->stop_error);
}

/* Check that nobody has written to the image since it was given up. */
static bool virtio_pmem_check_unchanged(VirtIOPMEM *pmem, Error **errp)
{
    struct statx_timestamp mtime;
    Error *err = NULL;

    if (!virtio_pmem_last_write(pmem, &mtime, errp)) {
        return false;
    }
    if (pmem->lock == ON_OFF_AUTO_OFF) {
        return true;
    }
    if (mtime.tv_sec != pmem->given_up_mtime.tv_sec ||
        mtime.tv_nsec != pmem->given_up_mtime.tv_nsec) {
        error_setg(errp, "memory backend '%s' was written to by another "
                   "process or host since the guest's state was saved",
                   virtio_pmem_id(pmem));
        return false;
    }
    /* A block device has no such time; the samples show some of the writes. */
    if (virtio_pmem_is_block(pmem) &&
        !virtio_pmem_compare(pmem, &pmem->identity, &err)) {
        error_propagate_prepend(errp, err,
                                "cannot reacquire the block device: ");
        return false;
    }
    return true;
}

/*
 * Reacquire the image that was given up. Nobody may have changed it meanwhile:
 * the guest would not know.
 */
static bool virtio_pmem_reacquire(VirtIOPMEM *pmem, Error **errp)
{
    if (virtio_pmem_lock_owner(pmem, errp) < 0) {
        return false;
    }
    if (!virtio_pmem_check_unchanged(pmem, errp)) {
        virtio_pmem_unlock_all(pmem);
        return false;
    }
    pmem->given_up = false;
    return true;
}

/*
 * Take over the image, and make sure that the guest sees what the source has
 * written to it. Return 0 or -errno.
 */
static int virtio_pmem_take_over(VirtIOPMEM *pmem, Error **errp)
{
    ERRP_GUARD();
    VirtIOPMEMIdentity here;
    bool same_file;
    int ret;

    /* First, so that nobody changes a page that has been counted. */
    ret = virtio_pmem_lock_owner(pmem, errp);
    if (ret < 0) {
        return ret;
    }
    if (!virtio_pmem_identify(pmem, &here, errp)) {
        return -EIO;
    }
    same_file = here.boot_id[0] && here.device == pmem->identity.device &&
                here.inode == pmem->identity.inode &&
                !memcmp(here.boot_id, pmem->identity.boot_id,
                        sizeof(here.boot_id));
    trace_virtio_pmem_take_over(pmem, same_file, pmem->identity.samples);
    /* On the same host the page cache is the same, too. */
    if (!same_file && pmem->drop_cache && !virtio_pmem_drop_cache(pmem, errp)) {
        error_append_hint(errp, "On storage that keeps all hosts' caches "
                          "coherent, set drop-cache=off.\n");
        return -ESTALE;
    }
    if (!virtio_pmem_compare(pmem, &pmem->identity, errp)) {
        return -ESTALE;
    }
    virtio_pmem_unlock(pmem, VIRTIO_PMEM_LOCK_CLAIM, &pmem->claim);
    /* The source has synced all of the image. */
    pmem->memmap = virtio_pmem_find_memmap(pmem->memdev);
    pmem->incoming = false;
    return 0;
}

/* Whether the guest may run on the image as it is now */
static bool virtio_pmem_check_run(VirtIOPMEM *pmem, Error **errp)
{
    if (pmem->given_up) {
        return virtio_pmem_reacquire(pmem, errp);
    }
    if (!pmem->incoming) {
        return true;
    }
    if (!pmem->loaded) {
        error_setg(errp, "memory backend '%s': the migration stream has no "
                   "state of this device", virtio_pmem_id(pmem));
        return false;
    }
    /* The source's version of this device has no hand-over. */
    return virtio_pmem_take_over(pmem, errp) == 0;
}

static void virtio_pmem_stop_vcpu(CPUState *cpu, run_on_cpu_data data)
{
    cpu->stop = true;
}

/*
 * Keep the vCPUs, which are about to start, from running: the VM stops as it
 * does for an I/O error.
 */
static void virtio_pmem_hold_back(VirtIOPMEM *pmem)
{
    CPUState *cpu;

    pmem->held_back = true;
    /* What is queued here comes before the first instruction. */
    CPU_FOREACH(cpu) {
        async_run_on_cpu(cpu, virtio_pmem_stop_vcpu, RUN_ON_CPU_NULL);
    }
    virtio_pmem_stop_vm(pmem);
}

/*
 * Whoever has the image, such as a destination that failed, may be about to
 * exit. A timer retries, as nothing may wait for that with QEMU's lock held.
 */
static void virtio_pmem_retry_later(VirtIOPMEM *pmem)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);

    if (!timer_pending(pmem->retry_timer)) {
        pmem->retry_until = now + VIRTIO_PMEM_RETRY_MS;
        timer_mod(pmem->retry_timer, now + VIRTIO_PMEM_RETRY_PERIOD_MS);
    }
}

static void virtio_pmem_retry(void *opaque)
{
    VirtIOPMEM *pmem = opaque;
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    Error *err = NULL;

    if (virtio_pmem_check_run(pmem, &err)) {
        if (pmem->held_back && runstate_check(RUN_STATE_IO_ERROR)) {
            info_report("virtio-pmem: memory backend '%s' is available again, "
                        "resuming the guest", virtio_pmem_id(pmem));
            pmem->held_back = false;
            vm_start();
        }
        return;
    }
    if (now < pmem->retry_until) {
        error_free(err);
        timer_mod(pmem->retry_timer, now + VIRTIO_PMEM_RETRY_PERIOD_MS);
        return;
    }
    error_reportf_err(err, "virtio-pmem: gave up after %d s: ",
                      VIRTIO_PMEM_RETRY_MS / 1000);
}

static void virtio_pmem_vm_change_state(void *opaque, bool running,
                                        RunState state)
{
    VirtIOPMEM *pmem = opaque;
    Error *err = NULL;

    if (!running) {
        virtio_pmem_quiesce(pmem);
        return;
    }
    pmem->held_back = false;
    /* One may have begun for a save that failed in another device. */
    pmem->last_sync_begun = false;
    if (!virtio_pmem_check_run(pmem, &err)) {
        error_reportf_err(err, "virtio-pmem: the guest cannot run: ");
        virtio_pmem_hold_back(pmem);
        if (pmem->given_up) {
            virtio_pmem_retry_later(pmem);
        }
    }
}

/*
 * Whether this save is a snapshot, which is loaded later, perhaps more than
 * once. savevm saves without a migration.
 */
static bool virtio_pmem_is_snapshot(VirtIOPMEM *pmem)
{
    MigrationCapabilityStatusList *list, *item;
    bool background = false;

    list = qmp_query_migrate_capabilities(NULL);
    for (item = list; item; item = item->next) {
        background |= item->value->capability ==
                      MIGRATION_CAPABILITY_BACKGROUND_SNAPSHOT &&
                      item->value->state;
    }
    qapi_free_MigrationCapabilityStatusList(list);
    return background || !pmem->migrating;
}

/* Whether this state and the image together make up the guest */
static bool virtio_pmem_can_save(VirtIOPMEM *pmem, Error **errp)
{
    if (virtio_pmem_is_snapshot(pmem)) {
        error_setg(errp, "cannot save a snapshot of the VM: it would not "
                   "contain memory backend '%s'", virtio_pmem_id(pmem));
        return false;
    }
    if (!pmem->memdev->share) {
        error_setg(errp, "memory backend '%s' is not shared (share=on), so "
                   "what the guest wrote cannot be migrated",
                   virtio_pmem_id(pmem));
        return false;
    }
    if (pmem->incoming || pmem->given_up) {
        error_setg(errp, "this QEMU does not own memory backend '%s'",
                   virtio_pmem_id(pmem));
        return false;
    }
    if (pmem->stop_error) {
        error_setg(errp, "memory backend '%s' could not be synced (%s), the "
                   "guest must not leave this host", virtio_pmem_id(pmem),
                   strerror(pmem->stop_error));
        return false;
    }
    return virtio_pmem_check_file(pmem, errp);
}

/*
 * All that can fail is done here, while this QEMU still owns the image.
 */
static int virtio_pmem_pre_save(void *opaque)
{
    VirtIOPMEM *pmem = opaque;
    Error *err = NULL;

    /* After a failed migration, a paused guest may not own its image yet. */
    if (pmem->given_up && !virtio_pmem_reacquire(pmem, &err)) {
        goto fail;
    }
    /*
     * Sync again: other devices may have written to the image by DMA until the
     * block layer was drained, which is after all of them were stopped.
     */
    virtio_pmem_quiesce(pmem);
    if (!virtio_pmem_can_save(pmem, &err) ||
        !virtio_pmem_identify(pmem, &pmem->identity, &err) ||
        !virtio_pmem_sample(pmem, &pmem->identity, &err) ||
        !virtio_pmem_last_write(pmem, &pmem->given_up_mtime, &err)) {
        goto fail;
    }
    pmem->identity.locking = pmem->locking;
    pmem->saved = true;
    return 0;

fail:
    virtio_pmem_fail_migration(err, "virtio-pmem: ");
    return -(pmem->stop_error ?: EINVAL);
}

static int virtio_pmem_pre_load(void *opaque)
{
    VirtIOPMEM *pmem = opaque;

    if (!pmem->incoming) {
        error_report("virtio-pmem: cannot load a snapshot of the VM: it does "
                     "not contain memory backend '%s', which the guest uses",
                     virtio_pmem_id(pmem));
        return -EINVAL;
    }
    return 0;
}

static int virtio_pmem_post_load(void *opaque, int version_id)
{
    VirtIOPMEM *pmem = opaque;

    virtio_pmem_queue_enable(VIRTIO_DEVICE(pmem), 0);
    pmem->loaded = true;
    return 0;
}

/*
 * The hand-over: a section that comes after those of all devices, so that
 * nothing can fail after the image is given up.
 */
static int virtio_pmem_hand_over(void *opaque)
{
    VirtIOPMEM *pmem = opaque;
    Error *err = NULL;

    if (!pmem->saved) {
        /* Out of turn: a migration puts this section last. */
        if (virtio_pmem_can_save(pmem, &err)) {
            error_setg(&err, "the state of memory backend '%s' has not been "
                       "saved", virtio_pmem_id(pmem));
        }
        virtio_pmem_fail_migration(err, "virtio-pmem: ");
        return -EINVAL;
    }
    pmem->saved = false;
    pmem->migrating = false;
    pmem->given_up = true;
    virtio_pmem_unlock_all(pmem);
    return 0;
}

static int virtio_pmem_handed_over(void *opaque, int version_id)
{
    VirtIOPMEM *pmem = opaque, *other;
    Error *err = NULL;
    int ret;

    QLIST_FOREACH(other, &virtio_pmem_devices, next) {
        if (other->incoming && !other->loaded) {
            error_setg(&err, "memory backend '%s': the migration stream has "
                       "no state of this device", virtio_pmem_id(other));
            virtio_pmem_fail_migration(err, "virtio-pmem: ");
            return -EINVAL;
        }
    }
    if (pmem->identity.samples > VIRTIO_PMEM_SAMPLES) {
        error_setg(&err, "memory backend '%s': the migration stream has %"
                   PRIu32 " samples, at most %d are possible",
                   virtio_pmem_id(pmem), pmem->identity.samples,
                   VIRTIO_PMEM_SAMPLES);
        virtio_pmem_fail_migration(err, "virtio-pmem: ");
        return -EINVAL;
    }
    if (pmem->identity.locking && !pmem->locking &&
        pmem->lock != ON_OFF_AUTO_OFF) {
        error_setg(&err, "memory backend '%s' is locked at the source, and "
                   "cannot be locked here", virtio_pmem_id(pmem));
        virtio_pmem_fail_migration(err, "virtio-pmem: ");
        return -ENOLCK;
    }
    ret = virtio_pmem_take_over(pmem, &err);
    if (ret < 0) {
        virtio_pmem_fail_migration(err, "virtio-pmem: ");
    }
    return ret;
}

static const VMStateDescription vmstate_virtio_pmem_hand_over = {
    .name = "virtio-pmem-hand-over",
    .priority = VIRTIO_PMEM_PRI_LAST,
    .version_id = 1,
    .minimum_version_id = 1,
    .pre_save = virtio_pmem_hand_over,
    .post_load = virtio_pmem_handed_over,
    .fields = (const VMStateField[]) {
        VMSTATE_BOOL(identity.locking, VirtIOPMEM),
        VMSTATE_UINT8_ARRAY(identity.boot_id, VirtIOPMEM, 36),
        VMSTATE_UINT64(identity.device, VirtIOPMEM),
        VMSTATE_UINT64(identity.inode, VirtIOPMEM),
        VMSTATE_UINT32(identity.samples, VirtIOPMEM),
        VMSTATE_UINT64_ARRAY(identity.offset, VirtIOPMEM, VIRTIO_PMEM_SAMPLES),
        VMSTATE_UINT64_ARRAY(identity.checksum, VirtIOPMEM,
                             VIRTIO_PMEM_SAMPLES),
        VMSTATE_END_OF_LIST()
    },
};

static int virtio_pmem_register_hand_over(VirtIOPMEM *pmem)
{
    return vmstate_register(VMSTATE_IF(pmem), 0,
                            &vmstate_virtio_pmem_hand_over, pmem);
}

static void virtio_pmem_unregister_hand_over(VirtIOPMEM *pmem)
{
    vmstate_unregister(VMSTATE_IF(pmem), &vmstate_virtio_pmem_hand_over, pmem);
}

/* A migration begins: put the section after those plugged in since. */
static void virtio_pmem_migration_begins(void *opaque)
{
    VirtIOPMEM *pmem = opaque;

    pmem->migrating = true;
    /* Counts of an earlier one say nothing of the speed of the storage. */
    pmem->dirty_time = 0;
    pmem->last_sync_begun = false;
    pmem->saved = false;
    virtio_pmem_unregister_hand_over(pmem);
    virtio_pmem_register_hand_over(pmem);
}

/*
 * A migration has failed or was cancelled: reacquire the image, whether the
 * guest runs or is paused.
 */
static void virtio_pmem_migration_failed(void *opaque)
{
    VirtIOPMEM *pmem = opaque;

    pmem->migrating = false;
    if (pmem->given_up && !virtio_pmem_reacquire(pmem, NULL)) {
        virtio_pmem_retry_later(pmem);
    }
}

/*
 * Convergence: the switchover writes the dirty pages of all images while the
 * guest is stopped. So a migration waits, as it does for dirty RAM, until they
 * can be written within the downtime limit.
 */

/*
 * Return how many bytes of @pmem's image a switchover would write now. Set
 * @too_long if, at the recent speed of the storage, they take longer than
 * @limit milliseconds.
 */
static uint64_t virtio_pmem_count_dirty(VirtIOPMEM *pmem, uint64_t limit,
                                        bool *too_long)
{
    struct virtio_pmem_cachestat stat;
    int64_t now = g_get_monotonic_time();
    uint64_t dirty, rate;

    if (virtio_pmem_cachestat(pmem->memdev, 0, &stat) < 0) {
        /* Not known */
        return 0;
    }
    dirty = (stat.dirty + stat.writeback) * qemu_real_host_page_size();
    if (pmem->dirty_time && dirty < pmem->dirty && now > pmem->dirty_time) {
        rate = (pmem->dirty - dirty) * G_USEC_PER_SEC /
               (now - pmem->dirty_time);
        pmem->write_rate = pmem->write_rate ? (pmem->write_rate + rate) / 2
                                            : rate;
    }
    pmem->dirty = dirty;
    pmem->dirty_time = now;
    *too_long |= dirty > VIRTIO_PMEM_DIRTY_UNKNOWN_RATE &&
                 (!pmem->write_rate ||
                  dirty / (pmem->write_rate / 1000 + 1) > limit);
    trace_virtio_pmem_count_dirty(pmem, dirty, pmem->write_rate);
    return dirty;
}

/*
 * Start writeback of all images. Return how many bytes are dirty, and whether
 * they are too many for a switchover now.
 */
static uint64_t virtio_pmem_write_all(bool *too_long)
{
    g_autoptr(GPtrArray) memdevs = g_ptr_array_new();
    uint64_t limit = migrate_get_current()->parameters.downtime_limit;
    bool locked = bql_locked();
    uint64_t dirty, total = 0;
    VirtIOPMEM *pmem;
    guint i;

    *too_long = false;
    WITH_QEMU_LOCK_GUARD(&virtio_pmem_devices_mutex) {
        QLIST_FOREACH(pmem, &virtio_pmem_devices, next) {
            dirty = virtio_pmem_count_dirty(pmem, limit, too_long);
            total += dirty;
            if (dirty) {
                object_ref(OBJECT(pmem->memdev));
                g_ptr_array_add(memdevs, pmem->memdev);
            }
        }
    }
    for (i = 0; i < memdevs->len; i++) {
        /* Like early writeback, this takes no error from the last sync. */
        virtio_pmem_start_writeback(memdevs->pdata[i], 0);
    }
    if (memdevs->len && !locked) {
        bql_lock();
    }
    for (i = 0; i < memdevs->len; i++) {
        object_unref(OBJECT(memdevs->pdata[i]));
    }
    if (memdevs->len && !locked) {
        bql_unlock();
    }
    return total;
}

/*
 * QEMU compares what is left with what the network can send within the limit,
 * which says nothing of the speed of the storage. It asks very often, so count
 * at intervals.
 */
static void virtio_pmem_pending(uint64_t *must_precopy)
{
    static uint64_t pending;
    static int64_t asked;
    int64_t now = g_get_monotonic_time();
    bool too_long;

    if (now - asked >= VIRTIO_PMEM_ITERATE_US) {
        pending = virtio_pmem_write_all(&too_long);
        if (!too_long) {
            pending = 0;
        }
        asked = now;
    }
    if (pending) {
        *must_precopy += pending + migrate_get_current()->threshold_size;
    }
}

static int virtio_pmem_save_iterate(QEMUFile *f, void *opaque)
{
    uint64_t pending = 0;

    virtio_pmem_pending(&pending);
    if (pending) {
        /* Wait for the storage, not for the network. */
        g_usleep(VIRTIO_PMEM_ITERATE_US);
    }
    return 1;
}

VIRTIO_PMEM_DEFINE_PENDING(virtio_pmem_pending)

static int virtio_pmem_load_state(QEMUFile *f, void *opaque, int version_id)
{
    return 0;
}

/*
 * One for all devices, and never unregistered: a guest can eject its device
 * while the migration thread is in here. The sections in the stream are empty.
 */
static const SaveVMHandlers virtio_pmem_writeback_handlers = {
    .save_setup = virtio_pmem_save_setup,
    .save_live_iterate = virtio_pmem_save_iterate,
    VIRTIO_PMEM_PENDING,
    .load_state = virtio_pmem_load_state,
};

static void virtio_pmem_register_writeback(void)
{
    static bool registered;

    if (!registered) {
        registered = true;
        qemu_mutex_init(&virtio_pmem_devices_mutex);
        register_savevm_live("virtio-pmem-writeback", 0, 1,
                             &virtio_pmem_writeback_handlers, NULL);
    }
}

/*
 * A load can fail after this device's part. The guest then goes on at the
 * source, while this QEMU may stay until somebody ends it.
 */
static int virtio_pmem_load_cleanup(void *opaque)
{
    if (virtio_pmem_load_failed()) {
        virtio_pmem_unlock_all(opaque);
    }
    return 0;
}

/* Without a save function it has no section in the stream. */
static const SaveVMHandlers virtio_pmem_savevm_handlers = {
    .load_cleanup = virtio_pmem_load_cleanup,
};

static void virtio_pmem_reset(VirtIODevice *vdev)
{
    virtio_pmem_discard(VIRTIO_PMEM(vdev));
}

static void virtio_pmem_queue_reset(VirtIODevice *vdev, uint32_t queue_index)
{
    virtio_pmem_discard(VIRTIO_PMEM(vdev));
}

static void virtio_pmem_get_config(VirtIODevice *vdev, uint8_t *config)
{
    VirtIOPMEM *pmem = VIRTIO_PMEM(vdev);
    struct virtio_pmem_config *pmemcfg = (struct virtio_pmem_config *)config;

    pmemcfg->start = cpu_to_le64(pmem->start);
    pmemcfg->size = cpu_to_le64(pmem->size);
}

static uint64_t virtio_pmem_get_features(VirtIODevice *vdev, uint64_t features,
                                         Error **errp)
{
    return features;
}

static void virtio_pmem_fill_device_info(const VirtIOPMEM *pmem,
                                         VirtioPMEMDeviceInfo *vi)
{
    vi->memaddr = pmem->start;
    vi->size = pmem->size;
    vi->memdev = object_get_canonical_path(OBJECT(pmem->memdev));
}

static MemoryRegion *virtio_pmem_get_memory_region(VirtIOPMEM *pmem,
                                                   Error **errp)
{
    if (!pmem->memdev) {
        error_setg(errp, "virtio-pmem needs a memory backend, set memdev");
        return NULL;
    }
    return &pmem->memdev->mr;
}

/* Refuse a backend that cannot keep the promises; warn if it may not. */
static bool virtio_pmem_check_memdev(VirtIOPMEM *pmem, Error **errp)
{
    Object *memdev = OBJECT(pmem->memdev);
    MemoryRegion *mr = &pmem->memdev->mr;

    if (host_memory_backend_is_mapped(pmem->memdev)) {
        error_setg(errp, "memory backend '%s' is used by another device",
                   virtio_pmem_id(pmem));
        return false;
    }
    if (memory_region_get_fd(mr) < 0) {
        error_setg(errp, "memory backend '%s' has no file to flush; use "
                   "memory-backend-file", virtio_pmem_id(pmem));
        return false;
    }
    if (object_property_find(memdev, "discard-data") &&
        object_property_get_bool(memdev, "discard-data", NULL)) {
        error_setg(errp, "memory backend '%s' has discard-data=on: QEMU would "
                   "destroy the image when it exits", virtio_pmem_id(pmem));
        return false;
    }
    if (memory_region_size(mr) % (2 * MiB)) {
        warn_report("virtio-pmem: size of memory backend '%s' is %" PRIu64
                    " bytes, which is not a multiple of 2 MiB: Linux will not "
                    "use it", virtio_pmem_id(pmem), memory_region_size(mr));
    }
    return true;
}

/*
 * Linux marks as written what a sync could not write, so another try would
 * succeed without it. That is why an error is neither ignored nor retried.
 */
static bool virtio_pmem_check_werror(VirtIOPMEM *pmem, Error **errp)
{
    switch (pmem->werror) {
    case BLOCKDEV_ON_ERROR_AUTO:
    case BLOCKDEV_ON_ERROR_REPORT:
    case BLOCKDEV_ON_ERROR_STOP:
        return true;
    default:
        error_setg(errp, "virtio-pmem does not support werror=%s: use report "
                   "or stop, as what a sync could not write is lost",
                   BlockdevOnError_str(pmem->werror));
        return false;
    }
}

/* The limit relies on what the kernel counts. */
static bool virtio_pmem_check_limit(VirtIOPMEM *pmem, Error **errp)
{
    struct virtio_pmem_cachestat stat;

    if (pmem->sync_bps && pmem->sync_bps < VIRTIO_PMEM_MIN_SYNC_BPS) {
        error_setg(errp, "sync-bps=%" PRIu64 ": must be 0 or at least %d",
                   pmem->sync_bps, VIRTIO_PMEM_MIN_SYNC_BPS);
        return false;
    }
    if (pmem->sync_bps && virtio_pmem_cachestat(pmem->memdev, 0, &stat) < 0) {
        error_setg_errno(errp, errno, "sync-bps needs cachestat(2), which "
                         "fails for memory backend '%s'",
                         virtio_pmem_id(pmem));
        return false;
    }
    return true;
}

/* A guest whose image the destination cannot open stays here. */
static bool virtio_pmem_block_migration(VirtIOPMEM *pmem, Error **errp)
{
    if (!pmem->memdev->share) {
        error_setg(&pmem->blocker, "virtio-pmem: memory backend '%s' is not "
                   "shared (share=on), so what the guest writes cannot be "
                   "migrated", virtio_pmem_id(pmem));
    } else if (!virtio_pmem_check_file(pmem, &pmem->blocker)) {
        error_prepend(&pmem->blocker, "virtio-pmem: ");
    } else {
        return true;
    }
    return virtio_pmem_add_blocker(&pmem->blocker, errp) >= 0;
}

static void virtio_pmem_realize(DeviceState *dev, Error **errp)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(dev);
    VirtIOPMEM *pmem = VIRTIO_PMEM(dev);

    if (!virtio_pmem_get_memory_region(pmem, errp) ||
        !virtio_pmem_check_werror(pmem, errp)) {
        return;
    }
    pmem->incoming = runstate_check(RUN_STATE_INMIGRATE);
    if (!virtio_pmem_check_memdev(pmem, errp) ||
        !virtio_pmem_check_limit(pmem, errp) ||
        !virtio_pmem_lock_start(pmem, pmem->incoming, errp)) {
        return;
    }
    pmem->size = memory_region_size(&pmem->memdev->mr);
    if (!virtio_pmem_block_migration(pmem, errp)) {
        virtio_pmem_unlock_all(pmem);
        return;
    }
    virtio_pmem_advise(pmem);
    /* Reading it caches a page, which is dropped with the others. */
    pmem->memmap = virtio_pmem_find_memmap(pmem->memdev);
    if (pmem->drop_cache) {
        /*
         * Linux keeps the pages that a sync could not write, and they look
         * clean. A guest that starts must see what is on storage.
         */
        virtio_pmem_drop_clean(pmem);
    }
    virtio_pmem_prepare_memmap(pmem, pmem->memmap.end);
    pmem->ram = (uintptr_t)memory_region_get_ram_ptr(&pmem->memdev->mr);
    pstrcpy(pmem->name, sizeof(pmem->name), virtio_pmem_id(pmem));
    virtio_pmem_register_writeback();
    WITH_QEMU_LOCK_GUARD(&virtio_pmem_devices_mutex) {
        QLIST_INSERT_HEAD(&virtio_pmem_devices, pmem, next);
    }
    virtio_pmem_read_ahead_start(pmem);
    virtio_pmem_catch_sigbus();

    host_memory_backend_set_mapped(pmem->memdev, true);
    QSIMPLEQ_INIT(&pmem->syncing);
    QSIMPLEQ_INIT(&pmem->waiting);
    pmem->writeback_timer = timer_new_ms(QEMU_CLOCK_VIRTUAL,
                                         virtio_pmem_writeback_start, pmem);
    pmem->limit_timer = timer_new_ns(QEMU_CLOCK_VIRTUAL,
                                     virtio_pmem_limit_passed, pmem);
    pmem->retry_timer = timer_new_ms(QEMU_CLOCK_REALTIME, virtio_pmem_retry,
                                     pmem);
    /*
     * Added before virtio_init() adds its own: when the VM stops, handlers of
     * one depth are called in reverse order, so the last kicks have been taken.
     */
    pmem->vm_change_state = virtio_pmem_add_vm_change_state_handler(
        dev, virtio_pmem_vm_change_state, pmem);
    virtio_init(vdev, VIRTIO_ID_PMEM, sizeof(struct virtio_pmem_config));
    pmem->rq_vq = virtio_add_queue(vdev, VIRTIO_PMEM_QUEUE_SIZE,
                                   virtio_pmem_handle_output);
    register_savevm_live("virtio-pmem-lock", VMSTATE_INSTANCE_ID_ANY, 1,
                         &virtio_pmem_savevm_handlers, pmem);
    virtio_pmem_register_hand_over(pmem);
    pmem->notifier = virtio_pmem_add_notifier(virtio_pmem_migration_begins,
                                              virtio_pmem_migration_failed,
                                              pmem);
}

static void virtio_pmem_unrealize(DeviceState *dev)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(dev);
    VirtIOPMEM *pmem = VIRTIO_PMEM(dev);

    WITH_QEMU_LOCK_GUARD(&virtio_pmem_devices_mutex) {
        QLIST_REMOVE(pmem, next);
    }
    virtio_pmem_read_ahead_stop();
    virtio_pmem_del_notifier(pmem->notifier);
    virtio_pmem_del_blocker(&pmem->blocker);
    virtio_pmem_unregister_hand_over(pmem);
    unregister_savevm(NULL, "virtio-pmem-lock", pmem);
    virtio_pmem_discard(pmem);
    pmem->stopping = false;
    pmem->held_back = false;
    if (pmem->sync) {
        pmem->sync->pmem = NULL;
        pmem->sync = NULL;
        aio_wait_kick();
    }
    timer_free(pmem->limit_timer);
    timer_free(pmem->retry_timer);
    timer_free(pmem->writeback_timer);
    if (pmem->writeback) {
        pmem->writeback->pmem = NULL;
        pmem->writeback = NULL;
        aio_wait_kick();
    }
    qemu_del_vm_change_state_handler(pmem->vm_change_state);
    /* Closing the file would unlock it, but the backend keeps it open. */
    virtio_pmem_unlock_all(pmem);
    /*
     * When the guest ejects the device, QEMU 7.2 leaves the memory mapped:
     * plugging in the same backend again would fail an assertion.
     */
    host_memory_backend_set_mapped(pmem->memdev,
        memory_region_is_mapped(&pmem->memdev->mr));
    virtio_delete_queue(pmem->rq_vq);
    virtio_cleanup(vdev);
}

/* Only whether there was an error: errno values differ between hosts. */
static int virtio_pmem_device_pre_save(void *opaque)
{
    VirtIOPMEM *pmem = opaque;

    pmem->failed = pmem->last_error != 0;
    return 0;
}

static int virtio_pmem_device_post_load(void *opaque, int version_id)
{
    VirtIOPMEM *pmem = opaque;

    pmem->last_error = pmem->failed ? EIO : 0;
    return 0;
}

static const VMStateDescription vmstate_virtio_pmem_device = {
    .name = "virtio-pmem-device",
    .version_id = 1,
    .minimum_version_id = 1,
    .pre_save = virtio_pmem_device_pre_save,
    .post_load = virtio_pmem_device_post_load,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT64_EQUAL(start, VirtIOPMEM, "virtio-pmem: memaddr"),
        VMSTATE_UINT64_EQUAL(size, VirtIOPMEM, "virtio-pmem: size of memdev"),
        VMSTATE_UINT64(failed, VirtIOPMEM),
        VMSTATE_END_OF_LIST()
    },
};

static const VMStateDescription vmstate_virtio_pmem = {
    .name = "virtio-pmem",
    .version_id = 1,
    .minimum_version_id = 1,
    .pre_save = virtio_pmem_pre_save,
    .pre_load = virtio_pmem_pre_load,
    .post_load = virtio_pmem_post_load,
    .fields = (const VMStateField[]) {
        VMSTATE_VIRTIO_DEVICE,
        VMSTATE_END_OF_LIST()
    },
};

/*
 * Counters are qdev properties, not mere QOM ones, so that the PCI device
 * has them as well and "-device virtio-pmem-pci,help" lists them.
 */
static void virtio_pmem_get_counter(Object *obj, Visitor *v, const char *name,
                                    void *opaque, Error **errp)
{
    visit_type_uint64(v, name, object_field_prop_ptr(obj, opaque), errp);
}

static void virtio_pmem_get_latency(Object *obj, Visitor *v, const char *name,
                                    void *opaque, Error **errp)
{
    uint64_t *buckets = object_field_prop_ptr(obj, opaque);
    uint64List *list = NULL;
    int i;

    for (i = VIRTIO_PMEM_LATENCY_BUCKETS - 1; i >= 0; i--) {
        QAPI_LIST_PREPEND(list, buckets[i]);
    }
    visit_type_uint64List(v, name, &list, errp);
    qapi_free_uint64List(list);
}

/* For "info qtree", which would show a list as one number */
static char *virtio_pmem_format_latency(Object *obj, const Property *prop)
{
    uint64_t *buckets = object_field_prop_ptr(obj, (Property *)prop);
    GString *text = g_string_new(NULL);
    int i;

    for (i = 0; i < VIRTIO_PMEM_LATENCY_BUCKETS; i++) {
        g_string_append_printf(text, "%s%" PRIu64, i ? " " : "", buckets[i]);
    }
    return g_string_free(text, FALSE);
}

VIRTIO_PMEM_DEFINE_PRINT(virtio_pmem_print_latency, virtio_pmem_format_latency)

static const PropertyInfo virtio_pmem_prop_counter = {
    VIRTIO_PMEM_PROPERTY_TYPE = "uint64",
    .get = virtio_pmem_get_counter,
};

static void virtio_pmem_get_flag(Object *obj, Visitor *v, const char *name,
                                 void *opaque, Error **errp)
{
    visit_type_bool(v, name, object_field_prop_ptr(obj, opaque), errp);
}

static const PropertyInfo virtio_pmem_prop_flag = {
    VIRTIO_PMEM_PROPERTY_TYPE = "bool",
    .get = virtio_pmem_get_flag,
};

static const PropertyInfo virtio_pmem_prop_latency = {
    VIRTIO_PMEM_PROPERTY_TYPE = "uint64List",
    .get = virtio_pmem_get_latency,
    .print = virtio_pmem_print_latency,
};

#define DEFINE_PROP_COUNTER(_name, _field) \
    DEFINE_PROP(_name, VirtIOPMEM, _field, virtio_pmem_prop_counter, uint64_t)

VIRTIO_PMEM_PROPERTIES virtio_pmem_properties[] = {
    DEFINE_PROP_UINT64(VIRTIO_PMEM_ADDR_PROP, VirtIOPMEM, start, 0),
    DEFINE_PROP_LINK(VIRTIO_PMEM_MEMDEV_PROP, VirtIOPMEM, memdev,
                     TYPE_MEMORY_BACKEND, HostMemoryBackend *),
    DEFINE_PROP_BOOL("drop-cache", VirtIOPMEM, drop_cache, true),
    DEFINE_PROP_BOOL("huge-pages", VirtIOPMEM, huge_pages, false),
    DEFINE_PROP_ON_OFF_AUTO("lock", VirtIOPMEM, lock, ON_OFF_AUTO_AUTO),
    DEFINE_PROP_SIZE("early-writeback", VirtIOPMEM, early_writeback,
                     16 * MiB),
    DEFINE_PROP_ON_OFF_AUTO("read-ahead", VirtIOPMEM, read_ahead,
                            ON_OFF_AUTO_AUTO),
    DEFINE_PROP_SIZE("sync-bps", VirtIOPMEM, sync_bps, 0),
    DEFINE_PROP_BLOCKDEV_ON_ERROR("werror", VirtIOPMEM, werror,
                                  BLOCKDEV_ON_ERROR_AUTO),
    DEFINE_PROP_COUNTER("requests", requests),
    DEFINE_PROP_COUNTER("merged", merged),
    DEFINE_PROP_COUNTER("syncs", syncs),
    DEFINE_PROP_COUNTER("errors", errors),
    DEFINE_PROP_COUNTER("last-error", last_error),
    DEFINE_PROP("sync-latency", VirtIOPMEM, sync_latency[0],
                virtio_pmem_prop_latency, uint64_t),
    DEFINE_PROP_COUNTER("writebacks", writebacks),
    DEFINE_PROP_COUNTER("cache-dropped", cache_dropped),
    DEFINE_PROP_COUNTER("cache-left", cache_left),
    DEFINE_PROP("reads-ahead", VirtIOPMEM, reads_ahead, virtio_pmem_prop_flag,
                bool),
    DEFINE_PROP("locked", VirtIOPMEM, owner, virtio_pmem_prop_flag, bool),
    VIRTIO_PMEM_PROPERTIES_END
};

static void virtio_pmem_class_init(ObjectClass *klass,
                                   VIRTIO_PMEM_CLASS_DATA *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);
    VirtioDeviceClass *vdc = VIRTIO_DEVICE_CLASS(klass);
    VirtIOPMEMClass *vpc = VIRTIO_PMEM_CLASS(klass);

    device_class_set_props(dc, virtio_pmem_properties);
    object_class_property_set_description(klass, "drop-cache",
        "Drop the host's page cache of memdev before a guest starts, and"
        " refuse to run an incoming one if pages are left");
    object_class_property_set_description(klass, "huge-pages",
        "Have the host cache memdev in huge pages; a flush then writes a whole"
        " huge page if any byte of it was changed");
    object_class_property_set_description(klass, "lock",
        "Lock the file of memdev, so that no other QEMU uses it; auto: unless"
        " its file system cannot");
    object_class_property_set_description(klass, "early-writeback",
        "Start writeback of memdev when this many bytes of it are dirty, so"
        " that a flush finds little to write; 0: never");
    object_class_property_set_description(klass, "read-ahead",
        "Have the host read ahead when the guest waits for a page of memdev;"
        " auto: unless it waits for pages that were evicted");
    object_class_property_set_description(klass, "sync-bps",
        "Bytes per second that flushes and early-writeback may write; 0: no"
        " limit");
    object_class_property_set_description(klass, "werror",
        "When a sync of memdev fails: report (auto) only fails every flush of"
        " the guest; stop also stops the guest, before it hears of that");
    object_class_property_set_description(klass, "requests",
        "Flush requests taken from the guest");
    object_class_property_set_description(klass, "merged",
        "Flush requests answered by a sync that another one started");
    object_class_property_set_description(klass, "syncs",
        "Syncs of memdev, those at a stop of the guest included");
    object_class_property_set_description(klass, "errors",
        "Syncs that failed");
    object_class_property_set_description(klass, "last-error",
        "errno of the last sync that failed, 0 if none has; unless it is 0"
        " every flush fails");
    object_class_property_set_description(klass, "sync-latency",
        "Syncs by duration: item n counts those of 2^n to 2^(n+1)-1"
        " microseconds");
    object_class_property_set_description(klass, "writebacks",
        "Times that early-writeback has started writeback");
    object_class_property_set_description(klass, "cache-dropped",
        "Bytes dropped from the host's page cache before the guest started, or"
        " before it ran after a migration");
    object_class_property_set_description(klass, "cache-left",
        "Bytes that were still in the host's page cache then");
    object_class_property_set_description(klass, "reads-ahead",
        "Whether the host reads ahead now");
    object_class_property_set_description(klass, "locked",
        "Whether this QEMU holds the lock of memdev");

    dc->vmsd = &vmstate_virtio_pmem;
    set_bit(DEVICE_CATEGORY_STORAGE, dc->categories);

    vdc->realize = virtio_pmem_realize;
    vdc->unrealize = virtio_pmem_unrealize;
    vdc->reset = virtio_pmem_reset;
    vdc->queue_reset = virtio_pmem_queue_reset;
    vdc->queue_enable = virtio_pmem_queue_enable;
    vdc->get_config = virtio_pmem_get_config;
    vdc->get_features = virtio_pmem_get_features;
    vdc->set_features = virtio_pmem_set_features;
    vdc->vmsd = &vmstate_virtio_pmem_device;

    vpc->fill_device_info = virtio_pmem_fill_device_info;
    vpc->get_memory_region = virtio_pmem_get_memory_region;
}

static const TypeInfo virtio_pmem_info = {
    .name          = TYPE_VIRTIO_PMEM,
    .parent        = TYPE_VIRTIO_DEVICE,
    .class_size    = sizeof(VirtIOPMEMClass),
    .class_init    = virtio_pmem_class_init,
    .instance_size = sizeof(VirtIOPMEM),
};

static void virtio_register_types(void)
{
    type_register_static(&virtio_pmem_info);
}

type_init(virtio_register_types)
