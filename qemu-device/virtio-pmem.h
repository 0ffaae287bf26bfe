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
#include "qapi/qapi-types-block-core.h"
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

/* How many pages of an image are compared when it is handed over */
#define VIRTIO_PMEM_SAMPLES 16

typedef struct VirtIOPMEMRequest VirtIOPMEMRequest;
typedef struct VirtIOPMEMSync VirtIOPMEMSync;
typedef struct VirtIOPMEMWriteback VirtIOPMEMWriteback;
typedef QSIMPLEQ_HEAD(, VirtIOPMEMRequest) VirtIOPMEMRequests;

/* What a destination compares its file with: see SPEC.rst, Incoming */
typedef struct VirtIOPMEMIdentity {
    /* Whether the source had locked the image */
    bool locking;
    /* The file, good on the host with this boot id */
    uint8_t boot_id[36];
    uint64_t device;
    uint64_t inode;
    /* The content: offsets of pages and their checksums */
    uint32_t samples;
    uint64_t offset[VIRTIO_PMEM_SAMPLES];
    uint64_t checksum[VIRTIO_PMEM_SAMPLES];
} VirtIOPMEMIdentity;

/* What an info block says of the memmap before the content */
typedef struct VirtIOPMEMMemmap {
    /* Where it ends in the image, 0 if there is none */
    uint64_t end;
    /* The checksum of the info block */
    uint64_t checksum;
} VirtIOPMEMMemmap;

struct VirtIOPMEM {
    VirtIODevice parent_obj;

    QLIST_ENTRY(VirtIOPMEM) next;

    VirtQueue *rq_vq;
    uint64_t start;
    uint64_t size;
    HostMemoryBackend *memdev;
    bool drop_cache;
    bool huge_pages;
    OnOffAuto lock;
    BlockdevOnError werror;
    /* For the signal handler: where the image is, and its name */
    uintptr_t ram;
    char name[64];
    VMChangeStateEntry *vm_change_state;
    Error *blocker;
    struct VirtIOPMEMNotifier *notifier;

    /* Whether the image is locked at all, and which of its locks are held */
    bool locking;
    bool owner;
    bool claim;
    /* The guest comes from another QEMU; this device's state is loaded */
    bool incoming;
    bool loaded;
    /* Sent when the image is handed over, or received */
    VirtIOPMEMIdentity identity;
    /* A migration has begun; its save can no longer fail in this device */
    bool migrating;
    bool saved;
    /* The image was given up; when its file was last written to before that */
    bool given_up;
    struct statx_timestamp given_up_mtime;
    /* To reacquire it: the timer, its end; whether vCPUs are held back */
    QEMUTimer *retry_timer;
    int64_t retry_until;
    bool held_back;
    /* The queue as it was enabled; it must not change */
    int ring_size;
    bool ring_packed;
    bool ring_layout_changed;

    /* The one sync that runs, the requests it answers and those after them */
    VirtIOPMEMSync *sync;
    VirtIOPMEMRequests syncing;
    VirtIOPMEMRequests waiting;
    /* As the info block on storage says */
    VirtIOPMEMMemmap memmap;

    /* A sync that began after the vCPUs have stopped: wanted, and begun */
    bool last_sync_wanted;
    bool last_sync_begun;

    /*
     * Dirty bytes at which writeback starts early, 0 for never; the timer that
     * counts them, its end (in ms of virtual time), and what it started
     */
    uint64_t early_writeback;
    QEMUTimer *writeback_timer;
    int64_t writeback_until;
    VirtIOPMEMWriteback *writeback;

    /* Whether to read ahead, and whether the mapping does */
    OnOffAuto read_ahead;
    bool reads_ahead;

    /*
     * Bytes per second that syncs and early writeback may write, 0 for no
     * limit; when the next sync may start, in ns of virtual time
     */
    uint64_t sync_bps;
    QEMUTimer *limit_timer;
    int64_t sync_not_before;

    /* In a migration: bytes dirty at a time, and bytes written per second */
    uint64_t dirty;
    int64_t dirty_time;
    uint64_t write_rate;

    /* errno of the last failed sync: no flush succeeds once it is set */
    uint64_t last_error;
    /* The same, until an answer has told the guest */
    uint64_t stop_error;
    /* In a stream: whether there was one */
    uint64_t failed;
    /* An error is stopping the guest, whose vCPUs may still run */
    bool stopping;

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
    VirtioDeviceClass parent;

    /* public */
    void (*fill_device_info)(const VirtIOPMEM *pmem, VirtioPMEMDeviceInfo *vi);
    MemoryRegion *(*get_memory_region)(VirtIOPMEM *pmem, Error **errp);
};

#endif
