# A guest keeps a file system on a stack of layers, over a reboot and over a second VM; the base is what it was, byte for byte.
# lab: limit 400
# lab: times 2 GUEST-DONE 0
# lab: times 3 GUEST-UP
# lab: times 2 CHECK ok the files are there after
dd if=/dev/urandom of=base.raw bs=1M count=2 2>/dev/null
qemu-img convert -O qcow2 -c base.raw base.qcow2 && qemu-img resize -q base.qcow2 96M && qemu-img convert -O raw base.qcow2 base.raw || exit 1
before=$(sha256sum <base.qcow2)
for round in first second; do
    timeout -s KILL 180 vmm-host layers-vm.toml </dev/null || exit 1
    [ "$before" = "$(sha256sum <base.qcow2)" ] || { echo "CHECK FAIL the base is changed"; exit 1; }
    [ $round = second ] || fresh
done
qemu-img check base.qcow2 && qemu-img compare -f qcow2 -F raw base.qcow2 base.raw || exit 1
echo "CHECK ok the base is unchanged"
# What is thrown away leaves nothing behind.
[ ! -e lost.overlay ]
