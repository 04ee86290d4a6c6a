/* SPDX-License-Identifier: MIT */
/*
 * again: memory that was given back to the kernel and is had again, often at the same address: a later
 * part of a thread's arena, the arena of another thread, and the end of the heap.
 */
#define _GNU_SOURCE
#include "smaps.h"

#include <malloc.h>
#include <pthread.h>

enum { BLOCKS = 40000, BLOCK = 5000 };

static char *blocks[BLOCKS];

static void *fill_twice(void *step)
{
    /* Three reservations of 64 MiB; freed forwards, or the blocks that glibc caches would keep the last. */
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < BLOCKS; i++) {
            blocks[i] = malloc(BLOCK);
            if (blocks[i] == NULL)
                exit(1);
            memset(blocks[i], 1, BLOCK);
        }
        if (round == 1)
            break;
        for (int i = 0; i < BLOCKS; i++)
            free(blocks[i]);
    }
    remember("arena_first", blocks[0], BLOCK);
    remember("arena_middle", blocks[BLOCKS / 2], BLOCK);
    remember("arena_last", blocks[BLOCKS - 1], BLOCK);
    pthread_barrier_wait(step);
    pthread_barrier_wait(step);
    for (int i = 0; i < BLOCKS; i++)
        free(blocks[i]);
    return NULL;
}

/* After the first one freed its later parts, this one's arena is likely to lie where they were. */
static void *new_arena(void *step)
{
    char *memory = malloc(BLOCK);

    if (memory == NULL)
        exit(1);
    remember("arena_of_another", memset(memory, 1, BLOCK), BLOCK);
    pthread_barrier_wait(step);
    pthread_barrier_wait(step);
    return NULL;
}

int main(void)
{
    pthread_t threads[2];
    pthread_barrier_t steps[2];
    char *memory;

    for (int i = 0; i < 2; i++)
        pthread_barrier_init(&steps[i], NULL, 2);
    if (pthread_create(&threads[0], NULL, fill_twice, &steps[0]) != 0)
        return 1;
    pthread_barrier_wait(&steps[0]);
    report_ranges();
    range_count = 0;
    pthread_barrier_wait(&steps[0]);
    pthread_join(threads[0], NULL);

    /* The next thread would get the arena of one that ended: it has to come from a new one. */
    mallopt(M_ARENA_TEST, 8);
    for (int i = 0; i < 2; i++) {
        if (pthread_create(&threads[i], NULL, new_arena, &steps[i]) != 0)
            return 1;
        pthread_barrier_wait(&steps[i]);
    }
    for (int i = 0; i < 2; i++) {
        pthread_barrier_wait(&steps[i]);
        pthread_join(threads[i], NULL);
    }

    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    memory = malloc(8 << 20);
    memset(memory, 1, 8 << 20);
    free(memory);
    malloc_trim(0);
    memory = malloc(8 << 20);
    remember("heap", memset(memory, 1, 8 << 20), 8 << 20);
    report_ranges();
    return 0;
}
