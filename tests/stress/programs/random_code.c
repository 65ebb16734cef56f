/* Random straight code with forward jumps: every way that flags are made, kept, read and lost; partial registers; memory
 * operands over a page boundary; SSE2. Flags that the manuals leave undefined are defined again before anything reads them.
 *
 * One line for every 50 pieces; "random_code FIRST COUNT -v" prints a line for each piece. */
#include "common.h"

#define REGISTERS (sizeof(word) == 8 ? 16 : 8)

word code_at, flags_in, flags_out, registers[16];
uint8_t vectors[8 * 16] __attribute__((aligned(16)));
void run_code(void);

#ifdef __x86_64__
#define EACH(what)                                                                                                     \
    what(0, "rax") what(1, "rcx") what(2, "rdx") what(3, "rbx") what(5, "rbp") what(6, "rsi") what(7, "rdi") what(8, "r8") \
    what(9, "r9") what(10, "r10") what(11, "r11") what(12, "r12") what(13, "r13") what(14, "r14") what(15, "r15")
#define SAVE "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
#define RESTORE "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
#else
#define EACH(what)                                                                                                     \
    what(0, "eax") what(1, "ecx") what(2, "edx") what(3, "ebx") what(5, "ebp") what(6, "esi") what(7, "edi")
#define SAVE "push %ebx; push %ebp; push %esi; push %edi\n"
#define RESTORE "pop %edi; pop %esi; pop %ebp; pop %ebx\n"
#endif
#define LOAD(number, name) "mov registers+" W "*" #number ", %" name "\n"
#define STORE(number, name) "mov %" name ", registers+" W "*" #number "\n"
#define XLOAD(number) "movdqa vectors+16*" #number ", %xmm" #number "\n"
#define XSTORE(number) "movdqa %xmm" #number ", vectors+16*" #number "\n"
#define XEACH(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7)

__asm__(".globl run_code\nrun_code:\n" SAVE "push" S " flags_in\n" XEACH(XLOAD) EACH(LOAD) POPF "\ncall *code_at\n" EACH(STORE)
            PUSHF "\npop" S " flags_out\n" XEACH(XSTORE) RESTORE "ret\n");

static uint8_t *out;
static uint64_t seed;

static uint32_t below(uint32_t limit) { return next_random(&seed) % limit; }
static void put(unsigned byte) { *out++ = (uint8_t)byte; }
static void put32(uint32_t value)
{
    memcpy(out, &value, 4);
    out += 4;
}

/* A general register that may change: not the stack pointer, not EBP, which points to the data. */
static unsigned some(void)
{
    for (;;) {
        unsigned number = below(REGISTERS);
        if (number != 4 && number != 5)
            return number;
    }
}

enum { BYTE, WORD, DWORD, QWORD };

/* Prefixes, opcode and operands of one instruction: reg is a register or an opcode extension, rm a register or memory. */
static void instruction(int size, unsigned prefix, unsigned escape, unsigned opcode, int reg, int extension, int memory)
{
    unsigned rm = some(), index = 0, kind = 0, x = 0;
    int byte_register = size == BYTE;
    if (memory) {
        rm = 5;
        kind = below(3);
        if (kind == 2 && (index = some()) != 0) {
            /* movzx index, index8 is done with CL to keep it small: movzx ecx, cl */
            index = 1;
            put(0x0f), put(0xb6), put(0xc9);
        } else if (kind == 2) {
            kind = 1;
        }
    }
    if (size == WORD)
        put(0x66);
    if (prefix)
        put(prefix);
    unsigned r = extension >= 0 ? (unsigned)extension : (unsigned)reg;
    if (sizeof(word) == 8) {
        unsigned rex = (size == QWORD ? 8u : 0) | (r > 7 ? 4u : 0) | x | (!memory && rm > 7 ? 1u : 0);
        /* With REX the byte registers 4 to 7 are SPL to DIL: the first two are not ours. Without, AH to BH. */
        if (rex || (byte_register && below(4) == 0 && (extension >= 0 || (r != 4 && r != 5)) && (memory || (rm != 4 && rm != 5))))
            put(0x40 | rex);
    }
    if (escape)
        put(escape);
    put(opcode);
    r &= 7;
    if (!memory) {
        put(0xc0 | r << 3 | (rm & 7));
    } else if (kind == 0) {
        put(0x45 | r << 3), put(below(256));
    } else if (kind == 1) {
        put(0x85 | r << 3), put32(below(2400) - 1200);
    } else {
        put(0x44 | r << 3), put(below(3) << 6 | index << 3 | 5), put(below(256));
    }
}

static int a_size(void) { return (int)below(sizeof(word) == 8 ? 4 : 3); }
static int wide_size(void) { return 1 + (int)below(sizeof(word) == 8 ? 3 : 2); }

/* cmp reg, reg: all six flags are defined again */
static void define_flags(void) { instruction(DWORD, 0, 0, 0x39, (int)some(), -1, 0); }

static void immediate(int size)
{
    if (size == BYTE)
        put(below(256));
    else if (size == WORD)
        put(below(256)), put(below(256));
    else
        put32(next_random(&seed));
}

static void one(void)
{
    static const uint8_t vector_ops[] = {0xfc, 0xfd, 0xfe, 0xd4, 0xef, 0xeb, 0xdb, 0xf8, 0xf9, 0xfa, 0xfb, 0xf4, 0x60, 0x61,
                                         0x62, 0x6c, 0xd5, 0xe5, 0x74, 0x75, 0x76, 0x64, 0x65, 0x66, 0xdf, 0xda, 0xde, 0x67};
    int memory = below(3) == 0, size = a_size();
    unsigned wide;
    switch (below(27)) {
    case 0: case 1: case 2: /* add or adc sbb and sub xor cmp, both directions */
        instruction(size, 0, 0, below(8) << 3 | (below(2) << 1) | (size != BYTE), (int)some(), -1, memory);
        break;
    case 3: /* with an immediate */
        instruction(size, 0, 0, size == BYTE ? 0x80 : 0x81, 0, (int)below(8), memory);
        immediate(size);
        break;
    case 4:
        instruction(wide_size(), 0, 0, 0x83, 0, (int)below(8), memory);
        put(below(256));
        break;
    case 5: case 6: /* inc dec: CF stays */
        instruction(size, 0, 0, size == BYTE ? 0xfe : 0xff, 0, (int)below(2), memory);
        break;
    case 7: /* not neg */
        instruction(size, 0, 0, size == BYTE ? 0xf6 : 0xf7, 0, 2 + (int)below(2), memory);
        break;
    case 8: /* shifts by a count; the flags stay if it is 0 */
        instruction(size, 0, 0, size == BYTE ? 0xc0 : 0xc1, 0, (int)below(6) + (below(6) == 0), memory);
        put(below(40));
        define_flags();
        break;
    case 9:
        instruction(size, 0, 0, size == BYTE ? 0xd2 : 0xd3, 0, (int)(below(2) ? 4 + below(2) : below(4)), memory);
        define_flags();
        break;
    case 10: /* shifts and rotates by one: OF is defined; AF is not after shifts, so rotates only */
        instruction(size, 0, 0, size == BYTE ? 0xd0 : 0xd1, 0, (int)below(4), memory);
        break;
    case 11: /* shld shrd */
        instruction(1 + (sizeof(word) == 8 ? 1 + (int)below(2) : 1), 0, 0x0f, below(2) ? 0xa4 : 0xac, (int)some(), -1, memory);
        put(below(32));
        define_flags();
        break;
    case 12: /* imul */
        instruction(wide_size(), 0, 0x0f, 0xaf, (int)some(), -1, memory);
        define_flags();
        break;
    case 13: /* mul imul of the accumulator */
        instruction(size, 0, 0, size == BYTE ? 0xf6 : 0xf7, 0, 4 + (int)below(2), memory);
        define_flags();
        break;
    case 14: /* bt bts btr btc */
        instruction(wide_size(), 0, 0x0f, 0xba, 0, 4 + (int)below(4), memory);
        put(below(64));
        define_flags();
        break;
    case 15: case 16: /* setcc */
        instruction(BYTE, 0, 0x0f, 0x90 | below(16), 0, 0, memory);
        break;
    case 17: case 18: /* cmovcc */
        instruction(wide_size(), 0, 0x0f, 0x40 | below(16), (int)some(), -1, memory);
        break;
    case 19: case 20: { /* jcc over one or two others */
        put(0x70 | below(16));
        uint8_t *distance = out++;
        one();
        if (below(2))
            one();
        if (out - distance - 1 > 127) {
            out = distance;
            out[-1] = 0xf8; /* clc */
            break;
        }
        *distance = (uint8_t)(out - distance - 1);
        break;
    }
    case 21: /* movzx movsx */
        instruction(wide_size(), 0, 0x0f, (below(2) ? 0xb6 : 0xbe) | below(2), (int)some(), -1, memory);
        break;
    case 22: { /* lea mov xchg xadd cmpxchg bswap */
        unsigned which = below(6);
        if (which == 0)
            instruction(wide_size(), 0, 0, 0x8b, (int)some(), -1, memory);
        else if (which == 1)
            instruction(size, 0, 0, size == BYTE ? 0x88 : 0x89, (int)some(), -1, memory);
        else if (which == 2)
            instruction(size, 0, 0, size == BYTE ? 0x86 : 0x87, (int)some(), -1, memory);
        else if (which == 3)
            instruction(size, memory && below(2) ? 0xf0 : 0, 0x0f, size == BYTE ? 0xc0 : 0xc1, (int)some(), -1, memory);
        else if (which == 4)
            instruction(size, memory && below(2) ? 0xf0 : 0, 0x0f, size == BYTE ? 0xb0 : 0xb1, (int)some(), -1, memory);
        else
            put(0x0f), put(0xc8 | "\0\1\2\3\6\7"[below(6)]);
        break;
    }
    case 23: { /* flags by hand */
        static const uint8_t bytes[] = {0xf8, 0xf9, 0xf5, 0x9f, 0x9e, 0x98, 0x99, 0xd6};
        unsigned which = below(7);
        put(bytes[which]);
        if (which == 6 && sizeof(word) == 8 && below(2))
            out[-1] = 0x48, put(0x99); /* cqo */
        break;
    }
    case 24: /* push and pop; flags through the stack */
        if (below(2)) {
            put(0x50 | "\0\1\2\3\6\7"[below(6)]), put(0x58 | "\0\1\2\3\6\7"[below(6)]);
        } else {
            unsigned number = (unsigned char)"\0\1\2\3\6\7"[below(6)];
            put(0x9c), put(0x58 | number);
            if (below(2))
                put(0x50 | number), put(0x9d);
            put(0x81), put(0xe0 | number), put32(ARITHMETIC);
        }
        break;
    case 25: /* SSE2 */
        wide = below(8);
        if (memory && below(2)) {
            instruction(DWORD, 0xf3, 0x0f, below(2) ? 0x6f : 0x7f, 0, (int)wide, 1); /* movdqu */
        } else {
            put(0x66), put(0x0f), put(vector_ops[below(COUNT(vector_ops))]), put(0xc0 | wide << 3 | below(8));
        }
        break;
    default: /* movd pmovmskb pshufd psllq, between the files */
        wide = below(4);
        put(0x66), put(0x0f);
        if (wide == 0)
            put(0x6e), put(0xc0 | below(8) << 3 | (unsigned char)"\0\1\2\3\6\7"[below(6)]);
        else if (wide == 1)
            put(0x7e), put(0xc0 | below(8) << 3 | (unsigned char)"\0\1\2\3\6\7"[below(6)]);
        else if (wide == 2)
            put(0xd7), put(0xc0 | (unsigned char)"\0\1\2\3\6\7"[below(6)] << 3 | below(8));
        else
            put(0x70), put(0xc0 | below(8) << 3 | below(8)), put(below(256));
    }
}

int main(int argc, char **argv)
{
    uint32_t first = argc > 1 ? (uint32_t)atoi(argv[1]) : 0, count = argc > 2 ? (uint32_t)atoi(argv[2]) : 2000;
    uint8_t *code = pages(4, RWX), *data = pages(4, RW);
    uint64_t all = 0;
    for (uint32_t piece = first; piece < first + count; piece++) {
        seed = piece * 0x12345678abcdefull + 1;
        uint64_t hash = 0;
        out = code + below(2 * PAGE);
        code_at = (word)out;
        unsigned length = 1 + below(60);
        for (unsigned i = 0; i < length; i++)
            one();
        put(0xc3);
        uint64_t start = seed;
        for (int again = 0; again < 6; again++) {
            seed = start + (uint64_t)(again / 2);
            for (unsigned i = 0; i < 4 * PAGE; i += 4) {
                uint32_t value = next_random(&seed);
                memcpy(data + i, &value, 4);
            }
            for (unsigned i = 0; i < 16; i++)
                registers[i] = (word)((uint64_t)next_random(&seed) << 32 | next_random(&seed));
            for (unsigned i = 0; i < sizeof vectors; i++)
                vectors[i] = (uint8_t)next_random(&seed);
            registers[4] = 0;
            registers[5] = (word)data + 2 * PAGE - 20;
            flags_in = 0x202 | (next_random(&seed) & ARITHMETIC);
            run_code();
            for (unsigned i = 0; i < REGISTERS; i++)
                if (i != 4 && i != 5)
                    hash = mix(hash, registers[i]);
            hash = mix(hash, flags_out & ARITHMETIC);
            hash = mix_bytes(hash, vectors, sizeof vectors);
            hash = mix_bytes(hash, data + PAGE, 2 * PAGE);
        }
        all = mix(all, hash);
        if (argc > 3)
            printf("piece %u: %016llx\n", piece, (unsigned long long)hash);
        else if (piece % 50 == 49)
            printf("to %u: %016llx\n", piece, (unsigned long long)all);
    }
    return 0;
}
