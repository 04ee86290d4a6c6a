/* SPDX-License-Identifier: MIT */
/*
 * stress ROUNDS THREADS: in each round THREADS threads allocate, and while they come and go the first one
 * forks.  The child allocates, starts another by vfork and exec, and becomes this program with `--child`, which
 * allocates in a thread.  Prints `done`; status 1 if anything failed.  A deadlock is for the caller to notice.
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

static char *self_child[] = {"stress", "--child", NULL};

static void *allocate(void *number)
{
    uint64_t seed = (uintptr_t)number;
    void *kept[32] = {NULL};

    for (int i = 0; i < 300; i++) {
        unsigned slot;
        size_t size;

        seed = seed * 6364136223846793005u + 1442695040888963407u;
        slot = (seed >> 40) % 32;
        size = (size_t)16 << (seed >> 33) % 14; /* to 128 KiB: heap, arenas and mappings */
        errno = 0;
        free(kept[slot]);
        switch ((seed >> 50) % 5) {
        case 0: kept[slot] = calloc(1, size); break;
        case 1: kept[slot] = realloc(malloc(10), size); break;
        case 2: kept[slot] = memalign(64, size); break;
        case 3: kept[slot] = aligned_alloc(4096, size); break;
        default: kept[slot] = malloc(size);
        }
        if (kept[slot] == NULL || errno != 0)
            abort();
        memset(kept[slot], 1, 16);
    }
    for (int i = 0; i < 32; i++)
        free(kept[i]);
    return NULL;
}

static void in_child(void)
{
    pid_t grandchild;
    int status;

    allocate(NULL);
    grandchild = vfork();
    if (grandchild == 0) {
        /* Not allowed, and done all the same by posix_spawn's elder relatives. */
        char *volatile memory = malloc(300000);

        memory[0] = 1;
        execv("/proc/self/exe", self_child);
        _exit(127);
    }
    if (grandchild < 0 || waitpid(grandchild, &status, 0) != grandchild || status != 0)
        _exit(1);
    execv("/proc/self/exe", self_child);
    _exit(127);
}

int main(int argc, char **argv)
{
    int rounds = argc == 3 ? atoi(argv[1]) : 0, count = argc == 3 ? atoi(argv[2]) : 0;
    pthread_attr_t small;
    pthread_t threads[1000];

    if (argc == 2 && strcmp(argv[1], "--child") == 0)
        return pthread_create(threads, NULL, allocate, NULL) != 0 || pthread_join(threads[0], NULL) != 0;
    if (rounds < 1 || count < 1 || count > 1000)
        return 2;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 16);
    for (int round = 0; round < rounds; round++) {
        pid_t child = -1;
        int status;

        for (int i = 0; i < count; i++) {
            uintptr_t number = (uintptr_t)round << 16 | (uintptr_t)(i + 1);

            if (pthread_create(&threads[i], &small, allocate, (void *)number) != 0)
                return 1;
            if (i != count / 2)
                continue;
            child = fork();
            if (child == 0)
                in_child();
        }
        for (int i = 0; i < count; i++)
            if (pthread_join(threads[i], NULL) != 0)
                return 1;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fprintf(stderr, "round %d: child %d, status %x\n", round, (int)child, status);
            return 1;
        }
    }
    puts("done");
    return 0;
}
