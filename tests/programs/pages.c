/* SPDX-License-Identifier: MIT */
/*
 * pages TAG EQUAL UNIQUE: fills EQUAL pages that are the same in every process with this TAG (but differ
 * from one another), and UNIQUE pages found nowhere else; prints `ready`, and keeps them until stdin ends.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };

static void fill(unsigned char *page, uint64_t seed)
{
    uint64_t *words = (uint64_t *)(void *)page;

    for (size_t i = 0; i < PAGE / sizeof *words; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        words[i] = seed;
    }
}

int main(int argc, char **argv)
{
    uint64_t tag = argc == 4 ? strtoull(argv[1], NULL, 0) : 0;
    size_t equal = argc == 4 ? strtoul(argv[2], NULL, 0) : 0;
    size_t unique = argc == 4 ? strtoul(argv[3], NULL, 0) : 0;
    unsigned char *pages = aligned_alloc(PAGE, (equal + unique) * PAGE);

    if (argc != 4 || pages == NULL)
        return 2;
    /* ksmd would split huge pages; without them every number is exact. */
    madvise(pages, (equal + unique) * PAGE, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < equal + unique; i++)
        fill(pages + i * PAGE, i < equal ? tag ^ (i << 20) : ((uint64_t)getpid() << 40) ^ i ^ ~tag);
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}
