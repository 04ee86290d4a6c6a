/* SPDX-License-Identifier: MIT */
/*
 * policy: says for each record on standard input what policy.h makes of it, "allow" or "deny".
 *
 * A record is a line `PATH-LENGTH TEXT-LENGTH PIECE` and then the path and the text.  The text is fed in
 * pieces of PIECE bytes; a TEXT-LENGTH of -1 means the defaults that are compiled in.
 *
 * policy ask: says what becomes of itself, as the libraries do.
 */
#include "policy.h"

#include <stdio.h>
#include <stdlib.h>

static bool is_denied(const char *path, size_t path_length, const char *text, long length, long piece,
                      bool whole, bool *wants_path)
{
    struct policy policy;

    policy_begin(&policy, path, path_length, whole);
    if (length < 0)
        policy_read_defaults(&policy);
    for (long at = 0; at < length; at += piece)
        if (policy_read(&policy, text + at, (size_t)(at + piece < length ? piece : length - at)))
            break;
    policy_end(&policy);
    *wants_path = policy.wants_path;
    return policy_denies(&policy);
}

static char *bytes(size_t length)
{
    char *memory = malloc(length + 1);

    if (memory == NULL || fread(memory, 1, length, stdin) != length)
        exit(1);
    memory[length] = '\0';
    return memory;
}

int main(int argc, char **argv)
{
    long path_length, length, piece;

    (void)argv;
    if (argc > 1) {
        fputs(policy_reason(ask_policy(NULL, NULL, NULL)), stdout);
        return 0;
    }
    while (scanf("%ld %ld %ld", &path_length, &length, &piece) == 3 && getchar() == '\n') {
        char *path = bytes((size_t)path_length), *text = bytes(length > 0 ? (size_t)length : 0);
        bool wants_path, denied, denied_by_base;

        denied = is_denied(path, (size_t)path_length, text, length, piece, true, &wants_path);
        if (wants_path)
            puts("wants a path that it has");
        denied_by_base = is_denied(path, (size_t)path_length, text, length, piece, false, &wants_path);
        if (path[0] == '/' && !wants_path && denied != denied_by_base)
            puts("the base name alone says something else");
        else
            puts(denied ? "deny" : "allow");
        fflush(stdout);
        free(path);
        free(text);
    }
    return 0;
}
