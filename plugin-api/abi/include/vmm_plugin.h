/*
 * The C-layout tables between vmm-host and its plugins. SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * A plugin exports one object, `const VmmRoot VMM_PLUGIN`, and carries its manifest (TOML text) in the ELF section
 * ".vmm.plugin"; docs/ and examples/hello-c show how. Names of interfaces and services stand for one table for ever.
 *
 * Generated from plugin-api/abi/src; to renew it after a change there:
 *     VMM_WRITE_HEADER=1 cargo test -p vmm-abi --test header
 */

#ifndef VMM_PLUGIN_H
#define VMM_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

/* What VmmRoot.magic holds: the text and its NUL, 8 bytes. */
#define VMM_MAGIC "VMMPLUG"

/*
 The exported symbol, a `Root`.
 */
#define VMM_ROOT_SYMBOL "VMM_PLUGIN"

/*
 The ELF section that holds the manifest text.
 */
#define VMM_MANIFEST_SECTION ".vmm.plugin"

/*
 Interface name of `BlockTable`.
 */
#define VMM_BLOCK "vmm.block/1"

/*
 Interface name of `BlockResizeTable`; offered by backends whose disk may get larger while it is used.
 */
#define VMM_BLOCK_RESIZE "vmm.block.resize/1"

/*
 Interface name of `CharTable`.
 */
#define VMM_CHAR "vmm.char/1"

/*
 Interface name of `DeviceTable`; every device has it.
 */
#define VMM_DEVICE "vmm.device/1"

/*
 Interface name of `IoTable`; every device with a region has it.
 */
#define VMM_IO "vmm.io/1"

/*
 Interface name of `PciTable`; a device that has it is a PCI function.
 */
#define VMM_PCI "vmm.pci/1"

/*
 Interface name of `PciCapabilityTable`; needed by devices with a `CAP_LIVE` capability.
 */
#define VMM_PCI_CAPABILITY "vmm.pci.capability/1"

/*
 Interface name of `EventsTable`; needed by objects that use `vmm.host.event/1` watches or timers.
 */
#define VMM_EVENTS "vmm.events/1"

/*
 Interface name of `SnapshotTable`.
 */
#define VMM_SNAPSHOT "vmm.snapshot/1"

/*
 Interface name of `DeviceResizeTable`; offered by devices that tell their guest of a disk that has grown.
 */
#define VMM_DEVICE_RESIZE "vmm.device.resize/1"

/*
 Service name of `MemoryTable`.
 */
#define VMM_MEMORY "vmm.host.memory/1"

/*
 Service name of `IrqTable`.
 */
#define VMM_IRQ "vmm.host.irq/1"

/*
 Service name of `EventTable`.
 */
#define VMM_EVENT "vmm.host.event/1"

/*
 Service name of `LogTable`.
 */
#define VMM_LOG "vmm.host.log/1"

/*
 Service name of `FaultTable`.
 */
#define VMM_FAULT "vmm.host.fault/1"

/*
 Service name of `CounterTable`.
 */
#define VMM_COUNTER "vmm.host.counter/1"

/*
 Service name of `ControlTable`.
 */
#define VMM_CONTROL "vmm.host.control/1"

/*
 Service name of `StartupTable`.
 */
#define VMM_STARTUP "vmm.host.startup/1"

/*
 Service name of `ThreadTable`.
 */
#define VMM_THREAD "vmm.host.thread/1"

/*
 Service name of `NameTable`.
 */
#define VMM_NAME "vmm.host.name/1"


/*
 ABI generation. A host refuses a plugin of another major number.
 */
#define VMM_ABI_MAJOR 1

/*
 Counts additions since the major number; for information only, never compared.
 */
#define VMM_ABI_MINOR 0

/*
 `Root::flags`: panics unwind in this plugin, so its thunks can catch them, or there are none, as in C. Without it a panic
 ends the process.
 */
#define VMM_FLAG_UNWIND 1

/*
 `Root::flags`: built with debug assertions.
 */
#define VMM_FLAG_DEBUG 2

/*
 `Root::create` makes a device (`driver =`).
 */
#define VMM_KIND_DEVICE 1

/*
 `Root::create` makes a block backend (`type =` in a `[block_dev]` table).
 */
#define VMM_KIND_BLOCK 2

/*
 `Root::create` makes a character backend (`type =` in a `[char_dev]` table).
 */
#define VMM_KIND_CHAR 3

/*
 `Opt::kind`: `Opt::int` is 0 or 1.
 */
#define VMM_OPT_BOOL 1

/*
 `Opt::kind`: `Opt::int` is the number; sizes are in bytes.
 */
#define VMM_OPT_INT 2

/*
 `Opt::kind`: `Opt::text` is the string, path or enum value.
 */
#define VMM_OPT_TEXT 3

/*
 `Opt::kind`: `Opt::obj` is the backend that the option names, `Opt::text` that backend's name in the VM file.
 */
#define VMM_OPT_OBJECT 4

/*
 The layout record in an `Iface` is an abi_stable 0.11 `TypeLayout`.
 */
#define VMM_LAYOUT_ABI_STABLE_0_11 11

/*
 `BlockInfo::features`: writes fail with `-EROFS`.
 */
#define VMM_BLOCK_READ_ONLY 1

/*
 `BlockInfo::features`: `OP_DISCARD` frees space; without it, it fails with `-ENOTSUP`.
 */
#define VMM_BLOCK_DISCARD 2

/*
 `BlockInfo::features`: `OP_WRITE_ZEROES` works; without it, it fails with `-ENOTSUP`.
 */
#define VMM_BLOCK_WRITE_ZEROES 4

/*
 `BlockInfo::features`: a write that has completed may still be lost until `OP_FLUSH` completes.
 */
#define VMM_BLOCK_VOLATILE_CACHE 8

/*
 `BlockReq::op`: fill the scatter list from `offset`.
 */
#define VMM_OP_READ 0

/*
 `BlockReq::op`: store the scatter list at `offset`.
 */
#define VMM_OP_WRITE 1

/*
 `BlockReq::op`: when it completes, every write that completed before it was submitted survives a power failure.
 */
#define VMM_OP_FLUSH 2

/*
 `BlockReq::op`: `len` bytes at `offset` are not needed any more; they read as anything.
 */
#define VMM_OP_DISCARD 3

/*
 `BlockReq::op`: `len` bytes at `offset` read as zero from now on.
 */
#define VMM_OP_WRITE_ZEROES 4

/*
 `BlockReq::flags`: for `OP_WRITE`, complete only when the data survives a power failure.
 */
#define VMM_REQ_FUA 1

/*
 `BlockReq::flags`: for `OP_WRITE_ZEROES`, space may be freed.
 */
#define VMM_REQ_UNMAP 2

/*
 `RegionDesc::kind`: I/O ports at a fixed address.
 */
#define VMM_REGION_PIO 1

/*
 `RegionDesc::kind`: guest physical addresses at a fixed place.
 */
#define VMM_REGION_MMIO 2

/*
 `RegionDesc::kind`: a memory BAR below 4 GiB.
 */
#define VMM_REGION_BAR_MEM32 3

/*
 `RegionDesc::kind`: a memory BAR anywhere; takes BAR registers `bar` and `bar + 1`.
 */
#define VMM_REGION_BAR_MEM64 4

/*
 `RegionDesc::kind`: an I/O port BAR.
 */
#define VMM_REGION_BAR_IO 5

/*
 `PinDesc::trigger`: each rising edge is an interrupt.
 */
#define VMM_TRIGGER_EDGE 0

/*
 `PinDesc::trigger`: interrupting for as long as the pin is high; the line may be shared.
 */
#define VMM_TRIGGER_LEVEL 1

/*
 `CapDesc::flags`: the guest's accesses to the capability's body go through `PciCapabilityTable`.
 */
#define VMM_CAP_LIVE 1

/*
 `EventsTable::ready` `events`: data can be read (`POLLIN`).
 */
#define VMM_EVENT_READ 1

/*
 `EventsTable::ready` `events`: data can be written (`POLLOUT`).
 */
#define VMM_EVENT_WRITE 4

/*
 `EventsTable::ready` `events`: error on the descriptor (`POLLERR`); reported whether asked for or not.
 */
#define VMM_EVENT_ERROR 8

/*
 `EventsTable::ready` `events`: the other end is gone (`POLLHUP`); reported whether asked for or not.
 */
#define VMM_EVENT_HANGUP 16

/*
 `EventsTable::ready` `events`: the timer of this token has expired.
 */
#define VMM_EVENT_TIMER 256

/*
 `LogTable` level: something failed.
 */
#define VMM_LOG_ERROR 1

/*
 `LogTable` level: something is odd.
 */
#define VMM_LOG_WARN 2

/*
 `LogTable` level: what an operator wants to know.
 */
#define VMM_LOG_INFO 3

/*
 `LogTable` level: what a developer wants to know.
 */
#define VMM_LOG_DEBUG 4

/*
 `LogTable` level: everything.
 */
#define VMM_LOG_TRACE 5

/*
 `EventTable::doorbell` flag: only writes of `value` signal.
 */
#define VMM_DOORBELL_MATCH 1

/*
 `EventTable::doorbell` flag: end the binding of the same region, offset, width and match.
 */
#define VMM_DOORBELL_END 2

/*
 `ControlTable::request`: reset the machine.
 */
#define VMM_REQUEST_RESET 1

/*
 `ControlTable::request`: switch it off, as if the guest had.
 */
#define VMM_REQUEST_POWER_OFF 2

/*
 `ControlTable::request`: end the VM as failed, because the guest is beyond help.
 */
#define VMM_REQUEST_FAILURE 3

/*
 The answer to a question for an interface by name.
 */
typedef struct {
    /*
     The table that the name stands for, or null: not offered.
     */
    const void *table;
    /*
     Description of the table's layout for the other side to check, or null: taken on trust.
     */
    const void *layout;
    /*
     What `layout` points at; `LAYOUT_ABI_STABLE_0_11` or 0.
     */
    uint32_t layout_kind;
} VmmIface;

/*
 UTF-8 text, not NUL terminated, borrowed for the call.
 */
typedef struct {
    /*
     First byte; may be null when `len` is 0.
     */
    const uint8_t *ptr;
    /*
     Bytes.
     */
    size_t len;
} VmmStr;

/*
 The host's side. One for the process at `Root::init`, one for each object at `Root::create`; both stay valid
 for the life of the process.
 */
typedef struct {
    /*
     First argument of every function in the services' tables.
     */
    void *ctx;
    /*
     The table for a service name such as `vmm.host.irq/1`. Any thread, any time; always the same answer.
     */
    VmmIface (*service)(void *ctx, VmmStr name);
} VmmHost;

/*
 What every object can do.
 */
typedef struct {
    /*
     Ends the object; it is not used afterwards. Control thread; the object is created or stopped, and backends
     outlive the objects that were created with them.
     */
    void (*release)(void *this_);
    /*
     The table for an interface name such as `vmm.io/1`. Any thread, any time; always the same answer.
     */
    VmmIface (*interface)(void *this_, VmmStr name);
} VmmBase;

/*
 A device or backend that a plugin made.
 */
typedef struct {
    /*
     First argument of every function in the object's tables.
     */
    void *this_;
    /*
     Null only in an `Opt` that carries no object.
     */
    const VmmBase *base;
} VmmObj;

/*
 One option of a device or backend, already validated against the manifest and with defaults filled in.
 */
typedef struct {
    /*
     The option's name in the manifest.
     */
    VmmStr key;
    /*
     `OPT_*`: which of the next fields counts.
     */
    uint32_t kind;
    /*
     Unused, zero.
     */
    uint32_t reserved;
    /*
     For `OPT_BOOL` and `OPT_INT`.
     */
    uint64_t int_;
    /*
     For `OPT_TEXT` and `OPT_OBJECT`.
     */
    VmmStr text;
    /*
     For `OPT_OBJECT`.
     */
    VmmObj obj;
} VmmOpt;

/*
 Where the callee puts bytes: error text, saved state. Called any number of times during the call it was passed to.
 */
typedef struct {
    /*
     Passed back in `write`.
     */
    void *ctx;
    /*
     Appends `len` bytes at `ptr`.
     */
    void (*write)(void *ctx, const uint8_t *ptr, size_t len);
} VmmSink;

/*
 The one exported static of a plugin.
 */
typedef struct {
    /*
     `MAGIC`.
     */
    uint8_t magic[8];
    /*
     `ABI_MAJOR` that the plugin was built with.
     */
    uint32_t abi_major;
    /*
     `ABI_MINOR` that the plugin was built with.
     */
    uint32_t abi_minor;
    /*
     `FLAG_*`.
     */
    uint32_t flags;
    /*
     Unused, zero.
     */
    uint32_t reserved;
    /*
     The same text as in `MANIFEST_SECTION`.
     */
    const uint8_t *manifest;
    /*
     Its bytes.
     */
    size_t manifest_len;
    /*
     Called once, first, on the control thread, with the process-wide host: install log and panic bridges here.
     Returns 0 or `-errno`; on failure the plugin is not used.
     */
    int32_t (*init)(const VmmHost *host);
    /*
     Creates a device or backend. Control thread; no vCPU runs yet. `kind` is `KIND_*`, `name` one of the manifest's
     names of that kind. May use the log, fault, counter, memory, startup and thread services; interrupts, doorbells and watches
     only from `start` on (a backend has no `start`: it may watch at once). On failure writes one line to `err`,
     leaves `out` alone and keeps nothing.
     */
    int32_t (*create)(const VmmHost *host,
                      uint32_t kind,
                      VmmStr name,
                      const VmmOpt *opts,
                      size_t opt_count,
                      VmmObj *out,
                      const VmmSink *err);
} VmmRoot;

/*
 What a backend is when it is created. Never changes while it lives; how large a disk has become since then, it says in
 `BlockResizeTable`.
 */
typedef struct {
    /*
     Bytes; a multiple of `logical`.
     */
    uint64_t bytes;
    /*
     Smallest unit that can be read or written, and the alignment of offsets and lengths: a power of two, 512 to 65536.
     */
    uint32_t logical;
    /*
     Unit that is written without a read before it; a multiple of `logical`.
     */
    uint32_t physical;
    /*
     `BLOCK_*`.
     */
    uint32_t features;
    /*
     Most elements in one scatter list.
     */
    uint32_t max_segments;
    /*
     Alignment that the addresses in a scatter list must have, in bytes; 1 for none.
     */
    uint32_t alignment;
    /*
     Most bytes in one discard or write-zeroes request; 0 when neither is offered.
     */
    uint32_t max_discard;
} VmmBlockInfo;

/*
 One element of a scatter list. It points into guest memory, which stays mapped for the life of the process, or into
 memory that the submitter keeps until the request is reaped.
 */
typedef struct {
    /*
     First byte. The guest may change what is there at any time.
     */
    uint8_t *host;
    /*
     Bytes.
     */
    size_t len;
} VmmIov;

/*
 One request.
 */
typedef struct {
    /*
     Comes back in `BlockDone::token`.
     */
    uint64_t token;
    /*
     `OP_*`.
     */
    uint32_t op;
    /*
     `REQ_*`.
     */
    uint32_t flags;
    /*
     Byte offset.
     */
    uint64_t offset;
    /*
     Bytes; for reads and writes the sum of the scatter list.
     */
    uint64_t len;
    /*
     Scatter list, for reads and writes. The list itself is borrowed for the call of submit.
     */
    const VmmIov *iov;
    /*
     Elements.
     */
    size_t iov_count;
} VmmBlockReq;

/*
 One completion.
 */
typedef struct {
    /*
     From `BlockReq::token`.
     */
    uint64_t token;
    /*
     0: all of it was done. `-errno`: not, or not all.
     */
    int32_t result;
    /*
     Unused, zero.
     */
    uint32_t reserved;
} VmmBlockDone;

/*
 `vmm.block/1`. A queue belongs to one thread at a time; different queues run in parallel without a lock between them.
 Requests of one queue complete in any order; a flush covers what had *completed*, on any queue, before it was submitted.
 */
typedef struct {
    /*
     Fills `out`. Any thread. Returns 0 or `-errno`.
     */
    int32_t (*info)(void *this_, VmmBlockInfo *out);
    /*
     Opens a queue for at most `depth` requests in flight and stores it in `out`; owned by the caller until
     `close_queue`. Control thread or the future owner.
     */
    int32_t (*open_queue)(void *this_, uint32_t depth, void **out, const VmmSink *err);
    /*
     Hands over `count` requests; returns how many were taken, from the first on. Fewer than `count`: the queue is full, reap first.
     Invalid requests are taken and complete with `-EINVAL`. Queue owner; allocates nothing, may do short I/O itself.
     */
    size_t (*submit)(void *queue, const VmmBlockReq *reqs, size_t count);
    /*
     Stores at most `max` completions; returns how many. Fewer than `max`: there are no more now. Queue owner.
     */
    size_t (*reap)(void *queue, VmmBlockDone *out, size_t max);
    /*
     A descriptor that gets readable when completions have come that were not there yet at the end of the last
     submit or reap. The owner reads 8 bytes from it, then reaps until there are no more. Borrowed until `close_queue`.
     -1: every request is complete when submit returns.
     */
    int32_t (*fd)(void *queue);
    /*
     Waits for what is in flight, then ends the queue. Queue owner.
     */
    void (*close_queue)(void *queue);
} VmmBlockTable;

/*
 `vmm.block.resize/1`: disks that get larger while they are used. A disk never gets smaller: each answer is a multiple of
 `BlockInfo::logical`, and at least `BlockInfo::bytes` and every answer before it. Requests up to the size that was answered
 are valid from then on. Who does not know of this table goes on using the first `BlockInfo::bytes` bytes.
 */
typedef struct {
    /*
     Looks again at how large the disk is, because the operator says that it has grown, and stores the size in bytes in `out`.
     A layer answers for what it stands on, which has been asked before it. Control thread; from create until release, also
     while queues are in use. Returns 0, or `-errno` with one line in `err`: the size stays what it was.
     */
    int32_t (*look_again)(void *this_, uint64_t *out, const VmmSink *err);
    /*
     The size of the last `look_again` in bytes; before the first, `BlockInfo::bytes`. Any thread; does not look.
     */
    uint64_t (*bytes)(void *this_);
} VmmBlockResizeTable;

/*
 `vmm.char/1`. One device uses a backend; any of its threads, one at a time for each direction.
 */
typedef struct {
    /*
     Takes at most `len` bytes of input into `buf`. `-EAGAIN`: none now, `fd` tells when. Never blocks. What is not
     taken waits: a device that has no room loses nothing.
     */
    ptrdiff_t (*read)(void *this_, uint8_t *buf, size_t len);
    /*
     Gives `len` bytes of output; returns how many were taken. Never blocks: a backend without a client keeps or drops
     bytes, as its options say, and counts what it drops.
     */
    ptrdiff_t (*write)(void *this_, const uint8_t *buf, size_t len);
    /*
     A descriptor, readable while `read` would give something. Borrowed until release. -1: there is never input.
     */
    int32_t (*fd)(void *this_);
} VmmCharTable;

/*
 A numbered window of guest-visible registers. The device never learns where a BAR was placed.
 */
typedef struct {
    /*
     The device's own number for it, passed to `IoTable`.
     */
    uint32_t id;
    /*
     `REGION_*`.
     */
    uint32_t kind;
    /*
     BAR number 0 to 5, for BAR kinds.
     */
    uint32_t bar;
    /*
     Unused, zero.
     */
    uint32_t reserved;
    /*
     Guest address, for PIO and MMIO kinds.
     */
    uint64_t address;
    /*
     Bytes; for BARs a power of two (memory at least 16, I/O 4 to 256, except that virtio's legacy I/O BAR may be larger).
     */
    uint64_t size;
} VmmRegionDesc;

/*
 An ISA interrupt pin. A PCI function's INTx is pin 0 and is not listed here.
 */
typedef struct {
    /*
     ISA IRQ, 0 to 15.
     */
    uint32_t irq;
    /*
     `TRIGGER_*`.
     */
    uint32_t trigger;
} VmmPinDesc;

/*
 What a device is made of. The arrays and text stay valid and unchanged until release.
 */
typedef struct {
    /*
     Regions.
     */
    const VmmRegionDesc *regions;
    /*
     How many.
     */
    size_t region_count;
    /*
     ISA interrupt pins; the index is the pin number for `vmm.host.irq/1`.
     */
    const VmmPinDesc *pins;
    /*
     How many.
     */
    size_t pin_count;
    /*
     ACPI hardware id (`PNP0501`) under which the guest's ACPI tables list the device, or empty: not listed.
     */
    VmmStr acpi_hid;
} VmmDeviceDesc;

/*
 `vmm.device/1`: description and life cycle. All on the control thread.
 */
typedef struct {
    /*
     Fills `out`. State: created. The answer never changes. Returns 0 or `-errno`.
     */
    int32_t (*describe)(void *this_, VmmDeviceDesc *out);
    /*
     The guest is about to run for the first time; interrupts, doorbells and watches may be asked for from here on.
     State: created → started. No vCPU runs until it returns.
     */
    int32_t (*start)(void *this_, const VmmSink *err);
    /*
     Quiesce: when it returns 0, no thread of the device touches guest memory or raises an interrupt, and requests
     in flight are finished or part of the state. State: started → paused; no vCPU runs.
     */
    int32_t (*pause)(void *this_, const VmmSink *err);
    /*
     Undoes pause. State: paused → started; no vCPU runs until it returns.
     */
    int32_t (*resume)(void *this_, const VmmSink *err);
    /*
     Back to power-on state, as by the platform's reset line. State: paused; stays paused.
     */
    int32_t (*reset)(void *this_, const VmmSink *err);
    /*
     The guest will not run again: finish what is in flight, end threads, flush. State: any → stopped.
     */
    void (*stop)(void *this_);
} VmmDeviceTable;

/*
 `vmm.io/1`: register access. Any vCPU thread, several at once; state started. Must not block: a vCPU waits.
 */
typedef struct {
    /*
     Reads `width` (1, 2, 4, 8) bytes at `offset` of region `region`. `offset + width` may lie beyond registers
     that the device has, never beyond the region. The host masks the result to `width`.
     */
    uint64_t (*read)(void *this_, uint32_t region, uint64_t offset, uint32_t width);
    /*
     Writes the low `width` bytes of `value`.
     */
    void (*write)(void *this_, uint32_t region, uint64_t offset, uint32_t width, uint64_t value);
} VmmIoTable;

/*
 A capability in PCI configuration space (PCI 3.0 section 6.7), in the order in which the guest finds them.
 */
typedef struct {
    /*
     Capability id; 0x09 is vendor specific. MSI-X (0x11) is the host's: ask for it by `msix_vectors`.
     */
    uint32_t id;
    /*
     `CAP_*`.
     */
    uint32_t flags;
    /*
     The bytes after id and next pointer; read-only to the guest unless `CAP_LIVE`.
     */
    const uint8_t *body;
    /*
     How many, at most 190 in all.
     */
    size_t body_len;
} VmmCapDesc;

/*
 What a PCI function is. `caps` stays valid and unchanged until release.
 */
typedef struct {
    /*
     Vendor id.
     */
    uint16_t vendor;
    /*
     Device id.
     */
    uint16_t device;
    /*
     Subsystem vendor id.
     */
    uint16_t subsystem_vendor;
    /*
     Subsystem id.
     */
    uint16_t subsystem;
    /*
     Class, subclass, programming interface: 24 bits, class highest.
     */
    uint32_t class_;
    /*
     Revision id.
     */
    uint8_t revision;
    /*
     Whether the function has an INTx pin (0 or 1); the host picks which.
     */
    uint8_t intx;
    /*
     MSI-X vectors, 0 to 2048.
     */
    uint16_t msix_vectors;
    /*
     Memory BAR number that the host makes for the MSI-X table and pending bits; no region may use it.
     */
    uint32_t msix_bar;
    /*
     Unused, zero.
     */
    uint32_t reserved;
    /*
     Capabilities.
     */
    const VmmCapDesc *caps;
    /*
     How many.
     */
    size_t cap_count;
} VmmPciDesc;

/*
 `vmm.pci/1`. The host owns configuration space, BAR placement, MSI-X table and masking.
 */
typedef struct {
    /*
     Fills `out`. Control thread; state created. The answer never changes. Returns 0 or `-errno`.
     */
    int32_t (*describe)(void *this_, VmmPciDesc *out);
} VmmPciTable;

/*
 `vmm.pci.capability/1`: the guest's accesses to capabilities marked `CAP_LIVE`. Any vCPU thread; state started.
 */
typedef struct {
    /*
     Reads `width` (1, 2, 4) bytes at `offset` into the body of capability number `cap` (its index in the description).
     */
    uint32_t (*read)(void *this_, uint32_t cap, uint32_t offset, uint32_t width);
    /*
     Writes there.
     */
    void (*write)(void *this_, uint32_t cap, uint32_t offset, uint32_t width, uint32_t value);
} VmmPciCapabilityTable;

/*
 `vmm.events/1`: on the I/O thread, never two at once for one object.
 */
typedef struct {
    /*
     The descriptor watched with `token` is ready, or the timer `token` has expired. State: from the first watch until
     release, also while paused: a paused device notes it and acts on resume. Must not block for long: other
     devices share the thread.
     */
    void (*ready)(void *this_, uint64_t token, uint32_t events);
} VmmEventsTable;

/*
 `vmm.snapshot/1`: state that survives the process. Control thread; state paused (save) or created (load).
 */
typedef struct {
    /*
     Writes the state to `out`; returns its version (from 1) or `-errno`.
     */
    int32_t (*save)(void *this_, const VmmSink *out, const VmmSink *err);
    /*
     Takes state of `version`, one that the manifest's `state` range promises. Returns 0 or `-errno`; after a failure
     the device is as created.
     */
    int32_t (*load)(void *this_, uint32_t version, const uint8_t *data, size_t len, const VmmSink *err);
} VmmSnapshotTable;

/*
 `vmm.device.resize/1`: the other side of `crate::block::BlockResizeTable`.
 */
typedef struct {
    /*
     A block backend that the device was created with has become larger: the device asks those that it has for their size and
     tells the guest, in the way of its own specification. Control thread; state started, vCPUs may run.
     */
    void (*resized)(void *this_);
} VmmDeviceResizeTable;

/*
 One range of guest RAM, mapped into this process. Another process can map the same by `fd` and `fd_offset`.
 */
typedef struct {
    /*
     Guest physical address of the first byte.
     */
    uint64_t gpa;
    /*
     Bytes.
     */
    uint64_t len;
    /*
     Where it is mapped here, readable and writable. The guest changes it at any time: only volatile or atomic access.
     */
    uint8_t *host;
    /*
     Offset in `fd`.
     */
    uint64_t fd_offset;
    /*
     File that backs it, or -1 where no file does: memory is private to this process unless the VM file says otherwise.
     */
    int32_t fd;
    /*
     Unused, zero.
     */
    uint32_t reserved;
    /*
     One bit per 4 KiB page, lowest bit first, to be set atomically by whoever writes to the page while
     `MemTable::tracking` is not zero; `len / 4096` bits rounded up to whole words.
     */
    uint64_t *dirty;
} VmmMemRegion;

/*
 All guest RAM, sorted by address. The same for the life of the process.
 */
typedef struct {
    /*
     The ranges.
     */
    const VmmMemRegion *regions;
    /*
     How many.
     */
    size_t count;
    /*
     Read atomically: not zero while pages written must be marked in the `dirty` bitmaps.
     */
    const uint32_t *tracking;
} VmmMemTable;

/*
 `vmm.host.memory/1`.
 */
typedef struct {
    /*
     The table of guest RAM; never null, never changes.
     */
    const VmmMemTable *(*table)(void *ctx);
} VmmMemoryTable;

/*
 `vmm.host.irq/1`. State: from start on.
 */
typedef struct {
    /*
     An eventfd; each count written to it is MSI-X vector `vector`. Borrowed, valid until release. While the guest masks
     the vector the count waits in it as the pending bit. `-errno`: no such vector.
     */
    int32_t (*fd)(void *ctx, uint32_t vector);
    /*
     Raises MSI-X vector `vector` once.
     */
    int32_t (*raise)(void *ctx, uint32_t vector);
    /*
     Drives pin `pin` (a PCI function's INTx is pin 0) high (1) or low (0).
     */
    int32_t (*level)(void *ctx, uint32_t pin, uint32_t high);
    /*
     Whether the guest has enabled MSI-X (1) or the function has to use INTx (0).
     */
    int32_t (*msix_enabled)(void *ctx);
} VmmIrqTable;

/*
 `vmm.host.event/1`. State: from start on; a backend may use watches and timers from create on.
 */
typedef struct {
    /*
     Binds guest writes of `width` bytes (0: any width) at `offset` of region `region` to eventfd `fd`: such a write adds 1
     to it and never reaches `vmm.io/1`. Lasts until release, or until a call with `DOORBELL_END`, after which writes reach
     `vmm.io/1` again. `-ENOTSUP`: not on this machine; the write arrives at `vmm.io/1`, which a device must handle in
     any case. Other `-errno`: refused, or no such binding to end.
     */
    int32_t (*doorbell)(void *ctx,
                        uint32_t region,
                        uint64_t offset,
                        uint32_t width,
                        uint32_t flags,
                        uint64_t value,
                        int32_t fd);
    /*
     Calls `vmm.events/1` with `token` whenever `fd` is ready for `events` (`EVENT_*`), again and again for as long as
     it is. A second watch of the same token replaces the first. The object keeps `fd` open while it is watched.
     */
    int32_t (*watch)(void *ctx, int32_t fd, uint32_t events, uint64_t token);
    /*
     Ends a watch. When called on the I/O thread no further `ready` of this token comes; from elsewhere one may be under way.
     */
    int32_t (*unwatch)(void *ctx, uint64_t token);
    /*
     Calls `vmm.events/1` with `token` and `EVENT_TIMER` once at `deadline` on `clock`'s scale; replaces an earlier deadline
     of that token; `u64::MAX` cancels.
     */
    int32_t (*timer)(void *ctx, uint64_t token, uint64_t deadline);
    /*
     Nanoseconds, monotonic.
     */
    uint64_t (*clock)(void *ctx);
} VmmEventTable;

/*
 `vmm.host.log/1`.
 */
typedef struct {
    /*
     The most detailed `LOG_*` level that anybody reads now; 0 for none.
     */
    uint32_t (*max_level)(void *ctx);
    /*
     Writes one message. The host adds the name of the device or plugin.
     */
    void (*log)(void *ctx, uint32_t level, VmmStr target, VmmStr text);
} VmmLogTable;

/*
 `vmm.host.fault/1`.
 */
typedef struct {
    /*
     The object has failed for good, in `method`, as `text` says (with place in the source). The host logs it with the
     plugin's and the device's names and follows `on_fault`.
     */
    void (*report)(void *ctx, VmmStr method, VmmStr text);
} VmmFaultTable;

/*
 `vmm.host.counter/1`.
 */
typedef struct {
    /*
     A counter of this object: 8 aligned bytes, added to atomically by the plugin, read by the host, valid for the life
     of the process. The same name gives the same counter.
     */
    uint64_t *(*counter)(void *ctx, VmmStr name);
} VmmCounterTable;

/*
 `vmm.host.control/1`.
 */
typedef struct {
    /*
     Asks for `REQUEST_*`; `why` goes to the log. Returns at once, before it happens.
     */
    int32_t (*request)(void *ctx, uint32_t what, VmmStr why);
} VmmControlTable;

/*
 `vmm.host.startup/1`: lets an object keep the guest from starting, for example until a console client has come.
 */
typedef struct {
    /*
     No vCPU runs until `StartupTable::release`. During create only; at most once. `why` goes to the log.
     */
    int32_t (*hold)(void *ctx, VmmStr why);
    /*
     Ends the hold; without one, does nothing.
     */
    void (*release)(void *ctx);
} VmmStartupTable;

/*
 `vmm.host.thread/1`: how the system schedules the thread that calls. For threads that the plugin has started.
 */
typedef struct {
    /*
     `on` 1: a wake-up of the calling thread interrupts nobody: if no processor is free, the thread runs when one is, or when
     its turn comes. So what wakes it, a virtual CPU that has rung a doorbell, goes on and leaves more work behind. 0: as a
     thread is at first. Returns `-ENOTSUP`, and changes nothing, where the system knows no such difference or the operator
     has chosen how the process is scheduled.
     */
    int32_t (*gather)(void *ctx, uint32_t on);
} VmmThreadTable;

/*
 `vmm.host.name/1`: what the operator calls the object, for messages and probes.
 */
typedef struct {
    /*
     The name of its table in the VM file, such as `block_dev.root`. Valid for the life of the process.
     */
    VmmStr (*name)(void *ctx);
} VmmNameTable;

#endif  /* VMM_PLUGIN_H */
