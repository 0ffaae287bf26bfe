# initramfs-tools or dracut; empty for the one that the distribution installs.
export DIB_FAKEDAX_INITRAMFS=${DIB_FAKEDAX_INITRAMFS:-}
# Whether files carry the flag that daxroot=inode looks for.
export DIB_FAKEDAX_INODE_FLAG=${DIB_FAKEDAX_INODE_FLAG:-1}
