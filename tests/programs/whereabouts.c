/* SPDX-License-Identifier: MIT */
/*
 * whereabouts [--fork]: prints where things lie in this process (or a child of it) and what settings it has, a
 * `KEY VALUE` a line; `at` are addresses that the program uses, `map` the kernel's list.
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static int in_data = 1;

static void at(const char *name, const void *address)
{
    printf("at %s %#lx\n", name, (unsigned long)address);
}

/* Whether a file of /proc holds exactly these bytes. */
static const char *holds(const char *path, const char *data, size_t size)
{
    FILE *file = fopen(path, "re");
    size_t same = 0;
    int byte = EOF;

    while (file != NULL && (byte = getc(file)) != EOF && same < size && data[same] == (char)byte)
        same++;
    if (file != NULL)
        fclose(file);
    return same == size && byte == EOF ? "yes" : "no";
}

static void print_lines(const char *path, const char *prefix, const char *only)
{
    FILE *file = fopen(path, "re");
    char line[PATH_MAX + 128];

    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        if (strncmp(line, only, strlen(only)) == 0)
            printf("%s%s", prefix, line);
    if (file != NULL)
        fclose(file);
}

/* The kernel's record against what the program was given. */
static void print_record(char **argv)
{
    static unsigned long found[512];
    const unsigned long *auxv;
    char **entry, *end = argv[0];
    FILE *file = fopen("/proc/self/auxv", "re");
    size_t length = file != NULL ? fread(found, sizeof *found, 512, file) : 0;
    int same = length >= 2;

    if (file != NULL)
        fclose(file);
    for (entry = argv; *entry != NULL; entry++)
        end = *entry + strlen(*entry) + 1;
    printf("cmdline %s\n", holds("/proc/self/cmdline", argv[0], (size_t)(end - argv[0])));
    for (entry = environ; *entry != NULL; entry++)
        end = *entry + strlen(*entry) + 1;
    printf("environ %s\n", holds("/proc/self/environ", environ[0], (size_t)(end - environ[0])));
    auxv = (const unsigned long *)(const void *)(entry + 1);
    for (size_t i = 0; same && i + 1 < length && auxv[i] != AT_NULL; i += 2)
        same = found[i] == auxv[i] && found[i + 1] == auxv[i + 1];
    printf("auxv %s\n", same ? "yes" : "no");
}

static void print_settings(void)
{
    struct rlimit stack;
    sigset_t signals;
    int status;

    getrlimit(RLIMIT_STACK, &stack);
    printf("stack_limit %lu %lu\n", (unsigned long)stack.rlim_cur, (unsigned long)stack.rlim_max);
    printf("personality %#x\n", (unsigned)personality(0xffffffff));
    printf("child %s\n", waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD ? "none" : "one");
    sigpending(&signals);
    for (int i = 1; i < 32; i++)
        if (sigismember(&signals, i))
            printf("pending %d\n", i);
    sigprocmask(SIG_SETMASK, NULL, &signals);
    for (int i = 1; i < 32; i++)
        if (sigismember(&signals, i))
            printf("blocked %d\n", i);
    print_lines("/proc/self/status", "", "TracerPid:");
    print_lines("/proc/self/status", "", "Name:");
}

int main(int argc, char **argv)
{
    char random[33] = "";
    const unsigned char *bytes = (const unsigned char *)getauxval(AT_RANDOM);
    void *fresh = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int status = 0;

    print_settings(); /* first: the child of --fork would be one */
    if (argc > 1 && strcmp(argv[1], "--fork") == 0) {
        pid_t child;

        fflush(stdout);
        child = fork();
        if (child != 0)
            return child > 0 && waitpid(child, &status, 0) == child && status == 0 ? 0 : 1;
    }
    print_record(argv);
    at("code", (const void *)(unsigned long)main);
    at("data", &in_data);
    at("malloc", malloc(1000));
    at("break", sbrk(0));
    at("stack", &argc);
    at("mmap", fresh);
    at("entry", (const void *)getauxval(AT_ENTRY));
    at("phdr", (const void *)getauxval(AT_PHDR));
    at("ld.so", (const void *)getauxval(AT_BASE));
    at("vdso", (const void *)getauxval(AT_SYSINFO_EHDR));
    at("execfn", (const void *)getauxval(AT_EXECFN));
    at("random", bytes);
    for (int i = 0; i < 16; i++)
        snprintf(random + 2 * i, 3, "%02x", bytes[i]);
    printf("random %s\n", random);
    printf("execfn %s\n", (const char *)getauxval(AT_EXECFN));
    printf("platform %s\n", (const char *)getauxval(AT_PLATFORM));
    /* The heap grows, and the stack does. */
    memset(alloca(1 << 20), 'x', 1 << 20);
    printf("grows %s\n", sbrk(1 << 20) != (void *)-1 ? "yes" : "no");
    print_lines("/proc/self/maps", "map ", "");
    return fflush(stdout) == 0 ? 0 : 1;
}
