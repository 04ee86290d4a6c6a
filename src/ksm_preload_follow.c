/* SPDX-License-Identifier: MIT */
/*
 * libksm_preload_follow.so: puts the programs that a program of a group starts into that group.
 *
 * A layout can only be given at exec. So a program that was started without goes through exec once
 * more, by way of ksm-wrapper, before anything of it has run but the loader: -z initfirst puts this
 * constructor before all others. Only in the environment of `ksm-wrapper --follow`; any doubt
 * means that the program runs on as it is. Freestanding, like ksm_preload_prctl.c.
 */
#include "follow.h"
#include "rawsys.h"

#include <elf.h>
#include <stdbool.h>
#include <stddef.h>

enum { AT_FDCWD = -100, O_RDONLY_CLOEXEC = 02000000, O_PATH = 010000000, PR_GET_NAME = 16 };

/* The part of the entry behind "NAME=", or NULL if the entry is of another variable. */
static char *value_of(char *entry, const char *name)
{
    while (*name != '\0' && *entry == *name) {
        entry++;
        name++;
    }
    return *name == '\0' && *entry == '=' ? entry + 1 : NULL;
}

static char *find(char **envp, const char *name)
{
    for (; *envp != NULL; envp++) {
        char *value = value_of(*envp, name);

        if (value != NULL)
            return value;
    }
    return NULL;
}

static bool contains(const char *text, const char *word)
{
    for (; text != NULL && *text != '\0'; text++) {
        size_t i = 0;

        while (word[i] != '\0' && text[i] == word[i])
            i++;
        if (word[i] == '\0')
            return true;
    }
    return false;
}

static void write_number(char *at, int digits, long number)
{
    while (digits-- > 0) {
        at[digits] = (char)('0' + number % 10);
        number /= 10;
    }
}

static bool is_number(const char *at, int digits, long number)
{
    while (digits-- > 0) {
        if (at[digits] != (char)('0' + number % 10))
            return false;
        number /= 10;
    }
    return true;
}

/* Reads the start of a file of /proc; its length, 0 if there is none. */
static long read_start(const char *path, void *data, long size)
{
    long file = raw_syscall5(RAW_openat, AT_FDCWD, (long)path, O_RDONLY_CLOEXEC, 0, 0);
    long length = 0;

    if (file < 0)
        return 0;
    length = raw_syscall5(RAW_read, file, (long)data, size, 0, 0);
    raw_syscall5(RAW_close, file, 0, 0, 0, 0);
    return length > 0 ? length : 0;
}

/* Not a privileged program, and not the loader called by hand, whose argv is another program's. */
static bool is_ordinary(void)
{
    unsigned long auxv[2 * 40];
    long size = read_start("/proc/self/auxv", auxv, sizeof auxv);
    bool unprivileged = false, has_loader = false;

    for (size_t i = 0; (long)((i + 2) * sizeof auxv[0]) <= size && auxv[i] != AT_NULL; i += 2) {
        if (auxv[i] == AT_SECURE)
            unprivileged = auxv[i + 1] == 0;
        else if (auxv[i] == AT_BASE)
            has_loader = auxv[i + 1] != 0;
    }
    return unprivileged && has_loader;
}

/* A debugger or strace counts the execs of what it starts, and lets nobody else trace it. */
static bool is_traced(void)
{
    char text[1024];
    long size = read_start("/proc/self/status", text, sizeof text - 1);

    text[size] = '\0';
    return !contains(text, "\nTracerPid:\t0\n");
}

static void pass_on(char **argv, char **envp, char *state)
{
    char comm[16] = "";
    const char *wrapper = state + FOLLOW_GROUP;
    long file;

    while (*wrapper != '\0' && *wrapper != ':')
        wrapper++;
    if (*wrapper == '\0')
        return;
    file = raw_syscall5(RAW_openat, AT_FDCWD, (long)"/proc/self/exe", O_PATH, 0, 0);
    if (file < 0)
        return;
    raw_syscall5(RAW_prctl, PR_GET_NAME, (long)comm, 0, 0, 0);
    for (int i = 0; i < FOLLOW_COMM_SIZE && comm[i] != '\0' && comm[i] != '/'; i++)
        state[FOLLOW_COMM + i] = comm[i];
    state[FOLLOW_MARK] = 'R';
    write_number(state + FOLLOW_MARK + 1, FOLLOW_MARK_SIZE - 1, file);
    raw_syscall5(RAW_execve, (long)(wrapper + 1), (long)argv, (long)envp, 0, 0);
    raw_syscall5(RAW_close, file, 0, 0, 0, 0);
}

__attribute__((constructor)) static void follow(int argc, char **argv, char **envp)
{
    char *state;
    long pid;

    /* glibc's ld.so passes these; musl's does not, and there argv cannot be had. */
    if (argc < 0 || argv == NULL || envp != argv + argc + 1)
        return;
    state = find(envp, FOLLOW_VARIABLE);
    if (state == NULL)
        return;
    for (int i = 0; i < FOLLOW_GROUP; i++)
        if (state[i] == '\0')
            return;
    if (state[FOLLOW_MARK] == 'R') /* this is the wrapper, on its way */
        return;
    pid = raw_syscall5(RAW_getpid, 0, 0, 0, 0, 0);
    /* valgrind runs the program itself: an exec would leave it behind. */
    if (!is_number(state + FOLLOW_MARK, FOLLOW_MARK_SIZE, pid) && is_ordinary() && !is_traced() &&
        !contains(find(envp, "LD_PRELOAD"), "/vgpreload_"))
        pass_on(argv, envp, state);
    /* What this program execs starts anew, also in this process. */
    write_number(state + FOLLOW_MARK, FOLLOW_MARK_SIZE, 0);
    for (int i = 0; i < FOLLOW_COMM_SIZE; i++)
        state[FOLLOW_COMM + i] = '/';
}
