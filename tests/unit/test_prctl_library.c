/* SPDX-License-Identifier: MIT */
/*
 * ksm_preload_prctl.c: its constructor, called as a loader would and as one would not.
 *
 * Runs with KSM_PRELOAD=off (meson.build), so that this program itself starts without the flag.
 */
#define _GNU_SOURCE
#include "check.h"

#include "../../src/ksm_preload_prctl.c"

#include <errno.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SKIP = 77 };

/* Clearing a flag that is set visits each page of the address space, and of AddressSanitizer's there
 * are 20 TB: 6.18 takes many minutes. */
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
enum { FLAG_MAY_BE_SET_BEFORE = 0 };
#else
enum { FLAG_MAY_BE_SET_BEFORE = 1 };
#endif

static int flag(void)
{
    return prctl(KSM_PR_GET_MEMORY_MERGE, 0UL, 0UL, 0UL, 0UL);
}

/* Calls the constructor in a child whose flag is FLAG_BEFORE; its stderr goes to SAID, NUL-terminated. */
static int flag_after(int flag_before, int argc, char **argv, char **envp, char said[200])
{
    ssize_t length;
    int ends[2], status;
    pid_t child;

    if (pipe(ends) != 0 || (child = fork()) < 0)
        abort();
    if (child == 0) {
        dup2(ends[1], 2);
        prctl(KSM_PR_SET_MEMORY_MERGE, (unsigned long)flag_before, 0UL, 0UL, 0UL);
        errno = ENOTTY;
        opt_in(argc, argv, envp);
        _exit(errno == ENOTTY ? flag() : 99);
    }
    close(ends[1]);
    length = read(ends[0], said, 199);
    said[length > 0 ? length : 0] = '\0';
    close(ends[0]);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_environment(void)
{
    static char word[] = "word", home[] = "HOME=/";
    char *stack[] = {word, word, NULL, home, NULL};
    char *elsewhere[] = {home, NULL};

    CHECK(environment(2, stack, stack + 3) == stack + 3);
    CHECK(environment(0, stack + 2, stack + 3) == stack + 3);
    /* Not as a kernel lays them out: whatever the registers held. */
    CHECK(environment(2, stack, elsewhere) == __environ);
    CHECK(environment(1, stack, stack + 3) == __environ);
    CHECK(environment(-1, stack, stack) == __environ);
    CHECK(environment(0, NULL, NULL) == __environ);
    CHECK(environment(2, stack, NULL) == __environ);
}

static void test_constructor(void)
{
    static char word[] = "word", off[] = "KSM_PRELOAD=off", madvise[] = "KSM_PRELOAD=madvise";
    static char verbose[] = "KSM_PRELOAD_VERBOSE=1";
    char *plain[] = {word, NULL, word, NULL}, *loud[] = {word, NULL, verbose, NULL};
    char *left_out[] = {word, NULL, off, NULL}, *loudly_out[] = {word, NULL, off, verbose, NULL};
    char *other[] = {word, NULL, verbose, madvise, NULL};
    char said[200];

    for (int before = 0; before <= FLAG_MAY_BE_SET_BEFORE; before++) {
        CHECK(flag_after(before, 1, plain, plain + 2, said) == 1);
        CHECK_TEXT(said, "");
        CHECK(flag_after(before, 1, loud, loud + 2, said) == 1);
        CHECK_TEXT(said, "ksm_preload: opted in (prctl)\n");
        CHECK(flag_after(before, 1, left_out, left_out + 2, said) == 0);
        CHECK_TEXT(said, "");
        CHECK(flag_after(before, 1, loudly_out, loudly_out + 2, said) == 0);
        CHECK_TEXT(said, "ksm_preload: left out: KSM_PRELOAD=off\n");
        CHECK(flag_after(before, 1, other, other + 2, said) == 0);
        CHECK(strchr(said, '\n') == said + strlen(said) - 1);

        /* musl calls it without arguments; then the environment is that of the libc. */
        unsetenv("KSM_PRELOAD");
        CHECK(flag_after(before, 0, NULL, NULL, said) == 1);
        setenv("KSM_PRELOAD", "off", 1);
        CHECK(flag_after(before, 0, NULL, NULL, said) == 0);
        /* Not more: in 32 bits the sum would wrap. */
        CHECK(flag_after(before, 0x1fffffff, plain, plain, said) == 0);
    }
}

int main(void)
{
    const char *name = NULL;

    test_environment();
    if (flag() < 0 || is_privileged(&name) < 0) {
        fprintf(stderr, "no PR_GET_MEMORY_MERGE or PR_GET_AUXV here\n");
        return failed_checks == 0 ? SKIP : 1;
    }
    CHECK(is_privileged(&name) == 0);
    /* valgrind gives its program a vector of its own, and the kernel knows valgrind's. */
    if (getenv("LD_PRELOAD") == NULL)
        CHECK(name == (const char *)getauxval(AT_EXECFN));
    CHECK(name != NULL);
    CHECK(flag() == 0);
    test_constructor();
    return check_status();
}
