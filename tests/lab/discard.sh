# What a guest discards are holes in the images afterwards, and the rest is what it was.
# lab: limit 240
# lab: sees GUEST-DONE 0
# lab: times 4 CHECK ok holes in
dd if=/dev/urandom of=base.img bs=1M count=16 2>/dev/null
cp base.img virtio.img
cp base.img nvme.img
qemu-img convert -O qcow2 base.img discard.qcow2 || exit 1
timeout -s KILL 180 vmm-host discard-vm.toml </dev/null || exit 1
# The first half is discarded. The overlay's guest has written all of its disk before.
for image in virtio.img nvme.img discard.qcow2 discard.overlay; do
    # shellcheck disable=SC2046
    set -- $(du -k $image)
    if [ "$1" -gt 8000 ] && [ "$1" -lt 9000 ]; then
        echo "CHECK ok holes in $image: $1 KiB"
    else
        echo "CHECK FAIL $image takes $1 KiB of 16384"
    fi
done
qemu-img check discard.qcow2 || exit 1
dd if=/dev/zero of=expected.img bs=1M seek=8 count=0 2>/dev/null
dd if=base.img of=expected.img bs=1M skip=8 seek=8 2>/dev/null
for image in virtio.img nvme.img; do
    qemu-img compare -f raw -F raw $image expected.img || exit 1
done
qemu-img compare -f qcow2 -F raw discard.qcow2 expected.img
