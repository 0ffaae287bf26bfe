# shellcheck shell=bash
# What build, check and convert share. Sourced.

SECTOR=512
MIB=1048576

# Properties of the image in Glance. os_type: otherwise Nova formats ephemeral
# disks as vfat, which has no DAX. hw_cdrom_bus: Debian's kernel for clouds has no
# driver for SATA, where Nova puts the config drive of a machine of type q35.
IMAGE_PROPERTIES=(fakedax_guest=true hw_qemu_guest_agent=yes os_type=linux
    hw_cdrom_bus=scsi hw_scsi_model=virtio-scsi)

function fail {
    echo "${0##*/}: $*" >&2
    exit 1
}

function say {
    echo "${0##*/}: $*" >&2
}

# quietly COMMAND...: shows the command's output only if it fails.
function quietly {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        rm "$log"
        fail "failed: $*"
    fi
    rm "$log"
}

function apt_install {
    quietly apt-get update
    quietly env DEBIAN_FRONTEND=noninteractive apt-get install --yes \
        --no-install-recommends "$@"
}

# mirror LABEL: prints a mirror of Debian that this machine's apt uses, without
# the last slash; nothing if it uses none.
function mirror {
    local uri
    uri=$(apt-get indextargets --format "\$(REPO_URI)" "Label: $1" \
        'Component: main' 'Created-By: Packages' | head -n 1)
    echo "${uri%/}"
}

# Prints what this machine's apt needs to reach a mirror and to accept its dates.
function apt_configuration {
    apt-config dump | grep -E \
        '^Acquire::(Check-(Date|Valid-Until)|https?::(Proxy|CaInfo)\>)' || true
}

# print_upload FORMAT FILE NAME: prints the command that uploads it to Glance.
function print_upload {
    local property properties=()
    for property in "${IMAGE_PROPERTIES[@]}"; do
        properties+=(--property "$property")
    done
    say "to use it: openstack image create --disk-format $1" \
        "--container-format bare ${properties[*]} --file $2 $3"
}

# partitions IMAGE: prints the partitions of a raw image with a GPT, one per line:
# number, start and size in sectors, type.
function partitions {
    sfdisk --json "$1" 2>/dev/null | python3 -c '
import json
import re
import sys

for part in json.load(sys.stdin)["partitiontable"].get("partitions", []):
    print(re.search("[0-9]+$", part["node"])[0], part["start"], part["size"],
          part["type"])
'
}

# root_partition IMAGE: prints that line for root: the partition with a distribution, or
# the largest one if none has any.
function root_partition {
    local number start size type largest=
    while read -r number start size type; do
        if holds_distribution "$1" "$start" "$size"; then
            echo "$number $start $size $type"
            return
        fi
        : "${largest:=$number $start $size $type}"
    done < <(partitions "$1" | sort --key 3,3nr)
    echo "$largest"
}

# holds_distribution IMAGE START SIZE: mounts the partition, where nobody else sees it
# and without a replay of its journal, and looks for a distribution's name.
function holds_distribution {
    # shellcheck disable=SC2016  # the other shell expands it
    unshare --mount --propagation private bash -euc '
        . "$1"
        shift
        mount_partition "$@" /mnt ro,noload \
            || mount_partition "$@" /mnt ro,norecovery,nouuid
        [[ -e /mnt/etc/os-release || -L /mnt/etc/os-release ]]
        ' - "${BASH_SOURCE[0]}" "$@" 2>/dev/null
}

# must_mount_images: whether this machine can.
function must_mount_images {
    unshare --mount true 2>/dev/null \
        || fail "may not mount anything here, even as root; allowed: a machine," \
            "or a privileged container"
    losetup --find >/dev/null 2>&1 \
        || fail "there is no loop device to mount images by; allowed: a kernel" \
            "that has them (modprobe loop), a container with /dev/loop-control" \
            "and /dev/loop0 and so on"
}

# partition_with IMAGE TAG VALUE: prints start and size of the partition that has
# this tag; nothing if none has it.
function partition_with {
    local number start size value
    while read -r number start size _; do
        if [[ $2 == PARTUUID ]]; then
            value=$(sfdisk --part-uuid "$1" "$number")
        else
            value=$(blkid --probe --offset $((start * SECTOR)) \
                --output value --match-tag "$2" "$1" || true)
        fi
        if [[ ${value,,} == "${3,,}" ]]; then
            echo "$start $size"
        fi
    done < <(partitions "$1")
}

# mount_partition IMAGE START SIZE DIRECTORY OPTIONS: START and SIZE in sectors.
function mount_partition {
    mount --options \
        "loop,offset=$(($2 * SECTOR)),sizelimit=$(($3 * SECTOR)),$5" "$1" "$4"
}

# mount_boot IMAGE ROOT OPTIONS: mounts the partition that the mounted root's fstab
# names for /boot, if any. Ubuntu 24.04 has its kernels on one.
function mount_boot {
    local device start size
    device=$(awk '$1 !~ /^#/ && $2 == "/boot" { print $1 }' \
        "$2/etc/fstab" 2>/dev/null || true)
    if [[ -z $device ]]; then
        return 0
    fi
    read -r start size < <(partition_with "$1" "${device%%=*}" \
        "${device#*=}") || {
        echo "no partition has $device" >&2
        return 1
    }
    mount_partition "$1" "$start" "$size" "$2/boot" "$3"
}

# kernel_lacks CONFIGURATION: prints the options that a kernel needs for DAX on
# virtio-pmem and that its configuration file lacks, one per line.
function kernel_lacks {
    local option
    for option in FS_DAX=y VIRTIO_PMEM='[ym]' BLK_DEV_PMEM='[ym]'; do
        if ! grep -qx "CONFIG_$option" "$1"; then
            echo "CONFIG_${option%%=*}"
        fi
    done
}

# kernel_banner VMLINUZ: prints what uname -r and -v say on an x86 kernel, from its
# setup header (Documentation/arch/x86/boot.rst, kernel_version).
function kernel_banner {
    python3 -c '
import struct
import sys

with open(sys.argv[1], "rb") as f:
    setup = f.read(65536)
start = struct.unpack_from("<H", setup, 0x20e)[0] + 0x200
print(setup[start:setup.index(0, start)].decode(errors="replace"))
' "$1" 2>/dev/null || true
}

# module_field BASE RELEASE FIELD MODULE: prints a field of the module that modprobe
# would load in the tree BASE; nothing if there is none, or it lacks the field.
function module_field {
    modinfo --basedir "$1" -k "$2" --field "$3" "$4" 2>/dev/null || true
}
