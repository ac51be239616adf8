# SIGTERM to vmm-host is the guest's power button: the guest hears it and powers off by itself.
# lab: sees GUEST-BUTTON
# lab: sees GUEST-DONE 0
vmm-host wait-power-button.toml </dev/null >/tmp/console 2>&1 &
host=$!
wait_for GUEST-WAITING 60 /tmp/console
kill -TERM $host
(sleep 30; kill -KILL $host) &
wait $host
code=$?
cat /tmp/console
exit $code
