/* SPDX-License-Identifier: MIT */
/* layout.c, image.c and tracee.c: which layouts there are, and the arithmetic that no run shows alone. */
#include "../../src/image.c"
#include "../../src/layout.c"
#include "../../src/tracee.c"

#include "check.h"

enum { PAGE = 4096, BIG_PAGE = 65536 };

static struct layout with(enum group_word word, uint64_t value, uint64_t page)
{
    struct group_secret secret = {{0}};

    secret.words[word] = value;
    return layout_of(&secret, page);
}

static bool same(struct layout a, struct layout b)
{
    return a.stack_limit == b.stack_limit && a.program == b.program && a.heap == b.heap && a.stack == b.stack;
}

static bool is_valid(struct layout layout, uint64_t page)
{
    /* The stack may have 6 MB at the start, and moves farther than that: its places do not overlap. */
    return layout.stack_limit % page == 0 && layout.program % page == 0 && layout.heap % page == 0 &&
           layout.stack % 16 == 0 && layout.stack >= 8 << 20 && layout.heap >= page &&
           layout.stack_limit >= layout.stack + (page << 20) && layout.program >= page << 22 &&
           layout.stack_limit < page << 29 && layout.program < page << 29 && layout.heap <= page << 18;
}

static void test_limits(void)
{
    static const uint64_t pages[] = {PAGE, 16384, BIG_PAGE};

    for (size_t i = 0; i < sizeof pages / sizeof *pages; i++) {
        struct group_secret secret;

        memset(&secret, 0, sizeof secret);
        CHECK(is_valid(layout_of(&secret, pages[i]), pages[i]));
        memset(&secret, 0xff, sizeof secret);
        CHECK(is_valid(layout_of(&secret, pages[i]), pages[i]));
        for (uint64_t seed = 1; seed < 1000; seed++) {
            for (size_t word = 0; word < GROUP_WORDS; word++)
                secret.words[word] = (secret.words[word] + seed) * UINT64_C(6364136223846793005);
            CHECK(is_valid(layout_of(&secret, pages[i]), pages[i]));
        }
    }
}

/* Every bit of the entropy that is promised changes its own address, and nothing else does. */
static void test_entropy(void)
{
    struct layout zero = with(GROUP_NODE, 0, PAGE);

    for (int bit = 0; bit < 64; bit++) {
        uint64_t value = UINT64_C(1) << bit;
        struct layout mmap_ = with(GROUP_MMAP, value, PAGE), program = with(GROUP_PROGRAM, value, PAGE);
        struct layout heap = with(GROUP_HEAP, value, PAGE), stack = with(GROUP_STACK, value, PAGE);

        CHECK((mmap_.stack_limit - zero.stack_limit) == (bit < 28 ? value * PAGE : 0));
        CHECK((program.program - zero.program) == (bit < 28 ? value * PAGE : 0));
        CHECK((heap.heap - zero.heap) == (bit < 18 ? value * PAGE : 0));
        CHECK((stack.stack - zero.stack) == (bit < 22 ? value * PAGE : bit >= 48 && bit < 57 ? (value >> 48) * 16 : 0));
        mmap_.stack_limit = zero.stack_limit;
        program.program = zero.program;
        heap.heap = zero.heap;
        stack.stack = zero.stack;
        CHECK(same(mmap_, zero) && same(program, zero) && same(heap, zero) && same(stack, zero));
    }
    for (size_t word = GROUP_STACK + 1; word < GROUP_WORDS; word++)
        CHECK(same(with((enum group_word)word, UINT64_MAX, PAGE), zero));
}

#if defined(__x86_64__) || defined(__aarch64__)

static bool finds_auxv(uint64_t *words, size_t count, size_t *at, size_t *size)
{
    /* In memory of that very size, so that a sanitizer sees what is read beyond. */
    struct tracee t = {.content = malloc(count * sizeof *words), .content_size = count * sizeof *words};
    bool found;

    if (t.content == NULL)
        abort();
    memcpy(t.content, words, t.content_size);
    found = find_auxv(&t);
    *at = t.auxv;
    *size = t.auxv_size;
    free(t.content);
    return found;
}

static void test_find_auxv(void)
{
    uint64_t words[] = {2, 100, 101, 0, 102, 0, AT_PHDR, 7, AT_ENTRY, 8, AT_NULL, 0, 99};
    uint64_t empty[] = {0, 0, 0, AT_NULL, 0};
    size_t at, size;

    CHECK(finds_auxv(words, 13, &at, &size) && at == 6 && size == 6);
    CHECK(finds_auxv(empty, 5, &at, &size) && at == 3 && size == 2);
    for (size_t count = 0; count < 12; count++)
        CHECK(!finds_auxv(words, count, &at, &size));
    for (size_t count = 0; count < 5; count++)
        CHECK(!finds_auxv(empty, count, &at, &size));
    words[0] = UINT64_MAX;
    CHECK(!finds_auxv(words, 13, &at, &size));
    words[0] = UINT64_MAX - 1;
    CHECK(!finds_auxv(words, 13, &at, &size));
    words[0] = 13;
    CHECK(!finds_auxv(words, 13, &at, &size));
}

static void test_moved_content(void)
{
    uint64_t words[] = {1, 1000, 0, 1100, 1200, 0, AT_PHDR, 5000, AT_RANDOM, 1300, AT_PAGESZ, 4096, AT_EXECFN,
                        1400, AT_ENTRY, 5100, AT_PLATFORM, 0, AT_NULL, 0, 0x1000};
    static const uint64_t expected[] = {1, 990, 0, 1090, 1190, 0, AT_PHDR, 5007, AT_RANDOM, 1290, AT_PAGESZ,
                                        4096, AT_EXECFN, 1390, AT_ENTRY, 5107, AT_PLATFORM, 0, AT_NULL, 0,
                                        0x1000};
    struct tracee t = {.content = (char *)words, .content_size = sizeof words};
    uint64_t before[sizeof words / sizeof *words];
    char *moved;

    memcpy(before, words, sizeof words);
    CHECK(find_auxv(&t));
    CHECK(aux_value(&t, AT_ENTRY) == 5100 && aux_value(&t, AT_SECURE) == 0 && aux(&t, AT_SECURE) == NULL);
    moved = moved_content(&t, (uint64_t)-10, 7);
    CHECK(moved != NULL && memcmp(moved, expected, sizeof expected) == 0);
    CHECK(memcmp(before, words, sizeof words) == 0);
    free(moved);
}

/* What the kernel says of this very process. */
static void test_reading(void)
{
    struct tracee t = {.pid = getpid(), .page = (uint64_t)sysconf(_SC_PAGESIZE)};
    uint64_t here = (uint64_t)(uintptr_t)&test_reading, stack = (uint64_t)(uintptr_t)&t;
    bool text_found = false;

    if (getauxval(AT_SYSINFO_EHDR) == 0)
        return; /* valgrind: /proc tells of it, not of this program */
    t.proc = open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
    t.memory = openat(t.proc, "mem", O_RDONLY | O_CLOEXEC);
    CHECK(t.proc >= 0 && t.memory >= 0);
    CHECK(tracee_find_syscall(&t));
    CHECK(memcmp((const void *)(uintptr_t)t.syscall, syscall_code, sizeof syscall_code) == 0);
    CHECK(t.syscall % SYSCALL_ALIGNMENT == 0);
    CHECK(read_record(&t));
    CHECK(t.record.start_code <= here && here < t.record.end_code);
    CHECK(t.record.start_stack > stack && t.record.env_end > t.record.arg_start);
    CHECK(read_mappings(&t, t.record.start_code & ~(t.page - 1), t.record.end_data + t.page));
    CHECK(t.stack.start <= stack && stack < t.stack.end);
    CHECK(t.part_count >= 3);
    for (size_t i = 0; i < t.part_count; i++)
        text_found |= t.parts[i].start <= here && here < t.parts[i].end && t.parts[i].is_text;
    CHECK(text_found);
    CHECK(read_mappings(&t, 0, 0) && t.part_count == 0);
    close(t.memory);
    close(t.proc);
}

/* More mappings than there is room for are refused, and not half of them moved. */
static void test_many_mappings(void)
{
    enum { PAGES = 200 };
    struct tracee t = {.pid = getpid()};
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, PAGES * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(memory != MAP_FAILED);
    for (size_t i = 0; i < PAGES; i += 2)
        CHECK(mprotect(memory + i * page, page, PROT_READ) == 0);
    t.proc = open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(!read_mappings(&t, (uintptr_t)memory, (uintptr_t)memory + PAGES * page) && errno == E2BIG);
    CHECK(read_mappings(&t, (uintptr_t)memory, (uintptr_t)memory + 20 * page) && t.part_count == 20);
    close(t.proc);
    munmap(memory, PAGES * page);
}

#endif

int main(void)
{
    test_limits();
    test_entropy();
#if defined(__x86_64__) || defined(__aarch64__)
    test_find_auxv();
    test_moved_content();
    test_reading();
    test_many_mappings();
#endif
    return check_status();
}
