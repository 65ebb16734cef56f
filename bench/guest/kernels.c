/* CPU-bound work: six classical kernels and two for floating point. */
#include <emmintrin.h>
#include <string.h>

#include "work.h"

/* ── SHA-256 (FIPS 180-4): 32-bit adds, rotates, a table; few branches ── */

static const uint32_t sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static NOINLINE void sha_block(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
        uint32_t x;
        memcpy(&x, block + 4 * i, 4);
        w[i] = __builtin_bswap32(x);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + sha_k[i] + w[i];
        uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    state[0] += a;
    state[1] += b;
    state[2] += c;
    state[3] += d;
    state[4] += e;
    state[5] += f;
    state[6] += g;
    state[7] += h;
}

static uint8_t sha_data[64 << 10];

static void sha_prepare(void)
{
    uint64_t seed = 1;
    for (size_t i = 0; i < sizeof sha_data; i++)
        sha_data[i] = (uint8_t)next_random(&seed);
}

static uint64_t sha_run(void)
{
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    for (size_t i = 0; i < sizeof sha_data; i += 64)
        sha_block(state, sha_data + i);
    return (uint64_t)state[0] << 32 | state[7];
}

/* ── Quicksort of 32-bit numbers: unpredictable branches, short loops ── */

#define SORT_COUNT 50000
static uint32_t sort_data[SORT_COUNT];

static NOINLINE void quicksort(uint32_t *first, uint32_t *last)
{
    while (last - first > 12) {
        uint32_t pivot = first[(last - first) / 2], *low = first, *high = last - 1;
        for (;;) {
            while (*low < pivot)
                low++;
            while (*high > pivot)
                high--;
            if (low >= high)
                break;
            uint32_t held = *low;
            *low++ = *high;
            *high-- = held;
        }
        uint32_t *middle = high + 1;
        if (middle - first < last - middle) {
            quicksort(first, middle);
            first = middle;
        } else {
            quicksort(middle, last);
            last = middle;
        }
    }
    for (uint32_t *next = first + 1; next < last; next++) {
        uint32_t value = *next, *hole = next;
        for (; hole > first && hole[-1] > value; hole--)
            *hole = hole[-1];
        *hole = value;
    }
}

static uint64_t sort_run(void)
{
    uint64_t seed = 2, hash = 0;
    for (size_t i = 0; i < SORT_COUNT; i++)
        sort_data[i] = next_random(&seed);
    quicksort(sort_data, sort_data + SORT_COUNT);
    for (size_t i = 1; i < SORT_COUNT; i++)
        if (sort_data[i - 1] > sort_data[i])
            die("the sorted numbers are out of order");
    for (size_t i = 0; i < SORT_COUNT; i += 97)
        hash = mix(hash, sort_data[i]);
    return hash;
}

/* ── Hash table, open addressing: random accesses over a mebibyte ── */

#define TABLE_BITS 16
#define TABLE_KEYS 40000
struct cell {
    uint64_t key, value;
};
static struct cell table[1 << TABLE_BITS];

static NOINLINE struct cell *table_find(uint64_t key)
{
    size_t at = (size_t)(key * 0x9e3779b97f4a7c15u >> (64 - TABLE_BITS));
    while (table[at].key && table[at].key != key)
        at = (at + 1) & ((1 << TABLE_BITS) - 1);
    return &table[at];
}

static uint64_t table_run(void)
{
    uint64_t hash = 0, seed = 3;
    memset(table, 0, sizeof table);
    for (uint64_t i = 0; i < TABLE_KEYS; i++) {
        uint64_t key = next_random(&seed) | 1ull << 40;
        struct cell *cell = table_find(key);
        cell->key = key;
        cell->value += i;
    }
    for (int round = 0; round < 4; round++) {
        seed = 3;
        for (uint64_t i = 0; i < TABLE_KEYS; i++) {
            struct cell *cell = table_find((next_random(&seed) + (i & 1)) | 1ull << 40);
            hash = mix(hash, cell->value);
        }
    }
    return hash;
}

/* ── Copying with SSE2: 16-byte loads and stores ── */

#define COPY_BYTES (256 << 10)
static uint8_t copy_from[COPY_BYTES] __attribute__((aligned(16))), copy_to[COPY_BYTES] __attribute__((aligned(16)));

static void copy_prepare(void)
{
    uint64_t seed = 4;
    for (size_t i = 0; i < COPY_BYTES; i++)
        copy_from[i] = (uint8_t)next_random(&seed);
}

static NOINLINE void copy_sse(uint8_t *to, const uint8_t *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64) {
        __m128i a = _mm_load_si128((const __m128i *)(from + i)), b = _mm_load_si128((const __m128i *)(from + i + 16));
        __m128i c = _mm_load_si128((const __m128i *)(from + i + 32)), d = _mm_load_si128((const __m128i *)(from + i + 48));
        _mm_store_si128((__m128i *)(to + i), a);
        _mm_store_si128((__m128i *)(to + i + 16), b);
        _mm_store_si128((__m128i *)(to + i + 32), c);
        _mm_store_si128((__m128i *)(to + i + 48), d);
        __asm__ volatile("" ::: "memory"); /* so that the compiler makes no call of memcpy of it */
    }
}

static uint64_t copy_run(void)
{
    uint64_t hash = 0;
    for (int round = 0; round < 8; round++)
        copy_sse(copy_to, copy_from, COPY_BYTES);
    for (size_t i = 0; i < COPY_BYTES; i += 4099)
        hash = mix(hash, copy_to[i]);
    return hash;
}

/* ── A bytecode interpreter that counts primes: an indirect jump for every operation ── */

enum { PUSH, LOAD, STORE, ADD, MULTIPLY, REMAINDER, LESS, JUMP_FALSE, JUMP, STOP };

/* for (n = 2; n < 3000; n++) { for (d = 2; d * d < n + 1; d++) if (n % d == 0) goto next; count++; next:; } */
static const int32_t primes_code[] = {
    /*  0 */ PUSH, 2, STORE, 0,
    /*  4 */ LOAD, 0, PUSH, 3000, LESS, JUMP_FALSE, 60,
    /* 11 */ PUSH, 2, STORE, 1,
    /* 15 */ LOAD, 1, LOAD, 1, MULTIPLY, LOAD, 0, PUSH, 1, ADD, LESS, JUMP_FALSE, 44,
    /* 28 */ LOAD, 0, LOAD, 1, REMAINDER, JUMP_FALSE, 51,
    /* 35 */ LOAD, 1, PUSH, 1, ADD, STORE, 1, JUMP, 15,
    /* 44 */ LOAD, 2, PUSH, 1, ADD, STORE, 2,
    /* 51 */ LOAD, 0, PUSH, 1, ADD, STORE, 0, JUMP, 4,
    /* 60 */ STOP,
};

static NOINLINE int64_t interpret(const int32_t *code, int64_t *variables, uint64_t *operations)
{
    static const void *const labels[] = {
        [PUSH] = &&push, [LOAD] = &&load, [STORE] = &&store, [ADD] = &&add, [MULTIPLY] = &&multiply, [REMAINDER] = &&remainder,
        [LESS] = &&less, [JUMP_FALSE] = &&jump_false, [JUMP] = &&jump, [STOP] = &&stop,
    };
    int64_t stack[32], *top = stack;
    const int32_t *next = code;
    uint64_t count = 0;
#define NEXT                 \
    do {                     \
        count++;             \
        goto *labels[*next++]; \
    } while (0)
    NEXT;
push:
    *top++ = *next++;
    NEXT;
load:
    *top++ = variables[*next++];
    NEXT;
store:
    variables[*next++] = *--top;
    NEXT;
add:
    top--;
    top[-1] += *top;
    NEXT;
multiply:
    top--;
    top[-1] *= *top;
    NEXT;
remainder:
    top--;
    top[-1] = (int64_t)((uint32_t)top[-1] % (uint32_t)*top);
    NEXT;
less:
    top--;
    top[-1] = top[-1] < *top;
    NEXT;
jump_false:
    next = *--top ? next + 1 : code + *next;
    NEXT;
jump:
    next = code + *next;
    NEXT;
stop:
    *operations = count;
    return variables[2];
#undef NEXT
}

static uint64_t interpret_run(void)
{
    int64_t variables[4] = {0};
    uint64_t operations = 0;
    int64_t primes = interpret(primes_code, variables, &operations);
    if (primes != 430)
        die("there are 430 primes below 3000, but the interpreter found another number of them");
    return mix(operations, (uint64_t)primes);
}

/* ── Recursion: calls, returns, the stack ── */

static NOINLINE uint32_t fibonacci(uint32_t n)
{
    if (n < 2)
        return n;
    uint32_t first = fibonacci(n - 1);
    __asm__ volatile("" : "+r"(first)); /* or the compiler unfolds the recursion */
    return first + fibonacci(n - 2);
}

static NOINLINE uint32_t ackermann(uint32_t m, uint32_t n)
{
    if (m == 0)
        return n + 1;
    return ackermann(m - 1, n == 0 ? 1 : ackermann(m, n - 1));
}

static uint64_t recursion_run(void)
{
    return mix(fibonacci(23), ackermann(2, 90));
}

/* ── Floating point: SSE2 scalars, and the x87 where long double is its ── */

static uint64_t mandelbrot_run(void)
{
    uint64_t hash = 0;
    for (int y = 0; y < 64; y++)
        for (int x = 0; x < 64; x++) {
            double cr = x / 24.0 - 2.0, ci = y / 24.0 - 1.3, r = 0, i = 0;
            int steps = 0;
            for (; steps < 100 && r * r + i * i < 4.0; steps++) {
                double next = r * r - i * i + cr;
                i = 2.0 * r * i + ci;
                r = next;
            }
            hash = mix(hash, (uint64_t)steps);
        }
    return hash;
}

static uint64_t x87_run(void)
{
    long double sum = 0, sign = 1;
    for (int i = 0; i < 40000; i++) {
        sum += sign / (2 * i + 1);
        sign = -sign;
    }
    uint64_t bits = 0;
    memcpy(&bits, &sum, sizeof bits);
    return bits;
}

const struct work kernels[] = {
    {"sha256", "KiB", sizeof sha_data / 1024, sha_prepare, sha_run, NULL},
    {"quicksort", "thousand numbers", SORT_COUNT / 1000, NULL, sort_run, NULL},
    {"hash", "thousand lookups", 5 * TABLE_KEYS / 1000, NULL, table_run, NULL},
    {"copy", "MiB", 8 * COPY_BYTES >> 20, copy_prepare, copy_run, NULL},
    {"bytecode", "runs", 1, NULL, interpret_run, NULL},
    {"recursion", "runs", 1, NULL, recursion_run, NULL},
    {"mandelbrot", "pictures", 1, NULL, mandelbrot_run, NULL},
    {"x87", "thousand terms", 40, NULL, x87_run, NULL},
};
const size_t kernels_count = COUNT(kernels);
