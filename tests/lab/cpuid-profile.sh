# A profile that the host printed, pasted into a VM file, runs a kernel. Level 1's emulated processor lacks what tells AMD's
# guests of threads and caches (topology extensions): the profile gets it here.
# lab: limit 180
# lab: sees GUEST-DONE 0
# lab: sees CHECK ok caches are shared
vmm-host cpuid >/tmp/host.toml || exit 1
line() { sed -n "s/^\"$1\" = \[\(.*\)\]/\1/p" /tmp/host.toml | tr -d ,; }
value() { printf '"%s" = [0x%x, 0x%x, 0x%x, 0x%x]\n' "$@"; }
{
    sed -e 's/^cpus = 6/cpus = 4\ncpuid_profile = "host"/' -e 's/^sockets = .*/topology = "1:0"/' -e '/^cores = /d' \
        -e 's/lab.topology=[^ ]*/lab.topology=2x1x2/' -e 's/lab.apicids=[^ "]*/lab.apicids=0,1,2,3/' cpus.toml
    grep -v -E '^"8000000[01]"' /tmp/host.toml
    # shellcheck disable=SC2046
    set -- $(line 80000000)
    value 80000000 0x8000001e "$2" "$3" "$4"
    # shellcheck disable=SC2046
    set -- $(line 80000001)
    value 80000001 "$1" "$2" $(($3 | 1 << 22)) "$4"
    value 8000001d-0 0x121 0x01c0003f 0x3f 0
    value 8000001d-1 0x122 0x01c0003f 0x3f 0
    value 8000001d-2 0x143 0x01c0003f 0x3ff 0
    value 8000001d-3 0x163 0x03c0003f 0x1fff 1
} >/tmp/profile.toml
timeout -s KILL 150 vmm-host --log-level debug /tmp/profile.toml
