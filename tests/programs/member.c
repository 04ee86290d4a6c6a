/* SPDX-License-Identifier: MIT */
/*
 * A library that leaves the program's path and a copy of /proc/self/maps in the file $KSM_MAPS when a program starts, if
 * the file is not there yet and the program's parent is the process $KSM_PARENT: so of what a test has started itself, as it was first
 * after ksm-wrapper.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

__attribute__((constructor)) static void at_start(void)
{
    const char *path = getenv("KSM_MAPS"), *parent = getenv("KSM_PARENT");
    char text[4096];
    ssize_t size;
    int from, to;

    if (path == NULL || parent == NULL || getppid() != atoi(parent) ||
        strcmp(program_invocation_short_name, "ksm-wrapper") == 0)
        return;
    to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (to < 0)
        return;
    size = readlink("/proc/self/exe", text, sizeof text - 1);
    from = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (size > 0)
        text[size++] = '\n';
    while (size > 0 && write(to, text, (size_t)size) == size)
        size = read(from, text, sizeof text);
    close(from);
    close(to);
}
