/* SPDX-License-Identifier: MIT */
/*
 * threads THREADS MEGABYTES: each thread fills that much memory in blocks of all sizes, frees every third one,
 * and fills that again; prints `ready`, and keeps the rest until stdin ends.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t megabytes;
static pthread_barrier_t filled;

static size_t size_of(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    /* 16 bytes to 512 KiB, so that arenas and single mappings are both used */
    return ((size_t)16 << (*seed >> 33) % 16) + (*seed >> 50) % 16;
}

static void *fill(void *number)
{
    enum { MOST = 1 << 16 };
    char **blocks = calloc(MOST, sizeof *blocks);
    uint64_t seed = (uintptr_t)number + 1;
    size_t total = 0, used = 0;

    if (blocks == NULL)
        exit(1);
    while (total < megabytes << 20 && used < MOST) {
        size_t size = size_of(&seed);

        blocks[used] = malloc(size);
        if (blocks[used] == NULL)
            exit(1);
        memset(blocks[used++], (int)seed, size);
        total += size;
    }
    for (size_t i = 0; i < used; i += 3) {
        size_t size = size_of(&seed);

        free(blocks[i]);
        blocks[i] = malloc(size);
        if (blocks[i] == NULL)
            exit(1);
        memset(blocks[i], (int)i, size);
    }
    pthread_barrier_wait(&filled);
    pthread_barrier_wait(&filled); /* the arena of a thread that ended would be used by the next one */
    return blocks;
}

int main(int argc, char **argv)
{
    unsigned count = argc == 3 ? (unsigned)atoi(argv[1]) : 0;

    if (count == 0 || count > 1000)
        return 2;
    megabytes = (size_t)atoi(argv[2]);
    pthread_barrier_init(&filled, NULL, count + 1);
    for (uintptr_t i = 0; i < count; i++) {
        pthread_t thread;

        if (pthread_create(&thread, NULL, fill, (void *)i) != 0)
            return 1;
    }
    pthread_barrier_wait(&filled);
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}
