/* SPDX-License-Identifier: MIT */
/*
 * contracts: what malloc(3), posix_memalign(3), mmap(2) and brk(2) promise, a `KEY VALUE` a line, once in
 * the first thread, once in another and once in a child.  The same with and without us.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, MEGABYTE = 1 << 20 };

/* Volatile, so that gcc neither folds a call nor warns of what it is called with. */
static volatile size_t huge = (size_t)PTRDIFF_MAX + 1, most = SIZE_MAX, none, odd = 3;
static const char *where;

static void result(const char *key, const char *of, const void *memory, int error)
{
    const char *name = strerrorname_np(error);

    printf("%s %s%s %s %s\n", where, key, of, memory != NULL ? "memory" : "NULL", name != NULL ? name : "?");
}

/* Runs a call with errno at EDOM, which none of them gives, and prints what came of it. */
#define TELL(key, of, call)                                                                        \
    do {                                                                                           \
        void *told;                                                                                \
        errno = EDOM;                                                                              \
        told = (call);                                                                             \
        result(key, of, told, errno);                                                              \
        errno = EDOM;                                                                              \
        free(told);                                                                                \
        if (errno != EDOM)                                                                         \
            printf("%s free after %s changed errno\n", where, key);                                \
    } while (0)

static void sizes(void)
{
    char *volatile kept = malloc(1000); /* volatile: gcc would warn of its use after realloc */
    char *more;

    TELL("malloc", "(0)", malloc(none));
    TELL("malloc", "(1)", malloc(1));
    TELL("malloc", "(100000)", malloc(100000));
    TELL("malloc", "(1 MiB)", malloc(MEGABYTE));
    TELL("malloc", "(100 MiB)", malloc(100 * MEGABYTE));
    TELL("malloc", "(PTRDIFF_MAX + 1)", malloc(huge));
    TELL("malloc", "(SIZE_MAX)", malloc(most));
    TELL("calloc", "(0, 0)", calloc(none, none));
    TELL("calloc", "(0, 5)", calloc(none, 5));
    TELL("calloc", "(5, 0)", calloc(5, none));
    TELL("calloc", "(1000, 1000)", calloc(1000, 1000));
    TELL("calloc", "(SIZE_MAX, 2)", calloc(most, 2));
    TELL("calloc", "(2, SIZE_MAX)", calloc(2, most));
    TELL("calloc", "(SIZE_MAX, SIZE_MAX)", calloc(most, most));
    /* The product is 0 and 2^32 when it wraps. */
    TELL("calloc", "(2^63, 2)", calloc(huge, 2));
    TELL("calloc", "(2^63 + 2^31, 2)", calloc(huge + (1ul << 31), 2));
    TELL("realloc", "(NULL, 10)", realloc(NULL, 10));
    TELL("realloc", "(NULL, 1 MiB)", realloc(NULL, MEGABYTE));
    TELL("realloc", "(p, 0)", realloc(malloc(10), none));
    TELL("realloc", "(1 MiB, 0)", realloc(malloc(MEGABYTE), none));
    TELL("reallocarray", "(NULL, 1000, 1000)", reallocarray(NULL, 1000, 1000));
    TELL("reallocarray", "(p, 0, 5)", reallocarray(malloc(10), none, 5));
    TELL("valloc", "(1)", valloc(1));
    TELL("valloc", "(SIZE_MAX)", valloc(most));
    TELL("pvalloc", "(1)", pvalloc(1));
    TELL("pvalloc", "(SIZE_MAX)", pvalloc(most));

    /* What fails leaves the old block as it was. */
    memset(kept, 7, 1000);
    errno = EDOM;
    more = realloc(kept, huge);
    result("realloc", "(p, PTRDIFF_MAX + 1)", more, errno);
    errno = EDOM;
    more = reallocarray(kept, huge, 2);
    result("reallocarray", "(p, 2^63, 2)", more, errno);
    for (int i = 0; i < 1000; i++)
        if (kept[i] != 7)
            printf("%s realloc lost byte %d\n", where, i);
    free(kept);
    free(NULL);
}

static void alignments(void)
{
    static const size_t wanted[] = {0, 1, 2, 3, 8, 16, 24, 64, 100, 4096, 5000, 65536, 1 << 21};
    static const size_t lengths[] = {0, 1, 100, 4096, 100000, MEGABYTE};

    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        for (size_t j = 0; j < sizeof lengths / sizeof *lengths; j++) {
            volatile size_t alignment = wanted[i];
            void *memory[3], *untouched = &memory;
            int error;

            errno = EDOM;
            memory[0] = memalign(alignment, lengths[j]);
            memory[1] = aligned_alloc(alignment, lengths[j]);
            printf("%s align %zu %zu: %s", where, alignment, lengths[j], strerrorname_np(errno));
            memory[2] = untouched;
            error = posix_memalign(&memory[2], alignment, lengths[j]);
            if (error != 0)
                printf(", posix_memalign %s, pointer %s", strerrorname_np(error),
                       memory[2] == untouched ? "untouched" : "changed");
            printf(", errno %s\n", strerrorname_np(errno));
            for (int k = 0; k < (error == 0 ? 3 : 2); k++) {
                if (memory[k] == NULL || (alignment != 0 && (alignment & (alignment - 1)) == 0 &&
                                          (uintptr_t)memory[k] % alignment != 0))
                    printf("%s align %zu %zu: call %d gave %s\n", where, alignment, lengths[j], k,
                           memory[k] == NULL ? "NULL" : "something else");
                else
                    memset(memory[k], k, lengths[j]);
                free(memory[k]);
            }
        }
    }
}

static void alignment_errors(void)
{
    void *memory = &memory;
    int error;

    TELL("memalign", "(4096, SIZE_MAX)", memalign(4096, most));
    TELL("memalign", "(SIZE_MAX, 1)", memalign(most, 1));
    TELL("aligned_alloc", "(64, PTRDIFF_MAX + 1)", aligned_alloc(64, huge));
    TELL("aligned_alloc", "(3, 10)", aligned_alloc(odd, 10));
    errno = EDOM;
    error = posix_memalign(&memory, 64, huge);
    printf("%s posix_memalign(64, PTRDIFF_MAX + 1) %s, pointer %s\n", where, strerrorname_np(error),
           memory == &memory ? "untouched" : "changed");

    memory = valloc(10);
    printf("%s valloc %% page %zu\n", where, (uintptr_t)memory % PAGE);
    free(memory);
    memory = pvalloc(PAGE + 1);
    printf("%s pvalloc %% page %zu, %s\n", where, (uintptr_t)memory % PAGE,
           malloc_usable_size(memory) >= (size_t)2 * PAGE ? "rounded up" : "too small");
    free(memory);
}

static void usable(void)
{
    for (size_t size = 0; size < (size_t)2 * MEGABYTE; size = size * 3 + 1) {
        void *memory = malloc(size);

        printf("%s usable %zu %zu\n", where, size, malloc_usable_size(memory));
        free(memory);
    }
}

static void zeroing(void)
{
    for (size_t size = 1; size < (size_t)4 * MEGABYTE; size = size * 2 + 7) {
        char *blocks[8];

        for (int i = 0; i < 8; i++) {
            blocks[i] = malloc(size);
            memset(blocks[i], 0xff, size);
        }
        for (int i = 0; i < 8; i++)
            free(blocks[i]);
        for (int i = 0; i < 8; i++) {
            blocks[i] = i % 2 ? calloc(1, size) : calloc(size, 1);
            for (size_t k = 0; k < size; k++)
                if (blocks[i][k] != 0) {
                    printf("%s calloc of %zu is not zero at %zu\n", where, size, k);
                    break;
                }
        }
        for (int i = 0; i < 8; i++)
            free(blocks[i]);
    }
}

/* Across the heap, a mapping, mremap and back. */
static void growing(void)
{
    unsigned char *memory = NULL;
    size_t had = 0;

    for (size_t size = 1; size < (size_t)64 * MEGABYTE; size = size * 3 + 5) {
        memory = realloc(memory, size);
        for (size_t i = 0; i < had; i += 101)
            if (memory[i] != (unsigned char)i)
                printf("%s realloc to %zu lost byte %zu\n", where, size, i);
        for (size_t i = had; i < size; i++)
            memory[i] = (unsigned char)i;
        had = size;
    }
    for (; had > 100; had /= 5) {
        memory = realloc(memory, had);
        for (size_t i = 0; i < had; i += 101)
            if (memory[i] != (unsigned char)i)
                printf("%s realloc down to %zu lost byte %zu\n", where, had, i);
    }
    free(memory);
}

static void mapping(const char *key, void *memory, size_t size)
{
    printf("%s %s %s %s\n", where, key, memory == MAP_FAILED ? "MAP_FAILED" : "memory",
           strerrorname_np(errno));
    errno = EDOM;
    if (memory != MAP_FAILED)
        munmap(memory, size);
}

static void mappings(void)
{
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS, both = PROT_READ | PROT_WRITE;
    char *memory;

    errno = EDOM;
    mapping("mmap", mmap(NULL, MEGABYTE, both, anonymous, -1, 0), MEGABYTE);
    mapping("mmap64", mmap64(NULL, MEGABYTE, both, anonymous, -1, 0), MEGABYTE);
    mapping("mmap of nothing", mmap(NULL, none, both, anonymous, -1, 0), 0);
    mapping("mmap of a bad descriptor", mmap(NULL, PAGE, both, MAP_PRIVATE, -1, 0), 0);
    mapping("mmap of a bad type", mmap(NULL, PAGE, both, MAP_ANONYMOUS, -1, 0), 0);
    mapping("mmap at an odd offset", mmap(NULL, PAGE, both, anonymous, -1, 1), 0);
    mapping("mmap of too much", mmap(NULL, huge, both, anonymous, -1, 0), 0);
    mapping("mmap of SIZE_MAX", mmap(NULL, most, both, anonymous, -1, 0), 0);
    mapping("mmap64 of too much", mmap64(NULL, huge, both, anonymous, -1, 0), 0);
    mapping("mmap64 of a bad descriptor", mmap64(NULL, PAGE, both, MAP_SHARED, 1000, 0), 0);

    memory = mmap(NULL, (size_t)4 * PAGE, PROT_NONE, anonymous, -1, 0);
    printf("%s mmap at its place %s\n", where,
           mmap(memory + PAGE, PAGE, both, anonymous | MAP_FIXED, -1, 0) == memory + PAGE ? "yes" : "no");
    mapping("mmap in use", mmap(memory, PAGE, both, anonymous | MAP_FIXED_NOREPLACE, -1, 0), 0);
    memory[PAGE] = 1;
    munmap(memory, (size_t)4 * PAGE);
}

/* Only in the first thread: malloc moves the break as well. */
static void breaks(void)
{
    char *start = sbrk(0), *got;

    errno = EDOM;
    got = sbrk(100000);
    printf("%s sbrk old break %s", where, got == start ? "yes" : "no");
    memset(got, 1, 100000);
    printf(", new %s, %s\n", (char *)sbrk(0) == start + 100000 ? "yes" : "no", strerrorname_np(errno));
    printf("%s brk back %d", where, brk(start));
    printf(" %s, %s\n", sbrk(0) == start ? "yes" : "no", strerrorname_np(errno));
    got = sbrk((intptr_t)(huge - 1) / 2);
    printf("%s sbrk too much %s", where, got == (void *)-1 ? "-1" : "memory");
    printf(" %s, unmoved %s\n", strerrorname_np(errno), sbrk(0) == start ? "yes" : "no");
    errno = EDOM;
    printf("%s brk too far %d", where, brk((void *)(huge / 2)));
    printf(" %s\n", strerrorname_np(errno));
}

static void *everything(void *name)
{
    where = name;
    sizes();
    alignments();
    alignment_errors();
    usable();
    zeroing();
    growing();
    mappings();
    return NULL;
}

int main(void)
{
    pthread_t thread;
    int status = 0;
    pid_t child;

    setvbuf(stdout, NULL, _IOFBF, (size_t)1 << 18);
    where = "first";
    breaks();
    everything("first");
    if (pthread_create(&thread, NULL, everything, "thread") != 0 || pthread_join(thread, NULL) != 0)
        return 1;
    fflush(stdout);
    child = fork();
    if (child == 0) {
        everything("child");
        fflush(stdout);
        _exit(0);
    }
    return child < 0 || waitpid(child, &status, 0) != child || status != 0;
}
