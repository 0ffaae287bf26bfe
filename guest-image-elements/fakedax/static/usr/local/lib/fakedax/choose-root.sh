# shellcheck shell=sh
# Chooses the root's device and its mount option, in the initramfs. Sourced after
# common.sh, with initramfs-tools and with dracut.

# How long to wait for the disks of virtio-pmem devices, in tenths of a second.
# libnvdimm makes them in the background, and a disk that it refuses never appears.
PMEM_WAIT=${PMEM_WAIT:-50}

wait_for_pmem() {
    wanted=$1
    tries=0
    while [ "$(count_pmem_disks)" -lt "$wanted" ]; do
        if [ "$tries" -ge "$PMEM_WAIT" ]; then
            echo "fakedax: $wanted virtio-pmem device(s) have become only" \
                "$(count_pmem_disks) disk(s); fakedax-guest will say why" >&2
            return
        fi
        tries=$((tries + 1))
        sleep 0.1
    done
}

# tag_of DEVICE TAG: prints the tag's value, such as a UUID; nothing if it has none.
tag_of() {
    case $2 in
        PARTUUID) tag=PART_ENTRY_UUID ;;
        PARTLABEL) tag=PART_ENTRY_NAME ;;
        *) tag=$2 ;;
    esac
    blkid -p -s "$tag" -o value "$1" 2> /dev/null
}

# devices_with TAG VALUE DISK...: prints those of the disks, and of their partitions,
# that carry this tag.
devices_with() {
    tag_name=$1
    value=$2
    shift 2
    for disk in "$@"; do
        for directory in "$ROOT_DIR/sys/block/$disk" \
            "$ROOT_DIR/sys/block/$disk/$disk"*; do
            if [ -e "$directory" ] &&
                [ "$(tag_of "/dev/${directory##*/}" "$tag_name")" = "$value" ]
            then
                echo "${directory##*/}"
            fi
        done
    done
}

# root_candidates SPECIFICATION DISK...: prints what of these disks root= may mean by a
# tag.
root_candidates() {
    specification=$1
    shift
    case $specification in
        LABEL=* | UUID=* | PARTLABEL=* | PARTUUID=*)
            value=${specification#*=}
            value=${value#\"}
            devices_with "${specification%%=*}" "${value%\"}" "$@"
            ;;
        /dev/disk/by-label/*) devices_with LABEL "${specification##*/}" "$@" ;;
        /dev/disk/by-uuid/*) devices_with UUID "${specification##*/}" "$@" ;;
        /dev/disk/by-partlabel/*)
            devices_with PARTLABEL "${specification##*/}" "$@"
            ;;
        /dev/disk/by-partuuid/*)
            devices_with PARTUUID "${specification##*/}" "$@"
            ;;
    esac
}

# pmem_candidates SPECIFICATION: prints the pmem devices that root= may mean.
pmem_candidates() {
    case $1 in
        /dev/disk/*) ;;
        /dev/pmem*)
            echo "${1#/dev/}"
            return
            ;;
        /dev/*)
            # A name such as /dev/vda1 may be the boot view's.
            if is_boot_view "${1#/dev/}"; then
                uuid=$(tag_of "$1" UUID)
                if [ -n "$uuid" ]; then
                    # shellcheck disable=SC2046 # one word per disk
                    devices_with UUID "$uuid" $(pmem_disks)
                fi
            fi
            return
            ;;
    esac
    # shellcheck disable=SC2046 # one word per disk
    root_candidates "$1" $(pmem_disks)
}

# mounts_with DEVICE TYPE OPTION: whether the file system mounts with this option.
# Nothing is written: neither a journal nor a log is replayed.
mounts_with() {
    case $2 in
        ext4) replay=noload ;;
        xfs) replay=norecovery ;;
        *) return 1 ;;
    esac
    mkdir -p "$ROOT_DIR/run/fakedax/try"
    mount -t "$2" -o "ro,$replay,$3" "$1" "$ROOT_DIR/run/fakedax/try" \
        2> /dev/null || return 1
    umount "$ROOT_DIR/run/fakedax/try"
}

# choose_root SPECIFICATION: sets CHOSEN to the device that holds the root, or empty to
# change nothing; OPTION to the mount option, or empty for none; OBSTACLE to what kept
# root from DAX, or empty if nothing did.
choose_root() {
    CHOSEN=
    OPTION=
    OBSTACLE=
    # A rescued server has two disks, often with the same tags. Root is on the one that
    # firmware has booted from; of a disk on fake DAX that is the boot view.
    booted=$(boot_disk)
    if [ -n "$booted" ] && ! is_boot_view "$booted"; then
        for name in $(root_candidates "$1" "$booted"); do
            CHOSEN=/dev/$name
            return
        done
    fi
    devices=$(count_virtio_pmem)
    if [ "$devices" -eq 0 ] && [ "$(count_pmem_disks)" -eq 0 ]; then
        return
    fi
    wait_for_pmem "$devices"
    candidates=$(pmem_candidates "$1")
    if [ -z "$candidates" ]; then
        return
    fi
    # The host shows the root first, so it has the lowest number.
    for name in $candidates; do
        CHOSEN=/dev/$name
        break
    done
    if [ "$candidates" != "$name" ]; then
        echo "fakedax: more than one pmem device has the root's $1:" \
            "$(echo "$candidates" | tr '\n' ' ')- using $name" >&2
    fi
    case $(dax_mode) in
        always) wanted=dax=always ;;
        inode) wanted=dax=inode ;;
        # Leaving the option out is not enough: files may ask for DAX themselves.
        off) wanted=dax=never ;;
    esac
    OBSTACLE=$(dax_obstacle "$name")
    # ext4 fails to mount if it does not support the option. Root must never fail to
    # mount, so the option is always tried first.
    if [ -z "$OBSTACLE" ] &&
        ! mounts_with "$CHOSEN" "$(tag_of "$CHOSEN" TYPE)" "$wanted"; then
        OBSTACLE=filesystem
    fi
    if [ -z "$OBSTACLE" ]; then
        OPTION=$wanted
    elif [ "$wanted" != dax=never ]; then
        echo "fakedax: $CHOSEN is mounted without DAX ($OBSTACLE);" \
            "fakedax-guest will say why" >&2
    fi
}

# record_choice: writes the choice down, for fakedax-guest.
record_choice() {
    mkdir -p "$ROOT_DIR/run/fakedax"
    {
        echo "device=$CHOSEN"
        echo "option=$OPTION"
        echo "obstacle=$OBSTACLE"
    } > "$ROOT_DIR/run/fakedax/root"
}
