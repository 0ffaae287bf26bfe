// SPDX-License-Identifier: GPL-2.0-only
/*
 * The flush path of virtio-pmem.
 *
 * A file system, or an fsync(2), asks for a flush by a bio or by a call that
 * blocks. Each joins the open group. One request, and one answer of the host,
 * end all of a group: it is sent, and so closed, as soon as the host has
 * answered the one before. Whoever comes later may have stored something that
 * the host's sync does not cover, and joins the next group. No lock is held
 * while the host syncs, so any number of tasks flush in the time of two syncs.
 *
 * The host never has two requests. It could not do more with them than we do,
 * and QEMU's device takes one from the queue for each notification, although
 * the queue tells it of two by one (VIRTIO_F_EVENT_IDX): the second would not
 * be answered.
 *
 * nd_pmem calls us for a bio with REQ_PREFLUSH before it stores the bio's data,
 * and once more for REQ_FUA afterwards. What must be on stable storage before
 * the data is stored can only be waited for: that call blocks. The others end
 * the bio from the interrupt.
 *
 * Nothing is allocated here: a flush may be what frees memory.
 *
 * The first error is final, as for the device of QEMU's: Linux marks pages
 * clean when their writeback fails, so that a later sync that succeeds says
 * nothing about them.
 */
#include <linux/blkdev.h>
#include <linux/completion.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/virtio_config.h>

#include "virtio_pmem.h"

/* How long a suspend waits for the host, in seconds. */
#define HOLD_TIMEOUT 20

struct virtio_pmem_task {
	struct list_head node;
	struct completion done;
	int err;
};

static void group_init(struct virtio_pmem_group *group)
{
	INIT_LIST_HEAD(&group->tasks);
	bio_list_init(&group->bios);
}

static bool group_empty(struct virtio_pmem_group *group)
{
	return list_empty(&group->tasks) && bio_list_empty(&group->bios);
}

static void group_move(struct virtio_pmem_group *from,
		       struct virtio_pmem_group *to)
{
	list_splice_tail_init(&from->tasks, &to->tasks);
	bio_list_merge(&to->bios, &from->bios);
	bio_list_init(&from->bios);
}

/* Without the lock: what ends a bio is the file system's code. */
static void group_end(struct virtio_pmem_group *group, int err)
{
	struct virtio_pmem_task *task, *next;
	struct bio *bio;

	list_for_each_entry_safe(task, next, &group->tasks, node) {
		task->err = err;
		/* The task's stack is gone after this. */
		complete(&task->done);
	}
	while ((bio = bio_list_pop(&group->bios))) {
		if (err && !bio->bi_status)
			bio->bi_status = errno_to_blk_status(err);
		bio_endio(bio);
	}
}

/* Let no flush succeed any more; @ended gets all that wait. */
static void fail(struct virtio_pmem *vpmem, struct virtio_pmem_group *ended)
{
	lockdep_assert_held(&vpmem->lock);
	vpmem->failed = true;
	group_move(&vpmem->sent, ended);
	group_move(&vpmem->open, ended);
	wake_up_all(&vpmem->answered);
}

/* Send the open group, if that can be done now. */
static void send(struct virtio_pmem *vpmem, struct virtio_pmem_group *ended)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };

	lockdep_assert_held(&vpmem->lock);
	if (group_empty(&vpmem->open) || vpmem->out || vpmem->held ||
	    vpmem->failed)
		return;
	vpmem->req.type = cpu_to_le32(VIRTIO_PMEM_REQ_TYPE_FLUSH);
	/* A device that forgets to answer has not flushed. */
	vpmem->resp.ret = cpu_to_le32(-1);
	sg_init_one(&out, &vpmem->req, sizeof(vpmem->req));
	sg_init_one(&in, &vpmem->resp, sizeof(vpmem->resp));
	/* It is empty, so it can only be broken, or too small for a request. */
	if (virtqueue_add_sgs(vpmem->req_vq, sgs, 1, 1, vpmem, GFP_ATOMIC)) {
		dev_err(&vpmem->vdev->dev, "flush queue is broken\n");
		fail(vpmem, ended);
		return;
	}
	vpmem->out = true;
	vpmem->requests++;
	group_move(&vpmem->open, &vpmem->sent);
	if (!virtqueue_kick(vpmem->req_vq))
		fail(vpmem, ended);
}

/*
 * Let @bio, or the calling task if there is none, end with the next request
 * that is sent.
 *
 * Returns 0 or -EIO for a task; 0 for a bio, whose error is in itself.
 */
static int join(struct virtio_pmem *vpmem, struct bio *bio)
{
	struct virtio_pmem_task task = {
		.done = COMPLETION_INITIALIZER_ONSTACK(task.done),
	};
	struct virtio_pmem_group ended;
	unsigned long flags;

	/* Stores past the cache (memcpy_flushcache()) are not ordered yet. */
	pmem_wmb();
	group_init(&ended);
	spin_lock_irqsave(&vpmem->lock, flags);
	if (vpmem->failed) {
		spin_unlock_irqrestore(&vpmem->lock, flags);
		return -EIO;
	}
	vpmem->flushes++;
	if (bio) {
		/* The caller's bio_endio() shall not be the last one. */
		bio_inc_remaining(bio);
		bio_list_add(&vpmem->open.bios, bio);
	} else {
		list_add_tail(&task.node, &vpmem->open.tasks);
	}
	send(vpmem, &ended);
	spin_unlock_irqrestore(&vpmem->lock, flags);
	group_end(&ended, -EIO);
	if (bio)
		return 0;
	wait_for_completion_io(&task.done);
	return task.err;
}

/**
 * virtio_pmem_flush() - flush what has been stored before the call
 * @nd_region: region of the device
 * @bio: what asks for it, or NULL to wait
 *
 * The flush of nd_region_desc; see nvdimm_flush() and pmem_submit_bio(). With
 * a bio it may return before the flush has ended: the bio then ends with it.
 *
 * Return: 0 or -EIO.
 */
int virtio_pmem_flush(struct nd_region *nd_region, struct bio *bio)
{
	struct virtio_device *vdev = nd_region_provider_data(nd_region);
	struct virtio_pmem *vpmem = vdev->priv;

#ifndef NVDIMM_FLUSH_ASYNC
	/*
	 * This kernel's nd_pmem calls us with the bio before it stores the
	 * data too, and stores it whatever we return. Later ones wait, without
	 * the bio, and do not store it after an error.
	 */
	if (bio && bio->bi_opf & REQ_PREFLUSH) {
		bio->bi_opf &= ~REQ_PREFLUSH;
		if (bio->bi_iter.bi_size) {
			int err = join(vpmem, NULL);

			if (err) {
				/* No commit record without its blocks. */
				bio->bi_iter.bi_size = 0;
				bio->bi_opf &= ~REQ_FUA;
			}
			return err;
		}
		/* Nothing is stored, so there is nothing to call again for. */
		bio->bi_opf &= ~REQ_FUA;
	}
#endif
	return join(vpmem, bio);
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush);

/**
 * virtio_pmem_flush_answered() - end those whose flush the host has done
 * @vq: the device's queue, whose callback this is
 */
void virtio_pmem_flush_answered(struct virtqueue *vq)
{
	struct virtio_pmem *vpmem = vq->vdev->priv;
	struct virtio_pmem_group flushed, ended;
	unsigned long flags;
	unsigned int len;

	group_init(&flushed);
	group_init(&ended);
	spin_lock_irqsave(&vpmem->lock, flags);
	/* One at the most; but what is no answer must be seen too. */
	while (virtqueue_get_buf(vq, &len)) {
		vpmem->out = false;
		if (vpmem->resp.ret && !vpmem->failed) {
			dev_err(&vpmem->vdev->dev,
				"the host could not flush (%d): every flush fails from now on\n",
				(int)le32_to_cpu(vpmem->resp.ret));
			fail(vpmem, &ended);
		}
		/* Empty if the device has failed. */
		group_move(&vpmem->sent, &flushed);
		wake_up_all(&vpmem->answered);
	}
	/* The host has put nonsense in the queue (virtqueue_get_buf()). */
	if (virtqueue_is_broken(vq))
		fail(vpmem, &ended);
	send(vpmem, &ended);
	spin_unlock_irqrestore(&vpmem->lock, flags);
	group_end(&flushed, 0);
	group_end(&ended, -EIO);
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush_answered);

/**
 * virtio_pmem_flush_abort() - the device is gone or broken
 * @vpmem: the device
 *
 * All that wait get -EIO, and so does every later flush.
 */
void virtio_pmem_flush_abort(struct virtio_pmem *vpmem)
{
	struct virtio_pmem_group ended;
	unsigned long flags;

	group_init(&ended);
	spin_lock_irqsave(&vpmem->lock, flags);
	fail(vpmem, &ended);
	spin_unlock_irqrestore(&vpmem->lock, flags);
	group_end(&ended, -EIO);
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush_abort);

static bool quiet(struct virtio_pmem *vpmem)
{
	unsigned long flags;
	bool quiet;

	spin_lock_irqsave(&vpmem->lock, flags);
	quiet = !vpmem->out || vpmem->failed;
	spin_unlock_irqrestore(&vpmem->lock, flags);
	return quiet;
}

/**
 * virtio_pmem_flush_hold() - send nothing, and wait for what was sent
 * @vpmem: the device, about to be reset for a suspend
 *
 * Who flushes from now on waits for virtio_pmem_flush_release().
 *
 * Return: 0; -EBUSY if the host does not answer, and nothing has changed.
 */
int virtio_pmem_flush_hold(struct virtio_pmem *vpmem)
{
	unsigned long flags;

	spin_lock_irqsave(&vpmem->lock, flags);
	vpmem->held = true;
	spin_unlock_irqrestore(&vpmem->lock, flags);
	if (wait_event_timeout(vpmem->answered, quiet(vpmem),
			       HOLD_TIMEOUT * HZ))
		return 0;
	dev_err(&vpmem->vdev->dev, "the host has not flushed for %d s\n",
		HOLD_TIMEOUT);
	virtio_pmem_flush_release(vpmem);
	return -EBUSY;
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush_hold);

/**
 * virtio_pmem_flush_release() - go on after virtio_pmem_flush_hold()
 * @vpmem: the device, with a queue that works
 */
void virtio_pmem_flush_release(struct virtio_pmem *vpmem)
{
	struct virtio_pmem_group ended;
	unsigned long flags;

	group_init(&ended);
	spin_lock_irqsave(&vpmem->lock, flags);
	vpmem->held = false;
	send(vpmem, &ended);
	spin_unlock_irqrestore(&vpmem->lock, flags);
	group_end(&ended, -EIO);
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush_release);

/**
 * virtio_pmem_flush_reclaim() - take back a request that nobody will answer
 * @vpmem: the device, which has been reset, so that the host has none
 */
void virtio_pmem_flush_reclaim(struct virtio_pmem *vpmem)
{
	unsigned long flags;

	spin_lock_irqsave(&vpmem->lock, flags);
	if (virtqueue_detach_unused_buf(vpmem->req_vq))
		vpmem->out = false;
	spin_unlock_irqrestore(&vpmem->lock, flags);
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush_reclaim);

/**
 * virtio_pmem_flush_init() - make a device ready for its first flush
 * @vpmem: the device
 */
void virtio_pmem_flush_init(struct virtio_pmem *vpmem)
{
	spin_lock_init(&vpmem->lock);
	init_waitqueue_head(&vpmem->answered);
	group_init(&vpmem->open);
	group_init(&vpmem->sent);
}
EXPORT_SYMBOL_GPL(virtio_pmem_flush_init);

MODULE_DESCRIPTION("Flush path of virtio-pmem");
MODULE_VERSION(VIRTIO_PMEM_VERSION);
MODULE_LICENSE("GPL");
