/* SPDX-License-Identifier: MIT */
/*
 * How it is done, and why so (kernel sources as of 6.18):
 *
 *   mappings  mmap_base() puts them RLIMIT_STACK below the top of memory (mm/util.c, arch/x86/mm/mmap.c),
 *             and with ADDR_NO_RANDOMIZE exactly there: so a soft limit out of the secret chooses the
 *             place. Both are put back before the program runs.
 *   program   mremap() of each of its mappings, before anything has looked at an address.
 *   stack     mremap() too, and the pointers in it: argv, environ, the auxiliary vector.
 *   heap      PR_SET_MM_MAP, which needs no privilege, with the rest of the kernel's record: /proc,
 *             gdb and core dumps find everything where it is.
 *
 * The system calls are made by the program itself, at the vdso's `syscall` instruction. The helper is
 * nobody's child but init's, blocks all signals, and if it dies takes the program along
 * (PTRACE_O_EXITKILL): there is no half-moved process.
 */
#define _GNU_SOURCE
#include "image.h"

#if defined(__x86_64__) || defined(__aarch64__)

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KSM_PR_GET_MDWE = 66 }; /* include/uapi/linux/prctl.h, since 6.3 */

/* --- what the kernel has made of the program --- */

/* Fields 26 to 28 and 45 to 51 (proc_pid_stat(5)), as PR_SET_MM_MAP wants them. */
static bool read_record(struct tracee *t)
{
    FILE *file = tracee_open(t, "stat");
    char text[2048];
    unsigned long long field[53] = {0};
    size_t size;
    char *at;

    if (file == NULL)
        return false;
    size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = '\0';
    at = strrchr(text, ')'); /* the end of field 2, which may hold anything */
    if (at == NULL)
        return false;
    at += 4; /* ") S ": field 3 is the only other one that is no number */
    for (int i = 4; i < 53; i++)
        field[i] = strtoull(at, &at, 10);
    t->record = (struct prctl_mm_map){
        .start_code = field[26],
        .end_code = field[27],
        .start_stack = field[28],
        .start_data = field[45],
        .end_data = field[46],
        .start_brk = field[47],
        .brk = field[47],
        .arg_start = field[48],
        .arg_end = field[49],
        .env_start = field[50],
        .env_end = field[51],
        .exe_fd = UINT32_MAX,
    };
    errno = EPERM; /* zeros are what others see */
    return field[26] != 0 && field[28] != 0 && field[47] != 0;
}

/* Finds the auxiliary vector in the stack's content, behind argv and environ. */
static bool find_auxv(struct tracee *t)
{
    const uint64_t *words = (const uint64_t *)(const void *)t->content;
    size_t count = t->content_size / sizeof *words, at = 1;

    if (count == 0 || words[0] > count)
        return false;
    at += words[0] + 1; /* argv and its NULL */
    while (at < count && words[at] != 0)
        at++;
    t->auxv = ++at;
    while (at < count && words[at] != AT_NULL)
        at += 2;
    t->auxv_size = at + 2 - t->auxv;
    return at + 2 <= count;
}

static uint64_t *aux(const struct tracee *t, uint64_t type)
{
    uint64_t *words = (uint64_t *)(void *)t->content;

    for (size_t at = t->auxv; at + 1 < t->auxv + t->auxv_size; at += 2)
        if (words[at] == type)
            return &words[at + 1];
    return NULL;
}

static uint64_t aux_value(const struct tracee *t, uint64_t type)
{
    const uint64_t *value = aux(t, type);

    return value != NULL ? *value : 0;
}

static bool read_stack(struct tracee *t)
{
    uint64_t from = *tracee_stack_pointer(&t->entry);

    t->content_size = t->stack.end - from;
    t->content = malloc(t->content_size);
    if (t->content == NULL || !tracee_read(t, from, t->content, t->content_size))
        return false;
    errno = ENOEXEC;
    return find_auxv(t);
}

/* The program's file says where it begins and ends; AT_ENTRY tells the difference to where it lies. */
static bool read_program(struct tracee *t)
{
    FILE *file = tracee_open(t, "exe");
    uint64_t low = UINT64_MAX, high = 0, bias;
    Elf64_Ehdr elf;

    if (file == NULL)
        return false;
    if (fread(&elf, sizeof elf, 1, file) != 1 || memcmp(elf.e_ident, ELFMAG, SELFMAG) != 0 ||
        elf.e_phentsize != sizeof(Elf64_Phdr) || fseek(file, (long)elf.e_phoff, SEEK_SET) != 0)
        elf.e_phnum = 0;
    bias = aux_value(t, AT_ENTRY) - elf.e_entry;
    t->fixed = elf.e_type == ET_EXEC;
    for (unsigned i = 0; i < elf.e_phnum; i++) {
        Elf64_Phdr part;

        if (fread(&part, sizeof part, 1, file) != 1) {
            high = 0;
            break;
        }
        if (part.p_type == PT_INTERP)
            t->loads_interpreter = true;
        if (part.p_type != PT_LOAD)
            continue;
        if (part.p_vaddr + bias < low)
            low = part.p_vaddr + bias;
        if (part.p_vaddr + part.p_memsz + bias > high)
            high = part.p_vaddr + part.p_memsz + bias;
        if (part.p_align > t->alignment)
            t->alignment = part.p_align;
    }
    fclose(file);
    t->program.start = low & ~(t->page - 1);
    t->program.end = (high + t->page - 1) & ~(t->page - 1);
    errno = ENOEXEC;
    return high > low;
}

/* Fills stack, and parts with the mappings between LOW and HIGH, and finds the vdso's system call. */
static bool read_mappings(struct tracee *t, uint64_t low, uint64_t high)
{
    FILE *file = tracee_open(t, "maps");
    char *line = NULL;
    size_t size = 0;
    bool fits = true;

    if (file == NULL)
        return false;
    t->part_count = 0;
    while (getline(&line, &size, file) > 0) {
        struct mapping found = {0, 0, false};
        char rights[8] = "", name[16] = "";

        /* A path begins with a slash. */
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s %*s %*s %*s %15s", &found.start, &found.end, rights,
                   name) < 3)
            continue;
        found.is_text = strncmp(rights, "r-x", 3) == 0;
        if (strcmp(name, "[stack]") == 0) {
            t->stack = found;
        } else if (found.start >= low && found.end <= high) {
            fits = t->part_count < sizeof t->parts / sizeof *t->parts;
            if (!fits)
                break;
            t->parts[t->part_count++] = found;
        }
    }
    free(line);
    fclose(file);
    errno = E2BIG;
    if (!fits)
        return false;
    errno = ENOEXEC;
    return t->stack.end != 0;
}

/* --- moving it --- */

/* Adds OFFSET to the pointer at that word of the stack's content. */
static void shift(uint64_t *word, uint64_t offset)
{
    if (word != NULL && *word != 0)
        *word += offset;
}

/* Returns the stack's content with all addresses as they will be. */
static char *moved_content(const struct tracee *t, uint64_t stack, uint64_t program)
{
    static const uint64_t in_stack[] = {AT_RANDOM, AT_EXECFN, AT_PLATFORM, AT_BASE_PLATFORM};
    static const uint64_t in_program[] = {AT_PHDR, AT_ENTRY};
    struct tracee copy = *t;
    uint64_t *words;

    copy.content = malloc(t->content_size);
    if (copy.content == NULL)
        return NULL;
    memcpy(copy.content, t->content, t->content_size);
    words = (uint64_t *)(void *)copy.content;
    for (size_t at = 1; at < t->auxv; at++)
        shift(&words[at], stack);
    for (size_t i = 0; i < sizeof in_stack / sizeof *in_stack; i++)
        shift(aux(&copy, in_stack[i]), stack);
    for (size_t i = 0; i < sizeof in_program / sizeof *in_program; i++)
        shift(aux(&copy, in_program[i]), program);
    return copy.content;
}

/* Has the kernel note the new addresses; the structure lies below the stack pointer for that long. */
static bool set_record(struct tracee *t, uint64_t stack, uint64_t program, uint64_t heap)
{
    struct prctl_mm_map record = t->record;
    uint64_t pointer = *tracee_stack_pointer(&t->entry) + stack;
    uint64_t place = (pointer - 2 * sizeof record) & ~(uint64_t)15;
    static const struct prctl_mm_map nothing;

    record.start_code += program;
    record.end_code += program;
    record.start_data += program;
    record.end_data += program;
    record.start_stack += stack;
    record.arg_start += stack;
    record.arg_end += stack;
    record.env_start += stack;
    record.env_end += stack;
    record.start_brk = record.brk = heap;
    record.auxv = (__u64 *)(uintptr_t)(pointer + t->auxv * sizeof(uint64_t));
    record.auxv_size = (__u32)(t->auxv_size * sizeof(uint64_t));
    return tracee_write(t, place, &record, sizeof record) &&
           tracee_call(t, SYS_prctl, PR_SET_MM, PR_SET_MM_MAP, place, sizeof record, 0) == 0 &&
           tracee_write(t, place, &nothing, sizeof nothing);
}

static bool set_comm(struct tracee *t, uint64_t stack, const char *comm)
{
    static const char nothing[16];
    char name[16] = "";
    uint64_t place = (*tracee_stack_pointer(&t->entry) + stack - 2 * sizeof name) & ~(uint64_t)15;

    snprintf(name, sizeof name, "%s", comm);
    return tracee_write(t, place, name, sizeof name) &&
           tracee_call(t, SYS_prctl, PR_SET_NAME, place, 0, 0, 0) == 0 &&
           tracee_write(t, place, nothing, sizeof nothing);
}


static bool restore_settings(struct tracee *t, const struct exec_settings *old)
{
    t->step = "restoring the personality";
    if (tracee_call(t, SYS_personality, old->personality, 0, 0, 0, 0) < 0)
        return false;
    t->step = "restoring the stack limit";
    return !tracee_fault() && prlimit(t->pid, RLIMIT_STACK, &old->stack, NULL) == 0;
}

static bool read_all(struct tracee *t)
{
    t->step = "finding a system call in the vdso";
    if (!tracee_find_syscall(t))
        return false;
    t->step = "reading the kernel's record";
    if (!read_record(t))
        return false;
    t->step = "reading the mappings";
    if (!read_mappings(t, 0, 0))
        return false;
    t->step = "reading the stack";
    if (!read_stack(t))
        return false;
    t->step = "reading the program's file";
    if (!read_program(t) || !read_mappings(t, t->program.start, t->program.end))
        return false;
    t->step = "checking for privileges";
    errno = EPERM;
    return aux_value(t, AT_SECURE) == 0 && !tracee_fault();
}

static bool move_mapping(struct tracee *t, const struct mapping *part, uint64_t offset)
{
    uint64_t size = part->end - part->start;

    return tracee_call(t, SYS_mremap, part->start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
                part->start + offset) >= 0;
}

/*
 * Whether the mapping may be made executable again: not under MemoryDenyWriteExecute=, be it by PR_SET_MDWE (6.3) or by
 * systemd's filter of system calls. Asked without changing anything.
 */
static bool may_become_text(struct tracee *t, uint64_t start, uint64_t size)
{
    return tracee_try(t, SYS_prctl, KSM_PR_GET_MDWE, 0, 0, 0, 0) <= 0 &&
           tracee_try(t, SYS_mprotect, start, size, PROT_READ | PROT_EXEC, 0, 0) == 0;
}

static bool move_program(struct tracee *t, uint64_t offset)
{
    t->step = "moving the program";
    for (size_t i = offset != 0 ? t->part_count : 0; i-- > 0;) {
        const struct mapping *part = &t->parts[i];
        uint64_t start = part->start + offset, size = part->end - part->start;

        if (!move_mapping(t, part, offset))
            return false;
        /* mremap() tells perf nothing, but mprotect() does (mm/mprotect.c, perf_event_mmap). */
        if (part->is_text && may_become_text(t, start, size) &&
            (tracee_call(t, SYS_mprotect, start, size, PROT_READ, 0, 0) < 0 ||
             tracee_call(t, SYS_mprotect, start, size, PROT_READ | PROT_EXEC, 0, 0) < 0))
            return false;
    }
    return true;
}

/* The mapping moves by whole pages; the rest of the offset is its content's within it. */
static bool move_stack(struct tracee *t, uint64_t distance, uint64_t program)
{
    static char zeros[1 << 16]; /* not const: in the file they would be more than half of it */
    uint64_t within = distance % t->page, pages = distance - within;
    char *content = moved_content(t, -distance, program);
    bool written;

    t->step = "moving the stack";
    if (content == NULL || !move_mapping(t, &t->stack, -pages)) {
        free(content);
        return false;
    }
    t->stack_moved = pages;
    t->step = "writing the stack";
    written = tracee_write(t, *tracee_stack_pointer(&t->entry) - distance, content, t->content_size) &&
              tracee_write(t, t->stack.end - distance, zeros, within);
    free(content);
    return written;
}

bool image_move(struct tracee *t, const struct layout *layout, const char *comm, const struct exec_settings *old)
{
    struct user_regs_struct regs = t->entry;
    uint64_t program = layout->program, heap;

    if (!read_all(t))
        return false;
    if (t->fixed || !t->loads_interpreter)
        program = 0; /* not position-independent; or a static PIE, which lies among the mappings */
    else if (t->alignment > t->page)
        program &= ~(t->alignment - 1);
    heap = t->program.end + program;
    if (!t->fixed && !t->loads_interpreter) /* where other programs are (ELF_ET_DYN_BASE): two thirds up */
        heap = (t->stack.end / 3 * 2 & ~(t->page - 1)) + layout->program;
    heap += layout->heap;

    if (!move_program(t, program) || !move_stack(t, layout->stack, program))
        return false;
    t->step = "correcting the kernel's record";
    if (!set_record(t, -layout->stack, program, heap) || (comm != NULL && !set_comm(t, -layout->stack, comm)) ||
        !restore_settings(t, old))
        return false;
    t->step = "setting the registers";
    *tracee_stack_pointer(&regs) -= layout->stack;
    return !tracee_fault() && tracee_set_registers(t, &regs);
}

/* --- when it cannot be moved --- */

bool image_exec_again(struct tracee *t, const struct exec_settings *old)
{
    uint64_t pointer = *tracee_stack_pointer(&t->entry), place = pointer - PATH_MAX - 64, argv, argc;
    struct mapping moved = {t->stack.start - t->stack_moved, t->stack.end - t->stack_moved, false};
    struct user_regs_struct regs = t->entry;
    char path[PATH_MAX + 1] = "";

    if ((t->syscall == 0 && !tracee_find_syscall(t)) || readlinkat(t->proc, "exe", path, PATH_MAX) <= 0)
        return false;
    if (t->stack_moved != 0 && (!move_mapping(t, &moved, t->stack_moved) ||
                                !tracee_write(t, pointer, t->content, t->content_size)))
        return false;
    if (!tracee_read(t, pointer, &argc, sizeof argc) || !tracee_write(t, place, path, strlen(path) + 1) ||
        !restore_settings(t, old))
        return false;
    argv = pointer + sizeof argc;
    tracee_set_call(&regs, SYS_execve,
             (const uint64_t[]){place, argv, argv + (argc + 1) * sizeof argv, 0, 0});
    *tracee_instruction_pointer(&regs) = t->syscall;
    return tracee_set_registers(t, &regs) && tracee_next_stop(t, 0) && tracee_next_stop(t, PTRACE_EVENT_EXEC);
}

void image_end(struct tracee *t, int status)
{
    if (t->syscall != 0 || tracee_find_syscall(t)) {
        struct user_regs_struct regs = t->entry;

        tracee_set_call(&regs, SYS_exit_group, (const uint64_t[]){(uint64_t)status, 0, 0, 0, 0});
        *tracee_instruction_pointer(&regs) = t->syscall;
        if (tracee_set_registers(t, &regs)) {
            (void)tracee_next_stop(t, 0);
            (void)tracee_next_stop(t, 0); /* does not come: it has ended */
        }
    }
    if (!t->gone)
        (void)kill(t->pid, SIGKILL);
}

#endif
