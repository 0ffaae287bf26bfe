/*
 * Differences between the releases of QEMU that the virtio-pmem device builds
 * in: 7.2, 10.0 and 10.2, and later ones as far as they are known
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VIRTIO_PMEM_COMPAT_H
#define HW_VIRTIO_PMEM_COMPAT_H

#include "block/thread-pool.h"
#include "migration/blocker.h"
#include "migration/migration.h"
#include "migration/misc.h"
#include "migration/vmstate.h"
#include "qapi/error.h"
#include "qapi/qapi-events-block-core.h"

/* Headers that moved: after 10.2, and in 10.0 */
#if __has_include("qemu/aio-wait.h")
#include "hw/core/qdev-properties.h"
#include "hw/core/qdev-properties-system.h"
#include "qemu/aio.h"
#include "qemu/aio-wait.h"
/* The same release renamed this, and the new one does not copy the error. */
#define migrate_set_error(_state, _err) \
    migrate_error_propagate(_state, error_copy(_err))
#else
#include "block/aio.h"
#include "block/aio-wait.h"
#include "hw/qdev-properties.h"
#include "hw/qdev-properties-system.h"
#endif
#if QEMU_VERSION_MAJOR >= 10
#include "system/hostmem.h"
#include "system/kvm.h"
#include "system/runstate.h"
#else
#include "sysemu/hostmem.h"
#include "sysemu/kvm.h"
#include "sysemu/runstate.h"
#endif

/*
 * Called for each outgoing migration that begins, and for each that failed or
 * was cancelled
 */
typedef struct VirtIOPMEMNotifier VirtIOPMEMNotifier;
typedef void VirtIOPMEMMigrationChanged(void *opaque);

/*
 * 10.1: class_init's data is constant; a VM state handler may fail (this
 * device's does not: it could not say why); there is a priority below the
 * default one (before, the section registered last is saved last); the print
 * function of a property returns the text.
 */
#if QEMU_VERSION_MAJOR > 10 || \
    (QEMU_VERSION_MAJOR == 10 && QEMU_VERSION_MINOR >= 1)

#define VIRTIO_PMEM_CLASS_DATA const void
#define VIRTIO_PMEM_PRI_LAST MIG_PRI_LOW

#define VIRTIO_PMEM_DEFINE_PRINT(_name, _format) \
    static char *_name(Object *obj, const Property *prop) \
    { \
        return _format(obj, prop); \
    }

static inline VMChangeStateEntry *
virtio_pmem_add_vm_change_state_handler(DeviceState *dev,
                                        VMChangeStateHandler *cb, void *opaque)
{
    return qdev_add_vm_change_state_handler(dev, cb, NULL, opaque);
}

#else

#define VIRTIO_PMEM_CLASS_DATA void
#define VIRTIO_PMEM_PRI_LAST MIG_PRI_DEFAULT

#define VIRTIO_PMEM_DEFINE_PRINT(_name, _format) \
    static int _name(Object *obj, VIRTIO_PMEM_PRINTED *prop, char *dest, \
                     size_t len) \
    { \
        g_autofree char *text = _format(obj, prop); \
\
        return snprintf(dest, len, "%s", text); \
    }

static inline VMChangeStateEntry *
virtio_pmem_add_vm_change_state_handler(DeviceState *dev,
                                        VMChangeStateHandler *cb, void *opaque)
{
    return qdev_add_vm_change_state_handler(dev, cb, opaque);
}

#endif

#if QEMU_VERSION_MAJOR >= 10

/* 10.0: an array of properties is constant and has no end marker. */
#define VIRTIO_PMEM_PROPERTIES static const Property
#define VIRTIO_PMEM_PRINTED const Property
#define VIRTIO_PMEM_PROPERTIES_END
#define VIRTIO_PMEM_PROPERTY_TYPE .type

/*
 * For load_cleanup, which is called before the source is told of a failure.
 * After a load that succeeded, the state is another one by then.
 */
static inline bool virtio_pmem_load_failed(void)
{
    return runstate_check(RUN_STATE_INMIGRATE);
}

/* 9.2: the event names the device by its QOM path. */
static inline void virtio_pmem_send_io_error(const char *path,
                                             BlockErrorAction action,
                                             bool nospace, const char *reason)
{
    qapi_event_send_block_io_error(path, "", NULL, IO_OPERATION_TYPE_WRITE,
                                   action, true, nospace, reason);
}

/* 8.2: QEMU frees the reason when the blocker is removed or refused. */
static inline int virtio_pmem_add_blocker(Error **reason, Error **errp)
{
    return migrate_add_blocker(reason, errp);
}

static inline void virtio_pmem_del_blocker(Error **reason)
{
    migrate_del_blocker(reason);
}

/* 9.0: a notifier is for one mode of migration, and gets events. */
struct VirtIOPMEMNotifier {
    VirtIOPMEMMigrationChanged *begins;
    VirtIOPMEMMigrationChanged *failed;
    void *opaque;
    struct {
        NotifierWithReturn entry;
        VirtIOPMEMNotifier *notifier;
    } modes[MIG_MODE__MAX];
};

static inline int virtio_pmem_notify(NotifierWithReturn *entry,
                                     MigrationEvent *event, Error **errp)
{
    VirtIOPMEMNotifier *notifier =
        container_of(entry, typeof(notifier->modes[0]), entry)->notifier;

    if (event->type == MIG_EVENT_PRECOPY_SETUP) {
        notifier->begins(notifier->opaque);
    } else if (event->type == MIG_EVENT_PRECOPY_FAILED) {
        notifier->failed(notifier->opaque);
    }
    return 0;
}

static inline VirtIOPMEMNotifier *
virtio_pmem_add_notifier(VirtIOPMEMMigrationChanged *begins,
                         VirtIOPMEMMigrationChanged *failed, void *opaque)
{
    VirtIOPMEMNotifier *notifier = g_new0(VirtIOPMEMNotifier, 1);
    MigMode mode;

    notifier->begins = begins;
    notifier->failed = failed;
    notifier->opaque = opaque;
    for (mode = 0; mode < MIG_MODE__MAX; mode++) {
        notifier->modes[mode].notifier = notifier;
        migration_add_notifier_mode(&notifier->modes[mode].entry,
                                    virtio_pmem_notify, mode);
    }
    return notifier;
}

static inline void virtio_pmem_del_notifier(VirtIOPMEMNotifier *notifier)
{
    MigMode mode;

    for (mode = 0; mode < MIG_MODE__MAX; mode++) {
        migration_remove_notifier(&notifier->modes[mode].entry);
    }
    g_free(notifier);
}

/* 8.0: two handlers return how much is left; 9.1: save_setup has an Error. */
static inline int virtio_pmem_save_setup(QEMUFile *f, void *opaque,
                                         Error **errp)
{
    return 0;
}

#define VIRTIO_PMEM_PENDING \
    .state_pending_estimate = virtio_pmem_state_pending, \
    .state_pending_exact = virtio_pmem_state_pending

#define VIRTIO_PMEM_DEFINE_PENDING(_pending) \
    static void virtio_pmem_state_pending(void *opaque, uint64_t *precopy, \
                                          uint64_t *postcopy) \
    { \
        _pending(precopy); \
    }

#else

#define VIRTIO_PMEM_PROPERTIES static Property
#define VIRTIO_PMEM_PRINTED Property
#define VIRTIO_PMEM_PROPERTIES_END DEFINE_PROP_END_OF_LIST(),
#define VIRTIO_PMEM_PROPERTY_TYPE .name

/* load_cleanup comes too early to know, but a load that fails ends QEMU. */
static inline bool virtio_pmem_load_failed(void)
{
    return false;
}

static inline void virtio_pmem_send_io_error(const char *path,
                                             BlockErrorAction action,
                                             bool nospace, const char *reason)
{
    qapi_event_send_block_io_error(path, false, NULL, IO_OPERATION_TYPE_WRITE,
                                   action, true, nospace, reason);
}

static inline int virtio_pmem_add_blocker(Error **reason, Error **errp)
{
    int ret = migrate_add_blocker(*reason, errp);

    if (ret < 0) {
        error_free(*reason);
        *reason = NULL;
    }
    return ret;
}

static inline void virtio_pmem_del_blocker(Error **reason)
{
    if (*reason) {
        migrate_del_blocker(*reason);
        error_free(*reason);
        *reason = NULL;
    }
}

struct VirtIOPMEMNotifier {
    VirtIOPMEMMigrationChanged *begins;
    VirtIOPMEMMigrationChanged *failed;
    void *opaque;
    Notifier entry;
};

static inline void virtio_pmem_notify(Notifier *entry, void *state)
{
    VirtIOPMEMNotifier *notifier =
        container_of(entry, VirtIOPMEMNotifier, entry);

    if (migration_in_setup(state)) {
        notifier->begins(notifier->opaque);
    } else if (migration_has_failed(state)) {
        notifier->failed(notifier->opaque);
    }
}

static inline VirtIOPMEMNotifier *
virtio_pmem_add_notifier(VirtIOPMEMMigrationChanged *begins,
                         VirtIOPMEMMigrationChanged *failed, void *opaque)
{
    VirtIOPMEMNotifier *notifier = g_new0(VirtIOPMEMNotifier, 1);

    notifier->begins = begins;
    notifier->failed = failed;
    notifier->opaque = opaque;
    notifier->entry.notify = virtio_pmem_notify;
    add_migration_state_change_notifier(&notifier->entry);
    return notifier;
}

static inline void virtio_pmem_del_notifier(VirtIOPMEMNotifier *notifier)
{
    remove_migration_state_change_notifier(&notifier->entry);
    g_free(notifier);
}

/* 8.1: the caller no longer passes the thread pool. */
static inline BlockAIOCB *virtio_pmem_submit(ThreadPoolFunc *func, void *arg,
                                             BlockCompletionFunc *cb,
                                             void *opaque)
{
    ThreadPool *pool = aio_get_thread_pool(qemu_get_aio_context());

    return thread_pool_submit_aio(pool, func, arg, cb, opaque);
}
#define thread_pool_submit_aio virtio_pmem_submit

static inline int virtio_pmem_save_setup(QEMUFile *f, void *opaque)
{
    return 0;
}

#define VIRTIO_PMEM_PENDING .save_live_pending = virtio_pmem_live_pending

#define VIRTIO_PMEM_DEFINE_PENDING(_pending) \
    static void virtio_pmem_live_pending(QEMUFile *f, void *opaque, \
                                         uint64_t threshold, \
                                         uint64_t *precopy, \
                                         uint64_t *compatible, \
                                         uint64_t *postcopy) \
    { \
        _pending(precopy); \
    }

/* 9.0: QEMU's lock has a shorter name. */
#define bql_locked qemu_mutex_iothread_locked
#define bql_lock qemu_mutex_lock_iothread
#define bql_unlock qemu_mutex_unlock_iothread

#endif

/*
 * The reason is in QMP's error-desc, at either end: QEMU keeps the first error
 * it is told.
 */
static inline void virtio_pmem_fail_migration(Error *err, const char *prefix)
{
    error_prepend(&err, "%s", prefix);
    migrate_set_error(migrate_get_current(), err);
    error_report_err(err);
}

#endif
