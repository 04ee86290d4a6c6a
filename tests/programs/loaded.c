/* SPDX-License-Identifier: MIT */
/*
 * Prints the files that the loader has loaded, one a line, in its order.  With no start files and the oldest symbols
 * only, so that it runs with each glibc (tests/test_preload_loader.py).
 */
#define _GNU_SOURCE
#include <link.h>
#include <string.h>
#include <unistd.h>

static int print(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    (void)data;
    if (write(1, info->dlpi_name, strlen(info->dlpi_name)) < 0 || write(1, "\n", 1) < 0)
        _exit(1);
    return 0;
}

__attribute__((force_align_arg_pointer)) void begin(void)
{
    dl_iterate_phdr(print, NULL);
    _exit(0);
}
