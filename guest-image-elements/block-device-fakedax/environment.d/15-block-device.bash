# What the bootloader element does for "gpt" is GRUB for BIOS; this element adds
# GRUB for EFI, which "efi" would want to mount.
export DIB_BLOCK_DEVICE=gpt
