/* SPDX-License-Identifier: MIT */
/*
 * no_break: allocates where the heap cannot grow, so that glibc's main arena takes pieces by mmap.
 * Prints `ready` and waits for the end of its input.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

int main(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *end;
    unsigned random = 1;

    free(malloc(1));
    end = sbrk(0);
    end += -(size_t)end & (page - 1);
    if (mmap(end, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != end)
        return 1;
    for (int i = 0; i < 4000; i++) {
        size_t size = (random = random * 1103515245 + 12345) % 20000 + 100;
        char *block = malloc(size);

        if (block == NULL)
            return 1;
        memset(block, i, size);
        for (int j = 0; j < 20; j++) {
            block = malloc(40);
            if (block == NULL)
                return 1;
            *block = 1;
        }
    }
    puts("ready");
    fflush(stdout);
    return getchar() == EOF ? 0 : 1;
}
