/*
 * The device of ../hello-device in C: each byte that the guest reads from its I/O port is the next letter of a text; whatever the
 * guest writes starts over.
 *
 *     make                                       builds libhello_c.so
 *     vmm-host --plugin-path . plugins hello-c   shows its manifest
 *
 *     [dev.greeter]
 *     driver = "hello-c"
 *     text = "Good morning\n"
 */

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "vmm_plugin.h"

/* Read by the host without running the plugin: what a VM file may say. */
__attribute__((section(".vmm.plugin"), used)) static const char MANIFEST[] =
    "abi = \"1.0\"\n"
    "name = \"hello-c\"\n"
    "version = \"0.1.0\"\n"
    "license = \"Apache-2.0 OR MIT\"\n"
    "about = \"Example: an I/O port that greets, in C\"\n"
    "[[driver]]\n"
    "name = \"hello-c\"\n"
    "about = \"Each byte read from its port is the next letter of a text; a write starts over\"\n"
    "bus = \"isa\"\n"
    "[[driver.option]]\n"
    "name = \"port\"\n"
    "type = \"u32\"\n"
    "default = 0x510\n"
    "range = [0x100, 0xffff]\n"
    "about = \"Number of the I/O port\"\n"
    "[[driver.option]]\n"
    "name = \"text\"\n"
    "type = \"string\"\n"
    "default = \"Hello from C\\n\"\n"
    "about = \"What the guest reads\"\n";

/* One device. Register access comes from several vCPU threads at once, hence the atomic. */
struct hello {
    VmmRegionDesc region;
    atomic_size_t next;
    size_t length;
    char text[];
};

static int is(VmmStr text, const char *name)
{
    return text.len == strlen(name) && memcmp(text.ptr, name, text.len) == 0;
}

static int32_t fail(const VmmSink *err, const char *why, int32_t code)
{
    err->write(err->ctx, (const uint8_t *)why, strlen(why));
    return -code;
}

/* vmm.device/1 */

static int32_t describe(void *this, VmmDeviceDesc *out)
{
    struct hello *hello = this;
    *out = (VmmDeviceDesc){.regions = &hello->region, .region_count = 1};
    return 0;
}

static int32_t nothing_to_do(void *this, const VmmSink *err)
{
    (void)this, (void)err;
    return 0;
}

static int32_t reset(void *this, const VmmSink *err)
{
    struct hello *hello = this;
    (void)err;
    atomic_store(&hello->next, 0);
    return 0;
}

static void stop(void *this)
{
    (void)this;
}

static const VmmDeviceTable DEVICE = {
    .describe = describe,
    .start = nothing_to_do,
    .pause = nothing_to_do,
    .resume = nothing_to_do,
    .reset = reset,
    .stop = stop,
};

/* vmm.io/1 */

static uint64_t io_read(void *this, uint32_t region, uint64_t offset, uint32_t width)
{
    struct hello *hello = this;
    size_t at = atomic_fetch_add(&hello->next, 1);
    (void)region, (void)offset, (void)width;
    return at < hello->length ? (uint8_t)hello->text[at] : 0;
}

static void io_write(void *this, uint32_t region, uint64_t offset, uint32_t width, uint64_t value)
{
    struct hello *hello = this;
    (void)region, (void)offset, (void)width, (void)value;
    atomic_store(&hello->next, 0);
}

static const VmmIoTable IO = {.read = io_read, .write = io_write};

/* What every object has. Layout records are for Rust; the host takes a table without one on trust. */

static void release(void *this)
{
    free(this);
}

static VmmIface interface(void *this, VmmStr name)
{
    (void)this;
    if (is(name, VMM_DEVICE))
        return (VmmIface){.table = &DEVICE};
    if (is(name, VMM_IO))
        return (VmmIface){.table = &IO};
    return (VmmIface){0};
}

static const VmmBase BASE = {.release = release, .interface = interface};

/* The root */

static int32_t init(const VmmHost *host)
{
    (void)host;
    return 0;
}

static int32_t create(const VmmHost *host, uint32_t kind, VmmStr name, const VmmOpt *opts, size_t opt_count,
                      VmmObj *out, const VmmSink *err)
{
    uint64_t port = 0;
    VmmStr text = {0};
    (void)host;
    if (kind != VMM_KIND_DEVICE || !is(name, "hello-c"))
        return fail(err, "this plugin has only the driver hello-c", EINVAL);
    for (size_t i = 0; i < opt_count; i++) {
        if (is(opts[i].key, "port") && opts[i].kind == VMM_OPT_INT)
            port = opts[i].int_;
        if (is(opts[i].key, "text") && opts[i].kind == VMM_OPT_TEXT)
            text = opts[i].text;
    }
    if (port == 0)
        return fail(err, "option `port` is missing", EINVAL);
    struct hello *hello = malloc(sizeof *hello + text.len);
    if (hello == NULL)
        return fail(err, "out of memory", ENOMEM);
    hello->region = (VmmRegionDesc){.id = 0, .kind = VMM_REGION_PIO, .address = port, .size = 1};
    atomic_init(&hello->next, 0);
    hello->length = text.len;
    if (text.len > 0)
        memcpy(hello->text, text.ptr, text.len);
    *out = (VmmObj){.this_ = hello, .base = &BASE};
    return 0;
}

__attribute__((visibility("default"))) const VmmRoot VMM_PLUGIN = {
    .magic = VMM_MAGIC,
    .abi_major = VMM_ABI_MAJOR,
    .abi_minor = VMM_ABI_MINOR,
    .flags = VMM_FLAG_UNWIND, /* no panic ends the process: C has none */
    .manifest = (const uint8_t *)MANIFEST,
    .manifest_len = sizeof MANIFEST - 1,
    .init = init,
    .create = create,
};
