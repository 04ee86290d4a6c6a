/* SPDX-License-Identifier: MIT */
/* preload_list.c: every composition, with and without memory. */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static int allocations_left = INT_MAX;

static void *counted_malloc(size_t size)
{
    return allocations_left-- > 0 ? malloc(size) : NULL;
}

#define malloc counted_malloc
#include "../../src/preload_list.c"
#undef malloc

#define NAME "libksm_preload_prctl.so"
#define OURS "ours/" NAME /* in a folder made for the test, with a copy in here/ and none in gone/ */

static void compose(const char *given, const char *expected)
{
    char *list = preload_list_with(given, OURS), *again;

    CHECK_TEXT(list, expected);
    again = preload_list_with(list, OURS);
    CHECK_TEXT(again, expected);
    free(again);
    free(list);
}

static void test_table(void)
{
    compose(NULL, OURS);
    compose("", OURS);
    compose(" : :: ", OURS);
    compose("/a.so", "/a.so:" OURS);
    compose(":/a.so:: b.so  /c.so: ", "/a.so:b.so:/c.so:" OURS);
    compose("/a.so:/a.so", "/a.so:/a.so:" OURS);
    compose("/a\tb.so\n", "/a\tb.so\n:" OURS);
    compose("/usr/$LIB/a.so:${ORIGIN}/b.so", "/usr/$LIB/a.so:${ORIGIN}/b.so:" OURS);
    /* The loader's to find: a bare name, a variable. */
    compose(NAME " /a.so", NAME ":/a.so");
    compose("/usr/$LIB/" NAME ":/a.so", "/usr/$LIB/" NAME ":/a.so");
    compose("/a.so:" NAME ":/b.so:$ORIGIN/" NAME, "/a.so:" NAME ":/b.so");
    compose("/a.so " OURS ":/b.so", "/a.so:" OURS ":/b.so");
    compose("./" OURS ":/a.so:" OURS, "./" OURS ":/a.so");
    compose("/a.so:here/" NAME " /b.so:" OURS, "/a.so:here/" NAME ":/b.so");
    /* Not ours: other names, and a path where nothing is. */
    compose(NAME ".1:x" NAME ":/x/" NAME "/y", NAME ".1:x" NAME ":/x/" NAME "/y:" OURS);
    compose("libksm_preload.so", "libksm_preload.so:" OURS);
    compose("gone/" NAME ":/a.so", "gone/" NAME ":/a.so:" OURS);
    compose("gone/" NAME ":" OURS ":/a.so", "gone/" NAME ":" OURS ":/a.so");
    compose(NAME "/", NAME "/:" OURS);
}

/* Longer than any buffer one might think of, and each byte that can be in an entry. */
static void test_long(void)
{
    enum { LENGTH = 300000 };
    static char given[LENGTH + 1], expected[LENGTH + sizeof ":" OURS];

    for (size_t i = 0; i < LENGTH; i++) {
        unsigned char byte = (unsigned char)(i % 251 + 1);

        given[i] = byte == ' ' || byte == ':' ? 'x' : (char)byte;
    }
    strcat(strcpy(expected, given), ":" OURS);
    compose(given, expected);
}

static void test_no_memory(void)
{
    for (int left = 0; left < 2; left++) {
        allocations_left = left;
        CHECK(preload_list_with("/a.so", OURS) == NULL);
    }
    allocations_left = INT_MAX;
}

static void test_can_hold(void)
{
    CHECK(preload_list_can_hold("/usr/lib/libksm_preload.so"));
    CHECK(preload_list_can_hold("/a-b+c,d@e~f%g=h#\303\244/x"));
    for (const char *bad = " :\t\n\v\f\r$"; *bad != '\0'; bad++) {
        char path[] = {'/', 'a', *bad, 'b', '\0'}, last[] = {'/', *bad, '\0'};

        CHECK(!preload_list_can_hold(path));
        CHECK(!preload_list_can_hold(last));
    }
}

static void make_copy(const char *folder, const char *path)
{
    int file;

    CHECK(mkdir(folder, 0755) == 0);
    file = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    CHECK(file >= 0);
    close(file);
}

int main(void)
{
    char folder[] = "/tmp/ksm-preload-unit-XXXXXX";

    CHECK(mkdtemp(folder) != NULL && chdir(folder) == 0);
    make_copy("ours", OURS);
    make_copy("here", "here/" NAME);
    test_table();
    test_long();
    unlink(OURS);
    unlink("here/" NAME);
    rmdir("ours");
    rmdir("here");
    rmdir(folder);

    test_no_memory();
    test_can_hold();
    return check_status();
}
