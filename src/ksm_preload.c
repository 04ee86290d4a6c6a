/* SPDX-License-Identifier: MIT */
/*
 * libksm_preload.so: opts the process it is loaded into in to KSM, on any Linux.
 *
 * Where the kernel has the prctl (Linux 6.4) that is all, and every function below is one branch and a
 * jump to the next library's.  Elsewhere, or under KSM_PRELOAD=madvise, the constructor marks what
 * is mapped, and the functions mark what is mapped later, with madvise(MADV_MERGEABLE).  Before all that
 * the policy is asked (policy.h).
 *
 * Rules: no lock, no allocation, no stdio, no thread; errno as the next library left it; a failure
 * of ours is never the program's.  The order below: marking, finding the next library, settings
 * and start, the functions.
 */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS /* 64 would rename mmap to mmap64 below */
#include "merge.h"
#include "policy.h"
#include "settings.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <malloc.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define COLD __attribute__((noinline, cold))
#define likely(condition) __builtin_expect(!!(condition), 1)
#define unlikely(condition) __builtin_expect(!!(condition), 0)

/* ---- Marking ---------------------------------------------------------------------------------- */

/* glibc's malloc/arena.c: a thread's arena grows inside reservations of this size and alignment. */
#define ARENA_SIZE ((uintptr_t)(sizeof(long) == 8 ? 64 : 1) * 1024 * 1024)
/* Its default M_TRIM_THRESHOLD and first M_MMAP_THRESHOLD. */
#define BIG ((size_t)128 * 1024)
/* A reservation of address space this large is not memory: before 6.18 ksmd walked its holes page by
 * page (CVE-2025-68211), and V8 and the JVM reserve terabytes. */
#define RESERVATION ((size_t)1024 * 1024 * 1024)

static struct {
    bool on;             /* marking; off with the prctl, before the start and after a failure */
    bool all;            /* the program has taken nothing out */
    bool glibc;          /* the next family is glibc's, whose chunk headers tell what is where */
    uintptr_t heap;      /* start of the brk heap */
    uintptr_t heap_end;  /* its end when last seen: all below is marked */
    uintptr_t quick_end; /* what is allocated below it needs no look; heap_end, but for after a trim */
    uintptr_t page_size;
    size_t threshold;    /* KSMP_MERGE_THRESHOLD: mappings below it are left alone */
    size_t blocks_left;  /* big blocks that may still become mappings of their own, see mark_block */
} follow = {.all = true};

/* No further from a reservation's start is its first chunk, behind a heap_info of 32 to 48 bytes. */
#define FIRST_CHUNK ((uintptr_t)128)

/* The reservation this thread allocated from last, which is marked. */
#define NO_ARENA ((uintptr_t)1)
static __thread uintptr_t last_arena __attribute__((tls_model("initial-exec"))) = NO_ARENA;
/*
 * Reservations that are marked, each at the place that its number has modulo the size.  They lie side by side; where two
 * want one place, the older is only marked again when it is next seen.  A map of the whole address space would take
 * a page of its own and one of page tables (benchmarks/footprint).  Whole words, so that threads
 * need no atomic operation.
 */
#define ARENAS 256
static uint32_t arenas_marked[ARENAS];

/*
 * What the program took out with madvise(MADV_UNMERGEABLE) of memory that is marked more than once: the heap and the
 * arenas.  For more ranges than fit the marking ends.  MADV_DONTDUMP and MADV_WIPEONFORK, which often
 * mean secrets, are no such word: the kernel does not heed them with the prctl, and what protects a secret has
 * to hold everywhere (SECURITY.md).
 */
#define MOST_TAKEN_OUT 16
static struct {
    uintptr_t start, end;
} taken_out[MOST_TAKEN_OUT];
static unsigned taken_out_count;

/* glibc's record of the break: exported, current, and spares a system call. */
extern void *__curbrk __attribute__((weak));

static uintptr_t current_break(void)
{
    return &__curbrk != NULL ? (uintptr_t)__curbrk : 0;
}

/* Marks whole pages around [start, end). Raw, so that nobody's madvise hook sees it or calls us back. */
static void mark_new(uintptr_t start, uintptr_t end)
{
    int saved = errno;

    start &= -follow.page_size;
    end = (end + follow.page_size - 1) & -follow.page_size;
    /*
     * EINVAL: a kernel without KSM.  ENOMEM: vm.max_map_count is reached, and each further mark could cost the
     * program a mapping it needs.  Both end it for good.  EAGAIN only loses this range, and so does the other
     * ENOMEM: a hole, where another thread has unmapped or trimmed meanwhile.  MS_ASYNC does nothing but look for
     * holes.
     */
    if (end > start && syscall(SYS_madvise, start, end - start, MADV_MERGEABLE) != 0 &&
        (errno == EINVAL ||
         (errno == ENOMEM && syscall(SYS_msync, start, end - start, MS_ASYNC) == 0)))
        follow.on = follow.glibc = false;
    errno = saved;
}

/* The same for memory that the program may have had before: without what it took out. */
static void mark(uintptr_t start, uintptr_t end)
{
    start &= -follow.page_size;
    for (unsigned i = 0; i < MOST_TAKEN_OUT && i < taken_out_count; i++) {
        uintptr_t hole = taken_out[i].start;
        uintptr_t hole_end = (taken_out[i].end + follow.page_size - 1) & -follow.page_size;

        if (start < hole_end && hole < end) {
            if (start < hole)
                mark(start, hole);
            if (hole_end < end)
                mark(hole_end, end);
            return;
        }
    }
    mark_new(start, end);
}

/* Before the call, so that no thread marks it in between, and before our start, too. */
static COLD void take_out(uintptr_t start, uintptr_t end)
{
    unsigned place;

    follow.all = false;
    /* A mapping of its own is marked but once. */
    if (follow.on && arenas_marked[start / ARENA_SIZE % ARENAS] == 0 &&
        (end <= follow.heap || start >= follow.heap_end))
        return;
    for (unsigned i = 0; i < MOST_TAKEN_OUT; i++)
        if (taken_out[i].start <= start && end <= taken_out[i].end)
            return;
    place = taken_out_count < MOST_TAKEN_OUT ? __atomic_fetch_add(&taken_out_count, 1, __ATOMIC_RELAXED)
                                             : MOST_TAKEN_OUT;
    if (place >= MOST_TAKEN_OUT) {
        follow.on = follow.glibc = false;
        return;
    }
    taken_out[place].start = start;
    taken_out[place].end = end;
}

/*
 * The break moved: by malloc, by free (a trim) or by the program itself.
 *
 * The last page stays unmarked.  So the kernel lets the next growth extend that one's mapping, and
 * the mark then moves the boundary between the two; a heap marked to its end would get a new mapping at
 * each growth, which cannot be joined once touched (mm/vma.c, is_mergeable_anon_vma).  That is what a trim leaves;
 * not each is followed by a growth, so the last page is taken out again when glibc begins to hand out what it kept
 * there, its default M_TOP_PAD of 128 KiB (sysmalloc, systrim).
 */
static COLD void follow_break(void)
{
    uintptr_t now = current_break(), from = follow.heap_end - follow.page_size, moved;
    uintptr_t kept = BIG + 2 * follow.page_size;

    if (now == 0) /* glibc has not asked for it yet: what was allocated is no heap */
        return;
    if (now > follow.heap_end) {
        mark(from > follow.heap ? from : follow.heap, now - follow.page_size);
        kept = 0;
    }
    moved = current_break(); /* by another thread: what was trimmed has to be marked again */
    follow.heap_end = moved < now ? moved : now;
    follow.quick_end = follow.heap_end - follow.heap > kept ? follow.heap_end - kept : follow.heap;
}

/* Lets the next growth extend the heap's last mapping. */
static COLD void unmark_last_page(void)
{
    int saved = errno;

    syscall(SYS_madvise, follow.heap_end - follow.page_size, follow.page_size, MADV_UNMERGEABLE);
    follow.quick_end = follow.heap_end;
    errno = saved;
}

/* The word before an allocation of glibc: its size and, in the low bits, where it came from (malloc/malloc.c,
 * "struct malloc_chunk"). */
enum { MMAPPED = 2, OTHER_ARENA = 4 };

static size_t chunk_header(const void *memory)
{
    size_t header;

    memcpy(&header, (const char *)memory - sizeof header, sizeof header);
    return header;
}

/*
 * A block with a mapping of its own has been written to before we see it, and once marked cannot be joined with its
 * neighbours.  So that this never costs the program a mapping it needs, only a quarter of vm.max_map_count is
 * spent on it; blocks after that stay unmarked, and joined.
 */
static COLD void mark_block(uintptr_t start, uintptr_t end)
{
    if (follow.blocks_left == 0)
        return;
    follow.blocks_left--; /* two threads may count one: it is no more than a bound */
    /* All of it: mremap refuses a range of two mappings, and realloc would have to copy. */
    mark_new(start, end);
}

/*
 * Where the break cannot move, since something was mapped behind the heap, the main arena takes pieces by mmap instead, most
 * of them right below the last (sysmalloc).  These are its rows of pieces, marked but for each one's first page:
 * so the kernel lets that one's mapping grow down by the next piece, as with the last page of the heap, and the
 * mark moves the boundary.
 */
#define ROWS 16
static struct {
    uintptr_t start, end;
} rows[ROWS];
static unsigned rows_begun;

/* For an allocation of the main arena outside the heap. Of a new piece, what the first one leaves is the chunk
 * behind it, so that this tells where the piece ends. */
static COLD void follow_piece(uintptr_t a, size_t length)
{
    uintptr_t start = a & -follow.page_size, end = a - 2 * sizeof length + length;
    size_t rest = chunk_header((const void *)(a + length)) & ~(size_t)7;
    unsigned row;

    for (row = 0; row < ROWS; row++)
        if (rows[row].start <= a && a < rows[row].end)
            return;
    if (rest < RESERVATION)
        end += rest;
    for (row = 0; row < ROWS; row++) {
        uintptr_t seen = rows[row].start;

        /* Below a row, or its piece's first part, where another thread was quicker. */
        if (start < seen && seen <= end && end <= rows[row].end) {
            mark(start + follow.page_size, end > seen ? end : end + follow.page_size);
            (void)__atomic_compare_exchange_n(&rows[row].start, &seen, start, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
            return;
        }
    }
    /* Pieces that seldom touch: a first page left out would only be one more mapping for each, and the
     * program may need those (vm.max_map_count). */
    if (rows_begun >= ROWS) {
        mark(start, end);
        return;
    }
    mark(start + follow.page_size, end);
    if ((end & (follow.page_size - 1)) != 0) /* the chunk behind is another thread's, not the rest */
        return;
    row = __atomic_fetch_add(&rows_begun, 1, __ATOMIC_RELAXED);
    if (row < ROWS) {
        /* In this order: nobody sees a row that is longer. */
        rows[row].start = start;
        __atomic_store_n(&rows[row].end, end, __ATOMIC_RELEASE);
    }
}

/* Called for an allocation at A that is not known to lie in marked memory. */
static COLD void follow_allocation(uintptr_t a)
{
    size_t header, length, before;
    uintptr_t arena;
    uint32_t *place;

    if (current_break() != follow.heap_end)
        follow_break();
    if (a == 0)
        return;
    header = chunk_header((const void *)a);
    memcpy(&before, (const char *)a - 2 * sizeof header, sizeof before);
    length = header & ~(size_t)7;
    if (a - follow.heap < follow.heap_end - follow.heap) {
        /* A trim and a growth to just the same end go unseen; only big ones are worth a look. */
        if (length >= BIG)
            mark(a, a + length);
        if (a >= follow.quick_end)
            unmark_last_page();
        return;
    }
    if (header & MMAPPED) {
        uintptr_t chunk = a - 2 * sizeof header;

        if (length + before >= follow.threshold)
            mark_block(chunk - before, chunk + length);
        return;
    }
    arena = a & -ARENA_SIZE;
    if (!(header & OTHER_ARENA)) {
        if (follow.all)
            follow_piece(a, length);
        return;
    }
    /* One that was given back may return, unmarked, at the same address: with a new arena, which is where a
     * thread's first allocation comes from, or as a later part of one, when its first chunk is handed
     * out (in the first part, malloc_state is there). */
    place = &arenas_marked[arena / ARENA_SIZE % ARENAS];
    if (last_arena == NO_ARENA || a - arena < FIRST_CHUNK || *place != (uint32_t)(arena / ARENA_SIZE)) {
        /* The whole reservation at once: the flag stays when parts become writable later. */
        mark(arena, arena + ARENA_SIZE);
        *place = (uint32_t)(arena / ARENA_SIZE);
    }
    last_arena = arena;
}

static inline void *followed(void *memory, bool big)
{
    uintptr_t a = (uintptr_t)memory;

    if (likely(!big && a - follow.heap < follow.quick_end - follow.heap &&
               (uintptr_t)__curbrk == follow.heap_end))
        return memory;
    if (unlikely(big || (a & -ARENA_SIZE) != last_arena))
        follow_allocation(a);
    return memory;
}

/* ---- The next library's functions --------------------------------------------------------------- */

/* What is interposed: type, name, parameters, arguments, and what failing is. */
#define ALLOCATORS(X)                                                                              \
    X(malloc, (size_t size), (size), size)                                                         \
    X(calloc, (size_t count, size_t each), (count, each), count * each)                            \
    X(reallocarray, (void *old, size_t count, size_t each), (old, count, each), count * each)      \
    X(memalign, (size_t alignment, size_t size), (alignment, size), size)                          \
    X(aligned_alloc, (size_t alignment, size_t size), (alignment, size), size)                     \
    X(valloc, (size_t size), (size), size)                                                         \
    X(pvalloc, (size_t size), (size), size)
#define OTHERS(X)                                                                                  \
    X(void *, realloc, (void *old, size_t size), (old, size), errno = ENOMEM; return NULL)         \
    X(int, posix_memalign, (void **memory, size_t alignment, size_t size),                         \
      (memory, alignment, size), return ENOMEM)                                                    \
    X(void *, mmap, (void *hint, size_t length, int prot, int flags, int file, off_t offset),      \
      (hint, length, prot, flags, file, offset), errno = ENOMEM; return MAP_FAILED)                \
    X(void *, mmap64, (void *hint, size_t length, int prot, int flags, int file, off64_t offset),  \
      (hint, length, prot, flags, file, offset), errno = ENOMEM; return MAP_FAILED)                \
    X(int, madvise, (void *start, size_t length, int advice), (start, length, advice),             \
      errno = ENOMEM; return -1)                                                                   \
    X(int, brk, (void *end), (end), errno = ENOMEM; return -1)                                     \
    X(void *, sbrk, (intptr_t by), (by), errno = ENOMEM; return (void *)-1)
#define FUNCTIONS(X)                                                                               \
    ALLOCATORS(ALLOCATOR_##X)                                                                      \
    OTHERS(X)

#define DECLARE(type, name, params, args, failing) static type early_##name params;
#define ALLOCATOR_DECLARE(name, params, args, size) DECLARE(void *, name, params, args, )
FUNCTIONS(DECLARE)

/* Each starts as early_NAME, which finds all of them: the first call can come before our constructor. */
static struct {
#define POINTER(type, name, params, args, failing) type(*name) params;
#define ALLOCATOR_POINTER(name, params, args, size) POINTER(void *, name, params, args, )
    FUNCTIONS(POINTER)
} next = {
#define EARLY(type, name, params, args, failing) .name = early_##name,
#define ALLOCATOR_EARLY(name, params, args, size) EARLY(void *, name, params, args, )
    FUNCTIONS(EARLY)
};

/* A dynamic section's address; ld.so has added the base to all but the kernel's vdso. */
static uintptr_t address_in(const struct link_map *map, uintptr_t value)
{
    return value < map->l_addr ? value + map->l_addr : value;
}

/* Where MAP defines NAME for everybody, or NULL. */
static void *defined_in(const struct link_map *map, const char *name)
{
    const ElfW(Sym) *symbols = NULL;
    const ElfW(Half) *versions = NULL;
    const uint32_t *gnu = NULL, *sysv = NULL;
    const char *strings = NULL;
    uint32_t hash = 5381, index, end;

    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++) {
        uintptr_t value = address_in(map, entry->d_un.d_ptr);

        switch (entry->d_tag) {
        case DT_SYMTAB: symbols = (const void *)value; break;
        case DT_STRTAB: strings = (const void *)value; break;
        case DT_VERSYM: versions = (const void *)value; break;
        case DT_GNU_HASH: gnu = (const void *)value; break;
        case DT_HASH: sysv = (const void *)value; break;
        }
    }
    if (symbols == NULL || strings == NULL || (gnu == NULL && sysv == NULL))
        return NULL;
    if (gnu != NULL) {
        /* buckets, first hashed symbol, Bloom words; then Bloom filter, buckets, hash values */
        const uint32_t *buckets = gnu + 4 + gnu[2] * (sizeof(ElfW(Addr)) / sizeof(uint32_t));
        const uint32_t *values = buckets + gnu[0] - gnu[1];

        for (const char *c = name; *c != '\0'; c++)
            hash = hash * 33 + (unsigned char)*c;
        index = gnu[0] != 0 ? buckets[hash % gnu[0]] : 0;
        if (index == 0)
            return NULL;
        for (end = index; !(values[end] & 1); end++)
            ;
        end++;
    } else {
        index = 1;
        end = sysv[1];
    }
    for (; index < end; index++) {
        const ElfW(Sym) *symbol = &symbols[index];

        if (symbol->st_shndx != SHN_UNDEF && (symbol->st_info & 15) == STT_FUNC &&
            (versions == NULL || !(versions[index] & 0x8000)) && /* hidden: an old version */
            strcmp(strings + symbol->st_name, name) == 0)
            return (void *)(map->l_addr + symbol->st_value);
    }
    return NULL;
}

/* musl's pointer to the same; the only way there when its loader was started by hand. */
extern struct r_debug *_dl_debug_addr __attribute__((weak));
#pragma weak _r_debug

/* All that is loaded, in order, as the loader tells debuggers.  By way of the program's headers, since
 * glibc's name for it, _r_debug, is not musl's, and one missing symbol stops a program there. */
static const struct link_map *loaded(void)
{
    const ElfW(Phdr) *header = (const void *)getauxval(AT_PHDR), *dynamic = NULL;
    unsigned long count = getauxval(AT_PHNUM);
    uintptr_t base = 0;

    for (; header != NULL && count > 0; header++, count--) {
        if (header->p_type == PT_PHDR)
            base = (uintptr_t)header - header->p_vaddr;
        else if (header->p_type == PT_DYNAMIC)
            dynamic = header;
    }
    if (&_dl_debug_addr != NULL && _dl_debug_addr != NULL)
        return _dl_debug_addr->r_map;
    if (dynamic == NULL)
        return NULL;
    for (const ElfW(Dyn) *entry = (const void *)(base + dynamic->p_vaddr); entry->d_tag != DT_NULL; entry++)
        if (entry->d_tag == DT_DEBUG && entry->d_un.d_ptr != 0)
            return ((const struct r_debug *)entry->d_un.d_ptr)->r_map;
    /* `lld -z rodynamic` leaves that entry out. */
    return &_r_debug != NULL ? _r_debug.r_map : NULL;
}

extern ElfW(Dyn) _DYNAMIC[] __attribute__((visibility("hidden")));

/* What one copy of this library asks another. */
EXPORT bool ksm_preload_follows(void);
EXPORT bool ksm_preload_follows(void)
{
    return follow.on;
}

/*
 * Whether this copy was opened late, behind the libc and so in nobody's way, and another follows already: that one has
 * seen what the program took out, this one has not.
 */
static COLD bool followed_by_another(void)
{
    bool followed = false, late = false;

    for (const struct link_map *map = loaded(); map != NULL && map->l_ld != _DYNAMIC; map = map->l_next) {
        bool (*follows)(void) = (bool (*)(void))defined_in(map, "ksm_preload_follows");

        if (follows != NULL)
            followed = followed || follows();
        else
            late = late || defined_in(map, "malloc") != NULL;
    }
    return followed && late;
}

/*
 * Fills `next` with the first definition after ours in the loader's order.
 *
 * Not dlsym: this has to work inside the first malloc of the process, which comes from ld.so or another
 * library's constructor, and dlsym may allocate there, under a lock of that allocator (jemalloc issue
 * 329).  This reads what ld.so has laid out and takes no lock.
 */
static COLD void find_next(void)
{
    static const struct {
        const char *name;
        size_t place;
    } functions[] = {
#define PLACE(type, name, params, args, failing) {#name, offsetof(__typeof__(next), name)},
#define ALLOCATOR_PLACE(name, params, args, size) PLACE(void *, name, params, args, )
        FUNCTIONS(PLACE)
    };
    const struct link_map *first = loaded(), *ours = first, *map;

    while (ours != NULL && ours->l_ld != _DYNAMIC)
        ours = ours->l_next;
    if (ours == NULL)
        return;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *found = NULL;

        for (map = ours->l_next; map != NULL && found == NULL; map = map->l_next)
            found = defined_in(map, functions[i].name);
        /* Loaded by dlopen we come last. */
        for (map = first; map != ours && found == NULL; map = map->l_next)
            found = defined_in(map, functions[i].name);
        if (found != NULL)
            memcpy((char *)&next + functions[i].place, &found, sizeof found);
    }
    if (next.mmap64 == early_mmap64 && sizeof(off_t) == sizeof(off64_t)) /* musl */
        next.mmap64 = (void *(*)(void *, size_t, int, int, int, off64_t))next.mmap;
}

/* ---- Start -------------------------------------------------------------------------------------- */

static int set_flag(unsigned long value)
{
    return prctl(KSM_PR_SET_MEMORY_MERGE, value, 0UL, 0UL, 0UL);
}

static const char *hexadecimal(const char *text, uintptr_t *value)
{
    for (*value = 0;; text++) {
        unsigned digit = (unsigned char)*text;

        if (digit - '0' < 10)
            digit -= '0';
        else if (digit - 'a' < 6)
            digit -= 'a' - 10;
        else
            return text;
        *value = *value * 16 + digit;
    }
}

/* One line of /proc/self/maps: `start-end perms offset device inode   name`. */
static void mark_mapping(const char *line)
{
    uintptr_t start, end;
    const char *perms = hexadecimal(line, &start), *name;

    perms = hexadecimal(perms + 1, &end) + 1;
    /* Text has no anonymous memory, shared mappings are refused by the kernel. */
    if (perms[3] != 'p' || perms[2] == 'x')
        return;
    name = strpbrk(line, "[/"); /* a path may have a bracket in it */
    if (name != NULL && strcmp(name, "[heap]") == 0) {
        if (start < follow.heap) /* the first of several parts */
            follow.heap = start;
        end -= follow.page_size; /* see follow_break */
    } else if (name != NULL && *name == '[' && strncmp(name, "[anon", 5) != 0) {
        return; /* the stack and the kernel's own */
    }
    if (follow.on && end - start >= follow.threshold && end - start < RESERVATION)
        mark(start, end);
}

/* Marks all that is mapped: heap, data and bss of the program and its libraries, ld.so's memory. */
static COLD void mark_everything(void)
{
    char text[4096];
    size_t used = 0;
    long got;
    int file = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);

    if (file < 0)
        return; /* no /proc: what comes later is still followed */
    while ((got = syscall(SYS_read, file, text + used, sizeof text - 1 - used)) > 0) {
        char *line = text, *end;

        used += (size_t)got;
        text[used] = '\0';
        for (; (end = strchr(line, '\n')) != NULL; line = end + 1) {
            *end = '\0';
            mark_mapping(line);
        }
        used -= (size_t)(line - text);
        memmove(text, line, used);
        if (used == sizeof text - 1)
            break; /* a name as long as a page: not the kernel's format */
    }
    syscall(SYS_close, file);
}

static size_t threshold_from(char *const *envp)
{
    static const char name[] = "KSMP_MERGE_THRESHOLD=";
    size_t value = 0;

    for (; envp != NULL && *envp != NULL; envp++) {
        if (strncmp(*envp, name, sizeof name - 1) != 0)
            continue;
        for (const char *c = *envp + sizeof name - 1; *c >= '0' && *c <= '9'; c++)
            value = value > SIZE_MAX / 10 - 10 ? SIZE_MAX / 2 : value * 10 + (size_t)(*c - '0');
    }
    return value;
}

/* A quarter of vm.max_map_count; of the kernel's default of 65530 where it cannot be read. */
static size_t block_budget(void)
{
    char text[32] = "";
    size_t value = 0;
    int file = (int)syscall(SYS_openat, AT_FDCWD, "/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);

    if (file >= 0) {
        if (syscall(SYS_read, file, text, sizeof text - 1) > 0)
            for (const char *c = text; *c >= '0' && *c <= '9'; c++)
                value = value * 10 + (size_t)(*c - '0');
        syscall(SYS_close, file);
    }
    return (value != 0 ? value : 65530) / 4;
}

static void say(const char *text)
{
    (void)!syscall(SYS_write, 2, text, strlen(text));
}

/* Whether all that allocates is glibc's.  Not by the name __libc_malloc: tcmalloc and mimalloc define that
 * too, and before the first block of a mapping of theirs there is nothing to read. */
static COLD bool next_is_glibc(void)
{
    const struct link_map *libc = loaded();

    while (libc != NULL && defined_in(libc, "gnu_get_libc_version") == NULL)
        libc = libc->l_next;
#define IS_LIBC(type, name, params, args, failing) &&(void *)next.name == defined_in(libc, #name)
#define ALLOCATOR_IS_LIBC(name, params, args, size) IS_LIBC(void *, name, params, args, )
    return libc != NULL && &__curbrk != NULL ALLOCATORS(ALLOCATOR_IS_LIBC)
        IS_LIBC(int, posix_memalign, , , ) IS_LIBC(void *, realloc, , , );
}

static COLD void follow_from_here(void)
{
    if (followed_by_another())
        return;
    follow.page_size = getauxval(AT_PAGESZ);
    follow.threshold = threshold_from(environ);
    follow.blocks_left = block_budget();
    /* Where the heap will start; if there is one already, mark_everything finds its start. */
    follow.heap = follow.quick_end = follow.heap_end = (uintptr_t)syscall(SYS_brk, 0);
    follow.on = true;
    mark_everything();
    follow.glibc = follow.on && next_is_glibc();
}

__attribute__((constructor)) static void opt_in(int argc, char **argv, char **envp)
{
    enum policy_answer answer = POLICY_LETS_IN;
    struct settings settings;
    bool left_out;
    int saved = errno;

    if (next.malloc == early_malloc)
        find_next();
    if (getauxval(AT_SECURE) != 0) {
        (void)set_flag(0); /* inherited from whoever started this set-uid program */
        errno = saved;
        return;
    }
    settings = read_settings(environ);
    if (!settings.off)
        answer = ask_policy((const char *)getauxval(AT_EXECFN),
                            is_called_by_glibc(argc, argv, envp) ? argv : NULL, envp);
    left_out = settings.off || answer != POLICY_LETS_IN;
    if (left_out || settings.madvise)
        (void)set_flag(0);
    if (!left_out && (settings.madvise || set_flag(1) != 0))
        follow_from_here();
    if (settings.verbose)
        say(settings.off ? "ksm_preload: left out: KSM_PRELOAD=off\n"
            : left_out   ? policy_reason(answer)
            : !settings.madvise && follow.page_size == 0 ? "ksm_preload: opted in (prctl)\n"
            : follow.on ? "ksm_preload: opted in (madvise)\n"
                        : "ksm_preload: not opted in: this kernel has no KSM\n");
    errno = saved;
}

/* ---- The interposed functions ------------------------------------------------------------------- */

/* What no other library defines cannot be had. */
#define DEFINE_EARLY(type, name, params, args, failing)                                            \
    static COLD type early_##name params                                                           \
    {                                                                                              \
        find_next();                                                                               \
        if (next.name != early_##name)                                                             \
            return next.name args;                                                                 \
        failing;                                                                                   \
    }
#define ALLOCATOR_DEFINE_EARLY(name, params, args, size)                                           \
    DEFINE_EARLY(void *, name, params, args, errno = ENOMEM; return NULL)
FUNCTIONS(DEFINE_EARLY)

/* Where a product of count and each overflows, the result is NULL and the size is not looked at. */
#define DEFINE_ALLOCATOR(name, params, args, size)                                                 \
    EXPORT void *name params                                                                       \
    {                                                                                              \
        if (!follow.glibc)                                                                         \
            return next.name args;                                                                 \
        /* Not one call with the comparison's result, which would have to be kept over it. */      \
        if (unlikely((size) >= BIG))                                                               \
            return followed(next.name args, true);                                                 \
        return followed(next.name args, false);                                                    \
    }
ALLOCATORS(DEFINE_ALLOCATOR)

EXPORT void *realloc(void *old, size_t size)
{
    bool was_mapped;
    void *memory;

    if (!follow.glibc)
        return next.realloc(old, size);
    was_mapped = old != NULL && (chunk_header(old) & MMAPPED);
    memory = next.realloc(old, size);
    /* By mremap: it is marked, or the program has taken it out since. */
    if (was_mapped && memory != NULL && (chunk_header(memory) & MMAPPED))
        return memory;
    return followed(memory, size >= BIG);
}

EXPORT int posix_memalign(void **memory, size_t alignment, size_t size)
{
    int error = next.posix_memalign(memory, alignment, size);

    if (follow.glibc && error == 0)
        followed(*memory, size >= BIG);
    return error;
}

/* Stacks are left out: they change too often.  So is what the kernel would refuse. */
static void *followed_mapping(void *memory, size_t length, int prot, int flags)
{
    if (follow.on && memory != MAP_FAILED && length >= follow.threshold &&
        (flags & MAP_TYPE) == MAP_PRIVATE && (prot != PROT_NONE || length < RESERVATION) &&
        !(flags & (MAP_STACK | MAP_GROWSDOWN | MAP_HUGETLB)))
        mark_new((uintptr_t)memory, (uintptr_t)memory + length);
    return memory;
}

/* mremap needs no watching: the mapping keeps its flag, and what it grows by gets the same. */

EXPORT void *mmap(void *hint, size_t length, int prot, int flags, int file, off_t offset)
{
    return followed_mapping(next.mmap(hint, length, prot, flags, file, offset), length, prot, flags);
}

EXPORT void *mmap64(void *hint, size_t length, int prot, int flags, int file, off64_t offset)
{
    return followed_mapping(next.mmap64(hint, length, prot, flags, file, offset), length, prot,
                            flags);
}

EXPORT int madvise(void *start, size_t length, int advice)
{
    if (unlikely(advice == MADV_UNMERGEABLE))
        take_out((uintptr_t)start, (uintptr_t)start + length);
    return next.madvise(start, length, advice);
}

EXPORT int brk(void *end)
{
    int result = next.brk(end);

    if (follow.on && current_break() != follow.heap_end)
        follow_break();
    return result;
}

EXPORT void *sbrk(intptr_t by)
{
    void *result = next.sbrk(by);

    if (follow.on && current_break() != follow.heap_end)
        follow_break();
    return result;
}
