# Runs the bench's guest on one disk image, under vmm-host or under QEMU, whose virtio-blk has a thread of its own too.
cd /lab/bench || exit 1
mount -t debugfs debugfs /sys/kernel/debug
dd if=/dev/urandom of=disk.img bs=1M count=128 2>/dev/null
host=$(sed -n 's/.*bench\.host=\([^ ]*\).*/\1/p' /proc/cmdline)
tests=$(sed -n 's/.*\(bench\.tests=[^ ]*\).*/\1/p' /proc/cmdline)
sed -i "s/bench\.tests=/$tests/" disk.toml
[ "$host" != vmm-host-nvme ] || sed -i s/pci-virtio-block/pci-nvme/ disk.toml
if [ "$host" = vmm-host-overlay ]; then
    sed -i 's/block_dev\.disk\]/block_dev.base]\nread_only = true/' disk.toml
    printf '\n[block_dev.disk]\ntype = "overlay"\nbacking = "base"\npath = "/lab/bench/overlay"\n' >>disk.toml
fi
case $host in
qemu)
    qemu-system-x86_64 -L /lab/bench/firmware -accel kvm -machine pc -cpu host -m 512 -smp 1 \
        -no-reboot -nic none -vga none -display none -serial stdio -monitor none \
        -kernel /lab/vmlinuz -initrd initrd -append "console=ttyS0 quiet panic=-1 $tests" \
        -object iothread,id=io -drive if=none,id=disk,format=raw,cache=writeback,aio=threads,file=disk.img \
        -device virtio-blk-pci,drive=disk,iothread=io,addr=5 </dev/null
    ;;
*) vmm-host --log-level warn disk.toml </dev/null ;;
esac | while IFS= read -r line; do
    line=${line%"$(printf '\r')"}
    read -r exits </sys/kernel/debug/kvm/exits
    case $line in
    "BENCH-START "*) before=$exits ;;
    "BENCH "*) line="$line $((exits - before))" ;;
    esac
    echo "$line"
done
