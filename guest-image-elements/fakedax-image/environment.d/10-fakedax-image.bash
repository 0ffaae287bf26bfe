# Words FROM=TO: mirrors that the build uses, and what the image names instead.
export DIB_FAKEDAX_IMAGE_MIRRORS=${DIB_FAKEDAX_IMAGE_MIRRORS:-}
# GRUB must not delay the boot of a server.
export DIB_GRUB_TIMEOUT=${DIB_GRUB_TIMEOUT:-1}
# cloud-init makes the network's configuration.
export DIB_APT_MINIMAL_CREATE_INTERFACES=${DIB_APT_MINIMAL_CREATE_INTERFACES:-0}
