/*
 * libselinux for a libvirt on a kernel without SELinux.
 *
 * Preloaded into libvirtd, it answers as a host with SELinux in enforcing mode
 * does, and keeps the label of each file in an extended attribute. Nothing is
 * enforced.
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
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/xattr.h>

#define ATTRIBUTE "trusted.test.selinux"
#define UNLABELLED "system_u:object_r:virt_image_t:s0"
#define LIBVIRTD "system_u:system_r:virtd_t:s0-s0:c0.c1023"

struct selabel_handle;
struct selinux_opt;

static int give(const char *label, char **context)
{
    *context = strdup(label);
    return *context ? (int)strlen(label) + 1 : -1;
}

/* The label of a file, given what getxattr(2) said of it. */
static int label(ssize_t size, const char *value, char **context)
{
    char found[256];

    if (size < 0) {
        return errno == ENODATA || errno == EOPNOTSUPP
            ? give(UNLABELLED, context) : -1;
    }
    memcpy(found, value, size);
    found[size] = '\0';
    return give(found, context);
}

/* Devices below /dev are on file systems that have no such attributes. */
static int done(int result)
{
    return result && errno == EOPNOTSUPP ? 0 : result;
}

int is_selinux_enabled(void)
{
    return 1;
}

int security_getenforce(void)
{
    return 1;
}

int security_check_context(const char *context)
{
    return 0;
}

int security_get_boolean_active(const char *name)
{
    return 1;
}

const char *selinux_virtual_domain_context_path(void)
{
    return getenv("TEST_SELINUX_DOMAIN");
}

const char *selinux_virtual_image_context_path(void)
{
    return getenv("TEST_SELINUX_IMAGE");
}

int getcon(char **context)
{
    return give(LIBVIRTD, context) < 0 ? -1 : 0;
}

int getcon_raw(char **context)
{
    return getcon(context);
}

int getpidcon_raw(pid_t pid, char **context)
{
    return getcon(context);
}

int setexeccon_raw(const char *context)
{
    return 0;
}

int setsockcreatecon_raw(const char *context)
{
    return 0;
}

int getfilecon_raw(const char *path, char **context)
{
    char value[255];

    return label(getxattr(path, ATTRIBUTE, value, sizeof(value)), value,
                 context);
}

int getfilecon(const char *path, char **context)
{
    return getfilecon_raw(path, context);
}

int lgetfilecon_raw(const char *path, char **context)
{
    char value[255];

    return label(lgetxattr(path, ATTRIBUTE, value, sizeof(value)), value,
                 context);
}

int fgetfilecon_raw(int fd, char **context)
{
    char value[255];

    return label(fgetxattr(fd, ATTRIBUTE, value, sizeof(value)), value,
                 context);
}

int setfilecon_raw(const char *path, const char *context)
{
    return done(setxattr(path, ATTRIBUTE, context, strlen(context), 0));
}

int lsetfilecon_raw(const char *path, const char *context)
{
    return done(lsetxattr(path, ATTRIBUTE, context, strlen(context), 0));
}

int fsetfilecon_raw(int fd, const char *context)
{
    return done(fsetxattr(fd, ATTRIBUTE, context, strlen(context), 0));
}

struct selabel_handle *selabel_open(unsigned int backend,
                                    const struct selinux_opt *options,
                                    unsigned int count)
{
    return (struct selabel_handle *)"files";
}

void selabel_close(struct selabel_handle *handle)
{
}

int selabel_lookup_raw(struct selabel_handle *handle, char **context,
                       const char *path, int mode)
{
    return give(UNLABELLED, context) < 0 ? -1 : 0;
}
