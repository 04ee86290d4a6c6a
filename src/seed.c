/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "seed.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/*
 * Not in the tables because they have no such knob: Ruby (seeds from getrandom, random.c), Lua 5.4 (from the
 * time and an address, lstate.c), Go (from AT_RANDOM, runtime/alg.go). PHP, Java, Guile and
 * Tcl hash strings without a seed.
 */
static const struct variable {
    const char *name, *format; /* of one uint32_t, never 0: to Python that means "no seed" */
    enum group_word word;
    const char *unless; /* the user has set this variable, or NAME itself */
} variables[] = {
    {"PYTHONHASHSEED", "%" PRIu32, GROUP_PYTHON, "PYTHONHASHSEED"}, /* CPython, Python/bootstrap_hash.c */
    {"PERL_PERTURB_KEYS", "0", GROUP_PERL, "PERL_HASH_SEED"},       /* perlrun(1), since 5.18 */
    {"PERL_HASH_SEED", "0x%08" PRIx32, GROUP_PERL, "PERL_HASH_SEED"},
};

static const struct flag {
    const char *runtime, *name, *format;
    enum group_word word;
} flags[] = {
    /* V8's; not allowed in NODE_OPTIONS (src/node_options.cc). Not --random-seed: it would save far more
     * (benchmarks/fleet), but all members would draw the same numbers from Math.random(). */
    {"node", "--hash-seed", "--hash-seed=%" PRIu32, GROUP_NODE},
    {"nodejs", "--hash-seed", "--hash-seed=%" PRIu32, GROUP_NODE},
};

enum { VARIABLES = sizeof variables / sizeof *variables, FLAGS = sizeof flags / sizeof *flags };

/* V8 takes a positive int. */
static uint32_t seed_of(const struct group_secret *secret, enum group_word word)
{
    return (uint32_t)(secret->words[word] % 0x7fffffff) + 1;
}

/* What we have set before is listed in the environment, as NAME=VALUE,...: it may be another group's. */
static const char recorded[] = "KSM_PRELOAD_SEEDS";

static bool is_users(const char *name)
{
    const char *value = getenv(name), *record = getenv(recorded);
    size_t name_length = strlen(name), length = value != NULL ? strlen(value) : 0;

    if (value == NULL)
        return false;
    while (record != NULL && *record != '\0') {
        size_t size = strcspn(record, ",");

        if (size == name_length + 1 + length && strncmp(record, name, name_length) == 0 &&
            record[name_length] == '=' && strncmp(record + name_length + 1, value, length) == 0)
            return false;
        record += size + (record[size] == ',');
    }
    return true;
}

static bool has_flag(char *const *argv, const char *name)
{
    size_t length = strlen(name);

    for (; *argv != NULL; argv++)
        if (strncmp(*argv, name, length) == 0)
            return true;
    return false;
}

/* The format is a column of the tables above. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
char **seed_set(const struct group_secret *secret, char **argv, void (*told)(const char *name))
{
    const char *slash = strrchr(argv[0], '/'), *runtime = slash != NULL ? slash + 1 : argv[0];
    size_t words = 0, added = 0, length = 0;
    char record[VARIABLES * 64];
    bool set[VARIABLES];
    char **longer;

    for (size_t i = 0; i < VARIABLES; i++)
        set[i] = !is_users(variables[i].unless) && !is_users(variables[i].name);
    for (size_t i = 0; i < VARIABLES; i++) {
        const struct variable *row = &variables[i];
        char text[32];

        if (!set[i])
            continue;
        snprintf(text, sizeof text, row->format, seed_of(secret, row->word));
        if (setenv(row->name, text, 1) != 0)
            return NULL;
        length += (size_t)snprintf(record + length, sizeof record - length, "%s%s=%s", length > 0 ? "," : "",
                                   row->name, text);
        if (told != NULL)
            told(row->name);
    }
    if (length > 0 && setenv(recorded, record, 1) != 0)
        return NULL;

    while (argv[words] != NULL)
        words++;
    longer = calloc(words + FLAGS + 1, sizeof *longer);
    if (longer == NULL)
        return NULL;
    longer[0] = argv[0];
    for (size_t i = 0; i < FLAGS; i++) {
        const struct flag *row = &flags[i];

        if (strcmp(row->runtime, runtime) != 0 || has_flag(argv, row->name))
            continue;
        if (asprintf(&longer[1 + added], row->format, seed_of(secret, row->word)) < 0)
            return NULL;
        if (told != NULL)
            told(row->name);
        added++;
    }
    memcpy(longer + 1 + added, argv + 1, words * sizeof *longer); /* and the NULL */
    return longer;
}
#pragma GCC diagnostic pop
