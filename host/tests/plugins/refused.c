/*
 * A plugin that is wrong in the one way that a macro on the compiler's command line names. Its functions do nothing: the host
 * has to refuse it before it calls them.
 */

#include <errno.h>
#include <stdlib.h>

#include "vmm_plugin.h"

#ifndef ABI
#define ABI "1.0"
#endif
#ifndef MAJOR
#define MAJOR VMM_ABI_MAJOR
#endif
#ifndef MAGIC
#define MAGIC VMM_MAGIC
#endif
#ifndef INIT_CODE
#define INIT_CODE 0
#endif
#ifndef ROOT_NAME
#define ROOT_NAME "refused"
#endif
#ifndef CREATE_CODE
#define CREATE_CODE -EINVAL
#endif

#define TEXT(name)                                                             \
    "abi = \"" ABI "\"\nname = \"" name "\"\nversion = \"1.2.3\"\n"            \
    "license = \"MIT\"\nabout = \"Wrong in one way\"\n[[driver]]\n"            \
    "name = \"refused\"\nabout = \"Wrong in one way\"\nbus = \"isa\"\n"

__attribute__((section(".vmm.plugin"), used)) static const char MANIFEST[] = TEXT("refused");

#ifdef ABORTS_ON_LOAD
__attribute__((constructor)) static void loaded(void)
{
    abort();
}
#endif

#ifdef MISSING_SYMBOL
extern void nobody_has_this(void);
__attribute__((visibility("default"))) void calls_it(void)
{
    nobody_has_this();
}
#endif

static int32_t init(const VmmHost *host)
{
    (void)host;
    return INIT_CODE;
}

static int32_t create(const VmmHost *host, uint32_t kind, VmmStr name, const VmmOpt *opts, size_t opt_count,
                      VmmObj *out, const VmmSink *err)
{
    (void)host, (void)kind, (void)name, (void)opts, (void)opt_count, (void)out, (void)err;
    return CREATE_CODE;
}

#ifndef NO_MANIFEST
static const char ROOT_MANIFEST[] = TEXT(ROOT_NAME);
#endif

#ifdef NO_ROOT
#define VMM_PLUGIN SOMETHING_ELSE
#endif

__attribute__((visibility("default"))) const VmmRoot VMM_PLUGIN = {
    .magic = MAGIC,
    .abi_major = MAJOR,
    .abi_minor = VMM_ABI_MINOR,
    .flags = VMM_FLAG_UNWIND,
#ifndef NO_MANIFEST
    .manifest = (const uint8_t *)ROOT_MANIFEST,
    .manifest_len = sizeof ROOT_MANIFEST - 1,
#endif
    .init = init,
    .create = create,
};
