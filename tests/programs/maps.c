/* SPDX-License-Identifier: MIT */
/*
 * maps pages|blocks COUNT: takes memory until there is no more under vm.max_map_count, at most COUNT pieces: pages
 * that the kernel cannot join into one mapping, or blocks of malloc that it can.  Then gives two back and asks for
 * little, gives all back and asks for much.  Prints `got N`, and whether it got those: `little 1`, `much 1`.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, BLOCK = 140 << 10, LITTLE = 1000, MUCH = 16 << 20, MOST = 100000 };

static int in_blocks;
static void *pieces[MOST];

static void *take(int number)
{
    int prot = number % 2 ? PROT_READ : PROT_READ | PROT_WRITE;
    void *page;

    if (in_blocks)
        return malloc(BLOCK);
    page = mmap(NULL, PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return page != MAP_FAILED ? page : NULL;
}

static void *filled(size_t size)
{
    void *memory = malloc(size);

    return memory != NULL ? memset(memory, 1, size) : NULL;
}

static void give_back(int number)
{
    if (in_blocks)
        free(pieces[number]);
    else
        munmap(pieces[number], PAGE);
}

/* No stdio before the pieces are taken: it would be the first to use malloc. */
int main(int argc, char **argv)
{
    int count = argc == 3 ? atoi(argv[2]) : 0, got = 0;
    void *little, *much;

    if (count <= 2 || count > MOST)
        return 2;
    in_blocks = strcmp(argv[1], "blocks") == 0;
    while (got < count && (pieces[got] = take(got)) != NULL)
        got++;
    for (int i = got - 1; i >= 0 && i >= got - 2; i--)
        give_back(i);
    little = filled(LITTLE);
    for (int i = 0; i < got - 2; i++)
        give_back(i);
    much = filled(MUCH);
    printf("got %d\nlittle %d\nmuch %d\n", got, little != NULL, much != NULL);
    return 0;
}
