#!/bin/bash
#
# The DevStack plugin: what each phase of stack.sh, unstack.sh and clean.sh
# does for nova-fakedax. DevStack sources it.

_XTRACE_FAKEDAX=$(set +o | grep xtrace)
set +o xtrace

FAKEDAX_APPARMOR=/etc/apparmor.d/abstractions/libvirt-qemu.d/nova-fakedax

# Whether a service of Nova that needs the package runs here.
function is_fakedax_enabled {
    is_service_enabled n-api || is_service_enabled n-sch ||
        is_service_enabled n-cpu
}

# Say at once what would fail much later.
function check_fakedax_settings {
    is_service_enabled n-cpu || return 0
    [[ $VIRT_DRIVER == libvirt ]] || die $LINENO \
        "VIRT_DRIVER=$VIRT_DRIVER: nova-fakedax needs libvirt"
    [[ $LIBVIRT_TYPE == kvm || $LIBVIRT_TYPE == qemu ]] || die $LINENO \
        "LIBVIRT_TYPE=$LIBVIRT_TYPE: nova-fakedax needs kvm or qemu"
    [[ ${NOVA_BACKEND:-} != LVM ]] || die $LINENO \
        "NOVA_BACKEND=LVM: nova-fakedax needs disks that are files"
}

# pip would replace Nova's checkout by a release that fits.
function check_fakedax_nova {
    local wanted installed
    wanted=$(sed -nE 's/^nova([<>=][^ ;]*).*/\1/p' \
        "$FAKEDAX_DIR/requirements.txt")
    installed=$("$PYTHON" -c '
import importlib.metadata
import sys

from packaging import specifiers

installed = importlib.metadata.version("nova")
if not specifiers.SpecifierSet(sys.argv[1]).contains(
        installed, prereleases=True):
    print(installed)
' "$wanted")
    [[ -z $installed ]] || die $LINENO "nova $installed is installed: \
this nova-fakedax is for nova$wanted; set NOVA_BRANCH, or the plugin's branch"
}

function install_fakedax {
    check_fakedax_nova
    setup_develop "$FAKEDAX_DIR"
    if is_service_enabled n-cpu; then
        if [[ $FAKEDAX_STOCK_QEMU == False ]]; then
            install_fakedax_emulator
        fi
        install_fakedax_apparmor
    fi
}

function install_fakedax_emulator {
    local built missing
    missing=$("$FAKEDAX_DIR/qemu-device/build" --packages)
    # shellcheck disable=SC2086  # one word per package
    [[ -z $missing ]] || install_package $missing
    sudo install -d -o "$STACK_USER" "$FAKEDAX_CACHE/nova-fakedax"
    built=$(XDG_CACHE_HOME=$FAKEDAX_CACHE "$FAKEDAX_DIR/qemu-device/build" \
        --version "$FAKEDAX_QEMU_VERSION" \
        ${FAKEDAX_DEBIAN_MIRROR:+--mirror "$FAKEDAX_DEBIAN_MIRROR"}) || die $LINENO "cannot build QEMU \
$FAKEDAX_QEMU_VERSION; with FAKEDAX_STOCK_QEMU=True none is built"
    sudo install -m 755 "$built" "$FAKEDAX_EMULATOR"
}

# Guests may lock their images, and libvirt may start the emulator for them.
function install_fakedax_apparmor {
    [[ -d /etc/apparmor.d ]] || return 0
    {
        sed "s,/var/lib/nova/instances,$(readlink -m "$NOVA_INSTANCES_PATH")," \
            "$FAKEDAX_DIR/etc/apparmor/nova-fakedax"
        if [[ $FAKEDAX_STOCK_QEMU == False ]]; then
            echo "$FAKEDAX_EMULATOR rmix,"
        fi
    } | sudo install -D -m 644 /dev/stdin "$FAKEDAX_APPARMOR"
}

function configure_fakedax {
    # It writes to the same file in the background.
    async_wait configure_neutron_nova
    if is_service_enabled n-cpu; then
        iniset "$NOVA_CONF" DEFAULT compute_driver fakedax.FakeDaxDriver
        if [[ $FAKEDAX_STOCK_QEMU == False ]]; then
            iniset "$NOVA_CONF" fakedax emulator "$FAKEDAX_EMULATOR"
        fi
    fi
    if is_service_enabled n-sch; then
        iniset_multiline "$NOVA_CONF" filter_scheduler available_filters \
            nova.scheduler.filters.all_filters \
            nova_fakedax.scheduler.FakeDaxFilter
    fi
}

# Ask the host, as its nova-compute does: other plugins and local.conf have
# changed the configuration since.
function check_fakedax_host {
    local check said
    check="$NOVA_BIN_DIR/nova-fakedax --config-file $NOVA_CPU_CONF check"
    said=$(sg "$LIBVIRT_GROUP" "$check -f value -c 'Why not'") || die $LINENO \
        "this host cannot run disks on fake DAX: ${said%%$'\n'*}"
}

# Flavors and an image, on the node that has the APIs.
function create_fakedax_samples {
    create_fakedax_flavor fakedax.tiny 512 3
    create_fakedax_flavor fakedax.small 1024 8
    if [[ $FAKEDAX_IMAGE == True ]] && is_service_enabled g-api; then
        upload_fakedax_image
    fi
}

function create_fakedax_flavor {
    local name=$1 ram=$2 disk=$3
    openstack --os-cloud devstack-admin flavor show "$name" \
        >/dev/null 2>&1 ||
        openstack --os-cloud devstack-admin flavor create "$name" \
            --ram "$ram" --disk "$disk" --vcpus 1 \
            --property fakedax:disks=root \
            --property trait:CUSTOM_FAKEDAX=required
}

function upload_fakedax_image {
    local built properties
    openstack --os-cloud devstack-admin image show "$FAKEDAX_IMAGE_NAME" \
        >/dev/null 2>&1 && return
    sudo install -d -o "$STACK_USER" "$FAKEDAX_CACHE/nova-fakedax"
    built=$(sudo env XDG_CACHE_HOME="$FAKEDAX_CACHE" \
        "$FAKEDAX_DIR/guest-image-elements/build" \
        --release "$FAKEDAX_IMAGE_RELEASE") || die $LINENO "cannot build the \
image; with FAKEDAX_IMAGE=False none is built"
    # shellcheck disable=SC2016  # the other shell expands it
    properties=$(bash -c '. "$1" && printf -- "--property %s " \
        "${IMAGE_PROPERTIES[@]}"' - \
        "$FAKEDAX_DIR/guest-image-elements/common.bash")
    # shellcheck disable=SC2086  # two words per property
    openstack --os-cloud devstack-admin image create "$FAKEDAX_IMAGE_NAME" \
        --public --disk-format raw --container-format bare \
        --file "$built" $properties
}

# lib/tempest has made tempest's environment. Nova is no part of it, and the
# tests need none.
function configure_fakedax_tempest {
    "$TEMPEST_DIR/.tox/tempest/bin/pip" install --no-deps -e "$FAKEDAX_DIR"
    iniset "$TEMPEST_CONFIG" fakedax flavor_ref "$(
        openstack --os-cloud devstack-admin flavor show fakedax.tiny \
            -f value -c id)"
    if [[ $FAKEDAX_IMAGE == True ]]; then
        iniset "$TEMPEST_CONFIG" fakedax image_ref "$(
            openstack --os-cloud devstack-admin image show \
                "$FAKEDAX_IMAGE_NAME" -f value -c id)"
    fi
    iniset "$TEMPEST_CONFIG" fakedax shared_storage "$FAKEDAX_SHARED_STORAGE"
}

# What the install phase left, also if it ended half way.
function uninstall_fakedax {
    local environment
    sudo rm -f "$FAKEDAX_EMULATOR" "$FAKEDAX_APPARMOR"
    # libvirt's package may lack it.
    sudo rmdir --ignore-fail-on-non-empty "${FAKEDAX_APPARMOR%/*}" \
        2>/dev/null || true
    for environment in "$DEVSTACK_VENV" "$TEMPEST_DIR/.tox/tempest"; do
        if [[ -x $environment/bin/pip ]]; then
            PIP_VIRTUAL_ENV=$environment pip_uninstall nova-fakedax
        fi
    done
}

# unstack.sh and clean.sh may be given fewer services than stack.sh.
case "$1 ${2:-}" in
    'unstack ')
        uninstall_fakedax
        ;;
    'clean ')
        sudo rm -rf "$FAKEDAX_CACHE/nova-fakedax"
        ;;
esac

if is_fakedax_enabled; then
    case "$1 ${2:-}" in
        'stack pre-install')
            echo_summary "Checking the settings of nova-fakedax"
            check_fakedax_settings
            ;;
        'stack install')
            echo_summary "Installing nova-fakedax"
            install_fakedax
            ;;
        'stack post-config')
            echo_summary "Configuring nova-fakedax"
            configure_fakedax
            ;;
        'stack extra')
            if is_service_enabled n-cpu; then
                echo_summary "Asking the host whether it can run fake DAX"
                check_fakedax_host
            fi
            if is_service_enabled n-api; then
                echo_summary "Making flavors and an image for nova-fakedax"
                create_fakedax_samples
            fi
            ;;
        'stack test-config')
            if is_service_enabled tempest; then
                echo_summary "Telling tempest of nova-fakedax"
                configure_fakedax_tempest
            fi
            ;;
    esac
fi

$_XTRACE_FAKEDAX
