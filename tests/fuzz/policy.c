/* SPDX-License-Identifier: MIT */
/*
 * libFuzzer's target for policy.h: the first line is the path of an executable, the rest a policy.
 *
 * A second reader, as simple as can be, has to come to the same verdict: whole lines, a table of which part
 * of the pattern matches which part of the name.  And the verdict must not depend on how the text is cut into
 * pieces, nor on whether the whole path is known, where that is said not to matter.
 */
#include "policy.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum verdict { NONE, ALLOWED, DENIED };

/* Whether the element of a pattern at `p` takes c; `end` is behind it, NULL if its set is never closed. */
static int takes(const uint8_t *p, const uint8_t *stop, uint8_t c, const uint8_t **end)
{
    const uint8_t *from;
    int not_in, found = 0;

    if (*p != '[') {
        *end = p + 1;
        return *p == '?' || *p == c;
    }
    p++;
    not_in = p < stop && *p == '!';
    p += not_in;
    for (from = p; p < stop && (*p != ']' || p == from); p++) {
        if (stop - p > 2 && p[1] == '-' && p[2] != ']') {
            found |= p[0] <= c && c <= p[2];
            p += 2;
        } else {
            found |= *p == c;
        }
    }
    *end = p < stop ? p + 1 : NULL;
    return p < stop && found != not_in;
}

static int closed(const uint8_t *p, const uint8_t *stop)
{
    while (p != NULL && p < stop)
        (void)takes(p, stop, 0, &p);
    return p != NULL;
}

static int matches(const uint8_t *pattern, size_t length, const uint8_t *text, size_t text_length)
{
    /* reached[t]: the pattern so far matches the first t bytes. */
    char *reached = calloc(text_length + 1, 1), *next = malloc(text_length + 1);
    const uint8_t *p = pattern, *stop = pattern + length, *end = pattern;
    int result;

    reached[0] = 1;
    if (!closed(pattern, stop)) {
        free(reached);
        free(next);
        return 0;
    }
    for (; p < stop; p = end) {
        char *swap = reached;

        memset(next, 0, text_length + 1);
        if (*p == '*') {
            next[0] = reached[0];
            for (size_t t = 1; t <= text_length; t++)
                next[t] = next[t - 1] | reached[t];
            end = p + 1;
        } else {
            (void)takes(p, stop, 0, &end);
            for (size_t t = 0; t < text_length; t++)
                next[t + 1] = (char)(reached[t] && takes(p, stop, text[t], &end));
        }
        reached = next;
        next = swap;
    }
    result = reached[text_length];
    free(reached);
    free(next);
    return result;
}

static int blank(uint8_t c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

static int is(const uint8_t *text, size_t length, const char *word)
{
    return length == strlen(word) && memcmp(text, word, length) == 0;
}

static void simple_line(const uint8_t *line, size_t length, const uint8_t *path, size_t path_length,
                        enum verdict *rule, enum verdict *otherwise)
{
    const uint8_t *base = path, *argument;
    size_t word = 0, rest;

    if (length > 511 || memchr(line, 0, length) != NULL || *rule != NONE)
        return;
    for (; length > 0 && blank(*line); line++)
        length--;
    while (length > 0 && blank(line[length - 1]))
        length--;
    while (word < length && !blank(line[word]))
        word++;
    argument = line + word;
    rest = length - word;
    for (; rest > 0 && blank(*argument); argument++)
        rest--;
    if (rest == 0)
        return;
    if (is(line, word, "default")) {
        if (*otherwise == NONE)
            *otherwise = is(argument, rest, "allow") ? ALLOWED : is(argument, rest, "deny") ? DENIED : NONE;
        return;
    }
    if (!is(line, word, "allow") && !is(line, word, "deny"))
        return;
    for (size_t i = 0; i < path_length; i++)
        if (path[i] == '/')
            base = path + i + 1;
    if (memchr(argument, '/', rest) != NULL
            ? matches(argument, rest, path, path_length)
            : matches(argument, rest, base, (size_t)(path + path_length - base)))
        *rule = is(line, word, "allow") ? ALLOWED : DENIED;
}

static int simply_denied(const uint8_t *text, size_t length, const uint8_t *path, size_t path_length)
{
    enum verdict rule = NONE, otherwise = NONE;

    if (path_length > 10 && memcmp(path + path_length - 10, " (deleted)", 10) == 0)
        path_length -= 10;
    for (;;) {
        const uint8_t *end = length > 0 ? memchr(text, '\n', length) : NULL;
        size_t line = end != NULL ? (size_t)(end - text) : length;

        simple_line(text, line, path, path_length, &rule, &otherwise);
        if (end == NULL)
            break;
        text += line + 1;
        length -= line + 1;
    }
    return (rule != NONE ? rule : otherwise) == DENIED;
}

static int denied(const char *text, size_t length, const char *path, size_t path_length, size_t piece,
                  bool whole, bool *wants_path)
{
    struct policy policy;

    policy_begin(&policy, path, path_length, whole);
    for (size_t at = 0; at < length; at += piece) {
        size_t now = length - at < piece ? length - at : piece;
        /* A piece of memory of its own, so that a look behind its end is found. */
        char *copy = malloc(now);
        bool done;

        memcpy(copy, text + at, now);
        done = policy_read(&policy, copy, now);
        free(copy);
        if (done)
            break;
    }
    policy_end(&policy);
    *wants_path = policy.wants_path;
    return policy_denies(&policy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = size > 0 ? memchr(data, '\n', size) : NULL;
    size_t path_length, length;
    const char *text;
    char *path;
    bool wants_path;
    int expected;

    if (end == NULL || end == data || memchr(data, 0, (size_t)(end - data)) != NULL)
        return -1; /* no path that a kernel would give */
    path_length = (size_t)(end - data);
    path = malloc(path_length + 1);
    memcpy(path, data, path_length);
    path[path_length] = '\0';
    text = (const char *)end + 1;
    length = size - path_length - 1;

    expected = simply_denied((const uint8_t *)text, length, data, path_length);
    if (denied(text, length, path, path_length, length + 1, true, &wants_path) != expected || wants_path ||
        denied(text, length, path, path_length, 1, true, &wants_path) != expected || wants_path ||
        denied(text, length, path, path_length, size % 61 + 2, true, &wants_path) != expected || wants_path)
        abort();
    if (path[0] == '/' && denied(text, length, path, path_length, length + 1, false, &wants_path) != expected &&
        !wants_path)
        abort();
    free(path);
    return 0;
}
