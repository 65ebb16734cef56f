/* Control flow that no shadow return stack foresees: returns to elsewhere, jumps through tables, other stacks. */
#include "common.h"

#include <setjmp.h>
#include <ucontext.h>

static uint64_t hash;

/* ── indirect calls with changing targets ── */
static NOINLINE uint32_t f0(uint32_t x) { return x + 1; }
static NOINLINE uint32_t f1(uint32_t x) { return x * 3; }
static NOINLINE uint32_t f2(uint32_t x) { return x ^ 0x5555; }
static NOINLINE uint32_t f3(uint32_t x) { return x << 7 | x >> 25; }
static uint32_t (*volatile table[4])(uint32_t) = {f0, f1, f2, f3};

static void indirect(void)
{
    uint64_t seed = 1;
    uint32_t x = 1;
    for (int i = 0; i < 20000; i++)
        x = table[next_random(&seed) & 3](x);
    say("indirect", x);
}

/* ── the return address is changed, in every way ── */
static NOINLINE word replaced_return(word way)
{
    word result;
    __asm__ volatile(
        "cmp $0, %1\n\tje 10f\n\tcmp $1, %1\n\tje 20f\n\tcmp $2, %1\n\tje 30f\n\tcmp $3, %1\n\tje 40f\n\tjmp 50f\n"
        /* 0: the callee adds to its return address: skips a two-byte instruction */
        "10:\txor %%eax, %%eax\n\tcall 11f\n\tmov $1, %%al\n\tor $16, %%al\n\tjmp 90f\n"
        "11:\tadd" S " $2, (%%" NSP ")\n\tret\n"
        /* 1: push and ret as a jump */
        "20:\tcall 21f\n21:\tpop %%" NCX "\n\tadd $22f-21b, %%" NCX "\n\tpush %%" NCX "\n\tmov $2, %%eax\n\tret\n\tud2\n"
        "22:\tadd $32, %%eax\n\tjmp 90f\n"
        /* 2: two calls, one return past both */
        "30:\tcall 31f\n\tmov $3, %%eax\n\tjmp 90f\n"
        "31:\tcall 32f\n\tud2\n"
        "32:\tlea " W "(%%" NSP "), %%" NSP "\n\tret\n"
        /* 3: a call whose return address is popped and forgotten, many times */
        "40:\tmov $40, %%ecx\n41:\tcall 42f\n\tud2\n42:\tpop %%" NDX "\n\tdec %%ecx\n\tjnz 41b\n\tmov $4, %%eax\n\tjmp 90f\n"
        /* 4: ret with an operand, over arguments */
        "50:\tpush $5\n\tpush $6\n\tcall 51f\n\tjmp 90f\n51:\tmov " W "(%%" NSP "), %%" NAX "\n\tret $2*" W "\n"
        "90:"
        : "=&a"(result)
        : "b"(way)
        : NCX, NDX, "memory", "cc");
    return result;
}

static void returns(void)
{
    for (word i = 0; i < 2000; i++)
        hash = mix(hash, replaced_return(i % 5));
    for (word way = 0; way < 5; way++)
        say("return", replaced_return(way));
}

/* ── longjmp out of deep calls, into frames that wait ── */
static jmp_buf places[8];

static NOINLINE int deep(int n, int to)
{
    if (n == 0)
        longjmp(places[to], to + 1);
    return deep(n - 1, to) + 1;
}

static void jumps(void)
{
    for (volatile int i = 0; i < 300; i++) {
        int came = setjmp(places[i % 8]);
        if (came == 0)
            hash = mix(hash, (uint64_t)deep(i % 90, i % 8));
        else
            hash = mix(hash, (uint64_t)(came + i * 10));
    }
    say("longjmp", hash);
}

/* ── coroutines on stacks of their own ── */
static ucontext_t main_context, others[3];
static volatile int turn;

static void coroutine(int number)
{
    for (int i = 0; i < 50; i++) {
        hash = mix(hash, (uint64_t)(number * 100 + i));
        int next = (number + 1 + i % 2) % 3;
        turn = next;
        if (next != number)
            swapcontext(&others[number], &others[next]);
    }
    setcontext(&main_context);
}

static void coroutines(void)
{
    static uint8_t stacks[3][65536];
    for (int i = 0; i < 3; i++) {
        getcontext(&others[i]);
        others[i].uc_stack.ss_sp = stacks[i];
        others[i].uc_stack.ss_size = sizeof stacks[i];
        others[i].uc_link = &main_context;
        makecontext(&others[i], (void (*)(void))coroutine, 1, i);
    }
    swapcontext(&main_context, &others[0]);
    say("coroutines", hash);
}

/* ── recursion: deeper than any return stack; by two functions; with a jump table in each frame ── */
static NOINLINE uint32_t down(uint32_t n, uint32_t x);
static NOINLINE uint32_t other(uint32_t n, uint32_t x)
{
    switch (x % 6) {
    case 0: x += 5; break;
    case 1: x = x * 7; break;
    case 2: x ^= n; break;
    case 3: x = x >> 1; break;
    case 4: x -= n; break;
    default: x = ~x; break;
    }
    return n == 0 ? x : down(n - 1, x) + (x & 1);
}
static NOINLINE uint32_t down(uint32_t n, uint32_t x) { return n == 0 ? x : other(n - 1, x * 3 + 1) ^ n; }

static void recursion(void)
{
    say("shallow", other(30, 1));
    for (uint32_t i = 0; i < 40; i++)
        hash = mix(hash, other(i * 37, i));
    say("deep", other(60000, 7));
    say("recursion", hash);
}

/* ── jumps computed with every addressing; call through memory that the call itself overwrites ── */
static void computed(void)
{
    static const void *labels[] = {&&a, &&b, &&c, &&d, &&e};
    volatile uint32_t steps = 0;
    uint32_t x = 1;
    goto *labels[0];
a:
    x = x * 5 + 1;
    goto *labels[1 + x % 3];
b:
    x ^= x >> 3;
    if (++steps > 5000)
        goto e;
    goto *labels[x % 4];
c:
    x += 77;
    if (++steps > 5000)
        goto *labels[4];
    goto *labels[(x >> 5) % 4];
d:
    x = ~x;
    if (++steps > 5000)
        goto e;
    goto *labels[x % 2 ? 0 : 2];
e:
    say("computed", x);
    word result = 0;
    uint8_t *stack = pages(2, RW);
    /* call [sp - word]: the target is read before the return address is pushed onto its place */
    word top = (word)stack + PAGE;
    __asm__ volatile("mov %%" NSP ", %%" NBX "\n\tmov %1, %%" NSP "\n\t"
                     "call 1f\n1:\tpop %%" NCX "\n\tadd $2f-1b, %%" NCX "\n\t"
                     "mov %%" NCX ", -" W "(%%" NSP ")\n\t"
                     "call *-" W "(%%" NSP ")\n\tadd $1, %%eax\n\tjmp 3f\n"
                     "2:\tmov $70, %%eax\n\tret\n"
                     "3:\tmov %%" NBX ", %%" NSP
                     : "=&a"(result)
                     : "D"(top)
                     : NBX, NCX, "memory", "cc");
    say("overwritten target", result);
    /* loop, jcxz, short and long forms */
    __asm__ volatile("xor %%eax, %%eax\n\tmov $100, %%ecx\n1:\tadd %%ecx, %%eax\n\tloop 1b\n\t"
                     "mov $50, %%ecx\n2:\tinc %%eax\n\tcmp $20, %%ecx\n\tloopne 2b\n\t"
                     "mov $9, %%ecx\n3:\tcmp %%eax, %%eax\n\tloope 3b\n\t"
                     "xor %%ecx, %%ecx\n\tjecxz 4f\n\tud2\n4:"
                     : "=&a"(result)
                     :
                     : NCX, "cc");
    say("loops", result);
}

int main(void)
{
    indirect();
    returns();
    jumps();
    coroutines();
    recursion();
    computed();
    return 0;
}
