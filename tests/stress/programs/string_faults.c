/* String instructions that run into a page they may not touch: which iteration faults, with which registers, and that
 * they go on where they stopped. */
#include "common.h"

static uint8_t *area; /* four pages; one of them is closed */
static int closed;
static uint64_t hash;
static int faults;

static void opened(int number, siginfo_t *info, void *context)
{
    (void)number;
    faults++;
    hash = mix(hash, (word)info->si_addr - (word)area);
    hash = mix(hash, reg(context, CX));
    hash = mix(hash, reg(context, SI) - (word)area);
    hash = mix(hash, reg(context, DI) - (word)area);
    hash = mix(hash, reg(context, REG_ERR) & 7);
    hash = mix(hash, reg(context, REG_TRAPNO));
    printf("  fault at %lx, %lx left, error %lx\n", (long)((word)info->si_addr - (word)area), (long)reg(context, CX),
           (long)reg(context, REG_ERR) & 7);
    protect(area + (unsigned)closed * PAGE, 1, RW);
}

static void fill(uint64_t seed)
{
    protect(area, 4, RW);
    for (unsigned i = 0; i < 4 * PAGE; i++)
        area[i] = (uint8_t)next_random(&seed);
}

enum { MOVSB, MOVSW, MOVSL, MOVSQ, STOSB, STOSL, LODSB, SCASB, CMPSB, KINDS };
static const char *const names[] = {"movsb", "movsw", "movsl", "movsq", "stosb", "stosl", "lodsb", "scasb", "cmpsb"};

static NOINLINE void run(int kind, int down, word count, uint8_t *to, const uint8_t *from)
{
    word flags = 0, a = 0x5a5a5a5a, from_word = (word)from, to_word = (word)to;
#define STRING(name, text)                                                                                            \
    case name:                                                                                                        \
        __asm__ volatile("test %5, %5\n\tjz 1f\n\tstd\n1:\tcmp %%al, %%al\n\t" text "\n\tcld\n\t" PUSHF "\n\tpop %0"    \
                         : "=r"(flags), "+a"(a), "+c"(count), "+S"(from_word), "+D"(to_word)                            \
                         : "r"(down)                                                                                  \
                         : "memory", "cc");                                                                           \
        break
    switch (kind) {
        STRING(MOVSB, "rep movsb");
        STRING(MOVSW, "rep movsw");
        STRING(MOVSL, "rep movsl");
#ifdef __x86_64__
        STRING(MOVSQ, "rep movsq");
#endif
        STRING(STOSB, "rep stosb");
        STRING(STOSL, "rep stosl");
        STRING(LODSB, "rep lodsb");
        STRING(SCASB, "repne scasb");
        STRING(CMPSB, "repe cmpsb");
    }
    hash = mix(hash, a);
    hash = mix(hash, count);
    hash = mix(hash, from_word - (word)area);
    hash = mix(hash, to_word - (word)area);
    hash = mix(hash, kind == SCASB || kind == CMPSB ? flags & ARITHMETIC : 0);
}

int main(void)
{
    static const int sizes[] = {1, 2, 4, 8, 1, 4, 1, 1, 1};
    area = pages(4, RW);
    catch_signal(SIGSEGV, opened, 0);
    for (int kind = 0; kind < KINDS; kind++) {
        if (kind == MOVSQ && sizeof(word) == 4)
            continue;
        for (int down = 0; down < 2; down++)
            for (int offset = 0; offset < 3; offset++)
                for (closed = 0; closed < 4; closed++)
                    for (int mode = 0; mode < 2; mode++) {
                        fill((uint64_t)kind * 100 + (unsigned)offset);
                        size_t bytes = PAGE + 600;
                        uint8_t *from = area + 100 + offset * 3, *to = area + 2 * PAGE - 300 + offset;
                        if (kind == SCASB)
                            for (unsigned i = 0; i < 4 * PAGE; i++)
                                area[i] |= 0x80;
                        if (kind == CMPSB)
                            memset(area, 7, 4 * PAGE);
                        if (down) {
                            from += bytes - (unsigned)sizes[kind];
                            to += bytes - (unsigned)sizes[kind];
                        }
                        hash = 0, faults = 0;
                        protect(area + (unsigned)closed * PAGE, 1, mode ? PROT_READ : PROT_NONE);
                        run(kind, down, bytes / (unsigned)sizes[kind], to, from);
                        protect(area, 4, RW);
                        printf("%s %s offset %d, page %d %s: %d faults, %016llx\n", names[kind], down ? "down" : "up", offset,
                               closed, mode ? "read-only" : "closed", faults,
                               (unsigned long long)mix_bytes(hash, area, 4 * PAGE));
                    }
    }
    /* Overlapping copies, which repeat a pattern. */
    for (unsigned distance = 1; distance < 20; distance++) {
        fill(distance);
        word count = 2000, from = (word)area + PAGE - 900, to = from + distance;
        __asm__ volatile("rep movsb" : "+c"(count), "+S"(from), "+D"(to) : : "memory");
        printf("overlap %u: %016llx\n", distance, (unsigned long long)mix_bytes(0, area, 4 * PAGE));
    }
    return 0;
}
