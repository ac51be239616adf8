# fio writes what carries its checksum, over virtio-block and over NVMe, and reads it back; in a second VM all of it is there still.
# lab: limit 400
# lab: times 2 GUEST-DONE 0
# lab: sees CHECK ok virtio-block: what the last VM wrote
# lab: sees CHECK ok NVMe: what the last VM wrote
for disk in virtio nvme; do
    dd if=/dev/zero of=$disk.img bs=1M seek=32 count=0 2>/dev/null
done
for round in first second; do
    timeout -s KILL 180 vmm-host fio-vm.toml </dev/null || exit 1
    [ $round = second ] || fresh fio
done
