/* SPDX-License-Identifier: MIT */
/*
 * A program of a shape that the options of the compiler decide: -DBSS=BYTES, -DTLS=BYTES, -DTHREADS=NUMBER,
 * -DDEEP=BYTES of stack; with -DWAIT it first waits for a line. It uses all of it, and prints sums that do not depend on addresses.
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#ifndef BSS
#define BSS 4096
#endif
#ifndef TLS
#define TLS 64
#endif
#ifndef THREADS
#define THREADS 3
#endif
#ifndef DEEP
#define DEEP 65536
#endif

extern char **environ;

static char zeros[BSS];
static char data[100000] = {1, 2, 3};
static char *const pointer = data + 2; /* relocated, then read only */
static __thread char mine[TLS] = {5};

static void *work(void *number)
{
    char *block = malloc(1000);

    mine[TLS - 1] = 1;
    memset(block, 1, 1000);
    number = (void *)((size_t)number + (size_t)mine[0] + (size_t)block[999]);
    free(block);
    return number;
}

/* The auxiliary vector, the loader's list and what the linker wrote in the file agree. */
static int list(struct dl_phdr_info *info, size_t size, void *first)
{
    (void)size;
    if (*(int *)first) {
        printf("headers %d %d\n", (unsigned long)info->dlpi_phdr == getauxval(AT_PHDR),
               info->dlpi_phnum == getauxval(AT_PHNUM));
        *(int *)first = 0;
    }
    return 0;
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    size_t total = 0;
    int first = 1, zero = 1;
    volatile char *deep = alloca(DEEP);
    pthread_attr_t attributes;
    void *stack;
    size_t size;

#ifdef WAIT
    puts("ready");
    fflush(stdout);
    if (read(0, &first, 1) < 0)
        return 3;
#endif
    for (size_t i = 0; i < BSS; i += 4096) {
        zero &= zeros[i] == 0;
        zeros[i] = 1;
    }
    deep[0] = 1;
    deep[DEEP / 2] = 2;
    for (size_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)i) != 0)
            return 1;
    for (size_t i = 0; i < THREADS; i++) {
        void *result;

        pthread_join(threads[i], &result);
        total += (size_t)result;
    }
    dl_iterate_phdr(list, &first);
    if (pthread_getattr_np(pthread_self(), &attributes) != 0)
        return 2;
    pthread_attr_getstack(&attributes, &stack, &size);
    pthread_attr_destroy(&attributes);
    printf("zero %d total %zu data %d deep %d\n", zero, total, *pointer, deep[0] + deep[DEEP / 2]);
    printf("stack of %zu MiB, on it %d\n", size >> 30 != 0 ? 1024 : (size + (1 << 19)) >> 20,
           (char *)&first < (char *)stack + size && (char *)&first > (char *)stack);
    printf("entry %d brk %d\n", getauxval(AT_ENTRY) != 0, sbrk(1 << 20) != (void *)-1);
    printf("%s %d %s\n", (const char *)getauxval(AT_PLATFORM), argc, argv[argc - 1]);
    printf("called %d\n", strcmp((const char *)getauxval(AT_EXECFN), argv[0]));
    for (char **entry = environ; *entry != NULL; entry++)
        if (strncmp(*entry, "PATH=", 5) == 0)
            puts(*entry);
    fprintf(stderr, "to stderr\n");
    return 7;
}
