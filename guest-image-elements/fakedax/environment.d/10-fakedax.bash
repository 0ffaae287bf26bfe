# Empty: the one that the distribution installs. Otherwise initramfs-tools or
# dracut.
export DIB_FAKEDAX_INITRAMFS=${DIB_FAKEDAX_INITRAMFS:-}
# Whether files carry the flag that daxroot=inode looks for.
export DIB_FAKEDAX_INODE_FLAG=${DIB_FAKEDAX_INODE_FLAG:-1}
