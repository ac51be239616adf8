# memtest86+ starts, finds this memory and tests it.
# lab: limit 120
# lab: sees Memtest86
# lab: sees Memory
# lab: sees Testing
vmm-host memtest-vm.toml </dev/null >/tmp/memtest 2>&1 &
host=$!
wait_for Testing 60 /tmp/memtest
# It has no ACPI to hear a power button by.
kill -TERM $host
wait $host
code=$?
cat /tmp/memtest
exit $code
