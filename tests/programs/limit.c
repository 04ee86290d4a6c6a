/* SPDX-License-Identifier: MIT */
/*
 * limit: takes all mappings that the kernel allows (vm.max_map_count) but three, allocates from the heap,
 * which needs none, and prints how that went.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, MOST = 1 << 20 };

int main(void)
{
    size_t mappings = 0;
    char *memory = mmap(NULL, (size_t)MOST * PAGE, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    unsigned failed = 0;
    int error = 0;

    if (memory == MAP_FAILED)
        return 2;
    free(malloc(100)); /* the heap is there */
    /* Every second page another mapping. */
    while (mappings < MOST && mprotect(memory + mappings * PAGE, PAGE, PROT_READ) == 0)
        mappings += 2;
    if (mappings >= MOST) {
        puts("no limit");
        return 0;
    }
    for (int i = 1; i <= 3; i++)
        mprotect(memory + (mappings - 2u * (unsigned)i) * PAGE, PAGE, PROT_NONE);
    for (int i = 0; i < 200; i++) {
        char *block;

        errno = 0;
        block = malloc(50000);
        if (errno != 0)
            error = errno;
        if (block == NULL)
            failed++;
        else
            memset(block, 1, 50000);
    }
    printf("failed %u, errno %d\n", failed, error);
    return 0;
}
