/* Segments of a local descriptor table: data with a base and a limit, code with a base, 16-bit code where the kernel allows it,
 * and in a 64-bit program 32-bit code. With an argument, 32-bit programs try a code segment's limit instead. The same bytes at the same place mean something else in each. */
#include "common.h"

#include <asm/ldt.h>
#include <setjmp.h>
#include <sys/syscall.h>

#ifdef __x86_64__
#define FREE_SEGMENT "gs"
#else
#define FREE_SEGMENT "fs"
#endif
#define SELECTOR(entry) ((entry) << 3 | 7)

static uint8_t area[4 * PAGE] __attribute__((aligned(4096)));
static uint8_t low_stack[4 * PAGE] __attribute__((aligned(4096)));
static sigjmp_buf back;
static volatile int expected;

/* For the assembly: where to call, what came back. */
struct __attribute__((packed)) {
    uint32_t offset;
    uint16_t selector;
} far_pointer;
word kept_stack, far_stack, far_result, far_argument;

static void set_entry(unsigned entry, word base, unsigned limit, int code, int bits32)
{
    struct user_desc description = {.entry_number = entry, .base_addr = (unsigned)base, .limit = limit, .seg_32bit = (unsigned)bits32,
                                    .contents = code ? 2 : 0, .useable = 1};
    if (syscall(SYS_modify_ldt, 1, &description, sizeof description))
        die("modify_ldt");
}

static void faulted(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    printf("fault: trap %d error %lx\n", (int)reg(context, REG_TRAPNO), (long)reg(context, REG_ERR) & 0xffff);
    if (!expected)
        _exit(1);
    expected = 0;
    siglongjmp(back, 1);
}

static void data(void)
{
    for (unsigned i = 0; i < sizeof area; i++)
        area[i] = (uint8_t)(i * 11 + (i >> 8));
    uint64_t hash = 0;
    for (unsigned i = 0; i < 50; i++) {
        uint32_t value, other;
        set_entry(i % 4, (word)area + i * 37, 0xfff, 0, 1);
        __asm__ volatile("mov %2, %%" FREE_SEGMENT "\n\t"
                         "movl %%" FREE_SEGMENT ":16, %0\n\t"
                         "addl $5, %%" FREE_SEGMENT ":32\n\t"
                         "movl %%" FREE_SEGMENT ":(%3), %1\n\t"
                         : "=&r"(value), "=&r"(other)
                         : "r"(SELECTOR(i % 4)), "r"((word)(i * 3))
                         : "memory", "cc");
        hash = mix(hash, value);
        hash = mix(hash, other);
    }
    say("data", mix_bytes(hash, area, sizeof area));
#ifdef __i386__
    /* The limit counts: a read over it, one that ends at it, one behind it; and a null selector. */
    static const unsigned offsets[] = {0xff0, 0xffc, 0xffd, 0xfff, 0x1000, 0xfffffffc};
    for (unsigned i = 0; i <= COUNT(offsets); i++)
        for (int kind = 0; kind < 3; kind++) {
            set_entry(1, (word)area, 0xfff, 0, 1);
            uint32_t value = 0;
            unsigned selector = i == COUNT(offsets) ? 0 : SELECTOR(1), offset = i == COUNT(offsets) ? 8 : offsets[i];
            expected = 1;
            if (sigsetjmp(back, 1) == 0) {
                if (kind == 0)
                    __asm__ volatile("mov %1, %%fs; movl %%fs:(%2), %0" : "=r"(value) : "r"(selector), "r"(offset) : "memory");
                else if (kind == 1)
                    __asm__ volatile("mov %0, %%fs; movb $1, %%fs:(%1)" : : "r"(selector), "r"(offset) : "memory");
                else
                    __asm__ volatile("push %%es; mov %1, %%es; movl %%es:(%2), %0; pop %%es" : "=r"(value) : "r"(selector), "r"(offset) : "memory");
                printf("offset %x kind %d: %x\n", offset, kind, value);
            } else {
                printf("offset %x kind %d\n", offset, kind);
            }
        }
#endif
    __asm__ volatile("mov %0, %%" FREE_SEGMENT : : "r"(0));
}

/* On a stack in the low 4 GiB: a far call, which returns far with a result in EAX. */
void far_call(void);
__asm__(".globl far_call\nfar_call:\n"
        "push" S " %" NBX "\n"
        "mov %" NSP ", kept_stack\n"
        "mov far_stack, %" NSP "\n"
        "mov far_argument, %" NCX "\n"
        "xor %eax, %eax\n"
        "lcall *far_pointer\n"
        "mov kept_stack, %" NSP "\n"
        "mov %" NAX ", far_result\n"
        "pop" S " %" NBX "\n"
        "ret\n");

static uint32_t call(unsigned selector, uint32_t offset, uint32_t argument)
{
    far_pointer.offset = offset;
    far_pointer.selector = (uint16_t)selector;
    far_stack = (word)low_stack + sizeof low_stack - 64;
    far_argument = argument;
#ifdef __x86_64__
    __asm__ volatile("sub $128, %%rsp; call far_call; add $128, %%rsp" : : : "rax", "rcx", "rdx", "memory", "cc");
#else
    __asm__ volatile("call far_call" : : : "eax", "ecx", "edx", "memory", "cc");
#endif
    return (uint32_t)far_result;
}

static void code(void)
{
    /* In 32 bits: mov eax, 0x33221148; inc eax; loop back to the inc; add eax, ecx; lret
       In 16 bits the same bytes begin with mov ax, 0x1148; and (sub sp …) are others: so 16-bit code has its own. */
    static const uint8_t code32[] = {0xb8, 0x48, 0x11, 0x22, 0x33, 0x40, 0xe2, 0xfd, 0x01, 0xc8, 0xcb};
    static const uint8_t code16[] = {0xb8, 0x34, 0x12, 0x66, 0x05, 0, 0, 1, 0, 0x40, 0xe2, 0xfd, 0x66, 0xcb};
    /* test cl, 1; then in 32 bits mov eax, 0x40400001, in 16 bits mov ax, 1; inc ax; inc ax; je +1; and a far return of 32-bit
       size, which wants a prefix in 16 bits. The argument says which it is. */
    static const uint8_t both[] = {0xf6, 0xc1, 1, 0xb8, 1, 0, 0x40, 0x40, 0xf6, 0xc1, 1, 0x74, 1, 0x66, 0xcb};
    const char *features = getenv("STRESS_FEATURES"); /* not every kernel allows 16-bit segments */
    int has_code16 = features && strstr(features, " code16 ");
    uint64_t hash = 0;
    if (mprotect(area, sizeof area, RWX))
        die("mprotect");
    for (unsigned i = 0; i < 100; i++) {
        word base = (word)area + i * 61 + 1000;
        memcpy((void *)(base + 16), code32, sizeof code32);
        set_entry(2, base, 0xfffff, 1, 1);
        hash = mix(hash, call(SELECTOR(2), 16, 1 + i % 9));
        /* the same bytes by another base */
        set_entry(3, base - 100, 0xfffff, 1, 1);
        hash = mix(hash, call(SELECTOR(3), 116, 2));
        if (!has_code16)
            continue;
        memcpy((void *)(base + 16), code16, sizeof code16);
        set_entry(2, base, 0xffff, 1, 0);
        hash = mix(hash, call(SELECTOR(2), 16, 1 + i % 9));
    }
    say("code", hash);
    if (has_code16) {
        memcpy(area + 64, both, sizeof both);
        set_entry(4, (word)area, 0xfffff, 1, 1);
        set_entry(5, (word)area, 0xffff, 1, 0);
        for (unsigned i = 0; i < 300; i++) {
            int small = i % 3 == 0;
            hash = mix(hash, call(SELECTOR(small ? 5 : 4), 64, small) & (small ? 0xffff : ~0u));
        }
    }
    say("one code in two modes", hash);
#ifdef __x86_64__
    /* The kernel's own 32-bit code segment, flat. */
    for (unsigned i = 0; i < 100; i++) {
        memcpy(area + 2000 + i, code32, sizeof code32);
        hash = mix(hash, call(0x23, (uint32_t)(word)(area + 2000 + i), 3 + i % 4));
    }
    say("compatibility mode", hash);
#endif
}

#ifdef __i386__
/* The limit of a code segment, which cuts the code's last byte off. */
static void code_limit(void)
{
    static const uint8_t code32[] = {0xb8, 0x48, 0x11, 0x22, 0x33, 0xcb};
    if (mprotect(area, sizeof area, RWX))
        die("mprotect");
    memcpy(area + 64, code32, sizeof code32);
    set_entry(6, (word)area, 64 + sizeof code32 - 2, 1, 1);
    for (int i = 0; i < 3; i++)
        if (expected = 1, sigsetjmp(back, 1) == 0)
            say("not over the limit", call(SELECTOR(6), 64, 1));
}
#endif

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    (void)argv;
    stack_t other = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&other, NULL);
    catch_signal(SIGSEGV, faulted, SA_ONSTACK | SA_NODEFER);
    if (argc > 1) {
#ifdef __i386__
        printf("%s\n", argv[1]);
        code_limit();
#endif
        return 0;
    }
    data();
    code();
    return 0;
}
