/*
 * A device whose description makes no sense in the one way that macros on the compiler's command line say. The host has to refuse it
 * with a reason, whatever numbers it is given.
 */

#include <stddef.h>
#include <string.h>

#include "vmm_plugin.h"

#ifndef REGIONS
#define REGIONS &REGION
#endif
#ifndef REGION_COUNT
#define REGION_COUNT 1
#endif
#ifndef KIND
#define KIND VMM_REGION_PIO
#endif
#ifndef ADDRESS
#define ADDRESS 0x600
#endif
#ifndef SIZE
#define SIZE 1
#endif
#ifndef PIN_COUNT
#define PIN_COUNT 0
#endif
#ifndef IRQ
#define IRQ 5
#endif
#ifndef DEVICE_NAME
#define DEVICE_NAME VMM_DEVICE
#endif
#ifndef IO_NAME
#define IO_NAME VMM_IO
#endif
#ifndef HID
#define HID ""
#endif

__attribute__((section(".vmm.plugin"), used)) static const char MANIFEST[] =
    "abi = \"1.0\"\nname = \"confused\"\nversion = \"1.2.3\"\nlicense = \"MIT\"\nabout = \"Makes no sense\"\n"
    "[[driver]]\nname = \"confused\"\nabout = \"Makes no sense\"\nbus = \"isa\"\n";

__attribute__((unused)) static const VmmRegionDesc REGION = {.kind = KIND, .address = ADDRESS, .size = SIZE};
__attribute__((unused)) static const VmmPinDesc PIN = {.irq = IRQ, .trigger = VMM_TRIGGER_LEVEL};

__attribute__((unused)) static const VmmDeviceDesc DESC = {
    .regions = REGIONS,
    .region_count = REGION_COUNT,
    .pins = &PIN,
    .pin_count = PIN_COUNT,
    .acpi_hid = {.ptr = (const uint8_t *)HID, .len = sizeof HID - 1},
};

static int32_t describe(void *this, VmmDeviceDesc *out)
{
    (void)this;
#ifdef DESCRIBE_CODE
    (void)out;
    return DESCRIBE_CODE;
#else
    *out = DESC;
    return 0;
#endif
}

static int32_t nothing_to_do(void *this, const VmmSink *err)
{
    (void)this, (void)err;
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
    .reset = nothing_to_do,
    .stop = stop,
};

static uint64_t io_read(void *this, uint32_t region, uint64_t offset, uint32_t width)
{
    (void)this, (void)region, (void)offset, (void)width;
    return 0;
}

static void io_write(void *this, uint32_t region, uint64_t offset, uint32_t width, uint64_t value)
{
    (void)this, (void)region, (void)offset, (void)width, (void)value;
}

static const VmmIoTable IO = {.read = io_read, .write = io_write};

static int is(VmmStr text, const char *name)
{
    return text.len == strlen(name) && memcmp(text.ptr, name, text.len) == 0;
}

static VmmIface interface(void *this, VmmStr name)
{
    (void)this;
    if (is(name, DEVICE_NAME))
        return (VmmIface){.table = &DEVICE};
    if (is(name, IO_NAME))
        return (VmmIface){.table = &IO};
    return (VmmIface){0};
}

static void release(void *this)
{
    (void)this;
}

__attribute__((unused)) static const VmmBase BASE = {.release = release, .interface = interface};

static int32_t init(const VmmHost *host)
{
    (void)host;
    return 0;
}

static int32_t create(const VmmHost *host, uint32_t kind, VmmStr name, const VmmOpt *opts, size_t opt_count,
                      VmmObj *out, const VmmSink *err)
{
    static char object;
    (void)host, (void)kind, (void)name, (void)opts, (void)opt_count;
#ifdef ERROR_TEXT
    err->write(err->ctx, (const uint8_t *)ERROR_TEXT, sizeof ERROR_TEXT - 1);
    (void)out, (void)object;
    return -1;
#else
    (void)err;
    *out = (VmmObj){.this_ = &object, .base = &BASE};
    return 0;
#endif
}

__attribute__((visibility("default"))) const VmmRoot VMM_PLUGIN = {
    .magic = VMM_MAGIC,
    .abi_major = VMM_ABI_MAJOR,
    .flags = VMM_FLAG_UNWIND,
    .manifest = (const uint8_t *)MANIFEST,
    .manifest_len = sizeof MANIFEST - 1,
    .init = init,
    .create = create,
};
