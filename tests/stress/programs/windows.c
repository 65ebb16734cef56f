/* Addresses that are nobody's, read and written by instructions that have long read and written somebody's: above and
 * below what a program may use, and where an emulator that puts a program's memory at host addresses that follow from
 * the guest's would have other memory of the program, or its own. And mappings that change under such instructions. */
#include "common.h"

#include <setjmp.h>

static sigjmp_buf back;
static volatile word fault_at, fault_error, fault_number, fault_code;

static void faulted(int number, siginfo_t *info, void *context)
{
    fault_at = (word)info->si_addr;
    fault_error = reg(context, REG_ERR) & 7;
    fault_number = (word)number;
    fault_code = (word)info->si_code;
    siglongjmp(back, 1);
}

/* The forms of an operand, each in an instruction of its own, which keeps what it has learnt of its addresses. */
#define FORMS(X) X(0) X(1) X(2) X(3) X(4) X(5)

static NOINLINE word touch(int form, uint8_t *at)
{
    word value = 0;
    uint8_t *base = at - 0x40;
    word index = (word)at >> 3, rest = (word)at & 7;
    switch (form) {
    case 0: __asm__ volatile("mov (%1), %b0" : "+q"(value) : "r"(at)); break;
    case 1: __asm__ volatile("mov 0x40(%1), %b0" : "+q"(value) : "r"(base)); break;
    case 2: __asm__ volatile("mov (%1,%2,8), %b0" : "+q"(value) : "r"(rest), "r"(index)); break;
    case 3: __asm__ volatile("mov -0x7fffffff(%1), %b0" : "+q"(value) : "r"(at + 0x7fffffff)); break;
    case 4: __asm__ volatile("addb $0, (%1); setz %b0" : "+q"(value) : "r"(at) : "memory", "cc"); break;
    default: __asm__ volatile("mov %1, %%r11; cmpb $7, (%%r11); seta %b0" : "+q"(value) : "r"(at) : "r11", "cc"); break;
    }
    return value;
}

static word hash = 14695981;

static void note(word value)
{
    hash = (hash ^ value) * (word)16777619u;
}

/* What an access does: its value, or its fault. */
static void probe(int form, uint8_t *at)
{
    if (sigsetjmp(back, 1) == 0) {
        note(touch(form, at));
    } else {
        note(fault_number << 16 | fault_code << 8 | fault_error);
        /* The address of a fault that has one. */
        note(fault_at ? 1 + (fault_at == (word)at) : 0);
    }
}

static uint8_t fixed[2 * PAGE] __attribute__((aligned(4096)));
static uint8_t constant = 9;

static void warm(int form, uint8_t *stack, uint8_t *mapped)
{
    for (int turn = 0; turn < 3000; turn++) {
        note(touch(form, fixed + turn % 4096));
        if (form % 2)
            note(touch(form, stack + turn % 4096));
        note(touch(form, mapped + turn % 4096));
    }
}

#ifdef __x86_64__
static const unsigned shifts[] = { 38, 39, 45, 46, 47, 48, 63 };

static void addresses(int form, uint8_t *stack, uint8_t *mapped)
{
    uint8_t *const known[] = { fixed, stack, mapped, &constant };
    /* What other bits would make of good addresses. */
    for (unsigned k = 0; k < COUNT(known); k++)
        for (unsigned n = 0; n < COUNT(shifts); n++) {
            probe(form, (uint8_t *)((word)known[k] ^ (word)1 << shifts[n]));
            if (shifts[n] < 45)
                continue; /* Whether that reaches beyond what is canonical is by chance. */
            probe(form, (uint8_t *)((word)known[k] + ((word)1 << shifts[n])));
            probe(form, (uint8_t *)((word)known[k] - ((word)1 << shifts[n])));
        }
    /* All over what is not canonical, and its ends. */
    for (word at = (word)1 << 47; at < (word)1 << 48; at += (word)1 << 37) {
        probe(form, (uint8_t *)at);
        probe(form, (uint8_t *)(at + 0x7fff7000));
    }
    static const word ends[] = { 0, 1, 0xfff, 0x10000, (word)1 << 39, (word)1 << 46, ((word)1 << 46) + 0x400000 };
    for (unsigned n = 0; n < COUNT(ends); n++) {
        probe(form, (uint8_t *)ends[n]);
        probe(form, (uint8_t *)(0 - ends[n] - 1));
        probe(form, (uint8_t *)(((word)1 << 47) - 4096 + ends[n] % 4096));
    }
}
#else
static void addresses(int form, uint8_t *stack, uint8_t *mapped)
{
    (void)stack;
    (void)mapped;
    probe(form, (uint8_t *)0);
    probe(form, (uint8_t *)0xfffff000u);
}
#endif

/* Pages that come, go, change their rights and their places. */
static void mappings(int form)
{
    uint8_t *area = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *other = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED || other == MAP_FAILED)
        exit(2);
    for (unsigned round = 0; round < 40; round++) {
        memset(area, (int)round, 4 * PAGE);
        memset(other, (int)(100 + round), PAGE);
        for (unsigned turn = 0; turn < 400; turn++)
            note(touch(form, area + turn * 37 % (4 * PAGE)));
        mprotect(area + PAGE, PAGE, PROT_READ);
        probe(form, area + PAGE + round);
        mprotect(area + 2 * PAGE, PAGE, PROT_NONE);
        probe(form, area + 2 * PAGE + round);
        mprotect(area + PAGE, 2 * PAGE, PROT_READ | PROT_WRITE);
        probe(form, area + PAGE + round);
        probe(form, area + 2 * PAGE + round);
        madvise(area + 3 * PAGE, PAGE, MADV_DONTNEED);
        probe(form, area + 3 * PAGE + round);
        munmap(area, PAGE);
        probe(form, area + round);
        if (mremap(other, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, area) != area)
            exit(2);
        probe(form, area + round);
        probe(form, other + round);
        if (mmap(other, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != other)
            exit(2);
        probe(form, other + round);
    }
    munmap(area, 4 * PAGE);
    munmap(other, PAGE);
}

int main(void)
{
    struct sigaction action = { .sa_sigaction = faulted, .sa_flags = SA_SIGINFO | SA_NODEFER };
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGBUS, &action, 0);
    uint8_t stack[4096];
    uint8_t *mapped = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
        return 2;
    for (unsigned n = 0; n < 4096; n++)
        stack[n] = (uint8_t)(fixed[n] = (uint8_t)(mapped[n] = (uint8_t)(n * 7)));
#define WHOLE(form)                                                                                                    \
    warm(form, stack, mapped);                                                                                         \
    printf("form %d: warm %llx", form, (unsigned long long)hash);                                                      \
    addresses(form, stack, mapped);                                                                                    \
    printf(" addresses %llx", (unsigned long long)hash);                                                               \
    mappings(form);                                                                                                    \
    warm(form, stack, mapped);                                                                                         \
    printf(" mappings %llx\n", (unsigned long long)hash);
    FORMS(WHOLE)
    return 0;
}
