/* SPDX-License-Identifier: MIT */
/*
 * trimmed: one thread grows the heap, another one shrinks it again at once. Under a debugger that holds every
 * madvise back for a moment, that of the first one comes too late, for memory that is gone.  Says then
 * whether what follows is mergeable.
 */
#define _GNU_SOURCE
#include "smaps.h"

#include <malloc.h>
#include <pthread.h>
#include <sys/syscall.h>

enum { MEGABYTE = 1 << 20 };

static char *start;

static void *grow(void *unused)
{
    sbrk(MEGABYTE);
    return unused;
}

static void *shrink(void *unused)
{
    while ((char *)syscall(SYS_brk, 0) == start)
        ;
    brk(start);
    return unused;
}

int main(void)
{
    pthread_t threads[2];
    void *memory = malloc(100);

    remember("before", memset(memory, 1, 100), 100);
    start = sbrk(0);
    if (pthread_create(&threads[0], NULL, shrink, NULL) != 0 ||
        pthread_create(&threads[1], NULL, grow, NULL) != 0)
        return 1;
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    memory = sbrk(MEGABYTE);
    remember("heap", memset(memory, 1, MEGABYTE / 2), MEGABYTE / 2);
    memory = malloc(MEGABYTE);
    remember("mapping", memset(memory, 1, MEGABYTE), MEGABYTE);
    report_ranges();
    return 0;
}
