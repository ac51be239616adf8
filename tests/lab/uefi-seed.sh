# Real cloud-init in a Debian system takes its data from the volume of a cloudinit block_dev, and applies it. Level 1's
# jobs share the Debian disk, which has another name afterwards: this one runs behind uefi-debian, by the order of names.
# lab: firmware
# lab: limit 1500
# lab: disks
# lab: sees seeded login:
# lab: sees GUEST-DONE 0
rm -f /tmp/keys /tmp/console
mkfifo /tmp/keys
vmm-host cloud-init-disk.toml </tmp/keys >/tmp/console 2>&1 &
host=$!
exec 3>/tmp/keys
tail -f /tmp/console &
shown=$!
wait_for 'login:' 700 /tmp/console
echo root >&3
wait_for 'root@' 300 /tmp/console
echo '/lab/check-seed; echo "GUEST-DONE $?"; systemctl poweroff' >&3
(sleep 600; kill -KILL $host 2>/dev/null) &
wait $host
code=$?
sleep 1
kill $shown
exit $code
