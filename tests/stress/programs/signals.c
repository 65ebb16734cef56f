/* Signals from exceptions: what the handler sees of the registers, what it changes, where the program goes on. */
#include "common.h"

#include <fenv.h>
#include <setjmp.h>
#include <sys/time.h>
#include <time.h>

static word flags_after;
static word start_of_code; /* addresses are printed relative to it */
static uint8_t *area;
static int skip; /* bytes of the faulting instruction */

static void show(const char *what, siginfo_t *info, void *context)
{
    static const int shown[] = {AX, BX, CX, DX, SI, DI};
    printf("%s: signal %d code %d trap %d error %lx at +%lx", what, info->si_signo, info->si_code, (int)reg(context, REG_TRAPNO),
           (long)reg(context, REG_ERR) & 0x1f, (long)(reg(context, IP) - start_of_code));
    for (size_t i = 0; i < COUNT(shown); i++) {
        word value = reg(context, shown[i]);
        if (value - (word)area < 8 * PAGE)
            printf(" area+%lx", (long)(value - (word)area));
        else
            printf(" %lx", (long)value);
    }
    printf(" flags %lx", (long)reg(context, REG_EFL) & ARITHMETIC);
    if (info->si_signo == SIGSEGV && info->si_code > 0 && info->si_code < 3)
        printf(" address %lx", (long)((word)info->si_addr - (word)area));
    if (info->si_signo == SIGFPE || info->si_signo == SIGILL)
        printf(" address +%lx", (long)((word)info->si_addr - start_of_code));
    printf("\n");
}

static void skipped(int number, siginfo_t *info, void *context)
{
    (void)number;
    show("fault", info, context);
    set_reg(context, IP, reg(context, IP) + (unsigned)skip);
    set_reg(context, AX, 0x1000 + reg(context, AX) % 256);
    set_reg(context, REG_EFL, reg(context, REG_EFL) ^ 1); /* CF */
}

/* Runs one instruction with known registers and flags; the handler skips it. */
#define ATTEMPT(text, length)                                                                                          \
    do {                                                                                                               \
        word a = 0x11, b = (word)area + 0x88, c = 0x33, d = 0x44, s = (word)area + PAGE - 2, t = (word)area + 2 * PAGE;   \
flags_after = 0; \
        skip = length;                                                                                                 \
        __asm__ volatile("jmp 3f\n"                                                                                   \
                         "1:\tcmp $0x7f, %%al\n\t"                                                                     \
                         "stc\n"                                                                                      \
                         "2:\t" text "\n\t"                                                                            \
                         PUSHF "\n\tpop" S " %0\n\tjmp 4f\n"                                                                \
                         "3:\tcall 5f\n5:\tpop" S " %1\n\tadd" S " $1b-5b, %1\n\tjmp 1b\n4:"                         \
                         : "=m"(flags_after), "=m"(start_of_code), "+a"(a), "+b"(b), "+c"(c), "+d"(d), "+S"(s), "+D"(t)        \
                         :                                                                                             \
                         : "memory", "cc");                                                                            \
        printf("%-24s after: %lx %lx %lx flags %lx\n", text, (long)a, (long)c, (long)d, (long)flags_after & ARITHMETIC);      \
    } while (0)

static void faults(void)
{
    area = pages(8, RW);
    protect(area + 2 * PAGE, 1, PROT_NONE);
    protect(area + PAGE, 1, PROT_READ);
    memset(area, 0x21, PAGE);
    catch_signal(SIGSEGV, skipped, 0);
    catch_signal(SIGFPE, skipped, 0);
    catch_signal(SIGILL, skipped, 0);
    catch_signal(SIGTRAP, skipped, 0);
    catch_signal(SIGBUS, skipped, 0);
    ATTEMPT("movl (%%" NDI "), %%ecx", 2);
    ATTEMPT("movl %%ecx, (%%" NDI ")", 2);
    ATTEMPT("movl %%ecx, (%%" NSI ")", 2);
    ATTEMPT("addl %%ecx, (%%" NDI ")", 2);
    ATTEMPT("addl (%%" NDI "), %%ecx", 2);
    ATTEMPT("adcl %%ecx, 4(%%" NSI ")", 3);
    ATTEMPT("lock incl (%%" NDI ")", 3);
    ATTEMPT("push (%%" NDI ")", 2);
    ATTEMPT("pop (%%" NDI ")", 2);
    ATTEMPT("call *(%%" NDI ")", 2);
    ATTEMPT("jmp *(%%" NDI ")", 2);
    ATTEMPT("xchgl %%ecx, (%%" NDI ")", 2);
    ATTEMPT("cmpxchgl %%ecx, (%%" NDI ")", 3);
    ATTEMPT("movups (%%" NDI "), %%xmm0", 3);
    ATTEMPT("movaps 1(%%" NBX "), %%xmm0", 4);
    ATTEMPT("movaps %%xmm0, 4(%%" NSI ")", 4);
    ATTEMPT("movsb", 1);
    ATTEMPT("lodsl", 1);
    ATTEMPT("stosb", 1);
    ATTEMPT("fldl (%%" NDI ")", 2);
    ATTEMPT("xor %%edx, %%edx\n\tdivl %%edx", 2);
    ATTEMPT("mov $0x80000000, %%eax\n\tcltd\n\tmov $-1, %%ecx\n\tidivl %%ecx", 2);
    ATTEMPT("divb 0x100(%%" NBX ")", 6);
    ATTEMPT("ud2", 2);
    ATTEMPT("hlt", 1);
    ATTEMPT("cli", 1);
    ATTEMPT("in %%dx, %%al", 1);
    ATTEMPT("int3", 0);
    ATTEMPT("int $3", 0);
    ATTEMPT("mov %%cr0, %%" NAX, 3);
    ATTEMPT("rdmsr", 2);
    ATTEMPT("mov $0xfff3, %%ecx\n\tmov %%ecx, %%ds", 2);
    ATTEMPT("int $0x30", 2);
    ATTEMPT("lgdt (%%" NBX ")", 3);
    ATTEMPT("btsl %%ecx, (%%" NDI ")", 3);
    ATTEMPT("imull (%%" NDI "), %%ecx", 3);
    ATTEMPT("shll %%cl, (%%" NDI ")", 2);
    ATTEMPT("testb $1, (%%" NDI ")", 3);
    ATTEMPT("enter $16, $0\n\tleave\n\tmov (%%" NDI "), %%ecx", 2);
#ifdef __x86_64__
    /* Non-canonical: #GP, and #SS through RSP or RBP; no address is given. */
    ATTEMPT("mov $0x8000000000000000, %%rcx\n\tmov (%%rcx), %%al", 2);
    ATTEMPT("mov $0x4000000000000000, %%rcx\n\tjmp *%%rcx", 2);
#endif
    signal(SIGBUS, SIG_DFL);
}

/* Executing where nothing may be executed: the instruction pointer is the address; the handler returns. */
static void returned(int number, siginfo_t *info, void *context)
{
    (void)number;
    printf("jump: area+%lx, address area+%lx, error %lx\n", (long)(reg(context, IP) - (word)area),
           (long)((word)info->si_addr - (word)area), (long)reg(context, REG_ERR) & 0x1f);
    word stack = reg(context, SP), to;
    memcpy(&to, (void *)stack, sizeof to);
    set_reg(context, IP, to);
    set_reg(context, SP, stack + sizeof to);
}

static void jumps(void)
{
    catch_signal(SIGSEGV, returned, 0);
    protect(area + 3 * PAGE, 1, RX);
    /* Pages 0 and 1 can be read but not run: 32-bit kernels run them all the same. */
    for (int page = sizeof(word) == 8 ? 0 : 2; page < 3; page++) {
        word target = (word)(area + (unsigned)page * PAGE + 0x10);
        __asm__ volatile("call *%0" : : "r"(target) : NAX, NCX, NDX, "memory", "cc");
    }
    /* An instruction whose second half is not there: page 3 is code, page 4 is none. */
    protect(area + 3 * PAGE, 1, RWX);
    protect(area + 4 * PAGE, 1, PROT_NONE);
    area[4 * PAGE - 3] = 0xb8; /* mov eax, imm32: three bytes here, two there */
    word target = (word)(area + 4 * PAGE - 3);
    __asm__ volatile("call *%0" : : "r"(target) : NAX, NCX, NDX, "memory", "cc");
    area[4 * PAGE - 3] = 0x90;
    area[4 * PAGE - 2] = 0x90;
    area[4 * PAGE - 1] = 0x90; /* runs off the page's end */
    __asm__ volatile("call *%0" : : "r"(target) : NAX, NCX, NDX, "memory", "cc");
}

/* Single steps: the address after every instruction. */
static uint64_t steps_hash;
static int steps;
static word last;

static void stepped(int number, siginfo_t *info, void *context)
{
    (void)number;
    steps++;
    word at = reg(context, IP) - start_of_code;
    steps_hash = mix(steps_hash, at);
    steps_hash = mix(steps_hash, reg(context, AX));
    steps_hash = mix(steps_hash, reg(context, CX));
    steps_hash = mix(steps_hash, (word)info->si_code);
    if (steps < 60)
        printf("%s%lx", steps % 20 == 1 ? "\nsteps " : " ", (long)at);
    last = at;
}

static NOINLINE void single_steps(void)
{
    word a = 0, c = 5, s = (word)area, t = (word)area + 200;
    memset(area, 1, PAGE);
    catch_signal(SIGTRAP, stepped, 0);
    __asm__ volatile("call 1f\n1:\tpop" S " %1\n\t"
                     PUSHF "\n\torl $0x100, (%%" NSP ")\n\t" POPF "\n\t"
                     "nop\n"
                     "2:\tadd $3, %%eax\n\t"
                     "dec %%ecx\n\t"
                     "jnz 2b\n\t"
                     "mov $6, %%ecx\n\t"
                     "rep movsb\n\t" /* a step an iteration */
                     "call 3f\n\t"
                     "jmp 4f\n"
                     "3:\tlea 1(%%" NAX "), %%eax\n\tret\n"
                     "4:\tpush %%" NAX "\n\tpop %%" NDX "\n\t"
                     "xor %%ecx, %%ecx\n\trep stosb\n\t"
                     PUSHF "\n\tandl $~0x100, (%%" NSP ")\n\t" POPF "\n\t"
                     "nop\n\tnop\n\t"
                     PUSHF "\n\tpop" S " %0"
                     : "=m"(flags_after), "=m"(start_of_code), "+a"(a), "+c"(c), "+S"(s), "+D"(t)
                     :
                     : NDX, "memory", "cc");
    printf("\n%d steps, last at %lx, %016llx, TF %ld\n", steps, (long)last, (unsigned long long)steps_hash,
           (long)(flags_after & 0x100));
}

/* Floating-point exceptions, unmasked. */
static sigjmp_buf back;

static void jumped(int number, siginfo_t *info, void *context)
{
    printf("signal %d code %d trap %d\n", number, info->si_code, (int)reg(context, REG_TRAPNO));
    siglongjmp(back, 1);
}

static void floating(void)
{
    static volatile double zero, one = 1, huge = 1e308, tiny = 1e-308;
    catch_signal(SIGFPE, jumped, SA_NODEFER);
    for (int kind = 0; kind < 8; kind++) {
        unsigned mxcsr = 0x1f80 & ~(kind & 1 ? 0x1e80u : 0u);
        unsigned short control = kind & 1 ? 0x37f : 0x360;
        if (sigsetjmp(back, 1) == 0) {
            volatile double result;
            __asm__ volatile("fninit; fldcw %0; ldmxcsr %1" : : "m"(control), "m"(mxcsr));
            double a = kind / 2 == 0 ? one : kind / 2 == 1 ? zero : kind / 2 == 2 ? huge : tiny;
            double b = kind / 2 == 2 ? huge : kind / 2 == 3 ? tiny : zero;
            if (kind & 1) {
                if (kind / 2 < 2)
                    __asm__ volatile("divsd %1, %0" : "+x"(a) : "x"(b));
                else
                    __asm__ volatile("mulsd %1, %0" : "+x"(a) : "x"(b));
                result = a;
            } else {
                if (kind / 2 < 2)
                    __asm__ volatile("fldl %1; fdivl %2; fwait; fstpl %0; fwait" : "=m"(result) : "m"(a), "m"(b));
                else
                    __asm__ volatile("fldl %1; fmull %2; fstpl %0; fwait" : "=m"(result) : "m"(a), "m"(b));
            }
            uint64_t bits;
            double copy = result;
            memcpy(&bits, &copy, 8);
            printf("floating %d: no signal, %llx\n", kind, (unsigned long long)bits);
        }
        unsigned clear = 0x1f80;
        __asm__ volatile("fninit; ldmxcsr %0" : : "m"(clear));
    }
}

/* A handler on a stack of its own, when the other one is full. */
static int depth_reached;

static void overflowed(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)info;
    int here;
    stack_t current;
    sigaltstack(NULL, &current);
    printf("overflow: on the other stack %d, fault near the stack pointer %d\n",
           (word)&here - (word)current.ss_sp < current.ss_size,
           (word)info->si_addr - reg(context, SP) + 65536 < 131072);
    siglongjmp(back, 1);
}

static NOINLINE int recurse(int n)
{
    volatile char space[512];
    space[0] = (char)n;
    depth_reached = n;
    return recurse(n + 1) + space[0];
}

static void overflow(void)
{
    stack_t other = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&other, NULL);
    catch_signal(SIGSEGV, overflowed, SA_ONSTACK);
    for (int i = 0; i < 3; i++)
        if (sigsetjmp(back, 1) == 0)
            recurse(0);
    printf("overflow: deep %d\n", depth_reached > 1000);
}

/* A timer that interrupts a calculation anywhere: nothing of it may show. */
static volatile int ticks;

static void ticked(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    ticks++;
    /* Everything that the interrupted code may hold is spoilt here. */
    __asm__ volatile("pxor %%xmm0, %%xmm0; pxor %%xmm7, %%xmm7; cmp %%eax, %%eax; stc" : : : "xmm0", "xmm7", "cc");
    volatile double x = ticks;
    x = x * 3 / 7;
}

static void interrupted(void)
{
    struct itimerval every = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    uint64_t first = 0;
    catch_signal(SIGALRM, ticked, SA_RESTART);
    for (int round = 0; round < 40 || (ticks < 5 && round < 100000); round++) {
        uint64_t hash = 1, seed = 9;
        double sum = 0;
        long double wide = 0;
        for (int i = 0; i < 20000; i++) {
            hash = mix(hash, next_random(&seed));
            hash = hash << 7 | hash >> 57;
            sum += 1.0 / (double)(1 + (hash & 1023));
            wide += sum;
        }
        hash = mix_bytes(hash, &sum, sizeof sum);
        hash = mix_bytes(hash, &wide, 10);
        if (round == 0) {
            first = hash;
            setitimer(ITIMER_REAL, &every, NULL);
        } else if (hash != first) {
            setitimer(ITIMER_REAL, &never, NULL);
            printf("interrupted: round %d differs\n", round);
            return;
        }
    }
    setitimer(ITIMER_REAL, &never, NULL);
    printf("interrupted: %016llx, ticks %d\n", (unsigned long long)first, ticks >= 5);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    faults();
    jumps();
    single_steps();
    floating();
    overflow();
    interrupted();
    return 0;
}
