/* SPDX-License-Identifier: MIT */
/* target.c: which programs can have a layout, through PATH and interpreters. */
#include "../../src/target.c"

#include "check.h"

static void write_file(const char *name, const void *content, size_t size, mode_t mode)
{
    int file = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    CHECK(file >= 0 && write(file, content, size) == (ssize_t)size && fchmod(file, mode) == 0);
    close(file);
}

static void write_script(const char *name, const char *text)
{
    write_file(name, text, strlen(text), 0755);
}

/* A program with one program header, of that type. */
static void write_program(const char *name, unsigned char class, unsigned short machine, unsigned short type,
                          unsigned header, mode_t mode)
{
    struct {
        Elf64_Ehdr elf;
        Elf64_Phdr part;
    } file = {.elf = {.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, class},
                      .e_type = type,
                      .e_machine = machine,
                      .e_phoff = sizeof file.elf,
                      .e_phentsize = sizeof file.part,
                      .e_phnum = 1},
              .part = {.p_type = header}};

    write_file(name, &file, sizeof file, mode);
}

static void test_programs(void)
{
    static const char set_id[] = "it is set-uid or set-gid", other[] = "it is of another architecture";
    static const char fixed[] = "it is static and not position-independent";

    write_program("pie", ELFCLASS64, OUR_MACHINE, ET_DYN, PT_INTERP, 0755);
    write_program("static-pie", ELFCLASS64, OUR_MACHINE, ET_DYN, PT_LOAD, 0755);
    write_program("no-pie", ELFCLASS64, OUR_MACHINE, ET_EXEC, PT_INTERP, 0755);
    write_program("static", ELFCLASS64, OUR_MACHINE, ET_EXEC, PT_LOAD, 0755);
    write_program("x32", ELFCLASS32, OUR_MACHINE, ET_DYN, PT_INTERP, 0755);
    write_program("i386", ELFCLASS32, EM_386, ET_DYN, PT_INTERP, 0755);
    write_program("riscv", ELFCLASS64, EM_RISCV, ET_DYN, PT_INTERP, 0755);
    write_program("set-uid", ELFCLASS64, OUR_MACHINE, ET_DYN, PT_INTERP, 04755);
    write_program("set-gid", ELFCLASS64, OUR_MACHINE, ET_DYN, PT_INTERP, 02755);

    CHECK(target_obstacle("./pie") == NULL);
    CHECK(target_obstacle("./static-pie") == NULL);
    CHECK(target_obstacle("./no-pie") == NULL);
    CHECK_TEXT(target_obstacle("./static"), fixed);
    CHECK_TEXT(target_obstacle("./x32"), other);
    CHECK_TEXT(target_obstacle("./i386"), other);
    CHECK_TEXT(target_obstacle("./riscv"), other);
    CHECK_TEXT(target_obstacle("./set-uid"), set_id);
    CHECK_TEXT(target_obstacle("./set-gid"), set_id);

    /* Through scripts, as the kernel reads their first line. */
    write_script("script", "#!./static\n");
    CHECK_TEXT(target_obstacle("./script"), fixed);
    write_script("script", "#! \t ./static -x\n");
    CHECK_TEXT(target_obstacle("./script"), fixed);
    write_script("script", "#!./static");
    CHECK_TEXT(target_obstacle("./script"), fixed);
    write_script("script", "#!./pie ./static\n");
    CHECK(target_obstacle("./script") == NULL);
    write_script("outer", "#!./script\n");
    write_script("script", "#!./static\n");
    CHECK_TEXT(target_obstacle("./outer"), fixed);
    write_script("circle", "#!./circle\n");
    CHECK(target_obstacle("./circle") == NULL);
    /* The bits of a script do nothing. */
    CHECK(chmod("outer", 04755) == 0);
    write_script("script", "#!./pie\n");
    CHECK(target_obstacle("./outer") == NULL);
}

/* What exec will complain of, or hand to a shell. */
static void test_others(void)
{
    static char long_name[PATH_MAX + 100];

    memset(long_name, 'x', sizeof long_name - 1);
    write_script("shell", "echo x\n");
    write_script("empty", "");
    write_script("nameless", "#!\n");
    write_script("blank", "#!  \n");
    write_script("gone", "#!./no-such\n");
    write_file("cut", ELFMAG, SELFMAG, 0755);
    CHECK(target_obstacle("./shell") == NULL);
    CHECK(target_obstacle("./empty") == NULL);
    CHECK(target_obstacle("./nameless") == NULL);
    CHECK(target_obstacle("./blank") == NULL);
    CHECK(target_obstacle("./gone") == NULL);
    CHECK(target_obstacle("./no-such") == NULL);
    CHECK(target_obstacle("./") == NULL);
    CHECK(target_obstacle("") == NULL);
    CHECK(target_obstacle("no-such-command-anywhere") == NULL);
    CHECK(target_obstacle(long_name) == NULL);
    CHECK_TEXT(target_obstacle("./cut"), "it is of another architecture");
}

static void test_path(void)
{
    static const char fixed[] = "it is static and not position-independent";
    char path[PATH_MAX];

    CHECK(mkdir("one", 0755) == 0 && mkdir("two", 0755) == 0 && mkdir("one/command", 0755) == 0);
    write_program("two/command", ELFCLASS64, OUR_MACHINE, ET_EXEC, PT_LOAD, 0755);
    setenv("PATH", "/no-such:one:two", 1);
    CHECK_TEXT(target_obstacle("command"), fixed);
    CHECK(find("command", path));
    CHECK_TEXT(path, "two/command");
    setenv("PATH", "one", 1);
    CHECK(!find("command", path));
    /* An empty part is this folder. */
    setenv("PATH", "one:", 1);
    CHECK_TEXT(target_obstacle("static"), fixed);
    setenv("PATH", "", 1);
    CHECK_TEXT(target_obstacle("static"), fixed);
    unsetenv("PATH");
    CHECK(find("sh", path));
    CHECK_TEXT(path, "/bin/sh");

    setenv("PATH", "two", 1);
    write_file("plain", "x", 1, 0644);
    CHECK(target_is_executable("command") && target_is_executable("./static"));
    CHECK(!target_is_executable("./plain") && !target_is_executable("./one"));
    CHECK(!target_is_executable("./no-such") && !target_is_executable("no-such"));
    CHECK(!target_is_executable(""));
}

static void clear(void)
{
    static const char *const names[] = {
        "pie", "static-pie", "no-pie", "static", "x32", "i386", "riscv", "set-uid", "set-gid", "script", "outer",
        "circle", "shell", "empty", "nameless", "blank", "gone", "cut", "plain", "two/command",
    };
    static const char *const folders[] = {"one/command", "one", "two"};

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unlink(names[i]);
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        rmdir(folders[i]);
}

int main(void)
{
    char folder[] = "/tmp/ksm-preload-unit-XXXXXX";

    CHECK(mkdtemp(folder) != NULL && chdir(folder) == 0);
    if (OUR_MACHINE != EM_NONE) {
        test_programs();
        test_others();
        test_path();
    }
    clear();
    CHECK(rmdir(folder) == 0);
    return check_status();
}
