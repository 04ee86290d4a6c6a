/* SPDX-License-Identifier: MIT */
/* What a program without a libc needs: where the kernel enters it, and the functions that compilers call unasked. */
#include <stddef.h>

__attribute__((noreturn, used)) void start(long *stack);
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);

/* The stack holds argc, argv, NULL, envp (each psABI, "Process Initialization"). */
#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n\txorl %ebp, %ebp\n\tmovq %rsp, %rdi\n\tandq $-16, %rsp\n\tcall start\n");
#elif defined(__i386__)
__asm__(".globl _start\n_start:\n\txorl %ebp, %ebp\n\tmovl %esp, %eax\n\tandl $-16, %esp\n"
        "\tsubl $12, %esp\n\tpushl %eax\n\tcall start\n");
#elif defined(__aarch64__)
__asm__(".globl _start\n_start:\n\tmov x29, #0\n\tmov x30, #0\n\tmov x0, sp\n\tand sp, x0, #-16\n\tb start\n");
#else
#error "ksm-preload: no entry point for this architecture yet (src/start.c)"
#endif

/* The barriers keep the compiler from making each loop a call of the function it is in. */
void *memcpy(void *to, const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        ((char *)to)[i] = ((const char *)from)[i];
        __asm__ volatile("" ::: "memory");
    }
    return to;
}

void *memset(void *to, int byte, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        ((char *)to)[i] = (char)byte;
        __asm__ volatile("" ::: "memory");
    }
    return to;
}
