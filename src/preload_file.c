/* SPDX-License-Identifier: MIT */
#include "preload_file.h"
#include "text.h"

static bool separates(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == ':';
}

/*
 * The loop of elf/rtld.c, with its mistake: each search for a comment starts at the beginning of the file
 * again, but goes only as far as there was text behind the comment before it.
 */
static void blank_comments(char *text, size_t size)
{
    size_t rest = size;

    while (rest > 0) {
        size_t comment = 0;

        while (comment < rest && text[comment] != '#')
            comment++;
        if (comment == rest)
            return;
        rest -= comment;
        do
            text[comment] = ' ';
        while (--rest > 0 && text[++comment] != '\n');
    }
}

void preload_names_begin(struct preload_names *names, char *text, size_t size)
{
    blank_comments(text, size);
    names->text = text;
    names->at = 0;
    names->size = size;
    /* A name at the very end of the file, with no room for a NUL behind it, is read on its own. */
    names->last = size;
    while (names->last > 0 && !separates(text[names->last - 1]))
        names->last--;
}

bool preload_names_next(struct preload_names *names, struct preload_name *name)
{
    for (;;) {
        size_t end = names->at < names->last ? names->last : names->size;
        size_t start = names->at;

        /* A NUL ends what strsep reads; then only the name at the very end is left. */
        while (start < end && separates(names->text[start]))
            start++;
        if (start == end || names->text[start] == '\0') {
            if (names->at >= names->last)
                return false;
            names->at = names->last;
            if (names->last == names->size)
                return false;
            continue;
        }
        names->at = start;
        while (names->at < end && !separates(names->text[names->at]) &&
               names->text[names->at] != '\0')
            names->at++;
        name->start = start;
        name->length = names->at - start;
        if (end == names->size && names->last < names->size)
            names->at = names->last = names->size;
        return true;
    }
}

bool preload_name_is_ours(const char *text, size_t length)
{
    static const char ours[][sizeof "libksm_preload_follow.so"] = {
        "libksm_preload.so",
        "libksm_preload_prctl.so",
        "libksm_preload_follow.so",
    };
    size_t base = length;

    while (base > 0 && text[base - 1] != '/')
        base--;
    for (unsigned i = 0; i < sizeof ours / sizeof *ours; i++) {
        size_t own = text_length(ours[i]);

        if (length - base == own && same_bytes(text + base, ours[i], own))
            return true;
    }
    return false;
}

static size_t line_start(const char *text, size_t at)
{
    while (at > 0 && text[at - 1] != '\n')
        at--;
    return at;
}

bool preload_name_in_comment(const char *text, struct preload_name name)
{
    /* A name may itself begin with '#', where the loader reads a comment as one. */
    for (size_t at = line_start(text, name.start); at <= name.start; at++)
        if (text[at] == '#')
            return true;
    return false;
}

/* Whether the loader reads the same from both texts, but for the EXTRA name, which only the second has. */
static bool reads_the_same(const char *without, size_t without_size, const char *with, size_t with_size,
                           struct preload_name extra, char *scratch)
{
    struct preload_names a, b;
    struct preload_name in_a, in_b;
    bool seen = false;

    copy_bytes(scratch, without, without_size);
    copy_bytes(scratch + PRELOAD_FILE_MAX, with, with_size);
    preload_names_begin(&a, scratch, without_size);
    preload_names_begin(&b, scratch + PRELOAD_FILE_MAX, with_size);
    while (preload_names_next(&b, &in_b)) {
        if (!seen && in_b.start == extra.start && in_b.length == extra.length) {
            seen = true;
            continue;
        }
        if (!preload_names_next(&a, &in_a) || in_a.length != in_b.length ||
            !same_bytes(without + in_a.start, with + in_b.start, in_a.length))
            return false;
    }
    return seen && !preload_names_next(&a, &in_a);
}

/* The bytes to cut out so that the name is gone. */
static struct preload_name cut_of(const char *text, size_t size, struct preload_name name)
{
    size_t start = name.start, end = name.start + name.length;
    size_t line = line_start(text, start), line_end = end;
    bool alone = true;

    while (line_end < size && text[line_end] != '\n')
        line_end++;
    for (size_t at = line; at < line_end; at++)
        alone &= separates(text[at]) || (at >= start && at < end);
    if (alone) {
        start = line;
        end = line_end < size ? line_end + 1 : size;
        if (line_end == size && start > 0)
            start--; /* the last line, with no newline of its own: that of the line before */
    } else if (end < line_end && separates(text[end])) {
        while (end < line_end && separates(text[end]))
            end++;
    } else {
        while (start > line && separates(text[start - 1]))
            start--;
    }
    return (struct preload_name){start, end - start};
}

static bool find_ours(const char *text, size_t size, char *scratch, struct preload_name *name)
{
    struct preload_names names;

    copy_bytes(scratch, text, size);
    preload_names_begin(&names, scratch, size);
    while (preload_names_next(&names, name))
        if (preload_name_is_ours(text + name->start, name->length))
            return true;
    return false;
}

size_t preload_file_remove(char *text, size_t size, char *scratch)
{
    static char old[PRELOAD_FILE_MAX];
    struct preload_name name;

    while (find_ours(text, size, scratch, &name)) {
        struct preload_name cut = cut_of(text, size, name);

        copy_bytes(old, text, size);
        copy_bytes(text + cut.start, old + cut.start + cut.length, size - cut.start - cut.length);
        if (reads_the_same(text, size - cut.length, old, size, name, scratch)) {
            size -= cut.length;
            continue;
        }
        copy_bytes(text, old, size);
        for (size_t i = 0; i < name.length; i++)
            text[name.start + i] = ' ';
    }
    return size;
}

size_t preload_file_add(char *text, size_t size, const char *entry, char *scratch)
{
    static char old[PRELOAD_FILE_MAX];
    struct preload_name name;
    size_t length = text_length(entry), old_size, at;

    if (find_ours(text, size, scratch, &name)) {
        bool is_entry = length == name.length && same_bytes(text + name.start, entry, length) &&
                        !preload_name_in_comment(text, name);

        /* Whether it is the only one is seen when it is taken out of a copy. */
        copy_bytes(old, text, size);
        for (size_t i = 0; i < name.length; i++)
            old[name.start + i] = ' ';
        if (is_entry && !find_ours(old, size, scratch, &name))
            return size;
        size = preload_file_remove(text, size, scratch);
    }
    if (size + length + 1 >= PRELOAD_FILE_MAX)
        return PRELOAD_FILE_IMPOSSIBLE;
    copy_bytes(old, text, size);
    old_size = size;

    at = size > 0 && text[size - 1] != '\n' ? size + 1 : size;
    if (at > size)
        text[size] = '\n';
    copy_bytes(text + at, entry, length);
    size = at + length;
    if (at == old_size)
        text[size++] = '\n';
    name = (struct preload_name){at, length};
    if (reads_the_same(old, old_size, text, size, name, scratch))
        return size;

    copy_bytes(text, entry, length);
    text[length] = '\n';
    copy_bytes(text + length + 1, old, old_size);
    size = length + 1 + old_size;
    name.start = 0;
    if (reads_the_same(old, old_size, text, size, name, scratch))
        return size;
    return PRELOAD_FILE_IMPOSSIBLE;
}
