# What firmware keeps is there for the next vmm-host, and one that runs has it for itself.
# lab: firmware
# lab: limit 300
# lab: times 2 SHELL-UP
# lab: times 1 00000000: 2A
# lab: sees in use by another VM
vmm-host ovmf-kept.toml </dev/null
[ $? = 5 ] || exit 1
vmm-host ovmf-kept.toml </dev/null &
host=$!
sleep 2
vmm-host ovmf-kept.toml </dev/null
[ $? = 1 ] || exit 1
wait $host
