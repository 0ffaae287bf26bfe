#!/bin/bash
# Puts into the initramfs what choose-root.sh needs to choose the root.
# dib-lint: disable=sete setu setpipefail dibdebugtrace

# called by dracut
function check {
    # Include it everywhere, even if this guest is not on fake DAX now.
    return 0
}

# called by dracut
function depends {
    echo systemd
}

# called by dracut
function installkernel {
    hostonly='' instmods virtio_pci virtio_blk virtio_pmem nd_virtio nd_pmem \
        nd_btt libnvdimm qemu_fw_cfg ext4 xfs
}

# called by dracut
# shellcheck disable=SC2154  # dracut sets these variables
function install {
    local file
    inst_multiple blkid cat grep head mkdir modprobe mount readlink sleep sort \
        systemctl tr udevadm umount wc
    for file in common.sh choose-root.sh; do
        inst_simple "/usr/local/lib/fakedax/$file"
    done
    inst_script /usr/local/lib/fakedax/is-boot-disk
    # Not inst_rules, which looks below /etc only where hostonly is set.
    inst_simple /etc/udev/rules.d/59-fakedax.rules
    inst_script "$moddir/fakedax-root.sh" /usr/local/lib/fakedax/fakedax-root
    inst_simple "$moddir/fakedax-root.service" \
        "$systemdsystemunitdir/fakedax-root.service"
    "${SYSTEMCTL:-systemctl}" -q --root "$initdir" add-wants initrd.target \
        fakedax-root.service
}
