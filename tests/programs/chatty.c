/* SPDX-License-Identifier: MIT */
/*
 * A library as stderred and its kind: interposes write and fwrite, finds the next ones when they are first
 * called, with allocations of its own in between, and passes what goes to stderr in brackets.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void *next(const char *name)
{
    free(malloc(1000));
    return dlsym(RTLD_NEXT, name);
}

ssize_t write(int file, const void *text, size_t size)
{
    static ssize_t (*real)(int, const void *, size_t);

    if (real == NULL)
        real = (ssize_t(*)(int, const void *, size_t))next("write");
    if (file == STDERR_FILENO)
        (void)!real(file, "[", 1);
    ssize_t written = real(file, text, size);
    if (file == STDERR_FILENO)
        (void)!real(file, "]", 1);
    return written;
}

size_t fwrite(const void *text, size_t size, size_t count, FILE *stream)
{
    static size_t (*real)(const void *, size_t, size_t, FILE *);

    if (real == NULL)
        real = (size_t(*)(const void *, size_t, size_t, FILE *))next("fwrite");
    return real(text, size, count, stream);
}
