/* SPDX-License-Identifier: MIT */
/* seed.c: what is set, from which word, and what stays as the user has it. */
#include "../../src/seed.c"

#include "check.h"

static char told[200];

static void tell(const char *name)
{
    strcat(strcat(told, name), " ");
}

static void clear(void)
{
    told[0] = '\0';
    unsetenv("PYTHONHASHSEED");
    unsetenv("PERL_HASH_SEED");
    unsetenv("PERL_PERTURB_KEYS");
}

static void release(char **argv, char **given)
{
    for (char **word = argv; *word != NULL; word++) {
        bool ours = true;

        for (char **other = given; *other != NULL; other++)
            ours &= *word != *other;
        if (ours)
            free(*word);
    }
    free(argv);
}

static void test_values(void)
{
    static const uint64_t values[] = {0, 1, 0x7ffffffe, 0x7fffffff, 0xffffffff, UINT64_MAX};
    static char command[] = "true";
    char *argv[] = {command, NULL}, **result;

    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        struct group_secret secret = {{0}};
        unsigned long seed;

        clear();
        secret.words[GROUP_PYTHON] = values[i];
        secret.words[GROUP_PERL] = values[i];
        result = seed_set(&secret, argv, tell);
        CHECK(result != NULL && result != argv && result[0] == command && result[1] == NULL);
        seed = strtoul(getenv("PYTHONHASHSEED"), NULL, 10);
        CHECK(seed > 0 && seed <= 0x7fffffff);
        CHECK(strtoul(getenv("PERL_HASH_SEED"), NULL, 0) == seed);
        CHECK_TEXT(getenv("PERL_PERTURB_KEYS"), "0");
        CHECK_TEXT(told, "PYTHONHASHSEED PERL_PERTURB_KEYS PERL_HASH_SEED ");
        release(result, argv);
    }
}

static void test_own(const char *name, const char *value, const char *expected)
{
    static char command[] = "true";
    struct group_secret secret = {{0}};
    char *argv[] = {command, NULL};

    clear();
    setenv(name, value, 1);
    release(seed_set(&secret, argv, tell), argv);
    CHECK_TEXT(getenv(name), value);
    CHECK_TEXT(told, expected);
}

static void test_flags(const char *command, const char *argument, bool hash_seed)
{
    struct group_secret secret = {{0}};
    char name[64], word[64];
    char *argv[] = {name, word, NULL}, **result;
    size_t at = 1;

    snprintf(name, sizeof name, "%s", command);
    snprintf(word, sizeof word, "%s", argument);
    secret.words[GROUP_NODE] = 41;
    result = seed_set(&secret, argv, NULL);
    CHECK(result != NULL && result[0] == name);
    if (hash_seed)
        CHECK_TEXT(result[at++], "--hash-seed=42");
    CHECK(result[at] == word && result[at + 1] == NULL);
    release(result, argv);
}

int main(void)
{
    test_values();
    test_own("PYTHONHASHSEED", "random", "PERL_PERTURB_KEYS PERL_HASH_SEED ");
    test_own("PYTHONHASHSEED", "", "PERL_PERTURB_KEYS PERL_HASH_SEED ");
    test_own("PERL_HASH_SEED", "7", "PYTHONHASHSEED ");
    test_own("PERL_PERTURB_KEYS", "2", "PYTHONHASHSEED PERL_HASH_SEED ");
    clear();
    test_flags("node", "x.js", true);
    test_flags("/usr/bin/nodejs", "x.js", true);
    test_flags("./node", "--random-seed=1", true);
    test_flags("node", "--hash-seed=1", false);
    test_flags("anode", "x.js", false);
    test_flags("node/", "x.js", false);
    return check_status();
}
