/* SPDX-License-Identifier: MIT */
/*
 * loop tight|random SECONDS: malloc and free in a loop, prints nanoseconds of CPU time per pair.
 *
 * tight: one size of 64 bytes, freed at once: nothing but the allocator's fastest path.
 * random: 1000 live blocks of 16 bytes to 64 KiB (most of them small), each written to and replaced
 * in random order.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec t;

    /* Of this process: whatever else the machine does is not in it. */
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint32_t state = 1;

static uint32_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static void tight(void)
{
    void *volatile block = malloc(64);

    free(block);
}

static void random_sizes(void)
{
    static char *blocks[1000];
    uint32_t r = next_random(), at = r % 1000;
    size_t size = (size_t)16 << ((r >> 10) % 13);

    if ((r >> 16) % 8 != 0)
        size = 16 + size % 512;
    free(blocks[at]);
    blocks[at] = malloc(size);
    memset(blocks[at], 1, size);
}

int main(int argc, char **argv)
{
    void (*step)(void);
    double seconds = argc == 3 ? atof(argv[2]) : 0, start, taken;
    long steps = 0;

    if (argc == 3 && strcmp(argv[1], "tight") == 0)
        step = tight;
    else if (argc == 3 && strcmp(argv[1], "random") == 0)
        step = random_sizes;
    else
        return 2;
    if (seconds <= 0)
        return 2;
    for (int i = 0; i < 100000; i++)
        step();
    start = now();
    do {
        for (int i = 0; i < 10000; i++)
            step();
        steps += 10000;
    } while ((taken = now() - start) < seconds);
    printf("%.4f\n", taken / (double)steps * 1e9);
    return 0;
}
