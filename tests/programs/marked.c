/* SPDX-License-Identifier: MIT */
/*
 * marked [big|break]: gets memory in all the ways there are, and prints for each whether it is mergeable.
 * With `big` the first allocation of all is a mapping of its own, and glibc does not know of a heap yet; with
 * `break` there is no other way than brk and sbrk.
 */
#define _GNU_SOURCE
#include "smaps.h"

#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

enum { MEGABYTE = 1 << 20, PAGE = 4096 };

static char data[4 * PAGE] = {1}, bss[4 * PAGE];
static pthread_barrier_t step;

static void *touched(void *memory, size_t size)
{
    if (memory == NULL || memory == MAP_FAILED)
        exit(1);
    memset(memory, 1, size);
    return memory;
}

static void *mapped(size_t size, int prot, int flags)
{
    return mmap(NULL, size, prot, flags, -1, 0);
}

static void allocators(void)
{
    void *memory = NULL;
    size_t each = 1024;

    /* The first ones also grow the heap, below glibc's limit for mappings of 128 KiB. */
    remember("malloc_small", touched(malloc(100), 100), 100);
    for (int i = 0; i < 50; i++)
        touched(malloc(100000), 100000);
    remember("malloc_heap", touched(malloc(100000), 100000), 100000);
    remember("malloc", touched(malloc(MEGABYTE), MEGABYTE), MEGABYTE);
    remember("calloc_one", touched(calloc(1, MEGABYTE), MEGABYTE), MEGABYTE);
    remember("calloc_product", touched(calloc(MEGABYTE / each, each), MEGABYTE), MEGABYTE);
    remember("realloc_null", touched(realloc(NULL, MEGABYTE), MEGABYTE), MEGABYTE);
    remember("realloc_grown", touched(realloc(malloc(50), MEGABYTE), MEGABYTE), MEGABYTE);
    memory = realloc(touched(malloc(MEGABYTE), MEGABYTE), 40 * MEGABYTE);
    remember("realloc_mremap", touched(memory, 40 * MEGABYTE), 40 * MEGABYTE);
    remember("reallocarray", touched(reallocarray(NULL, MEGABYTE / each, each), MEGABYTE), MEGABYTE);
    remember("memalign", touched(memalign(PAGE, MEGABYTE), MEGABYTE), MEGABYTE);
    remember("memalign_wide", touched(memalign(MEGABYTE, MEGABYTE), MEGABYTE), MEGABYTE);
    remember("aligned_alloc", touched(aligned_alloc(64, MEGABYTE), MEGABYTE), MEGABYTE);
    if (posix_memalign(&memory, 2 * PAGE, MEGABYTE) != 0)
        exit(1);
    remember("posix_memalign", touched(memory, MEGABYTE), MEGABYTE);
    remember("valloc", touched(valloc(MEGABYTE), MEGABYTE), MEGABYTE);
    remember("pvalloc", touched(pvalloc(MEGABYTE), MEGABYTE), MEGABYTE);
}

static void mappings(void)
{
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS, both = PROT_READ | PROT_WRITE;
    char *memory, path[] = "/tmp/ksm-preload-marked-XXXXXX";
    int file = mkstemp(path);

    if (file < 0 || unlink(path) != 0 || ftruncate(file, MEGABYTE) != 0)
        exit(1);
    remember("mmap", touched(mapped(MEGABYTE, both, anonymous), MEGABYTE), MEGABYTE);
    remember("mmap64", touched(mmap64(NULL, MEGABYTE, both, anonymous, -1, 0), MEGABYTE), MEGABYTE);
    memory = mmap(NULL, MEGABYTE, both, MAP_PRIVATE, file, 0);
    remember("mmap_private_file", touched(memory, MEGABYTE), MEGABYTE);
    memory = mapped(MEGABYTE, PROT_NONE, anonymous);
    if (mprotect(memory, MEGABYTE, both) != 0)
        exit(1);
    remember("mmap_reserved", touched(memory, MEGABYTE), MEGABYTE);
    memory = touched(mapped(MEGABYTE, both, anonymous), MEGABYTE);
    memory = mremap(memory, MEGABYTE, 40 * MEGABYTE, MREMAP_MAYMOVE);
    remember("mremap_grown", touched(memory, 40 * MEGABYTE), 40 * MEGABYTE);
    memory = mapped(MEGABYTE, PROT_NONE, anonymous);
    memory = mmap(memory + MEGABYTE / 2, MEGABYTE / 2, both, anonymous | MAP_FIXED, -1, 0);
    remember("mmap_fixed", touched(memory, MEGABYTE / 2), MEGABYTE / 2);

    remember("small_mapping", touched(mapped(16 * PAGE, both, anonymous), 16 * PAGE), 16 * PAGE);
    remember("reserved_2_GiB", mapped((size_t)2048 * MEGABYTE, PROT_NONE, anonymous | MAP_NORESERVE), PAGE);
    remember("map_stack", touched(mapped(MEGABYTE, both, anonymous | MAP_STACK), MEGABYTE), MEGABYTE);
    memory = mapped(MEGABYTE, both, anonymous | MAP_GROWSDOWN);
    remember("map_growsdown", touched(memory, MEGABYTE), MEGABYTE);
    memory = mapped(MEGABYTE, both, MAP_SHARED | MAP_ANONYMOUS);
    remember("map_shared", touched(memory, MEGABYTE), MEGABYTE);
    memory = mmap(NULL, MEGABYTE, both, MAP_SHARED, file, 0);
    remember("map_shared_file", touched(memory, MEGABYTE), MEGABYTE);
    memory = mapped(2 * MEGABYTE, both, anonymous | MAP_HUGETLB);
    if (memory != MAP_FAILED) /* where the machine has set huge pages aside */
        remember("map_hugetlb", memory, 2 * MEGABYTE);
}

/* What the program takes out stays out, whatever it does next. */
static void taken_out(void)
{
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS, both = PROT_READ | PROT_WRITE;
    char *memory = touched(mapped(MEGABYTE, both, anonymous), MEGABYTE), *block;
    size_t size = MEGABYTE;

    madvise(memory, MEGABYTE, MADV_UNMERGEABLE);
    memory = mremap(memory, MEGABYTE, 40 * MEGABYTE, MREMAP_MAYMOVE);
    remember("unmergeable_mapping", touched(memory, 40 * MEGABYTE), 40 * MEGABYTE);

    /* Whole, with glibc's header in front: mremap moves one mapping, not a part of two. */
    block = touched(malloc(size), size);
    madvise((void *)((uintptr_t)block & -(uintptr_t)PAGE), size + PAGE, MADV_UNMERGEABLE);
    block = realloc(block, size + MEGABYTE);
    remember("unmergeable_block", touched(block, size + MEGABYTE), size + MEGABYTE);

    block = touched(malloc(3 * PAGE), 3 * PAGE);
    block = (char *)(((uintptr_t)block + PAGE - 1) & -(uintptr_t)PAGE);
    madvise(block, PAGE, MADV_UNMERGEABLE);
    remember("unmergeable_heap", block, PAGE);
    for (int i = 0; i < 50; i++)
        touched(malloc(100000), 100000);
}

static void program_break(void)
{
    char *memory = sbrk(MEGABYTE);

    remember("sbrk", touched(memory, MEGABYTE - PAGE), MEGABYTE - PAGE);
    memory = sbrk(0);
    if (brk(memory + MEGABYTE) != 0)
        exit(1);
    remember("brk", touched(memory, MEGABYTE - PAGE), MEGABYTE - PAGE);
}

static void *in_a_thread(void *unused)
{
    char here = 1;

    remember("thread_small", touched(malloc(1000), 1000), 1000);
    for (int i = 0; i < 500; i++)
        touched(malloc(100000), 100000);
    remember("thread_arena", touched(malloc(100000), 100000), 100000);
    remember("thread_big", touched(malloc(MEGABYTE), MEGABYTE), MEGABYTE);
    remember("thread_stack", &here, 1);
    pthread_barrier_wait(&step);
    pthread_barrier_wait(&step);
    return unused;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    char here = 1;

    if (argc > 1 && strcmp(argv[1], "break") == 0) {
        program_break();
        report_ranges();
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "big") == 0)
        remember("first_big", touched(malloc(MEGABYTE), MEGABYTE), MEGABYTE);
    remember("first_small", touched(malloc(100), 100), 100);

    memset(bss, 1, sizeof bss);
    remember("data", data, sizeof data);
    remember("bss", bss, sizeof bss);
    remember("library_data", stdout, 1);
    remember("stack", &here, 1);
    program_break();
    taken_out();
    allocators();
    mappings();
    pthread_barrier_init(&step, NULL, 2);
    if (pthread_create(&thread, NULL, in_a_thread, NULL) != 0)
        return 1;
    pthread_barrier_wait(&step);
    report_ranges();
    pthread_barrier_wait(&step);
    return pthread_join(thread, NULL);
}
