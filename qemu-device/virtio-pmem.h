/*
 * Virtio PMEM device
 *
 * A drop-in replacement for QEMU's include/hw/virtio/virtio-pmem.h: the names
 * that hw/virtio/virtio-pmem-pci.[ch] relies on are unchanged.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VIRTIO_PMEM_H
#define HW_VIRTIO_PMEM_H

#include "hw/virtio/virtio.h"
#include "qapi/qapi-types-common.h"
#include "qapi/qapi-types-machine.h"
#include "qemu/queue.h"
#include "qom/object.h"

#define TYPE_VIRTIO_PMEM "virtio-pmem"

OBJECT_DECLARE_TYPE(VirtIOPMEM, VirtIOPMEMClass,
                    VIRTIO_PMEM)

#define VIRTIO_PMEM_ADDR_PROP "memaddr"
#define VIRTIO_PMEM_MEMDEV_PROP "memdev"

/* Bucket n counts the syncs that took 2^n to 2^(n+1) - 1 microseconds. */
#define VIRTIO_PMEM_LATENCY_BUCKETS 32

typedef struct VirtIOPMEMRequest VirtIOPMEMRequest;
typedef struct VirtIOPMEMSync VirtIOPMEMSync;
typedef struct VirtIOPMEMWriteback VirtIOPMEMWriteback;
typedef QSIMPLEQ_HEAD(, VirtIOPMEMRequest) VirtIOPMEMRequests;

struct VirtIOPMEM {
    VirtIODevice parent_obj;

    VirtQueue *rq_vq;
    uint64_t start;
    uint64_t size;
    HostMemoryBackend *memdev;
    bool drop_cache;
    bool huge_pages;
    OnOffAuto lock;
    bool locked;
    VMChangeStateEntry *vm_change_state;
    /* What the queue had when it was enabled, which may not change */
    int ring_size;
    bool ring_packed;
    bool ring_layout_changed;

    /* The one sync that runs, the requests it answers and those after them */
    VirtIOPMEMSync *sync;
    VirtIOPMEMRequests syncing;
    VirtIOPMEMRequests waiting;

    /*
     * Dirty bytes from which on writeback starts early, 0 if never; the timer
     * that looks, until when (in ms of the guest's time), and what it started
     */
    uint64_t early_writeback;
    QEMUTimer *writeback_timer;
    int64_t writeback_until;
    VirtIOPMEMWriteback *writeback;

    /* errno of the last failed sync: no flush succeeds once it is set */
    uint64_t last_error;
    /* The same, while the guest has had no answer that tells it so */
    uint64_t stop_error;

    uint64_t requests;
    uint64_t merged;
    uint64_t syncs;
    uint64_t errors;
    uint64_t sync_latency[VIRTIO_PMEM_LATENCY_BUCKETS];
    uint64_t writebacks;
    uint64_t cache_dropped;
    uint64_t cache_left;
};

struct VirtIOPMEMClass {
    /* private */
    VirtIODevice parent;

    /* public */
    void (*fill_device_info)(const VirtIOPMEM *pmem, VirtioPMEMDeviceInfo *vi);
    MemoryRegion *(*get_memory_region)(VirtIOPMEM *pmem, Error **errp);
};

#endif
