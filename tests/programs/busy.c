/* SPDX-License-Identifier: MIT */
/*
 * A library whose constructor maps memory in many parts and starts a thread, which unmaps it all as soon as the
 * first part is mergeable: while we go through the list of mappings that we have read.
 */
#define _GNU_SOURCE
#include "smaps.h"

#include <pthread.h>
#include <sys/mman.h>

enum { SIZE = 1 << 20, PAGE = 4096 };

static void *unmap(void *pages)
{
    do {
        look();
    } while (ranges[0].marked == 0);
    munmap(pages, SIZE);
    return NULL;
}

__attribute__((constructor)) static void at_start(void)
{
    pthread_t thread;
    char *pages = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (pages == MAP_FAILED)
        exit(1);
    for (size_t i = 0; i < SIZE; i += (size_t)2 * PAGE)
        mprotect(pages + i, PAGE, PROT_READ);
    remember("first", pages, 1);
    if (pthread_create(&thread, NULL, unmap, pages) == 0)
        pthread_detach(thread);
}
