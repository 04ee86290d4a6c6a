/* SPDX-License-Identifier: MIT */
/* Which memory carries `mg`, the kernel's own word for mergeable; for victims that report on themselves. */
#ifndef SMAPS_H
#define SMAPS_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct range {
    const char *name;
    uintptr_t start, end;
    int marked, unmarked; /* mappings */
} ranges[100];
static unsigned range_count;

/* Keeps a range in mind until report_ranges() is called. */
__attribute__((unused)) static void remember(const char *name, const volatile void *memory, size_t size)
{
    struct range *range = &ranges[range_count++];

    if (range_count > sizeof ranges / sizeof *ranges)
        abort();
    range->name = name;
    range->start = (uintptr_t)memory;
    range->end = (uintptr_t)memory + size;
}

static void read_mappings(char *text)
{
    unsigned long start = 0, end = 0;
    char *rest;

    for (char *line = strtok_r(text, "\n", &rest); line != NULL; line = strtok_r(NULL, "\n", &rest)) {
        unsigned long a, b;

        if (sscanf(line, "%lx-%lx ", &a, &b) == 2) {
            start = a;
            end = b;
        } else if (strncmp(line, "VmFlags:", 8) == 0) {
            for (unsigned i = 0; i < range_count; i++) {
                if (ranges[i].start >= end || ranges[i].end <= start)
                    continue;
                if (strstr(line, " mg") != NULL)
                    ranges[i].marked++;
                else
                    ranges[i].unmarked++;
            }
        }
    }
}

/* Counts the mappings of each range. */
__attribute__((unused)) static void look(void)
{
    static char text[1 << 22];
    int smaps = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    ssize_t got;

    /* Nothing here allocates: that would let us catch up with what was missed until now. */
    while ((got = read(smaps, text + used, sizeof text - 1 - used)) > 0)
        used += (size_t)got;
    close(smaps);
    if (used == 0)
        exit(1);
    text[used] = '\0';
    read_mappings(text);
}

/* Prints `NAME yes`, `no` or `part` for each range; `gone` where nothing is mapped. */
__attribute__((unused)) static void report_ranges(void)
{
    look();
    for (unsigned i = 0; i < range_count; i++)
        printf("%s %s\n", ranges[i].name,
               ranges[i].marked == 0 && ranges[i].unmarked == 0 ? "gone"
               : ranges[i].unmarked == 0                         ? "yes"
               : ranges[i].marked == 0                           ? "no"
                                                                 : "part");
    fflush(stdout);
}

#endif
