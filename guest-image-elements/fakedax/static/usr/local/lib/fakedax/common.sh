# shellcheck shell=sh
# What the initramfs, the units and fakedax-guest share. Sourced; the shell may be
# dash, busybox or bash.
#
# Tests set FAKEDAX_ROOT, a directory that has /sys, /proc and the like.

ROOT_DIR=${FAKEDAX_ROOT:-}

# attribute FILE: prints a file of sysfs or procfs; nothing if there is none.
attribute() {
    cat "$ROOT_DIR$1" 2> /dev/null
}

# count_virtio_pmem: prints how many devices the host has given to this guest.
# Virtio device 27 is pmem (virtio 1.2, section 5.19).
count_virtio_pmem() {
    count=0
    for file in "$ROOT_DIR"/sys/bus/virtio/devices/*/device; do
        if [ "$(cat "$file" 2> /dev/null)" = 0x001b ]; then
            count=$((count + 1))
        fi
    done
    echo "$count"
}

# pmem_disks: prints the disks that these devices have become, one per line.
pmem_disks() {
    for directory in "$ROOT_DIR"/sys/block/pmem*; do
        if [ -e "$directory" ]; then
            echo "${directory##*/}"
        fi
    done
}

count_pmem_disks() {
    pmem_disks | wc -l
}

# disk_of NAME: prints the disk of a partition; for a disk, its own name.
disk_of() {
    for directory in "$ROOT_DIR/sys/block/"*"/$1"; do
        if [ -e "$directory" ]; then
            directory=${directory%/*}
            echo "${directory##*/}"
            return
        fi
    done
    echo "$1"
}

# is_boot_view NAME: whether it is the read-only view of the root's file that
# firmware boots from. Nothing else may read it: its cached pages would be a second
# copy of the data, and would become stale.
is_boot_view() {
    [ "$(attribute "/sys/block/$(disk_of "$1")/serial")" = fakedax-boot ]
}

# boot_disk: prints the disk that firmware has booted from; nothing if that is not
# known, as where firmware was not to boot from a disk.
boot_disk() {
    pattern=$(boot_disk_pattern)
    found=
    for disk in "$ROOT_DIR"/sys/block/vd* "$ROOT_DIR"/sys/block/sd*; do
        # shellcheck disable=SC2254 # it is a pattern
        case $(readlink -f "$disk") in
            $pattern) found="$found ${disk##*/}" ;;
        esac
    done
    # Of several disks of one controller it is not known which.
    case ${found# } in
        *' '*) ;;
        ?*) echo "${found# }" ;;
    esac
}

# boot_disk_pattern: prints a pattern for the path in sysfs of the disk that QEMU has
# its firmware boot first. QEMU names it by its path in Open Firmware, such as
# /pci@i0cf8/pci-bridge@2,1/scsi@0/disk@0,0 (docs/specs/fw_cfg.rst, "bootorder").
boot_disk_pattern() {
    file=/sys/firmware/qemu_fw_cfg/by_name/bootorder/raw
    if ! [ -e "$ROOT_DIR$file" ]; then
        modprobe -q qemu_fw_cfg 2> /dev/null || true
    fi
    path=$(attribute "$file" | tr -d '\0' | head -n 1)
    directory=$ROOT_DIR/sys/devices/pci0000:00
    case $path in
        /pci@*/*) path=${path#/*/} ;;
        *) return ;;
    esac
    while true; do
        node=${path%%/*}
        path=${path#*/}
        directory=$(pci_child "$directory" "${node#*@}")
        if [ -z "$directory" ]; then
            return
        fi
        first=${path%%/*}
        last=${path#*/disk@}
        case $path in
            # virtio-blk
            disk@*) echo "$directory/*" ;;
            # SCSI: channel, target and LUN
            channel@*/disk@*,*)
                channel=$((0x${first#*@}))
                echo "$directory/*:$channel:$((0x${last%,*})):$((0x${last#*,}))/*"
                ;;
            # SATA and IDE: port, and unit on it
            drive@*/disk@*)
                port=$(($(first_port "$directory") + 0x${first#*@}))
                echo "$directory/ata$port/*:0:$((0x$last)):0/*"
                ;;
            # USB
            hub@* | storage@*) echo "$directory/*" ;;
            */*) continue ;;
        esac
        return
    done
}

# pci_child DIRECTORY ADDRESS: prints the directory of a PCI device below a bridge, by
# its slot and function in the form of Open Firmware: "1f,2"; "3" for function 0.
pci_child() {
    case $2 in
        *,*) address=$2 ;;
        *) address=$2,0 ;;
    esac
    address=0${address%,*}.${address#*,}
    for child in "$1"/*:"${address#"${address%??.*}"}"; do
        if [ -e "$child" ]; then
            echo "$child"
        fi
    done
}

# first_port DIRECTORY: prints the number that the kernel has given to the first port of
# a controller of SATA or IDE.
first_port() {
    for child in "$1"/ata*; do
        echo "${child##*/ata}"
    done | sort -n | head -n 1
}

# root_mount: prints the device that root is on, and the type of its file system;
# nothing if /proc/mounts does not say.
root_mount() {
    # shellcheck disable=SC2034 # rest: of the line
    while read -r source target type rest; do
        # "rootfs / rootfs" is that of the initramfs.
        if [ "$target" = / ] && [ "$source" != rootfs ]; then
            echo "$source $type"
        fi
    done < "$ROOT_DIR/proc/mounts" | tail -n 1
}

# dax_mode: prints off, inode or always, from the kernel's command line.
dax_mode() {
    mode=always
    for word in $(attribute /proc/cmdline); do
        case $word in
            daxroot=off | daxroot=inode | daxroot=always)
                mode=${word#daxroot=}
                ;;
            daxroot=*)
                echo "fakedax: $word on the kernel's command line is not one" \
                    "of off, inode, always; taken as always" >&2
                mode=always
                ;;
        esac
    done
    echo "$mode"
}

# kernel_has_fs_dax: only a kernel with CONFIG_FS_DAX has this symbol. Unlike the
# kernel's configuration, the names of symbols can be read everywhere.
kernel_has_fs_dax() {
    grep -q ' dax_iomap_rw$' "$ROOT_DIR/proc/kallsyms" 2> /dev/null
}

# dax_obstacle NAME: prints what keeps a block device from DAX, as far as that shows
# without a mount: kernel, disk, partition or nothing.
dax_obstacle() {
    disk=$(disk_of "$1")
    if ! kernel_has_fs_dax; then
        echo kernel
    elif [ "$(attribute "/sys/block/$disk/queue/dax")" != 1 ]; then
        echo disk
    elif [ "$disk" != "$1" ] && ! {
        is_page_aligned "$(attribute "/sys/block/$disk/$1/start")" &&
            is_page_aligned "$(attribute "/sys/block/$disk/$1/size")"
    }; then
        echo partition
    fi
}

# is_page_aligned SECTORS: whether it is a multiple of 4 KiB.
is_page_aligned() {
    [ $((${1:-1} % 8)) -eq 0 ]
}
