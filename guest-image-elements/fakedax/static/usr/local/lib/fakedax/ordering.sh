# shellcheck shell=sh
# Which drivers of virtio-pmem keep a journal's commit behind the blocks that it
# commits. Sourced: by fakedax-guest in the guest, by check and convert outside.

# kernel_of BANNER: prints the distribution's version of a kernel, "Debian
# 6.1.192-2", from what uname -v or /proc/version says; nothing if that has none.
kernel_of() {
    echo "$1" | sed -n -E \
        's/.* (Debian [0-9]+\.[0-9]+\.[0-9]+[^ )]*).*/\1/p'
}

# driver_orders VERSION BANNER: prints yes, no or unknown. VERSION is that of the
# module nd_virtio (empty for the kernel's own, which has none), BANNER is what
# uname -v says on its kernel.
#
# Debian's kernels are right since they have Linux's "nvdimm: pmem: keep PREFLUSH
# before data writes" (CVE-2026-98161). Nothing is known of others.
driver_orders() {
    case $1 in
        fakedax-*)
            echo yes
            return
            ;;
        ?*)
            echo unknown
            return
            ;;
    esac
    kernel=$(kernel_of "$2")
    if [ -z "$kernel" ]; then
        echo unknown
        return
    fi
    # "6.12.117-1~deb12u1" to "6 12 117".
    numbers=$(echo "$kernel" |
        sed -E 's/^Debian ([0-9]+)\.([0-9]+)\.([0-9]+).*/\1 \2 \3/')
    patch=${numbers##* }
    case ${numbers% *} in
        "6 12") first=112 ;;
        "7 3") first=4 ;;
        # The series in between never got that fix.
        [0-6]" "* | "7 "[0-2]) first= ;;
        *) first=0 ;;
    esac
    if [ -n "$first" ] && [ "$patch" -ge "$first" ]; then
        echo yes
    else
        echo no
    fi
}

# driver_remedy: prints what to do if the driver does not keep the order, or if that
# is unknown.
driver_remedy() {
    echo "install the driver of this project (DKMS package fakedax-driver), or" \
        "a kernel of Debian's whose own is safe: 6.12.112 or later in 6.12," \
        "7.3.4 or later"
}
