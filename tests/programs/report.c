/* SPDX-License-Identifier: MIT */
/*
 * report [--fork|--thread] [ARG...]: prints what a program can know of itself, a `KEY VALUE` a line.
 * The same program run with and without us has to print the same, but for the lines about merging.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define GET_MEMORY_MERGE 68 /* Linux 6.4; bookworm's headers are older */

extern char **environ;

static int errno_at_start, errno_in_constructor;
static int argument_count;
static char **arguments;

__attribute__((constructor)) static void remember_errno(void)
{
    errno_in_constructor = errno;
}

static void print(const char *key, const char *value)
{
    printf("%s ", key);
    for (; *value != '\0'; value++) {
        if (*value == '\n' || *value == '\\')
            printf("\\%03o", *value);
        else
            putchar(*value);
    }
    putchar('\n');
}

/* First of all the lines: opening anything else would be seen here. */
static void print_descriptors(void)
{
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;

    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        char path[PATH_MAX], target[PATH_MAX] = "";

        if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(folder))
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%.10s", entry->d_name);
        if (readlink(path, target, sizeof target - 1) < 0)
            strcpy(target, "?");
        printf("fd %s ", entry->d_name);
        print("is", target);
    }
    if (folder != NULL)
        closedir(folder);
}

/* Whether the mapping that holds `address` carries `mg`: the kernel's own word on it. */
static const char *mergeable(const void *address)
{
    FILE *smaps = fopen("/proc/self/smaps", "re");
    const char *answer = "unknown";
    char line[PATH_MAX + 128];
    int here = 0;

    while (smaps != NULL && fgets(line, sizeof line, smaps) != NULL) {
        unsigned long start, end;

        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            here = start <= (unsigned long)address && (unsigned long)address < end;
        else if (here && strncmp(line, "VmFlags:", 8) == 0)
            answer = strstr(line, " mg") != NULL ? "yes" : "no";
    }
    if (smaps != NULL)
        fclose(smaps);
    return answer;
}

static void print_mappings(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[PATH_MAX + 128], last[PATH_MAX + 128] = "";

    while (maps != NULL && fgets(line, sizeof line, maps) != NULL) {
        char *path = strchr(line, '/');

        line[strcspn(line, "\n")] = '\0';
        if (path != NULL && strcmp(path, last) != 0)
            print("file", strcpy(last, path));
    }
    if (maps != NULL)
        fclose(maps);
}

/* The lines of a /proc file that start with one of `keys`, which ends with a NULL. */
static void print_lines(const char *path, const char *const *keys)
{
    FILE *file = fopen(path, "re");
    char line[4096];

    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        char *value = strpbrk(line, ": \t");

        line[strcspn(line, "\n")] = '\0';
        if (value == NULL)
            continue;
        *value++ = '\0';
        for (size_t i = 0; keys[i] != NULL; i++)
            if (strcmp(line, keys[i]) == 0)
                print(line, value + strspn(value, " \t"));
    }
    if (file != NULL)
        fclose(file);
}

static void report(void)
{
    static const char *const status[] = {"Name", "Umask", "Uid", "Gid", "Threads", "SigPnd",
                                         "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "CapPrm", "CapEff",
                                         "CapAmb", "NoNewPrivs", "Seccomp", NULL};
    static const char *const merging[] = {"ksm_merge_any", NULL};
    char cwd[PATH_MAX];
    void *small = malloc(100), *large = malloc(1 << 20);

    print_descriptors();
    printf("errno_in_constructor %d\nerrno_at_start %d\n", errno_in_constructor, errno_at_start);
    printf("secure %lu\n", getauxval(AT_SECURE));
    printf("argc %d\n", argument_count);
    for (int i = 0; i < argument_count; i++)
        print("argv", arguments[i]);
    for (char **entry = environ; *entry != NULL; entry++)
        print("env", *entry);
    print("cwd", getcwd(cwd, sizeof cwd) != NULL ? cwd : "?");
    printf("dumpable %d\n", prctl(PR_GET_DUMPABLE));
    /* Not "self": the first thread may still be busy starting this one, with its signals blocked. */
    print_lines("/proc/thread-self/status", status);

    printf("pid %d\nppid %d\nsession %d\n", getpid(), getppid(), getsid(0));
    print_mappings();

    printf("merge %d\n", prctl(GET_MEMORY_MERGE, 0UL, 0UL, 0UL, 0UL));
    print("small_mergeable", mergeable(small));
    print("large_mergeable", mergeable(large));
    print_lines("/proc/self/ksm_stat", merging);
    free(small);
    free(large);
}

static void *report_in_thread(void *unused)
{
    report();
    return unused;
}

int main(int argc, char **argv)
{
    int status = 0;
    pthread_t thread;

    errno_at_start = errno;
    argument_count = argc;
    arguments = argv;
    if (argc > 1 && strcmp(argv[1], "--thread") == 0) {
        if (pthread_create(&thread, NULL, report_in_thread, NULL) != 0)
            return 1;
        pthread_join(thread, NULL);
    } else if (argc > 1 && strcmp(argv[1], "--fork") == 0) {
        pid_t child = fork();

        if (child == 0)
            report();
        else if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
            return 1;
    } else {
        report();
    }
    return fflush(stdout) == 0 ? 0 : 1;
}
