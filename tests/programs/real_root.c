/* SPDX-License-Identifier: MIT */
/*
 * real_root, as /init of an initramfs: loads the modules of /modules in the order of their names, mounts
 * /dev/vda read-only, makes it the root and becomes the program that `init=` of the kernel's command line
 * names, else /sbin/init, with the arguments behind `--`.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel panics when its first program ends. */
static void die(const char *what)
{
    fprintf(stderr, "real_root: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void load_modules(void)
{
    struct dirent **names;
    int count = scandir(".", &names, NULL, alphasort);

    for (int i = 0; i < count; i++) {
        int file = open(names[i]->d_name, O_RDONLY | O_CLOEXEC);
        if (names[i]->d_name[0] != '.' && syscall(SYS_finit_module, file, "", 0) != 0)
            die(names[i]->d_name);
        close(file);
    }
}

static char *wanted_init(void)
{
    static char line[4096];
    char *word;
    FILE *file = fopen("/proc/cmdline", "r");

    if (!file || !fgets(line, sizeof line, file))
        die("/proc/cmdline");
    fclose(file);
    for (word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
        if (strncmp(word, "init=", 5) == 0)
            return word + 5;
    return "/sbin/init";
}

int main(int argc, char **argv)
{
    /* As Debian's own initramfs leaves them to the real root. */
    static const char *const kept[][2] = {{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}};
    char target[32];

    (void)argc;
    mkdir("/root", 0755);
    for (int i = 0; i < 3; i++) {
        mkdir(kept[i][1], 0755);
        if (mount(kept[i][0], kept[i][1], kept[i][0], 0, NULL) != 0)
            die(kept[i][1]);
    }
    if (chdir("/modules") != 0)
        die("/modules");
    load_modules();
    argv[0] = wanted_init();
    if (mount("/dev/vda", "/root", "ext4", MS_RDONLY, NULL) != 0)
        die("/dev/vda");
    for (int i = 0; i < 3; i++) {
        snprintf(target, sizeof target, "/root%s", kept[i][1]);
        if (mount(kept[i][1], target, NULL, MS_MOVE, NULL) != 0)
            die(target);
    }
    if (chdir("/root") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0)
        die("/root");
    execv(argv[0], argv);
    die(argv[0]);
}
