# What Linux makes of the board's own devices, with SIGUSR2 to vmm-host as its NMI button.
# lab: sees GUEST-DONE 0
# lab: sees SIGUSR2: each CPU gets a non-maskable interrupt
# lab: limit 180
vmm-host board-vm.toml </dev/null >/tmp/console 2>&1 &
host=$!
wait_for GUEST-WAITING 90 /tmp/console
kill -USR2 $host
(sleep 80; kill -KILL $host) &
wait $host
code=$?
cat /tmp/console
exit $code
