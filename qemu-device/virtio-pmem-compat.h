/*
 * What differs, for the virtio-pmem device, between QEMU 7.2 and 10.0
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VIRTIO_PMEM_COMPAT_H
#define HW_VIRTIO_PMEM_COMPAT_H

#include "block/aio.h"
#include "block/thread-pool.h"
#include "hw/qdev-properties.h"

#if QEMU_VERSION_MAJOR >= 10

#include "system/hostmem.h"
#include "system/runstate.h"

#define VIRTIO_PMEM_PROPERTIES static const Property
#define VIRTIO_PMEM_PROPERTIES_END
#define VIRTIO_PMEM_PROPERTY_TYPE .type

/*
 * To be asked in load_cleanup, which is called before the source is told, and
 * after a guest that came in well has left the state of one that comes in.
 */
static inline bool virtio_pmem_load_failed(void)
{
    return runstate_check(RUN_STATE_INMIGRATE);
}

#else

#include "sysemu/hostmem.h"
#include "sysemu/runstate.h"

#define VIRTIO_PMEM_PROPERTIES static Property
#define VIRTIO_PMEM_PROPERTIES_END DEFINE_PROP_END_OF_LIST(),
#define VIRTIO_PMEM_PROPERTY_TYPE .name

/* load_cleanup comes too early to know; but QEMU ends if it has failed. */
static inline bool virtio_pmem_load_failed(void)
{
    return false;
}

static inline BlockAIOCB *virtio_pmem_submit(ThreadPoolFunc *func, void *arg,
                                             BlockCompletionFunc *cb,
                                             void *opaque)
{
    ThreadPool *pool = aio_get_thread_pool(qemu_get_aio_context());

    return thread_pool_submit_aio(pool, func, arg, cb, opaque);
}
#define thread_pool_submit_aio virtio_pmem_submit

#endif

#endif
