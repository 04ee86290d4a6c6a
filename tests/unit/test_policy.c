/* SPDX-License-Identifier: MIT */
/* policy.h: what cannot be seen from outside.  The rules have their table in tests/test_policy.py. */
#define _GNU_SOURCE
#include "check.h"

#include "policy.h"

#include <stdlib.h>
#include <unistd.h>

/* The verdict on `path` by `text`, fed in pieces of `piece` bytes. */
static bool denied(const char *text, size_t length, const char *path, size_t piece)
{
    struct policy policy;

    policy_begin(&policy, path, strlen(path), true);
    for (size_t at = 0; at < length; at += piece)
        if (policy_read(&policy, text + at, at + piece < length ? piece : length - at))
            break;
    policy_end(&policy);
    return policy_denies(&policy);
}

static void test_pieces(void)
{
    static const char text[] = "# a list\n\ndeny \tone\r\n  allow /usr/*two \ndefault deny\nallow three";
    static const char *const in[] = {"/bin/three", "/usr/two", "/usr/bin/xtwo"};
    static const char *const out[] = {"/usr/bin/one", "/two", "/bin/thre", "/bin/threee", "three/x"};

    for (size_t piece = 1; piece <= sizeof text; piece++) {
        for (size_t i = 0; i < sizeof in / sizeof *in; i++)
            CHECK(!denied(text, sizeof text - 1, in[i], piece));
        for (size_t i = 0; i < sizeof out / sizeof *out; i++)
            CHECK(denied(text, sizeof text - 1, out[i], piece));
    }
}

static void test_longest_line(void)
{
    char text[1024];

    for (size_t blanks = 500; blanks < 520; blanks++) {
        size_t length = (size_t)snprintf(text, sizeof text, "deny a%*s\n", (int)blanks, "");
        bool fits = length - 1 <= 511;

        CHECK(denied(text, length, "/bin/a", length) == fits);
        CHECK(denied(text, length, "/bin/a", 7) == fits);
        CHECK(denied(text, length - 1, "/bin/a", length) == fits); /* without its newline */
    }
}

static void test_sources_are_texts_of_their_own(void)
{
    struct policy policy;

    policy_begin(&policy, "/bin/ab", 7, true);
    CHECK(!policy_read(&policy, "deny a", 6));
    CHECK(!policy_end(&policy));
    CHECK(!policy_read(&policy, "b\n", 2));
    CHECK(!policy_end(&policy));
    CHECK(!policy_denies(&policy));
    policy_read(&policy, "default deny", 12);
    policy_end(&policy);
    policy_read(&policy, "default allow\n", 14);
    CHECK(policy_denies(&policy));
}

static void test_names(void)
{
    CHECK(policy_drop_in("a.conf") == 6);
    CHECK(policy_drop_in(".conf") == 0);
    CHECK(policy_drop_in(".a.conf") == 0);
    CHECK(policy_drop_in("a.conf~") == 0);
    CHECK(policy_drop_in("conf") == 0);
    CHECK(policy_drop_in("") == 0);
    CHECK(policy_compare("a", "b") < 0 && policy_compare("b", "a") > 0);
    CHECK(policy_compare("a", "aa") < 0 && policy_compare("", "a") < 0);
    CHECK(policy_compare("a", "a") == 0);
    CHECK(policy_compare("z", "\xc3\xa4") < 0); /* bytes have no sign */
}

static void test_defaults(void)
{
    static const char *const out[] = {"/usr/bin/sudo", "/usr/bin/ssh", "/usr/bin/ssh (deleted)",
                                      "/lib/x/ld-linux-x86-64.so.2", "/opt/x/Proton Pass",
                                      "/usr/bin/perf_6.1", "/usr/lib/systemd/systemd-executor"};
    static const char *const in[] = {"/usr/bin/python3.11", "/usr/bin/node", "/usr/bin/stepmania",
                                     "/usr/bin/auth", "/usr/bin/agetty2", "/usr/games/chromium-bsu"};
    size_t length = sizeof policy_defaults - 1;

    for (size_t i = 0; i < sizeof out / sizeof *out; i++)
        CHECK(denied(policy_defaults, length, out[i], length));
    for (size_t i = 0; i < sizeof in / sizeof *in; i++)
        CHECK(!denied(policy_defaults, length, in[i], length));
    CHECK(strchr(policy_defaults, '#') == NULL);
}

/* As a kernel lays them out: the texts of argv and envp, and above them, not far away, the name. */
static size_t quick_name(const char *name, long distance, int place)
{
    static char area[8 * 1024 * 1024];
    char *texts = area + 4096, *envp[] = {texts - 8, NULL}, *argv[13], *copy = strcpy(texts + distance, name);

    strcpy(area + 4096 - 8, "word");
    for (int i = 0; i < 13; i++)
        argv[i] = i == 12 ? NULL : i > 0 && i == place ? copy : area + 4096 - 8;
    return policy_quick_name(copy, argv, envp);
}

static void test_quick_name(void)
{
    char link[] = "/tmp/ksm-preload-link-XXXXXX", name[] = "/bin/true", *none[] = {NULL};

    CHECK(policy_quick_name(NULL, none, none) == 0);
    CHECK(policy_quick_name(name, NULL, none) == 0);
    CHECK(policy_quick_name(name, none, none) == 0);
    CHECK(quick_name(name, 100, 0) == sizeof name - 1);
    CHECK(quick_name("bin/true", 100, 0) == 0);
    for (int i = 1; i <= 10; i++)
        CHECK(quick_name(name, 100, i) == 0); /* a script's */
    CHECK(quick_name(name, 100, 11) == sizeof name - 1);
    CHECK(quick_name(name, 5 * 1024 * 1024, 0) == sizeof name - 1);
    CHECK(quick_name(name, 7 * 1024 * 1024, 0) == 0);
    CHECK(quick_name(name, -100, 0) == 0); /* below them */

    close(mkstemp(link));
    CHECK(quick_name(link, 100, 0) == sizeof link - 1);
    unlink(link);
    CHECK(quick_name(link, 100, 0) == 0);
    CHECK(symlink("/bin/true", link) == 0);
    CHECK(quick_name(link, 100, 0) == 0);
    unlink(link);
}

static void test_what_is_not_there(void)
{
    static const int absent[] = {ENOENT, ENOTDIR, ELOOP, ENXIO, ENODEV};
    static const int unknown[] = {EACCES, EPERM, ENOMEM, EMFILE, ENFILE, EINTR, EIO, ENOSYS};

    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++)
        CHECK(policy_is_absent(-absent[i]));
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        CHECK(!policy_is_absent(-unknown[i]));
}

static void test_reasons(void)
{
    CHECK_TEXT(policy_reason(POLICY_LETS_IN), "");
    for (enum policy_answer answer = POLICY_LEAVES_OUT; answer <= POLICY_NO_NAME; answer++)
        CHECK(strncmp(policy_reason(answer), "ksm_preload: left out: ", 23) == 0);
}

int main(void)
{
    test_pieces();
    test_longest_line();
    test_sources_are_texts_of_their_own();
    test_names();
    test_defaults();
    test_quick_name();
    test_what_is_not_there();
    test_reasons();
    return check_status();
}
