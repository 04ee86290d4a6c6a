/* SPDX-License-Identifier: MIT */
/*
 * open LIBRARY...: loads each with RTLD_NOW and RTLD_DEEPBIND, allocates with every allocator that it brings
 * along, frees that with the program's own free, and prints `NAME ok`, `failed` or `missing` for each.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static void try(void *library, const char *name)
{
    static const size_t size = 200000;
    union {
        void *object;
        void *(*one)(size_t);
        void *(*two)(size_t, size_t);
        void *(*resize)(void *, size_t);
        void *(*map)(void *, size_t, int, int, int, long);
        int (*align)(void **, size_t, size_t);
    } function = {dlsym(library, name)};
    void *memory = NULL;

    if (function.object == NULL) {
        printf("%s missing\n", name);
        return;
    }
    errno = EDOM;
    if (strcmp(name, "malloc") == 0 || strcmp(name, "valloc") == 0)
        memory = function.one(size);
    else if (strcmp(name, "realloc") == 0)
        memory = function.resize(malloc(10), size);
    else if (strcmp(name, "calloc") == 0)
        memory = function.two(1, size);
    else if (strcmp(name, "memalign") == 0)
        memory = function.two(64, size);
    else if (strcmp(name, "posix_memalign") == 0 && function.align(&memory, 64, size) != 0)
        memory = NULL;
    else if (strcmp(name, "mmap") == 0)
        memory = function.map(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("%s %s\n", name, memory == NULL || memory == MAP_FAILED || errno != EDOM ? "failed" : "ok");
    if (memory != NULL && memory != MAP_FAILED) {
        memset(memory, 1, size);
        if (strcmp(name, "mmap") == 0)
            munmap(memory, size);
        else
            free(memory);
    }
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"malloc",         "calloc", "realloc", "memalign",
                                        "posix_memalign", "valloc", "mmap"};

    for (int i = 1; i < argc; i++) {
        void *library = dlopen(argv[i], RTLD_NOW | RTLD_DEEPBIND);

        if (library == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        for (size_t k = 0; k < sizeof names / sizeof *names; k++)
            try(library, names[k]);
    }
    return 0;
}
