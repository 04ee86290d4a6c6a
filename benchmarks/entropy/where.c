/* SPDX-License-Identifier: MIT */
/* Prints where the kernel has put it: program, mappings (the loader), heap, stack, vdso. */
#include <stdio.h>
#include <sys/auxv.h>
#include <unistd.h>

extern char __executable_start[];

int main(int argc, char **argv)
{
    unsigned long heap = (unsigned long)sbrk(0); /* before anything has allocated */

    (void)argc;
    printf("%lx %lx %lx %lx %lx\n", (unsigned long)__executable_start, getauxval(AT_BASE), heap,
           (unsigned long)argv, getauxval(AT_SYSINFO_EHDR));
    return 0;
}
