# memtest86+ starts, finds this memory and tests it.
# lab: limit 120
# lab: sees Memtest86
# lab: sees Memory
# lab: sees Testing
vmm-host --log-level debug memtest-vm.toml </dev/null >/tmp/memtest 2>&1 &
host=$!
tries=0
until grep -q Testing /tmp/memtest || [ $tries = 60 ]; do
    sleep 1
    tries=$((tries + 1))
done
# It has no ACPI to hear a power button by.
kill -TERM $host
wait $host
code=$?
cat /tmp/memtest
exit $code
