/* SPDX-License-Identifier: MIT */
/* ksm_wrapper.c: what no run of it from outside shows. */
#define main wrapper_main
int wrapper_main(int argc, char **argv);
#include "../../src/ksm_wrapper.c"
#undef main

#include "check.h"

#include <sys/wait.h>

/* Any path of the cache, or NULL where there is no cache (musl, a minimal container). */
static const char *some_path_of_the_cache(char path[PATH_MAX])
{
    FILE *pipe = popen("/sbin/ldconfig -p 2>/dev/null", "re");
    char line[PATH_MAX + 200], *arrow = NULL;

    while (pipe != NULL && arrow == NULL && fgets(line, sizeof line, pipe) != NULL)
        arrow = strstr(line, "=> /");
    if (arrow != NULL)
        snprintf(path, PATH_MAX, "%.*s", (int)strcspn(arrow + 3, "\n"), arrow + 3);
    if (pipe != NULL)
        pclose(pipe);
    return arrow != NULL ? path : NULL;
}

static void test_loader_cache(void)
{
    char path[PATH_MAX], name[PATH_MAX];

    CHECK(!in_loader_cache("libno-such-thing.so", "/proc/self/exe"));
    if (some_path_of_the_cache(path) == NULL)
        return;
    snprintf(name, sizeof name, "%s", strrchr(path, '/') + 1);
    CHECK(in_loader_cache(name, path));
    /* Another file, or none, of a name that the cache has. */
    CHECK(!in_loader_cache(name, "/proc/self/exe"));
    CHECK(!in_loader_cache(name, "/no/such/file"));
    CHECK(!in_loader_cache(name, ""));
    /* The file, by a name that the cache does not have: the end, the start or more of one. */
    CHECK(!in_loader_cache(name + 1, path));
    CHECK(!in_loader_cache("", path));
    CHECK(!in_loader_cache(path, path));
    name[strlen(name) - 1] = '\0';
    CHECK(!in_loader_cache(name, path));
}

static void test_own_directory(void)
{
    char directory[PATH_MAX], self[2 * PATH_MAX];

    own_directory(directory);
    CHECK(directory[0] == '/');
    snprintf(self, sizeof self, "%s/%s", directory, program_invocation_short_name);
    CHECK(access(self, X_OK) == 0);
}

/* A library beside the program is found as such, and one that is nowhere ends it with status 1. */
static void test_library_entry(void)
{
    char path[PATH_MAX];
    int status = 0;
    pid_t child;

    CHECK_TEXT(library_entry(program_invocation_short_name, path), path);
    CHECK(access(path, R_OK) == 0);

    fflush(NULL);
    child = fork();
    if (child == 0) {
        fclose(stderr);
        library_entry("libno-such-thing.so", path);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == FAILED);
}

int main(void)
{
    test_loader_cache();
    test_own_directory();
    test_library_entry();
    return check_status();
}
