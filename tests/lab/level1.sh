# Level 1 itself: KVM is there, the plugins load into vmm-host there, and it accepts the VM files.
# lab: limit 60
# lab: sees virtio-block
ls -l /dev/kvm
vmm-host plugins || exit 1
for file in *.toml; do
    "$(host_of "$file")" check "$file" || exit 1
done
