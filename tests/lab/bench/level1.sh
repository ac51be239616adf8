# Runs the bench's guest on one disk image, under QEMU's virtio-blk and under vmm-host's, in turns.
cd /lab/bench || exit 1
dd if=/dev/urandom of=disk.img bs=1M count=128 2>/dev/null
scale=$(sed -n 's/.*bench\.scale=\([^ ]*\).*/\1/p' /proc/cmdline)
sed -i "s/bench.scale=1/bench.scale=$scale/" disk.toml
for round in 1 2; do
    for name in $(sed -n 's/.*bench\.hosts=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' '); do
        echo "BENCH-HOST $name $round"
        case $name in
        qemu)
            timeout -s KILL 300 qemu-system-x86_64 -L /lab/bench/firmware -accel kvm -machine pc -cpu host -m 512 -smp 1 \
                -no-reboot -nic none -vga none -display none -serial stdio -monitor none \
                -kernel /lab/vmlinuz -initrd initrd -append "console=ttyS0 quiet panic=-1 bench.scale=$scale" \
                -object iothread,id=io -drive if=none,id=disk,format=raw,cache=writeback,aio=threads,file=disk.img \
                -device virtio-blk-pci,drive=disk,iothread=io,addr=5 </dev/null
            ;;
        *) timeout -s KILL 300 vmm-host --log-level warn disk.toml </dev/null ;;
        esac
        echo "BENCH-END $name $?"
    done
done
