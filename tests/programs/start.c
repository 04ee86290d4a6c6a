/* SPDX-License-Identifier: MIT */
/*
 * start fork|vfork|spawn|system|daemon|bare|exec CMD [ARG...]: starts CMD in one of the ways there are,
 * waits for it, prints `parent N` (N = PR_GET_MEMORY_MERGE of this program afterwards) and returns CMD's
 * status.  `exec` becomes CMD, `bare` too, with an empty environment.
 */
#define _GNU_SOURCE
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define GET_MEMORY_MERGE 68

extern char **environ;

static int started(const char *way, char **command)
{
    pid_t child = -1;
    int status;

    if (strcmp(way, "system") == 0)
        return system(command[0]);
    if (strcmp(way, "spawn") == 0) {
        if (posix_spawn(&child, command[0], NULL, NULL, command, environ) != 0)
            return -1;
    } else if (strcmp(way, "vfork") == 0) {
        child = vfork();
        if (child == 0) {
            execv(command[0], command);
            _exit(127);
        }
    } else if (strcmp(way, "fork") == 0 || strcmp(way, "daemon") == 0) {
        child = fork();
        if (child == 0) {
            /* A daemon's way: a session of its own, then a second child. */
            if (strcmp(way, "daemon") == 0)
                _exit(setsid() < 0 ? 127 : WEXITSTATUS(started("fork", command)));
            execv(command[0], command);
            _exit(127);
        }
    }
    return child > 0 && waitpid(child, &status, 0) == child ? status : -1;
}

int main(int argc, char **argv)
{
    char *nothing[] = {NULL};
    int status;

    if (argc < 3)
        return 2;
    if (strcmp(argv[1], "exec") == 0)
        execv(argv[2], argv + 2);
    if (strcmp(argv[1], "bare") == 0)
        execve(argv[2], argv + 2, nothing);
    status = started(argv[1], argv + 2);
    printf("parent %d\n", prctl(GET_MEMORY_MERGE, 0UL, 0UL, 0UL, 0UL));
    return status >= 0 && WIFEXITED(status) ? WEXITSTATUS(status) : 125;
}
