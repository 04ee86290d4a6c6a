/* SPDX-License-Identifier: MIT */
/*
 * refuse OPTION ERRNO CMD [ARG...]: runs CMD where prctl(OPTION) fails with ERRNO, as under a container's
 * seccomp filter or an old kernel; with OPTION `madvise`, where madvise(MADV_MERGEABLE) does, with
 * `personality`, where personality(ADDR_NO_RANDOMIZE) does, and with another name of the table, where that
 * call does; ERRNO 0 kills the caller instead.  The filter is inherited: nest this program for a second one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static const struct {
    const char *name;
    unsigned call, argument, mask, value; /* refused if (argument & mask) == value */
} table[] = {
    {"madvise", SYS_madvise, 2, UINT_MAX, MADV_MERGEABLE},
    /* All bits means a question. */
    {"personality", SYS_personality, 0, ADDR_NO_RANDOMIZE | 1U << 31, ADDR_NO_RANDOMIZE},
    {"mprotect", SYS_mprotect, 2, PROT_EXEC, PROT_EXEC},
    {"mremap", SYS_mremap, 0, 0, 0},
    {"ptrace", SYS_ptrace, 0, 0, 0},
    {"prlimit64", SYS_prlimit64, 0, 0, 0},
    {"pipe2", SYS_pipe2, 0, 0, 0},
    {"clone", SYS_clone, 0, 0, 0},
};

int main(int argc, char **argv)
{
    unsigned error = argc > 3 ? (unsigned)strtoul(argv[2], NULL, 0) : 0;
    unsigned call = SYS_prctl, argument = 0, mask = UINT_MAX;
    unsigned value = argc > 3 ? (unsigned)strtoul(argv[1], NULL, 0) : 0;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, error == 0 ? SECCOMP_RET_KILL_PROCESS
                                             : SECCOMP_RET_ERRNO | (error & SECCOMP_RET_DATA)),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};

    if (argc < 4)
        return 2;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strcmp(argv[1], table[i].name) == 0) {
            call = table[i].call;
            argument = table[i].argument;
            mask = table[i].mask;
            value = table[i].value;
        }
    filter[1].k = call;
    filter[2].k = (unsigned)offsetof(struct seccomp_data, args) + 8 * argument;
    filter[3].k = mask;
    filter[4].k = value;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1UL, 0UL, 0UL, 0UL) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        perror("refuse");
        return 125;
    }
    execv(argv[3], argv + 3);
    perror(argv[3]);
    return 127;
}
