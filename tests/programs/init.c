/* SPDX-License-Identifier: MIT */
/* A first program: prints its arguments, its blocked signals, how / is mounted, and /etc/ld.so.preload. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/statvfs.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    sigset_t blocked;
    int count = 0, c;
    FILE *preload;
    struct statvfs root;

    sigprocmask(SIG_BLOCK, NULL, &blocked);
    for (int i = 1; i < NSIG; i++)
        count += sigismember(&blocked, i) == 1;
    if (statvfs("/", &root) < 0)
        return 1;
    printf("pid %d, %d blocked, flags %lx:", (int)getpid(), count,
           root.f_flag & (ST_RDONLY | ST_NOSUID | ST_NODEV | ST_NOEXEC));
    for (int i = 0; i < argc; i++)
        printf(" %s", argv[i]);
    printf("\n");
    preload = fopen("/etc/ld.so.preload", "r");
    while (preload != NULL && (c = getc(preload)) != EOF)
        putchar(c);
    return 0;
}
