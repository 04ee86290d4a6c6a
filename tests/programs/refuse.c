/* SPDX-License-Identifier: MIT */
/*
 * refuse OPTION ERRNO CMD [ARG...]: runs CMD where prctl(OPTION) fails with ERRNO, as under a container's
 * seccomp filter or an old kernel; with OPTION `madvise`, where madvise(MADV_MERGEABLE) does. The filter is
 * inherited: nest this program for a second one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int of_madvise = argc > 3 && strcmp(argv[1], "madvise") == 0;
    unsigned call = of_madvise ? SYS_madvise : SYS_prctl;
    unsigned argument = of_madvise ? 2 : 0;
    unsigned option = of_madvise ? MADV_MERGEABLE : argc > 3 ? (unsigned)strtoul(argv[1], NULL, 0) : 0;
    unsigned error = argc > 3 ? (unsigned)strtoul(argv[2], NULL, 0) : 0;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * argument),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, option, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error & SECCOMP_RET_DATA)),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};

    if (argc < 4)
        return 2;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1UL, 0UL, 0UL, 0UL) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        perror("refuse");
        return 125;
    }
    execv(argv[3], argv + 3);
    perror(argv[3]);
    return 127;
}
