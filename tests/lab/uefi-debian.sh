# A Debian system comes to its login prompt by firmware and GRUB, checks its machine, and powers off cleanly.
# lab: firmware
# lab: limit 420
# lab: disks
# lab: sees GRUB-UP
# lab: sees lab login:
# lab: sees GUEST-DONE 0
rm -f /tmp/keys /tmp/console
mkfifo /tmp/keys
vmm-host debian-disk.toml </tmp/keys >/tmp/console 2>&1 &
host=$!
exec 3>/tmp/keys
tail -f /tmp/console &
shown=$!
wait_for 'lab login:' 300 /tmp/console
echo root >&3
wait_for 'root@lab' 60 /tmp/console
echo '/lab/check; echo "GUEST-DONE $?"; systemctl poweroff' >&3
(sleep 180; kill -KILL $host 2>/dev/null) &
wait $host
code=$?
sleep 1
kill $shown
exit $code
