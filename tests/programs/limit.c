/* SPDX-License-Identifier: MIT */
/*
 * limit [blocks]: takes all mappings that the kernel allows (vm.max_map_count) but three, allocates from the heap,
 * which needs none, and prints how that went.  With `blocks` it allocates as many blocks that glibc maps
 * one by one, which the kernel joins, and prints how many mappings they are.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, MOST = 1 << 20 };

static int blocks(void)
{
    static char text[1 << 16];
    int maps, mappings = 0;
    ssize_t got;

    /* glibc maps no more than 65536 at a time. */
    for (int i = 0; i < 60000; i++)
        if (malloc(140000) == NULL)
            return 1;
    maps = open("/proc/self/maps", O_RDONLY);
    while ((got = read(maps, text, sizeof text)) > 0)
        for (ssize_t i = 0; i < got; i++)
            mappings += text[i] == '\n';
    close(maps);
    printf("%d\n", mappings);
    return 0;
}

int main(int argc, char **argv)
{
    size_t mappings = 0;
    char *memory = mmap(NULL, (size_t)MOST * PAGE, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    unsigned failed = 0;
    int error = 0;

    if (memory == MAP_FAILED)
        return 2;
    if (argc > 1 && strcmp(argv[1], "blocks") == 0)
        return blocks();
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
