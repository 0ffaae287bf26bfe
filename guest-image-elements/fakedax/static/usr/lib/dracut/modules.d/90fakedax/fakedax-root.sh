#!/bin/sh
# Takes the root from pmem, with DAX, where there is pmem: changes sysroot.mount,
# which systemd has made of the kernel's command line.

# shellcheck source=guest-image-elements/fakedax/static/usr/local/lib/fakedax/common.sh
. /lib/fakedax/common.sh
# shellcheck source=guest-image-elements/fakedax/static/usr/local/lib/fakedax/choose-root.sh
. /lib/fakedax/choose-root.sh

# Names of the boot view must have lost to pmem's before anyone looks.
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
