/* SPDX-License-Identifier: MIT */
/*
 * early: allocates before our constructor can have run, and says at its end whether that memory is whole and
 * mergeable.  A library (-shared) for its constructor, or a program (-DPROGRAM) that also has one, and an
 * IFUNC resolver.
 */
#define _GNU_SOURCE
#include "smaps.h"

#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

enum { SMALL = 100, BIG = 1 << 20 };

static unsigned char *memory[12];
static size_t sizes[12];
static unsigned count;

static void keep(const char *name, void *got, size_t size)
{
    if (got == NULL || got == MAP_FAILED)
        abort();
    memset(got, (int)count + 1, size);
    remember(name, got, size);
    memory[count] = got;
    sizes[count++] = size;
}

static void *in_a_thread(void *unused)
{
    keep("early_thread", malloc(SMALL), SMALL);
    return unused;
}

static void allocate(void)
{
    pthread_t thread;
    void *aligned = NULL;

    if (count > 0)
        return;
    keep("early_malloc", malloc(SMALL), SMALL);
    keep("early_malloc_big", malloc(BIG), BIG);
    keep("early_calloc", calloc(2, SMALL), (size_t)2 * SMALL);
    keep("early_realloc", realloc(malloc(10), BIG), BIG);
    keep("early_reallocarray", reallocarray(NULL, 2, SMALL), (size_t)2 * SMALL);
    keep("early_memalign", memalign(64, SMALL), SMALL);
    if (posix_memalign(&aligned, 4096, BIG) != 0)
        abort();
    keep("early_posix_memalign", aligned, BIG);
    keep("early_mmap", mmap(NULL, BIG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), BIG);
    keep("early_sbrk", sbrk(BIG), BIG / 2);
    if (pthread_create(&thread, NULL, in_a_thread, NULL) != 0 || pthread_join(thread, NULL) != 0)
        abort();
    if (mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED || errno != EINVAL)
        abort();
}

__attribute__((constructor)) static void at_start(void)
{
    allocate();
}

__attribute__((destructor)) static void at_end(void)
{
    report_ranges();
    for (unsigned i = 0; i < count; i++)
        for (size_t k = 0; k < sizes[i]; k++)
            if (memory[i][k] != i + 1)
                abort();
}

#ifdef PROGRAM
static int chosen(void)
{
    return 0;
}

static int (*resolve(void))(void)
{
    char *volatile got = malloc(SMALL);

    if (got != NULL)
        got[0] = 1;
    return got != NULL ? chosen : NULL;
}

int choice(void) __attribute__((ifunc("resolve")));

int main(void)
{
    return choice();
}
#endif
