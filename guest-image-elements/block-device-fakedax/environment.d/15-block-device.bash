# With "gpt", the bootloader element installs GRUB for BIOS, and this element adds
# GRUB for EFI. With "efi", the bootloader element would mount the ESP.
export DIB_BLOCK_DEVICE=gpt
