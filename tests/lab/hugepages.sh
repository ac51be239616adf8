# Guest memory of large pages: refused with the figures while there are none, and used once there are.
# lab: limit 60
# lab: sees 32 pages of 2 MiB are needed, and of 8 in reserve 8 are free: "sysctl vm.nr_hugepages=32"
# lab: sees vmm-selftest
# lab: sees LARGE-PAGES-USED 32
cat >/tmp/huge.toml <<'END'
[main]
name = "huge"
cpus = 1
memory = 64
kernel = "builtin:selftest"
cmdline = "mode=hang"
profile = "minimal"
hugepages = true
prefault = true
END
reserve=/sys/kernel/mm/hugepages/hugepages-2048kB
echo 8 >$reserve/nr_hugepages
vmm-host check /tmp/huge.toml && exit 1
echo 40 >$reserve/nr_hugepages
vmm-host /tmp/huge.toml </dev/null &
vm=$!
tries=0
while [ "$(cat $reserve/free_hugepages)" != 8 ] && [ $tries -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
echo "LARGE-PAGES-USED $((40 - $(cat $reserve/free_hugepages)))"
sleep 2
kill $vm
wait $vm
[ "$(cat $reserve/free_hugepages)" = 40 ]
