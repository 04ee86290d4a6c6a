/* SPDX-License-Identifier: MIT */
/*
 * place [WORD...]: prints where it lies in memory, what it was given beside that, and as `wrong ...` what of
 * the kernel's record and the stack does not fit together.  Other first words, where nothing else is
 * printed but what they say:
 *
 *   --spawn CMD [ARG...]  runs CMD as a child and returns its status
 *   --wait                says "ready" and waits
 *   --spin [NUMBER]       computes in spin_in_here(), for so long or without end
 *   --crash               ends by SIGABRT
 *   --deep                needs nearly all of its stack; --overflow: and more
 *   --heap MEGABYTES      extends the heap by so much and writes to all of it
 *   --threads NUMBER      so many at once, each with thread-local storage and a stack
 *
 * Compiled with -DBSS=BYTES or -DTLS=BYTES it has that much of it.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef BSS
#define BSS 100
#endif
#ifndef TLS
#define TLS 100
#endif

extern char **environ;
extern char _start[];
extern ElfW(Dyn) _DYNAMIC[] __attribute__((weak));

static int initialised = 1;
static char bss[BSS];
static __thread char tls[TLS];

static void wrong(const char *what)
{
    printf("wrong %s\n", what);
}

static size_t read_file(const char *path, void *data, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    ssize_t got;

    while (file >= 0 && length < size && (got = read(file, (char *)data + length, size - length)) > 0)
        length += (size_t)got;
    if (file >= 0)
        close(file);
    return length;
}

static const char *label_end; /* the end of the mapping that label() found */

/* The last column of the line of /proc/self/maps that holds ADDRESS. */
static const char *label(const void *address)
{
    static char line[5000];
    FILE *maps = fopen("/proc/self/maps", "re");
    const char *found = "nothing";

    while (maps != NULL && fgets(line, sizeof line, maps) != NULL) {
        unsigned long from, to;
        int name = 0;

        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, "%lx-%lx %*s %*s %*s %*s %n", &from, &to, &name) < 2 ||
            (uintptr_t)address < from || (uintptr_t)address >= to)
            continue;
        found = line + name;
        label_end = (const char *)to;
        break;
    }
    if (maps != NULL)
        fclose(maps);
    return found;
}

static int print_object(struct dl_phdr_info *info, size_t size, void *count)
{
    (void)size;
    if ((*(int *)count)++ == 0)
        printf("where program %#lx\n", (unsigned long)info->dlpi_addr);
    else if (strstr(info->dlpi_name, "/libc.") != NULL)
        printf("where libc %#lx\n", (unsigned long)info->dlpi_addr);
    return 0;
}

/* Fields of /proc/self/stat, by proc(5)'s numbers. */
static void read_stat(unsigned long field[53])
{
    char text[4096], *at;

    text[read_file("/proc/self/stat", text, sizeof text - 1)] = '\0';
    at = strrchr(text, ')') + 4;
    for (int i = 4; i < 53; i++)
        field[i] = strtoul(at, &at, 10);
}

static void check_strings(const char *path, char **strings, unsigned long start, unsigned long end)
{
    static char text[8 << 20];
    size_t size = read_file(path, text, sizeof text), at = 0;

    if (size != end - start)
        wrong("size of cmdline or environ");
    if (strings[0] != NULL && (uintptr_t)strings[0] != start)
        wrong("start of arguments or environment");
    for (; *strings != NULL; strings++) {
        size_t length = strlen(*strings) + 1;

        if (at + length > size || memcmp(*strings, text + at, length) != 0) {
            wrong("cmdline or environ");
            return;
        }
        at += length;
    }
    if (at != size)
        wrong("end of cmdline or environ");
}

static void check_auxv(void)
{
    static const unsigned long plain[] = {AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_FLAGS, AT_UID, AT_EUID, AT_GID,
                                          AT_EGID, AT_SECURE, AT_CLKTCK, AT_HWCAP, AT_HWCAP2};
    const ElfW(Phdr) *headers = (const ElfW(Phdr) *)getauxval(AT_PHDR);
    uintptr_t dynamic = 0, bias = UINTPTR_MAX;
    unsigned long kernels[2 * 64];
    ElfW(auxv_t) *given;
    char **end = environ;
    size_t size = read_file("/proc/self/auxv", kernels, sizeof kernels), entries = 0;

    while (*end != NULL)
        end++;
    given = (ElfW(auxv_t) *)(end + 1);
    while (given[entries].a_type != AT_NULL)
        printf("auxv_type %lu\n", (unsigned long)given[entries++].a_type);
    if (size < (entries + 1) * sizeof *given || memcmp(given, kernels, (entries + 1) * sizeof *given) != 0)
        wrong("/proc/self/auxv");
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        printf("auxv %lu %lu\n", plain[i], getauxval(plain[i]));
    printf("platform %s\n", (const char *)getauxval(AT_PLATFORM));
    printf("execfn %s\n", (const char *)getauxval(AT_EXECFN));
    if (getauxval(AT_ENTRY) != (uintptr_t)_start)
        wrong("AT_ENTRY");
    for (unsigned long i = 0; i < getauxval(AT_PHNUM); i++)
        if (headers[i].p_type == PT_DYNAMIC)
            dynamic = headers[i].p_vaddr;
        else if (headers[i].p_type == PT_PHDR)
            bias = (uintptr_t)headers - headers[i].p_vaddr;
    if (dynamic != 0 && bias != UINTPTR_MAX && bias + dynamic != (uintptr_t)_DYNAMIC)
        wrong("AT_PHDR");
    if (strcmp(label((void *)getauxval(AT_RANDOM)), "[stack]") != 0)
        wrong("AT_RANDOM");
    if (getauxval(AT_SYSINFO_EHDR) != 0 && memcmp((void *)getauxval(AT_SYSINFO_EHDR), ELFMAG, SELFMAG) != 0)
        wrong("AT_SYSINFO_EHDR");
}

static int keep_first(struct dl_phdr_info *info, size_t size, void *bias)
{
    (void)size;
    *(unsigned long *)bias = info->dlpi_addr;
    return 1;
}

static void check_record(const unsigned long field[53], char **argv)
{
    unsigned long code = (uintptr_t)&check_record, data = (uintptr_t)&initialised, bias = 0;

    dl_iterate_phdr(keep_first, &bias);
    printf("code %#lx %#lx\n", field[26] - bias, field[27] - bias);
    printf("data %#lx %#lx\n", field[45] - bias, field[46] - bias);
    if (code < field[26] || code >= field[27])
        wrong("start_code, end_code");
    if (field[28] != (uintptr_t)(argv - 1) || field[28] % 16 != 0)
        wrong("start_stack");
    if (data < field[45] || data >= field[46])
        wrong("start_data, end_data");
    if (field[48] > field[49] || field[49] > field[50] || field[50] > field[51])
        wrong("arg_start to env_end");
}

/* sbrk(), which musl has not. */
static char *extend(size_t size)
{
    char *end = (char *)syscall(SYS_brk, 0UL);

    return (char *)syscall(SYS_brk, end + size) == end + size ? end : NULL;
}

static void check_labels(void)
{
    const char *execfn = (const char *)getauxval(AT_EXECFN);
    char path[4096] = "", *end;
    int local = 0;

    if (readlink("/proc/self/exe", path, sizeof path - 1) < 0)
        wrong("exe");
    if (strcmp(label((const void *)(uintptr_t)&check_labels), path) != 0)
        wrong("mapping of the program");
    if (strcmp(label(execfn), "[stack]") != 0 || strcmp(label(&local), "[stack]") != 0)
        wrong("[stack]");
    else
        for (execfn += strlen(execfn); execfn < label_end; execfn++)
            if (*execfn != '\0') {
                wrong("end of the stack");
                break;
            }
    bss[BSS - 1] = bss[BSS / 2] = 1;
    end = extend(1 << 16);
    memset(end, 1, 1 << 16);
    if (strcmp(label(end + (1 << 16) - 1), "[heap]") != 0)
        wrong("[heap]");
}

static void print_limits(void)
{
    struct rlimit limit;

    for (unsigned i = 0; i < 16; i++)
        if (getrlimit(i, &limit) == 0)
            printf("limit %u %lld %lld\n", i, (long long)limit.rlim_cur, (long long)limit.rlim_max);
}

/* What a helper may have left behind. */
static void check_alone(void)
{
    char children[200], status[4096], *tracer;
    sigset_t pending;
    int subreaper = 0;
    siginfo_t info;

    children[read_file("/proc/thread-self/children", children, sizeof children - 1)] = '\0';
    printf("children %s\n", children);
    errno = 0;
    printf("wait %d", waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT | __WALL));
    printf(" %d\n", errno);
    status[read_file("/proc/self/status", status, sizeof status - 1)] = '\0';
    tracer = strstr(status, "TracerPid:");
    printf("tracer %d\n", tracer != NULL ? atoi(tracer + 10) : -1);
    printf("subreaper %d\n", prctl(PR_GET_CHILD_SUBREAPER, &subreaper, 0UL, 0UL, 0UL) == 0 ? subreaper : -1);
    sigpending(&pending);
    for (int number = 1; number < 65; number++)
        if (sigismember(&pending, number) == 1)
            printf("pending %d\n", number);
}

static void check_stack(void)
{
    pthread_attr_t attributes;
    void *start;
    size_t size;
    int local = 0;

    if (pthread_getattr_np(pthread_self(), &attributes) != 0 ||
        pthread_attr_getstack(&attributes, &start, &size) != 0 || (char *)&local < (char *)start ||
        (char *)&local >= (char *)start + size)
        wrong("pthread_getattr_np");
    else
        printf("stack_size %zu\n", (size + (1 << 16)) >> 18);
    pthread_attr_destroy(&attributes);
    pthread_attr_init(&attributes);
    pthread_attr_getstacksize(&attributes, &size);
    printf("thread_stack_size %zu\n", size);
    pthread_attr_destroy(&attributes);
}

static void print_all(char **argv)
{
    unsigned long field[53];
    int count = 0;

    read_stat(field);
    dl_iterate_phdr(print_object, &count);
    printf("where loader %#lx\n", getauxval(AT_BASE));
    printf("where vdso %#lx\n", getauxval(AT_SYSINFO_EHDR));
    printf("where heap %#lx\n", field[47]);
    printf("where stack %#lx\n", field[51]); /* its end; where it begins depends on the environment */
    printf("personality %#x\n", personality(0xffffffff));
    print_limits();
    check_alone();
    check_record(field, argv);
    check_strings("/proc/self/cmdline", argv, field[48], field[49]);
    check_strings("/proc/self/environ", environ, field[50], field[51]);
    check_auxv();
    check_labels();
    check_stack();
}

static int spawn(char **argv)
{
    int status = 0;
    pid_t child;

    if (posix_spawnp(&child, argv[0], NULL, NULL, argv, environ) != 0 || waitpid(child, &status, 0) != child)
        return 99;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

__attribute__((noinline)) static void wait_in_here(void)
{
    puts("ready");
    fflush(stdout);
    for (;;)
        pause();
}

__attribute__((noinline)) static void crash_in_here(void)
{
    abort();
}

__attribute__((noinline)) static void spin_in_here(volatile unsigned long *counter, const char *number)
{
    unsigned long count = number != NULL ? strtoul(number, NULL, 10) : ULONG_MAX;

    puts("ready");
    fflush(stdout);
    while (count-- > 0)
        ++*counter;
}

/* To be seen in a backtrace and a core. */
static volatile unsigned long a_variable = 0x12345678;

static size_t dive(size_t bytes)
{
    volatile char frame[4096];

    frame[0] = frame[4095] = 1;
    return bytes <= sizeof frame ? (size_t)frame[0] : dive(bytes - sizeof frame) + (size_t)frame[4095];
}

static int grow(size_t size)
{
    char *start = extend(0);

    for (size_t grown = 0; grown < size; grown += 1 << 20)
        if (extend(1 << 20) != start + grown)
            return 1;
    for (size_t at = 0; at < size; at += 4096)
        start[at] = 1;
    printf("heap %s\n", label(start + size - 1));
    return 0;
}

static pthread_barrier_t together;

static void *use_tls(void *number)
{
    char on_stack[10000];

    memset(on_stack, 1, sizeof on_stack);
    tls[0] = tls[TLS - 1] = (char)(uintptr_t)number;
    pthread_barrier_wait(&together);
    return tls[TLS - 1] == (char)(uintptr_t)number && on_stack[5000] == 1 ? number : NULL;
}

static int start_threads(unsigned count)
{
    pthread_t *threads = calloc(count, sizeof *threads);
    void *result;

    pthread_barrier_init(&together, NULL, count);
    for (uintptr_t i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, use_tls, (void *)(i + 1)) != 0)
            return 1;
    for (uintptr_t i = 0; i < count; i++)
        if (pthread_join(threads[i], &result) != 0 || result != (void *)(i + 1))
            return 2;
    printf("threads %u\n", count);
    free(threads);
    return 0;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    int status = 0;

    tls[TLS - 1] = 1;
    if (strcmp(mode, "--spawn") == 0)
        return spawn(argv + 2);
    if (strcmp(mode, "--wait") == 0)
        wait_in_here();
    else if (strcmp(mode, "--spin") == 0)
        spin_in_here(&a_variable, argv[2]);
    else if (strcmp(mode, "--crash") == 0)
        crash_in_here();
    else if (strcmp(mode, "--deep") == 0)
        printf("deep %d\n", dive(7 << 20) > 0);
    else if (strcmp(mode, "--overflow") == 0)
        printf("deep %d\n", dive(SIZE_MAX) > 0);
    else if (strcmp(mode, "--heap") == 0)
        status = grow((size_t)atoi(argv[2]) << 20);
    else if (strcmp(mode, "--threads") == 0)
        status = start_threads((unsigned)atoi(argv[2]));
    else
        print_all(argv);
    return fflush(stdout) == 0 ? status : 1;
}
