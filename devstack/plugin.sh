#!/bin/bash
#
# The DevStack plugin: what each phase of stack.sh, unstack.sh and clean.sh
# does for nova-fakedax. DevStack sources it.

_XTRACE_FAKEDAX=$(set +o | grep xtrace)
set +o xtrace

# Services of Nova that need the package.
function is_fakedax_enabled {
    is_service_enabled n-api || is_service_enabled n-sch ||
        is_service_enabled n-cpu
}

# Say at once what would fail much later.
function check_fakedax {
    is_service_enabled n-cpu || return 0
    [[ $VIRT_DRIVER == libvirt ]] || die $LINENO \
        "VIRT_DRIVER=$VIRT_DRIVER: nova-fakedax needs libvirt"
    [[ $LIBVIRT_TYPE == kvm || $LIBVIRT_TYPE == qemu ]] || die $LINENO \
        "LIBVIRT_TYPE=$LIBVIRT_TYPE: nova-fakedax needs kvm or qemu"
    [[ ${NOVA_BACKEND:-} != LVM ]] || die $LINENO \
        "NOVA_BACKEND=LVM: nova-fakedax needs disks that are files"
}

function install_fakedax {
    setup_develop "$FAKEDAX_DIR"
    if is_service_enabled n-cpu && [[ $FAKEDAX_STOCK_QEMU == False ]]; then
        install_fakedax_emulator
    fi
}

function install_fakedax_emulator {
    local built
    # shellcheck disable=SC2046
    install_package $("$FAKEDAX_DIR/qemu-device/build" --packages)
    sudo install -d -o "$STACK_USER" "$FAKEDAX_CACHE"
    built=$(XDG_CACHE_HOME=$FAKEDAX_CACHE "$FAKEDAX_DIR/qemu-device/build" \
        --version "$FAKEDAX_QEMU_VERSION") ||
        die $LINENO "cannot build QEMU $FAKEDAX_QEMU_VERSION; with \
FAKEDAX_STOCK_QEMU=True none is built"
    printf '#!/bin/sh\nexec %s "$@"\n' "$built" |
        sudo install -m 755 /dev/stdin "$FAKEDAX_EMULATOR"
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
        configure_fakedax_scheduler
    fi
}

function configure_fakedax_scheduler {
    local enabled
    enabled=$(iniget "$NOVA_CONF" filter_scheduler enabled_filters)
    if [[ ,$enabled, != *,FakeDaxFilter,* ]]; then
        iniset "$NOVA_CONF" filter_scheduler enabled_filters \
            "${enabled:+$enabled,}FakeDaxFilter"
    fi
    iniset_multiline "$NOVA_CONF" filter_scheduler available_filters \
        nova.scheduler.filters.all_filters \
        nova_fakedax.scheduler.FakeDaxFilter
}

# Flavors and an image, on the node that has the APIs.
function fill_fakedax {
    create_fakedax_flavor fakedax.tiny 256 3
    create_fakedax_flavor fakedax.small 1024 8
    if [[ $FAKEDAX_IMAGE == True ]] && is_service_enabled g-api; then
        upload_fakedax_image
    fi
}

function create_fakedax_flavor {
    local name=$1 ram=$2 disk=$3
    openstack --os-cloud devstack-admin flavor show "$name" >/dev/null 2>&1 ||
        openstack --os-cloud devstack-admin flavor create "$name" \
            --ram "$ram" --disk "$disk" --vcpus 1 \
            --property fakedax:disks=root \
            --property trait:CUSTOM_FAKEDAX=required
}

function upload_fakedax_image {
    local built
    openstack --os-cloud devstack-admin image show "$FAKEDAX_IMAGE_NAME" \
        >/dev/null 2>&1 && return
    built=$(sudo env XDG_CACHE_HOME="$FAKEDAX_CACHE" \
        "$FAKEDAX_DIR/guest-image-elements/build" \
        --release "$FAKEDAX_IMAGE_RELEASE") ||
        die $LINENO "cannot build the image; with FAKEDAX_IMAGE=False none is \
built"
    openstack --os-cloud devstack-admin image create "$FAKEDAX_IMAGE_NAME" \
        --public --disk-format raw --container-format bare \
        --file "$built" --property fakedax_guest=true
}

function clean_fakedax {
    sudo rm -f "$FAKEDAX_EMULATOR"
    sudo rm -rf "$FAKEDAX_CACHE"
}

if is_fakedax_enabled; then
    case "$1 ${2:-}" in
        'stack pre-install')
            echo_summary "Checking what nova-fakedax needs"
            check_fakedax
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
            if is_service_enabled n-api; then
                echo_summary "Making flavors and an image for nova-fakedax"
                fill_fakedax
            fi
            ;;
    esac
fi
# clean.sh knows no services.
if [[ $1 == clean ]]; then
    clean_fakedax
fi

$_XTRACE_FAKEDAX
