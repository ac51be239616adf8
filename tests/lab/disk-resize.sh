# Disks grow, and one shrinks, while a guest uses them: virtio-block on a file, NVMe on a file behind a throttle. The files are made
# larger first, and vmm-host is told by SIGWINCH. And an image of a CD, made by xorriso, on both devices.
# lab: limit 240
# lab: sees GUEST-DONE 0
# lab: sees grow.img` has been grown from 1048576 to 33554432 bytes
# lab: sees block_dev.grow has grown from 33554432 to 67108864 bytes
# lab: sees block_dev.slow has grown from 33554432 to 50331648 bytes
# lab: sees grow.img` has been cut to 16777216 bytes
truncate -s 1M grow.img
truncate -s 32M below.img
vmm-host disk-resize-vm.toml </dev/null >/tmp/console 2>&1 &
host=$!
(
    sleep 200
    kill -KILL $host
) &
limit=$!
wait_for RESIZE-READY 90 /tmp/console
# Nobody is told before the signal comes.
truncate -s 64M grow.img
truncate -s 48M below.img
wait_for RESIZE-NOW 90 /tmp/console
kill -WINCH $host
wait_for SHRINK-NOW 90 /tmp/console
truncate -s 16M grow.img
kill -WINCH $host
wait_for GUEST-DONE 90 /tmp/console
wait $host
code=$?
kill $limit
cat /tmp/console
rm grow.img below.img
exit $code
