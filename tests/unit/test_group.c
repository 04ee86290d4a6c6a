/* SPDX-License-Identifier: MIT */
/* group.c: names, and a secret that is drawn and read. */
#include "../../src/group.c"

#include "check.h"

static void test_names(void)
{
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    char name[70] = "";

    for (int byte = 1; byte < 256; byte++) {
        char first[] = {(char)byte, '\0'}, second[] = {'a', (char)byte, '\0'};

        CHECK(group_name_is_valid(first) == (strchr(allowed, byte) != NULL));
        CHECK(group_name_is_valid(second) == (strchr(allowed, byte) != NULL || strchr("._@+-", byte) != NULL));
    }
    CHECK(!group_name_is_valid(""));
    memset(name, 'a', 64);
    CHECK(group_name_is_valid(name));
    name[64] = 'a';
    CHECK(!group_name_is_valid(name));
}

static void test_secret(int folder, const char *path)
{
    struct group_secret first, second;
    struct stat info;
    int file;

    CHECK(draw(folder, path, "g") == NULL);
    file = openat(folder, "g", O_RDONLY | O_CLOEXEC);
    CHECK(read(file, &second, sizeof second) == sizeof second);
    close(file);
    CHECK(draw(folder, path, "g") == NULL); /* another process was quicker: its secret stays */
    CHECK(fstatat(folder, "g", &info, 0) == 0 && info.st_size == sizeof first && info.st_nlink == 1);
    CHECK((info.st_mode & 07777) == 0600);
    CHECK(draw(folder, path, "h") == NULL);
    file = openat(folder, "g", O_RDONLY | O_CLOEXEC);
    CHECK(read(file, &first, sizeof first) == sizeof first);
    CHECK(memcmp(&first, &second, sizeof first) == 0);
    close(file);
    file = openat(folder, "h", O_RDONLY | O_CLOEXEC);
    CHECK(read(file, &second, sizeof second) == sizeof second);
    close(file);
    for (int i = 0; i < GROUP_WORDS; i++)
        CHECK(first.words[i] != second.words[i] && first.words[i] != 0);
    CHECK(draw(folder, path, "no/such") != NULL && strstr(reason, "no/such: No such file") != NULL);
    unlinkat(folder, "g", 0);
    unlinkat(folder, "h", 0);
}

static void test_enter(int folder)
{
    int inner;

    CHECK((inner = enter(folder, "inner", 0700, true)) >= 0);
    close(inner);
    CHECK((inner = enter(folder, "inner", 0755, true)) >= 0);
    close(inner);
    CHECK(fchmodat(folder, "inner", 0755, 0) == 0);
    CHECK((inner = enter(folder, "inner", 0755, true)) >= 0);
    close(inner);
    CHECK(enter(folder, "inner", 0700, true) < 0 && errno == EPERM);
    CHECK(symlinkat("inner", folder, "link") == 0 && enter(folder, "link", 0755, true) < 0);
    unlinkat(folder, "link", 0);
    unlinkat(folder, "inner", AT_REMOVEDIR);
}

int main(void)
{
    char path[] = "/tmp/ksm-preload-unit-XXXXXX";
    int folder;

    test_names();
    CHECK(mkdtemp(path) != NULL);
    folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    umask(0777);
    test_secret(folder, path);
    test_enter(folder);
    close(folder);
    CHECK(rmdir(path) == 0); /* nothing unfinished is left */
    return check_status();
}
