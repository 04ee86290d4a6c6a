/* SPDX-License-Identifier: MIT */
/*
 * pointers PAGES: fills so many pages of malloc's small blocks with pointers to one another, to the stack
 * and to the C library; prints `ready`, and keeps them until stdin ends.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct node {
    struct node *before;
    int (*function)(const char *);
    void *stack;
    unsigned long number; /* equal pages within one process would merge, too */
    void *rest[10];
};

int main(int argc, char **argv)
{
    unsigned long pages = argc == 2 ? strtoul(argv[1], NULL, 0) : 0;
    size_t nodes = pages * 4096 / (sizeof(struct node) + sizeof(size_t));
    struct node *last = NULL;
    char byte;

    if (pages == 0)
        return 2;
    for (size_t i = 0; i < nodes; i++) {
        struct node *node = malloc(sizeof *node);

        if (node == NULL)
            return 1;
        *node = (struct node){last, puts, &argc, i, {node, last, node, last, node, last, node, last, node, last}};
        last = node;
    }
    if (puts("ready") < 0 || fflush(stdout) != 0)
        return 1;
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    free(last);
    return 0;
}
