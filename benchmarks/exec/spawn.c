/* SPDX-License-Identifier: MIT */
/*
 * spawn ROUNDS ARM... -- PROGRAM [ARG...]
 *
 * Starts PROGRAM and waits for its end, once per arm and round, the arms in turn so that a drift of
 * the machine's speed reaches all alike.  An arm is the LD_PRELOAD to run with, `-` for none,
 * or `!WRAPPER` to run `WRAPPER PROGRAM` without LD_PRELOAD.
 * Prints one line per round: the nanoseconds of each arm.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_ARMS = 16, MOST_ARGS = 64 };

static long now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static long run(char *const *argv, char *const *env)
{
    pid_t pid;
    int status;
    long start = now();
    int error = posix_spawn(&pid, argv[0], NULL, NULL, argv, env);

    if (error != 0) {
        fprintf(stderr, "spawn: %s: %s\n", argv[0], strerror(error));
        exit(1);
    }
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            exit(1);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "spawn: %s failed, wait status 0x%x\n", argv[0], (unsigned)status);
        exit(1);
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    char preload[MOST_ARMS][4096], *env[MOST_ARMS][3], *command[MOST_ARMS][MOST_ARGS];
    int rounds = argc > 1 ? atoi(argv[1]) : 0, arms = 0, at = 2;

    while (at < argc && strcmp(argv[at], "--") != 0) {
        char *arm = argv[at++];
        int used = 0;

        if (arms == MOST_ARMS)
            return 2;
        env[arms][used++] = (char *)"PATH=/usr/bin:/bin";
        if (arm[0] != '-' && arm[0] != '!') {
            snprintf(preload[arms], sizeof preload[arms], "LD_PRELOAD=%s", arm);
            env[arms][used++] = preload[arms];
        }
        env[arms][used] = NULL;
        command[arms][0] = arm[0] == '!' ? arm + 1 : NULL;
        arms++;
    }
    at++;
    if (rounds < 1 || arms == 0 || at >= argc || argc - at > MOST_ARGS - 2) {
        fprintf(stderr, "usage: spawn ROUNDS ARM... -- PROGRAM [ARG...]\n");
        return 2;
    }
    for (int arm = 0; arm < arms; arm++) {
        int used = command[arm][0] != NULL;

        for (int i = at; i < argc; i++)
            command[arm][used++] = argv[i];
        command[arm][used] = NULL;
    }
    for (int round = -rounds / 20; round < rounds; round++) { /* the first twentieth warms up */
        for (int arm = 0; arm < arms; arm++) {
            long taken = run(command[arm], env[arm]);

            if (round >= 0)
                printf("%ld%c", taken, arm + 1 < arms ? ' ' : '\n');
        }
    }
    return 0;
}
