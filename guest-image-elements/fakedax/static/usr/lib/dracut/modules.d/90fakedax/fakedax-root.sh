#!/bin/sh
# Chooses the root on pmem, and DAX for it, where there is pmem. Changes
# sysroot.mount, which systemd has made from the kernel's command line.

# shellcheck source=guest-image-elements/fakedax/static/usr/local/lib/fakedax/common.sh
. /usr/local/lib/fakedax/common.sh
# shellcheck source=guest-image-elements/fakedax/static/usr/local/lib/fakedax/choose-root.sh
. /usr/local/lib/fakedax/choose-root.sh

# Until udev has settled, names of the root may still lead to the boot view.
udevadm settle --timeout=10
root=
for word in $(attribute /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
    esac
done
choose_root "$root"
record_choice
if [ -z "$CHOSEN" ]; then
    exit 0
fi
options=$(systemctl show --property Options --value sysroot.mount)
directory=/run/systemd/system/sysroot.mount.d
mkdir -p "$directory"
cat > "$directory/90-fakedax.conf" << EOF
[Mount]
What=$CHOSEN
Options=${options:-defaults}${OPTION:+,$OPTION}
EOF
systemctl daemon-reload
