/* Accesses of every size over every boundary; and that what faults on its second page changes nothing on its first. */
#include "common.h"

#include <emmintrin.h>
#include <setjmp.h>

static uint8_t *area;
static sigjmp_buf back;
static volatile word fault_at;
static volatile word fault_error;

static void faulted(int number, siginfo_t *info, void *context)
{
    (void)number;
    fault_at = (word)info->si_addr - (word)area;
    fault_error = reg(context, REG_ERR) & 7;
    siglongjmp(back, 1);
}

static void fill(uint64_t seed)
{
    for (unsigned i = 0; i < 3 * PAGE; i++)
        area[i] = (uint8_t)next_random(&seed);
}

static uint64_t sum;

/* One access of each kind at an address; kinds from 20 on only read. */
static NOINLINE int access_kind(int kind, uint8_t *at)
{
    word value = 0x12345678, flags = 0;
    uint64_t wide = 0x1122334455667788;
    __m128i vector = _mm_set_epi32(1, 2, 3, 4);
    long double extended = 1.25L;
    switch (kind) {
    case 0: __asm__ volatile("movw %w1, %0" : "=m"(*at) : "r"(value) : "memory"); break;
    case 1: __asm__ volatile("movl %k1, %0" : "=m"(*at) : "r"(value) : "memory"); break;
    case 2: __asm__ volatile("movq %1, %%xmm0; movq %%xmm0, %0" : "=m"(*at) : "m"(wide) : "memory", "xmm0"); break;
    case 3: _mm_storeu_si128((__m128i *)at, vector); break;
    case 4: __asm__ volatile("addl %k1, %0\n\t" PUSHF "\n\tpop %2" : "+m"(*at) : "r"(value), "r"(flags) : "memory", "cc"); break;
    case 5: __asm__ volatile("lock addl %k1, %0" : "+m"(*at) : "r"(value) : "memory", "cc"); break;
    case 6: __asm__ volatile("xchgl %k1, %0" : "+m"(*at), "+r"(value) : : "memory"); break;
    case 7: __asm__ volatile("lock xaddl %k1, %0" : "+m"(*at), "+r"(value) : : "memory", "cc"); break;
    case 8: __asm__ volatile("notw %0" : "+m"(*at) : : "memory"); break;
    case 9: __asm__ volatile("fldt %1; fstpt %0" : "=m"(*at) : "m"(extended) : "memory"); break;
    case 10: __asm__ volatile("fldt %1; fstpl %0" : "=m"(*at) : "m"(extended) : "memory"); break;
    case 11: __asm__ volatile("fildll %1; fistpll %0" : "=m"(*at) : "m"(wide) : "memory"); break;
    case 12: __asm__ volatile("sete %0; incl %0" : "+m"(*at) : : "memory", "cc"); break;
    case 13: __asm__ volatile("rolw $3, %0" : "+m"(*at) : : "memory", "cc"); break;
    case 14: __asm__ volatile("btsl %k1, %0" : "+m"(*at) : "r"((word)13) : "memory", "cc"); break;
    case 15: __asm__ volatile("cmpxchgl %k1, %0" : "+m"(*at), "+a"(flags) : "r"(value) : "memory", "cc"); break;
    case 16: __asm__ volatile("movups %1, %0" : "=m"(*at) : "x"(vector) : "memory"); break;
    case 17: __asm__ volatile("fnstcw %0" : "=m"(*at) : : "memory"); break;
    case 18: __asm__ volatile("movhps %1, %0" : "=m"(*at) : "x"(vector) : "memory"); break;
#ifdef __x86_64__
    case 19: __asm__ volatile("movq %1, %0" : "=m"(*at) : "r"(wide) : "memory"); break;
    case 20: __asm__ volatile("subq %1, %0" : "+m"(*at) : "r"(wide) : "memory", "cc"); break;
#endif
    case 21: __asm__ volatile("movl %1, %k0" : "=r"(value) : "m"(*at) : "memory"); break;
    case 22: __asm__ volatile("cmpl %k1, %2\n\t" PUSHF "\n\tpop %0" : "=r"(flags) : "r"(value), "m"(*at) : "memory", "cc"); break;
    case 23: vector = _mm_loadu_si128((const __m128i *)at); break;
    case 24: __asm__ volatile("movzwl %1, %k0" : "=r"(value) : "m"(*at) : "memory"); break;
    case 25: __asm__ volatile("imull $77, %1, %k0" : "=r"(value) : "m"(*at) : "memory", "cc"); break;
    default: return 0;
    }
    uint32_t parts[4];
    memcpy(parts, &vector, sizeof parts);
    sum = mix(sum, (uint32_t)value);
    sum = mix(sum, parts[0] ^ (uint64_t)parts[3] << 32);
    if (kind == 22)
        sum = mix(sum, flags & ARITHMETIC);
    return 1;
}

/* The stack pointer over a boundary: pushes, pops, calls and returns. */
static NOINLINE uint64_t stack_at(uint8_t *top)
{
    word result = 0;
    __asm__ volatile("mov %%" NSP ", %%" NBX "\n\t"
                     "mov %1, %%" NSP "\n\t"
                     "push $0x12345\n\t"
                     "pushw $0x678\n\t"
                     "push %%" NSP "\n\t"
                     "call 1f\n\t"
                     "jmp 2f\n"
                     "1:\tmov $0x55, %%eax\n\t"
                     "push %%" NAX "\n\t"
                     "pop %%" NCX "\n\t"
                     "ret\n"
                     "2:\tpop %%" NDX "\n\t"
                     "popw %%ax\n\t"
                     "pop %%" NDX "\n\t"
                     "add %%" NDX ", %%" NAX "\n\t"
                     "add %%" NCX ", %%" NAX "\n\t"
                     "mov %%" NBX ", %%" NSP
                     : "=a"(result)
                     : "D"(top)
                     : NBX, NCX, NDX, "memory", "cc");
    return result;
}

int main(void)
{
    area = pages(3, RW);
    catch_signal(SIGSEGV, faulted, SA_NODEFER);
    for (int kind = 0; kind <= 25; kind++) {
        sum = 0;
        fill(kind);
        int any = 0;
        for (unsigned i = 0; i < 24; i++)
            any |= access_kind(kind, area + PAGE - 16 + i);
        if (any)
            printf("kind %d: %016llx\n", kind, (unsigned long long)mix_bytes(sum, area, 3 * PAGE));
    }
    for (int mode = 0; mode < 4; mode++) {
        unsigned page = mode & 1;
        for (int kind = 0; kind <= 25; kind++)
            for (unsigned i = 4; i <= 16; i += 3) {
                protect(area, 3, RW);
                fill(kind);
                sum = 0;
                protect(area + page * PAGE, 1, mode & 2 ? PROT_READ : PROT_NONE);
                volatile int any = 0;
                fault_at = fault_error = 0;
                if (sigsetjmp(back, 1) == 0)
                    any = access_kind(kind, area + PAGE - 16 + i);
                else
                    any = 2;
                protect(area, 3, RW);
                if (any)
                    printf("mode %d kind %d at %u: %s %lx error %lx, %016llx\n", mode, kind, i, any == 2 ? "fault" : "none",
                           (long)fault_at, (long)fault_error, (unsigned long long)mix_bytes(sum, area, 3 * PAGE));
                __asm__ volatile("fninit");
            }
    }
    uint64_t hash = 0;
    fill(1);
    memset(area, 0, 3 * PAGE);
    for (unsigned i = 0; i < 40; i++)
        hash = mix(hash, stack_at(area + 2 * PAGE + 20 - i));
    say("stack", hash);
    return 0;
}
