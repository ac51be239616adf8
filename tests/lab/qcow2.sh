# A guest makes and checks a file system on a qcow2 image in front of a raw one, and qemu-img finds the image sound. Then again, with
# what is there already.
# lab: limit 240
# lab: times 2 GUEST-DONE 0
# lab: sees CHECK ok the first file is there still
qemu-img create -q -f qcow2 -b keep.img -F raw data.qcow2 96M || exit 1
for round in first second; do
    timeout -s KILL 100 vmm-host qcow2-vm.toml </dev/null || exit 1
    qemu-img check data.qcow2 || exit 1
    [ $round = second ] || fresh
done
tr -d k <keep.img | wc -c | grep -qx 0
