// SPDX-License-Identifier: GPL-2.0-only
/*
 * Registers a virtio-pmem device with libnvdimm, whose nd_pmem makes a disk of
 * it. What a flush does is in nd_virtio.c.
 *
 * This driver takes the place of the kernel's own, for two reasons. Before
 * Linux 6.12.112 that one lets nd_pmem store the data of a bio with
 * REQ_PREFLUSH while its flush is still under way, so that a journal's commit
 * record can reach the disk before the blocks that it commits. And all of them
 * flush for one task at a time.
 */
#include <linux/interrupt.h>
#include <linux/memory_hotplug.h>
#include <linux/module.h>
#include <linux/numa.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "virtio_pmem.h"

static int find_queue(struct virtio_pmem *vpmem)
{
	struct virtqueue *vq;

	vq = virtio_find_single_vq(vpmem->vdev, virtio_pmem_flush_answered,
				   "flush_queue");
	if (IS_ERR(vq))
		return PTR_ERR(vq);
	vpmem->req_vq = vq;
	return 0;
}

/* Where the device's memory is in the guest's, in bytes (section 5.19.4). */
static void read_region(struct virtio_device *vdev, u64 *start, u64 *size)
{
	struct virtio_shm_region shm;

	if (virtio_has_feature(vdev, VIRTIO_PMEM_F_SHMEM_REGION) &&
	    virtio_get_shm_region(vdev, &shm, VIRTIO_PMEM_SHMEM_REGION_ID)) {
		*start = shm.addr;
		*size = shm.len;
		return;
	}
	virtio_cread_le(vdev, struct virtio_pmem_config, start, start);
	virtio_cread_le(vdev, struct virtio_pmem_config, size, size);
}

static int register_region(struct virtio_pmem *vpmem)
{
	struct resource res = {
		.start = vpmem->start,
		.end = vpmem->start + vpmem->size - 1,
	};
	struct nd_region_desc desc = {
		.res = &res,
		.flush = virtio_pmem_flush,
		.provider_data = vpmem->vdev,
		.numa_node = memory_add_physaddr_to_nid(res.start),
		.target_node = phys_to_target_node(res.start),
	};

	if (desc.target_node == NUMA_NO_NODE)
		desc.target_node = desc.numa_node;
	set_bit(ND_REGION_PAGEMAP, &desc.flags);
	set_bit(ND_REGION_ASYNC, &desc.flags);
	if (!nvdimm_pmem_region_create(vpmem->nvdimm_bus, &desc))
		return -ENXIO;
	return 0;
}

/* Take the queue from the host, and all that the host has not answered. */
static void delete_queue(struct virtio_pmem *vpmem)
{
	virtio_reset_device(vpmem->vdev);
	/* A restore may have found none. */
	if (!vpmem->req_vq)
		return;
	virtio_pmem_flush_reclaim(vpmem);
	vpmem->vdev->config->del_vqs(vpmem->vdev);
	vpmem->req_vq = NULL;
}

static int virtio_pmem_validate(struct virtio_device *vdev)
{
	struct virtio_shm_region shm;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "configuration space cannot be read\n");
		return -EINVAL;
	}
	/* The configuration space says the same (section 5.19.5). */
	if (virtio_has_feature(vdev, VIRTIO_PMEM_F_SHMEM_REGION) &&
	    !virtio_get_shm_region(vdev, &shm, VIRTIO_PMEM_SHMEM_REGION_ID))
		__virtio_clear_bit(vdev, VIRTIO_PMEM_F_SHMEM_REGION);
	return 0;
}

static int virtio_pmem_probe(struct virtio_device *vdev)
{
	struct virtio_pmem *vpmem;
	int err;

	vpmem = kzalloc(sizeof(*vpmem), GFP_KERNEL);
	if (!vpmem)
		return -ENOMEM;
	vpmem->vdev = vdev;
	vdev->priv = vpmem;
	virtio_pmem_flush_init(vpmem);
	err = find_queue(vpmem);
	if (err)
		goto free;
	read_region(vdev, &vpmem->start, &vpmem->size);
	vpmem->nd_desc.provider_name = "virtio-pmem";
	vpmem->nd_desc.module = THIS_MODULE;
	vpmem->nvdimm_bus = nvdimm_bus_register(&vdev->dev, &vpmem->nd_desc);
	if (!vpmem->nvdimm_bus) {
		err = -ENXIO;
		goto delete_queue;
	}
	/* A disk may be made, and flushed, before the region is returned. */
	virtio_device_ready(vdev);
	err = register_region(vpmem);
	if (err)
		goto unregister;
	return 0;

unregister:
	nvdimm_bus_unregister(vpmem->nvdimm_bus);
delete_queue:
	delete_queue(vpmem);
free:
	kfree(vpmem);
	dev_err(&vdev->dev, "no disk can be made of it: error %d\n", err);
	return err;
}

static void virtio_pmem_remove(struct virtio_device *vdev)
{
	struct virtio_pmem *vpmem = vdev->priv;

	/* Pulled out: those that wait keep the disk from being taken down. */
	if (vpmem->req_vq && virtqueue_is_broken(vpmem->req_vq))
		virtio_pmem_flush_abort(vpmem);
	/* Waits for the disk's bios, and so for the host. */
	nvdimm_bus_unregister(vpmem->nvdimm_bus);
	delete_queue(vpmem);
	kfree(vpmem);
}

static void virtio_pmem_config_changed(struct virtio_device *vdev)
{
	/* Section 2.1.2: what is under way will not be answered. */
	if (vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_NEEDS_RESET) {
		dev_err(&vdev->dev, "the device has failed: every flush fails from now on\n");
		virtio_pmem_flush_abort(vdev->priv);
	}
}

#ifdef CONFIG_PM_SLEEP
static int virtio_pmem_freeze(struct virtio_device *vdev)
{
	struct virtio_pmem *vpmem = vdev->priv;
	int err;

	err = virtio_pmem_flush_hold(vpmem);
	if (err)
		return err;
	delete_queue(vpmem);
	return 0;
}

static int virtio_pmem_restore(struct virtio_device *vdev)
{
	struct virtio_pmem *vpmem = vdev->priv;
	u64 start, size;
	int err;

	err = find_queue(vpmem);
	if (err)
		goto fail;
	virtio_device_ready(vdev);
	read_region(vdev, &start, &size);
	if (start != vpmem->start || size != vpmem->size) {
		dev_err(&vdev->dev,
			"the disk was at %#llx, %llu bytes, and is now at %#llx, %llu bytes\n",
			vpmem->start, vpmem->size, start, size);
		err = -ENXIO;
		goto fail;
	}
	virtio_pmem_flush_release(vpmem);
	return 0;

fail:
	virtio_pmem_flush_abort(vpmem);
	return err;
}
#endif

static ssize_t flushes_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	struct virtio_pmem *vpmem = dev_to_virtio(dev)->priv;

	return sysfs_emit(buf, "%llu\n", READ_ONCE(vpmem->flushes));
}
static DEVICE_ATTR_RO(flushes);

static ssize_t requests_show(struct device *dev, struct device_attribute *attr,
			     char *buf)
{
	struct virtio_pmem *vpmem = dev_to_virtio(dev)->priv;

	return sysfs_emit(buf, "%llu\n", READ_ONCE(vpmem->requests));
}
static DEVICE_ATTR_RO(requests);

static ssize_t failed_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	struct virtio_pmem *vpmem = dev_to_virtio(dev)->priv;

	return sysfs_emit(buf, "%d\n", READ_ONCE(vpmem->failed));
}
static DEVICE_ATTR_RO(failed);

/* /sys/bus/virtio/devices/virtioN/flush/ */
static struct attribute *flush_attrs[] = {
	&dev_attr_flushes.attr,
	&dev_attr_requests.attr,
	&dev_attr_failed.attr,
	NULL,
};

static const struct attribute_group flush_group = {
	.name = "flush",
	.attrs = flush_attrs,
};

static const struct attribute_group *flush_groups[] = {
	&flush_group,
	NULL,
};

static const struct virtio_device_id id_table[] = {
	{ VIRTIO_ID_PMEM, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, id_table);

static const unsigned int features[] = {
	VIRTIO_PMEM_F_SHMEM_REGION,
};

static struct virtio_driver virtio_pmem_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.driver.dev_groups = flush_groups,
	.feature_table = features,
	.feature_table_size = ARRAY_SIZE(features),
	.id_table = id_table,
	.validate = virtio_pmem_validate,
	.probe = virtio_pmem_probe,
	.remove = virtio_pmem_remove,
	.config_changed = virtio_pmem_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = virtio_pmem_freeze,
	.restore = virtio_pmem_restore,
#endif
};
module_virtio_driver(virtio_pmem_driver);

MODULE_DESCRIPTION("Virtio persistent memory");
MODULE_VERSION(VIRTIO_PMEM_VERSION);
MODULE_LICENSE("GPL");
