/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the two modules of the virtio-pmem driver share.
 *
 * The device and its requests: Virtual I/O Device (VIRTIO) 1.3, section 5.19.
 */
#ifndef VIRTIO_PMEM_H
#define VIRTIO_PMEM_H

#include <linux/bio.h>
#include <linux/libnvdimm.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <uapi/linux/virtio_pmem.h>

/* modinfo shows it, which tells this driver from the kernel's own. */
#define VIRTIO_PMEM_VERSION "fakedax-1.0"

/* Linux before 6.9 lacks these in its uapi header (section 5.19.3). */
#ifndef VIRTIO_PMEM_F_SHMEM_REGION
#define VIRTIO_PMEM_F_SHMEM_REGION 0
#define VIRTIO_PMEM_SHMEM_REGION_ID 0
#endif

/* Tasks and bios that one answer of the host ends. */
struct virtio_pmem_group {
	struct list_head tasks;
	struct bio_list bios;
};

struct virtio_pmem {
	struct virtio_device *vdev;
	struct virtqueue *req_vq;
	struct nvdimm_bus *nvdimm_bus;
	struct nvdimm_bus_descriptor nd_desc;
	u64 start;
	u64 size;

	/* All below, and the virtqueue. */
	spinlock_t lock;
	/* Those whose flush the host has not been asked for yet. */
	struct virtio_pmem_group open;
	/* Those that the request answers which the host has. */
	struct virtio_pmem_group sent;
	/* The host has the request. */
	bool out;
	struct virtio_pmem_req req;
	struct virtio_pmem_resp resp;
	/* The device is suspended: nothing is sent, and all wait in @open. */
	bool held;
	/* A flush has failed, so data may be lost: no later one may succeed. */
	bool failed;
	/* Woken when the answer comes, and when the device fails. */
	wait_queue_head_t answered;

	/* For sysfs: flushes asked for, and requests sent for them. */
	u64 flushes;
	u64 requests;
};

void virtio_pmem_flush_init(struct virtio_pmem *vpmem);
int virtio_pmem_flush(struct nd_region *nd_region, struct bio *bio);
void virtio_pmem_flush_answered(struct virtqueue *vq);
void virtio_pmem_flush_abort(struct virtio_pmem *vpmem);
int virtio_pmem_flush_hold(struct virtio_pmem *vpmem);
void virtio_pmem_flush_release(struct virtio_pmem *vpmem);
void virtio_pmem_flush_reclaim(struct virtio_pmem *vpmem);

#endif
