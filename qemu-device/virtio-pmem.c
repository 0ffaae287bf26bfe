/*
 * Virtio PMEM device
 *
 * A file of the host, mapped into the guest, which the guest makes durable
 * by a flush request (Virtual I/O Device Specification 1.3, section 5.19).
 * Written to replace QEMU's file of the same name; the type names, the wire
 * protocol and the meaning of the existing properties are the same. What is
 * promised, and how it is kept, is in SPEC.rst beside this file.
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/aio-wait.h"
#include "hw/qdev-properties.h"
#include "hw/virtio/virtio-pmem.h"
#include "migration/register.h"
#include "migration/vmstate.h"
#include "qapi/error.h"
#include "qapi/qapi-builtin-visit.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/iov.h"
#include "qemu/madvise.h"
#include "qemu/units.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_pmem.h"
#include "trace.h"
#include "virtio-pmem-compat.h"
#include <sys/syscall.h>

/*
 * The largest ring there is. QEMU 10.0.13 gives every queue this size
 * whatever it asks for, and a ring does not migrate to a smaller one.
 */
#define VIRTIO_PMEM_QUEUE_SIZE 1024

/*
 * The byte of the image that is locked. libvirt may lock byte 0, and the block
 * layer 100 and 200 and what follows them (block/file-posix.c): that may have
 * the image open as well, for the firmware to boot from.
 */
#define VIRTIO_PMEM_LOCK_BYTE 300

/*
 * How long to wait for another's end: at the start for a QEMU that was killed,
 * whose locks some file systems (FUSE) give up a little later; and before a
 * guest runs again.
 */
#define VIRTIO_PMEM_LOCK_START_US G_USEC_PER_SEC
#define VIRTIO_PMEM_LOCK_RUN_US (10 * G_USEC_PER_SEC)
#define VIRTIO_PMEM_LOCK_POLL_US (20 * 1000)

/* How often to look whether much is dirty. */
#define VIRTIO_PMEM_WRITEBACK_PERIOD_MS 100

/*
 * How long after a flush. The journal of a guest's file system that changes
 * commits every 5 seconds (ext4; others more seldom), which is a flush.
 */
#define VIRTIO_PMEM_WRITEBACK_AWAKE_MS 10000

struct VirtIOPMEMRequest {
    VirtQueueElement elem;
    QSIMPLEQ_ENTRY(VirtIOPMEMRequest) next;
};

/* Outlives the device if the device is unplugged meanwhile. */
struct VirtIOPMEMSync {
    VirtIOPMEM *pmem;
    HostMemoryBackend *memdev;
    int error;
    uint64_t usecs;
};

/* The same of writeback that is started before a sync asks for it. */
struct VirtIOPMEMWriteback {
    VirtIOPMEM *pmem;
    HostMemoryBackend *memdev;
    uint64_t threshold;
    uint64_t dirty;
    int64_t count_usecs;
    bool started;
    int error;
};

static const char *virtio_pmem_id(VirtIOPMEM *pmem)
{
    return object_get_canonical_path_component(OBJECT(pmem->memdev));
}

static void virtio_pmem_queue_enable(VirtIODevice *vdev, uint32_t queue_index)
{
    VirtIOPMEM *pmem = VIRTIO_PMEM(vdev);

    pmem->ring_size = virtio_queue_get_num(vdev, 0);
    pmem->ring_packed = virtio_vdev_has_feature(vdev, VIRTIO_F_RING_PACKED);
    pmem->ring_layout_changed = false;
}

/*
 * Remembered even if it changes back: QEMU maps the ring anew at times of its
 * own, by the layout that holds then.
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
 * Return whether the ring may be touched. QEMU 7.2 does not ask in all places
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
 * Answer all of @requests by @ret, 0 or -1. Return whether the guest was told.
 *
 * The interrupt comes last: where it is a message, it is a write of the
 * guest's choice to an address of its choice, this device's registers
 * included.
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
    /* To push to the ring of a broken device is to give the request back. */
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
    int64_t start = g_get_monotonic_time();

    sync->error = qemu_fdatasync(memory_region_get_fd(&sync->memdev->mr)) < 0
                  ? errno : 0;
    sync->usecs = g_get_monotonic_time() - start;
    return 0;
}

static void virtio_pmem_sync_account(VirtIOPMEM *pmem, VirtIOPMEMSync *sync)
{
    int bucket = sync->usecs ? 63 - clz64(sync->usecs) : 0;

    trace_virtio_pmem_sync_done(pmem, sync->error, sync->usecs);
    pmem->syncs++;
    pmem->sync_latency[MIN(bucket, VIRTIO_PMEM_LATENCY_BUCKETS - 1)]++;
    if (sync->error) {
        error_report("virtio-pmem: cannot sync memory backend '%s': %s; "
                     "its content on storage is unknown and "
                     "every flush fails from now on",
                     virtio_pmem_id(pmem), strerror(sync->error));
        pmem->errors++;
        pmem->last_error = sync->error;
    }
}

/* What Linux 6.5 has for counting the cached pages of a file */
struct virtio_pmem_cachestat {
    uint64_t cache;
    uint64_t dirty;
    uint64_t writeback;
    uint64_t evicted;
    uint64_t recently_evicted;
};

#ifndef __NR_cachestat
#define __NR_cachestat 451
#endif

/* Return 0, or -1 and set errno. */
static int virtio_pmem_cachestat(HostMemoryBackend *memdev,
                                 struct virtio_pmem_cachestat *stat)
{
    struct {
        uint64_t offset;
        uint64_t length;
    } whole_file = { 0, 0 };

    return syscall(__NR_cachestat, memory_region_get_fd(&memdev->mr),
                   &whole_file, stat, 0);
}

static int virtio_pmem_writeback_run(void *opaque)
{
    VirtIOPMEMWriteback *writeback = opaque;
    struct virtio_pmem_cachestat stat;
    int64_t start = g_get_monotonic_time();

    if (virtio_pmem_cachestat(writeback->memdev, &stat) < 0) {
        writeback->error = errno;
        return 0;
    }
    writeback->count_usecs = g_get_monotonic_time() - start;
    writeback->dirty = stat.dirty * qemu_real_host_page_size();
    if (writeback->dirty < writeback->threshold) {
        return 0;
    }
    /*
     * Without SYNC_FILE_RANGE_WAIT_*, which would take the error of a page
     * from the sync that has to report it.
     */
    writeback->started = true;
    if (sync_file_range(memory_region_get_fd(&writeback->memdev->mr), 0, 0,
                        SYNC_FILE_RANGE_WRITE) < 0) {
        writeback->error = errno;
    }
    return 0;
}

static void virtio_pmem_writeback_schedule(VirtIOPMEM *pmem, int64_t msecs)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL);

    if (!pmem->last_error && now < pmem->writeback_until) {
        timer_mod(pmem->writeback_timer, now + msecs);
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
        if (writeback->error) {
            /*
             * The kernel cannot do this, or could not: whether anything is
             * lost is for the next sync to say, as if the kernel had started
             * the writeback by itself.
             */
            pmem->early_writeback = 0;
        } else {
            /* Counting takes time by the size of the cache: at most 1 %. */
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
 * Whoever flushes will flush again, and then wait for all that was stored
 * until then, by others too: keep that from growing.
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

static void virtio_pmem_sync_start(VirtIOPMEM *pmem);

static void virtio_pmem_sync_done(void *opaque, int ret)
{
    VirtIOPMEMSync *sync = opaque;
    VirtIOPMEM *pmem = sync->pmem;

    if (pmem) {
        /* The guest can have its device ejected by the interrupt. */
        object_ref(OBJECT(pmem));
        virtio_pmem_sync_account(pmem, sync);
        pmem->sync = NULL;
        virtio_pmem_answer(pmem, &pmem->syncing, sync->error ? -1 : 0);
        virtio_pmem_sync_start(pmem);
        object_unref(OBJECT(pmem));
        aio_wait_kick();
    }
    object_unref(OBJECT(sync->memdev));
    g_free(sync);
}

/*
 * Have one sync answer all the requests that wait, unless one is running:
 * that one began before they came, so it cannot speak for them.
 */
static void virtio_pmem_sync_start(VirtIOPMEM *pmem)
{
    VirtIOPMEMRequest *req;
    VirtIOPMEMSync *sync;

    if (pmem->sync || QSIMPLEQ_EMPTY(&pmem->waiting)) {
        return;
    }
    if (pmem->last_error) {
        /*
         * Linux marks the pages it could not write clean, so another sync
         * would succeed without them having been written.
         */
        if (virtio_pmem_answer(pmem, &pmem->waiting, -1)) {
            pmem->stop_error = 0;
        }
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
    object_ref(OBJECT(sync->memdev));
    pmem->sync = sync;
    thread_pool_submit_aio(virtio_pmem_sync_run, sync, virtio_pmem_sync_done,
                           sync);
}

/*
 * Read the type of @req and check that there is room for the answer.
 *
 * The answer has to be in RAM. For anything else the element holds a bounce
 * buffer, and to give it back is to write to another device's registers.
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
     * Nothing is answered in here, so a guest that keeps adding requests
     * runs out of ring.
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

/* Wait until no request is in flight, then make all of the image durable. */
static void virtio_pmem_quiesce(VirtIOPMEM *pmem)
{
    VirtIOPMEMSync sync = { .memdev = pmem->memdev };
    uint64_t errors = pmem->errors;

    trace_virtio_pmem_quiesce(pmem);
    AIO_WAIT_WHILE(NULL, pmem->sync || pmem->writeback);
    virtio_pmem_sync_run(&sync);
    virtio_pmem_sync_account(pmem, &sync);
    if (pmem->errors > errors) {
        pmem->stop_error = pmem->last_error;
    }
    trace_virtio_pmem_quiesced(pmem, pmem->stop_error);
}

/*
 * Keep others from the image, unless that is not to be or it is held already:
 * those that write to it from those that read it, and from each other. What
 * is written to a private mapping is nobody else's concern.
 *
 * Return 0, -EBUSY if another has it, or -errno.
 */
static int virtio_pmem_lock(VirtIOPMEM *pmem, Error **errp)
{
    MemoryRegion *mr = &pmem->memdev->mr;
    int fd = memory_region_get_fd(mr);
    int ret;

    if (pmem->lock == ON_OFF_AUTO_OFF || pmem->locked ||
        !pmem->memdev->share || fd < 0) {
        return 0;
    }
    /*
     * Other locks than those of an open file description are lost as soon as
     * the process closes any descriptor of the file.
     */
    ret = qemu_has_ofd_lock() ? qemu_lock_fd(fd, VIRTIO_PMEM_LOCK_BYTE, 1,
                                             !memory_region_is_rom(mr))
                              : -ENOSYS;
    switch (ret) {
    case 0:
        pmem->locked = true;
        trace_virtio_pmem_lock(pmem, true);
        return 0;
    case -EAGAIN:
    case -EACCES:
        error_setg(errp, "memory backend '%s' is in use by another process "
                   "or host", virtio_pmem_id(pmem));
        return -EBUSY;
    case -EINVAL:
    case -ENOLCK:
    case -ENOSYS:
    case -EOPNOTSUPP:
        if (pmem->lock == ON_OFF_AUTO_AUTO) {
            warn_report("virtio-pmem: memory backend '%s' cannot be locked "
                        "(%s), nothing keeps others from it",
                        virtio_pmem_id(pmem), strerror(-ret));
            pmem->lock = ON_OFF_AUTO_OFF;
            return 0;
        }
        break;
    }
    error_setg_errno(errp, -ret, "cannot lock memory backend '%s'",
                     virtio_pmem_id(pmem));
    return ret;
}

static void virtio_pmem_unlock(VirtIOPMEM *pmem)
{
    int ret;

    if (!pmem->locked) {
        return;
    }
    ret = qemu_unlock_fd(memory_region_get_fd(&pmem->memdev->mr),
                         VIRTIO_PMEM_LOCK_BYTE, 1);
    if (ret) {
        warn_report("virtio-pmem: cannot unlock memory backend '%s': %s",
                    virtio_pmem_id(pmem), strerror(-ret));
    }
    pmem->locked = false;
    trace_virtio_pmem_lock(pmem, false);
}

/* The same, and wait so long for another that has it. */
static bool virtio_pmem_lock_wait(VirtIOPMEM *pmem, int64_t usecs,
                                  Error **errp)
{
    int64_t end = g_get_monotonic_time() + usecs;
    Error *err = NULL;

    while (virtio_pmem_lock(pmem, &err) == -EBUSY &&
           g_get_monotonic_time() < end) {
        error_free(err);
        err = NULL;
        g_usleep(VIRTIO_PMEM_LOCK_POLL_US);
    }
    error_propagate(errp, err);
    return !err;
}

/*
 * Have the lock before the guest runs, which has been given up if its state
 * was saved: perhaps to one that has failed to start the guest, and has yet
 * to end.
 */
static void virtio_pmem_lock_to_run(VirtIOPMEM *pmem)
{
    Error *err = NULL;

    if (!virtio_pmem_lock_wait(pmem, VIRTIO_PMEM_LOCK_RUN_US, &err)) {
        /*
         * Nothing can keep the vCPUs from running once it has come to this,
         * and both guests would write to the image. This one has synced what
         * it wrote.
         */
        error_reportf_err(err, "virtio-pmem: the guest cannot run again: ");
        exit(EXIT_FAILURE);
    }
}

static void virtio_pmem_vm_change_state(void *opaque, bool running,
                                        RunState state)
{
    if (running) {
        virtio_pmem_lock_to_run(opaque);
    } else {
        virtio_pmem_quiesce(opaque);
    }
}

static int virtio_pmem_pre_save(void *opaque)
{
    VirtIOPMEM *pmem = opaque;

    if (!pmem->memdev->share) {
        error_report("virtio-pmem: memory backend '%s' is not shared "
                     "(share=on), what the guest wrote cannot be migrated",
                     virtio_pmem_id(pmem));
        return -EINVAL;
    }
    /*
     * Once more: other devices may have written to the image, by DMA, until
     * the block layer was drained, which is after all of them were stopped.
     */
    virtio_pmem_quiesce(pmem);
    if (pmem->stop_error) {
        error_report("virtio-pmem: memory backend '%s' could not be synced "
                     "(%s), the guest must not leave this host",
                     virtio_pmem_id(pmem), strerror(pmem->stop_error));
        return -pmem->stop_error;
    }
    /* For the destination, which loads this state. */
    virtio_pmem_unlock(pmem);
    return 0;
}

/*
 * Count the bytes of @pmem's image that are in the host's page cache, and
 * those of them that are not on storage (0 if the kernel does not tell).
 * Return 0 or -errno.
 */
static int virtio_pmem_count_cache(VirtIOPMEM *pmem, uint64_t *cached,
                                   uint64_t *dirty)
{
    size_t page = qemu_real_host_page_size();
    uint8_t *ram = memory_region_get_ram_ptr(&pmem->memdev->mr);
    g_autofree unsigned char *resident = NULL;
    struct virtio_pmem_cachestat stat;
    const uint64_t chunk = 1 * GiB;
    uint64_t offset, length, i;

    if (!virtio_pmem_cachestat(pmem->memdev, &stat)) {
        *cached = stat.cache * page;
        *dirty = (stat.dirty + stat.writeback) * page;
        return 0;
    }
    if (errno != ENOSYS && errno != EOPNOTSUPP) {
        return -errno;
    }

    *cached = 0;
    *dirty = 0;
    resident = g_malloc(chunk / page);
    for (offset = 0; offset < pmem->size; offset += chunk) {
        length = MIN(chunk, pmem->size - offset);
        if (mincore(ram + offset, length, resident) < 0) {
            return -errno;
        }
        for (i = 0; i < DIV_ROUND_UP(length, page); i++) {
            *cached += resident[i] & 1 ? page : 0;
        }
    }
    return 0;
}

/*
 * Forget what this host has cached of the image, which another host has
 * written to since, and make sure that nothing was kept.
 */
static bool virtio_pmem_drop_cache(VirtIOPMEM *pmem, Error **errp)
{
    uint64_t cached, dirty;
    int ret;

    ret = virtio_pmem_count_cache(pmem, &cached, &dirty);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot count the cached pages");
        return false;
    }
    if (dirty) {
        /* To drop them would be to write them over the other host's. */
        pmem->cache_left = cached;
        error_setg(errp, "%" PRIu64 " bytes in this host's page cache were "
                   "changed here and are not on storage", dirty);
        return false;
    }
    ret = posix_fadvise(memory_region_get_fd(&pmem->memdev->mr), 0, 0,
                        POSIX_FADV_DONTNEED);
    if (ret) {
        error_setg_errno(errp, ret, "cannot drop the cached pages");
        return false;
    }
    pmem->cache_dropped = cached;
    ret = virtio_pmem_count_cache(pmem, &cached, &dirty);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot count the cached pages");
        return false;
    }
    pmem->cache_left = cached;
    pmem->cache_dropped -= MIN(cached, pmem->cache_dropped);
    trace_virtio_pmem_drop_cache(pmem, pmem->cache_dropped, cached);
    if (cached) {
        error_setg(errp, "%" PRIu64 " bytes remain in this host's page cache "
                   "and may be stale", cached);
        return false;
    }
    return true;
}

/*
 * The source has synced the image by now, as it does so before it sends any
 * device's state; and nothing has been read through the mapping yet, unless
 * by a device that was loaded before this one, whose pages would be found.
 */
static int virtio_pmem_pre_load(void *opaque)
{
    VirtIOPMEM *pmem = opaque;
    Error *err = NULL;
    int ret;

    /* First, so that nobody changes a page that has been counted. */
    ret = virtio_pmem_lock(pmem, &err);
    if (ret < 0) {
        error_reportf_err(err, "virtio-pmem: ");
        return ret;
    }
    if (pmem->drop_cache && !virtio_pmem_drop_cache(pmem, &err)) {
        error_append_hint(&err, "On storage that keeps all hosts' caches "
                          "coherent, set drop-cache=off.\n");
        error_reportf_err(err, "virtio-pmem: memory backend '%s': ",
                          virtio_pmem_id(pmem));
        return -ESTALE;
    }
    return 0;
}

static int virtio_pmem_post_load(void *opaque, int version_id)
{
    virtio_pmem_queue_enable(VIRTIO_DEVICE(opaque), 0);
    return 0;
}

/*
 * A load can fail after this device's part. The source goes on then, while
 * this QEMU may stay for as long as it takes somebody to look at it.
 */
static int virtio_pmem_load_cleanup(void *opaque)
{
    if (virtio_pmem_load_failed()) {
        virtio_pmem_unlock(opaque);
    }
    return 0;
}

/* Without a function that saves, there is nothing of it in the stream. */
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

/*
 * QEMU asks for huge pages for all RAM (ram_block_add). Linux then caches the
 * image by 2 MiB where the file system can, and what is dirty is the whole of
 * it: a flush would write 2 MiB for each 4 KiB that the guest has stored.
 */
static void virtio_pmem_set_page_size(VirtIOPMEM *pmem)
{
    MemoryRegion *mr = &pmem->memdev->mr;

    if (!pmem->huge_pages && memory_region_get_fd(mr) >= 0) {
        /* Fails where there are no huge pages, which is as well. */
        qemu_madvise(memory_region_get_ram_ptr(mr), pmem->size,
                     QEMU_MADV_NOHUGEPAGE);
    }
}

static void virtio_pmem_realize(DeviceState *dev, Error **errp)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(dev);
    VirtIOPMEM *pmem = VIRTIO_PMEM(dev);

    if (!virtio_pmem_get_memory_region(pmem, errp)) {
        return;
    }
    if (host_memory_backend_is_mapped(pmem->memdev)) {
        error_setg(errp, "memory backend '%s' is used by another device",
                   virtio_pmem_id(pmem));
        return;
    }
    /* The source has the image until it has synced it: see pre_load. */
    if (!runstate_check(RUN_STATE_INMIGRATE) &&
        !virtio_pmem_lock_wait(pmem, VIRTIO_PMEM_LOCK_START_US, errp)) {
        return;
    }

    host_memory_backend_set_mapped(pmem->memdev, true);
    pmem->size = memory_region_size(&pmem->memdev->mr);
    virtio_pmem_set_page_size(pmem);
    QSIMPLEQ_INIT(&pmem->syncing);
    QSIMPLEQ_INIT(&pmem->waiting);
    pmem->writeback_timer = timer_new_ms(QEMU_CLOCK_VIRTUAL,
                                         virtio_pmem_writeback_start, pmem);
    /*
     * Handlers of one depth are called in reverse order when the VM stops:
     * before virtio_init(), so that the last kicks have been taken by then.
     */
    pmem->vm_change_state = qdev_add_vm_change_state_handler(
        dev, virtio_pmem_vm_change_state, pmem);
    virtio_init(vdev, VIRTIO_ID_PMEM, sizeof(struct virtio_pmem_config));
    pmem->rq_vq = virtio_add_queue(vdev, VIRTIO_PMEM_QUEUE_SIZE,
                                   virtio_pmem_handle_output);
    register_savevm_live("virtio-pmem-lock", VMSTATE_INSTANCE_ID_ANY, 1,
                         &virtio_pmem_savevm_handlers, pmem);
}

static void virtio_pmem_unrealize(DeviceState *dev)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(dev);
    VirtIOPMEM *pmem = VIRTIO_PMEM(dev);

    unregister_savevm(NULL, "virtio-pmem-lock", pmem);
    virtio_pmem_discard(pmem);
    if (pmem->sync) {
        pmem->sync->pmem = NULL;
        pmem->sync = NULL;
        aio_wait_kick();
    }
    timer_free(pmem->writeback_timer);
    if (pmem->writeback) {
        pmem->writeback->pmem = NULL;
        pmem->writeback = NULL;
        aio_wait_kick();
    }
    qemu_del_vm_change_state_handler(pmem->vm_change_state);
    /* Not left to the backend's end, which has the file open until then. */
    virtio_pmem_unlock(pmem);
    /*
     * When the guest ejects the device, QEMU 7.2 leaves the memory where it
     * is: to plug the same backend again would be an assertion's failure.
     */
    host_memory_backend_set_mapped(pmem->memdev,
        memory_region_is_mapped(&pmem->memdev->mr));
    virtio_delete_queue(pmem->rq_vq);
    virtio_cleanup(vdev);
}

static const VMStateDescription vmstate_virtio_pmem_device = {
    .name = "virtio-pmem-device",
    .version_id = 1,
    .minimum_version_id = 1,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT64_EQUAL(start, VirtIOPMEM, "virtio-pmem: memaddr"),
        VMSTATE_UINT64_EQUAL(size, VirtIOPMEM, "virtio-pmem: size of memdev"),
        VMSTATE_UINT64(last_error, VirtIOPMEM),
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

static const PropertyInfo virtio_pmem_prop_counter = {
    VIRTIO_PMEM_PROPERTY_TYPE = "uint64",
    .get = virtio_pmem_get_counter,
};

static const PropertyInfo virtio_pmem_prop_latency = {
    VIRTIO_PMEM_PROPERTY_TYPE = "uint64List",
    .get = virtio_pmem_get_latency,
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
    VIRTIO_PMEM_PROPERTIES_END
};

static void virtio_pmem_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);
    VirtioDeviceClass *vdc = VIRTIO_DEVICE_CLASS(klass);
    VirtIOPMEMClass *vpc = VIRTIO_PMEM_CLASS(klass);

    device_class_set_props(dc, virtio_pmem_properties);
    object_class_property_set_description(klass, "drop-cache",
        "Drop the host's page cache of memdev before an incoming guest starts,"
        " and refuse to start it if that fails");
    object_class_property_set_description(klass, "huge-pages",
        "Have the host cache memdev in huge pages, all of which a flush writes"
        " if any byte of it was changed");
    object_class_property_set_description(klass, "lock",
        "Lock the file of memdev, so that no other QEMU uses it; auto: unless"
        " its file system cannot");
    object_class_property_set_description(klass, "early-writeback",
        "Start writeback of memdev when so many bytes of it are dirty, so that"
        " a flush finds little to write; 0: leave that to the flush");
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
        "Bytes dropped from the host's page cache when the guest came in");
    object_class_property_set_description(klass, "cache-left",
        "Bytes that were still in the host's page cache then");

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
