/* SPDX-License-Identifier: MIT */
/* preload_file.c in buffers that end where it is told, for the sanitizers; what it does: tests/test_preload_file.py. */
#include "check.h"

#include <stdint.h>
#include <stdlib.h>

#include "../../src/preload_file.c"

#define ENTRY "/usr/lib/libksm_preload_prctl.so"

static const char *const pieces[] = {"/a.so", "#", "\n", " ", ":", "\t", ENTRY, "libksm_preload.so", "\r", "x", "#\n"};
static char *scratch; /* 2 * PRELOAD_FILE_MAX */

/* Marsaglia's xorshift: the same files in each run. */
static uint32_t random_below(uint32_t limit)
{
    static uint32_t state = 2463534242;

    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % limit;
}

static char *exactly(const char *text, size_t size)
{
    char *result = malloc(size > 0 ? size : 1);

    if (result == NULL)
        abort();
    memcpy(result, text, size);
    return result;
}

/* The names of TEXT: how many, and how many of them are ours. Each is within the file, behind the one before. */
static size_t count_names(const char *text, size_t size, size_t *ours)
{
    char *copy_ = exactly(text, size);
    struct preload_names names;
    struct preload_name name;
    size_t count = 0, end = 0;

    *ours = 0;
    preload_names_begin(&names, copy_, size);
    while (preload_names_next(&names, &name)) {
        CHECK(name.length > 0 && name.start >= end && name.start + name.length <= size);
        end = name.start + name.length;
        *ours += preload_name_is_ours(text + name.start, name.length);
        (void)preload_name_in_comment(text, name);
        count++;
    }
    CHECK(!preload_names_next(&names, &name));
    free(copy_);
    return count;
}

static void edit(const char *old, size_t size)
{
    char *text = malloc(PRELOAD_FILE_MAX);
    size_t ours, before = count_names(old, size, &ours), others = before - ours, now;

    if (text == NULL)
        abort();
    memcpy(text, old, size);
    now = preload_file_add(text, size, ENTRY, scratch);
    if (now != PRELOAD_FILE_IMPOSSIBLE) {
        CHECK(now < PRELOAD_FILE_MAX); /* else it could not be read again */
        CHECK(count_names(text, now, &ours) == others + 1 && ours == 1);
        CHECK(preload_file_add(text, now, ENTRY, scratch) == now);
        now = preload_file_remove(text, now, scratch);
        CHECK(count_names(text, now, &ours) == others && ours == 0);
        if (others == before)
            CHECK(now == size && memcmp(text, old, size) == 0);
    }
    memcpy(text, old, size);
    now = preload_file_remove(text, size, scratch);
    CHECK(now <= size);
    CHECK(count_names(text, now, &ours) == others && ours == 0);
    CHECK(preload_file_remove(text, now, scratch) == now);
    free(text);
}

static size_t make(char *text, size_t limit)
{
    size_t size = 0;

    for (;;) {
        uint32_t which = random_below(sizeof pieces / sizeof *pieces + 1);
        const char *piece = which > 0 ? pieces[which - 1] : "";
        size_t length = which > 0 ? strlen(piece) : 1; /* a NUL */

        if (size + length > limit)
            return size;
        memcpy(text + size, piece, length);
        size += length;
    }
}

static void test_short(void)
{
    char text[120];

    for (int i = 0; i < 8000; i++)
        edit(text, make(text, random_below(sizeof text)));
}

/* The largest files that are read: up to the limit there is no room, just below it there may be. */
static void test_long(void)
{
    static char text[PRELOAD_FILE_MAX];

    for (size_t less = 1; less < sizeof ENTRY + 4; less += less < 3 || less >= sizeof ENTRY - 2 ? 1 : 7) {
        size_t size = PRELOAD_FILE_MAX - less;

        for (unsigned i = 0; i < sizeof pieces / sizeof *pieces; i++) {
            size_t length = strlen(pieces[i]);

            for (size_t at = 0; at < size; at++)
                text[at] = pieces[i][at % length];
            if (strstr(pieces[i], "libksm") == NULL)
                edit(text, size);
        }
        memset(text, '\0', size);
        edit(text, size);
        memset(text, '\n', size);
        CHECK((preload_file_add(text, size, ENTRY, scratch) == PRELOAD_FILE_IMPOSSIBLE) ==
              (less < sizeof ENTRY + 1));
    }
}

/* Each is taken out on its own, so fewer. */
static void test_many_of_ours(void)
{
    static char text[PRELOAD_FILE_MAX];
    size_t size = 0;

    for (int i = 0; i < 100; i++) {
        memcpy(text + size, ENTRY "\n", sizeof ENTRY);
        size += sizeof ENTRY;
    }
    edit(text, size);
    memset(text + size, 'x', sizeof text - 1 - size);
    edit(text, sizeof text - 1);
}

int main(void)
{
    scratch = malloc(2 * PRELOAD_FILE_MAX);
    if (scratch == NULL)
        abort();
    test_short();
    test_long();
    test_many_of_ours();
    free(scratch);
    return check_status();
}
