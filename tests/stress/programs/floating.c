/* x87, MMX, SSE and AVX: mixed, rounded in every way, with the odd numbers, and across signals and processes. What is used
 * of AVX and the like is said by STRESS_FEATURES. */
#include "common.h"

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <sys/wait.h>

static int has(const char *feature)
{
    const char *all = getenv("STRESS_FEATURES");
    char wanted[32];
    snprintf(wanted, sizeof wanted, " %s ", feature);
    return all && strstr(all, wanted) != NULL;
}

static const double odd[] = {0.0,      -0.0,     1.0,      -1.5,    3.0,       0.1,         1e300,   1e-300, 5e-324,
                             -1e-310,  1e-160,   INFINITY, -INFINITY, NAN,     4294967296.5, -2147483648.5, 9.3e18, 0.5};

static uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

/* ── scalars: SSE with every rounding, denormals to zero, the flags that stay ── */
static void sse_scalars(void)
{
    for (unsigned mode = 0; mode < 8; mode++) {
        unsigned control = 0x1f80 | (mode & 3) << 13 | (mode & 4 ? 0x8040u : 0), flags = 0;
        uint64_t hash = 0;
        for (size_t i = 0; i < COUNT(odd); i++)
            for (size_t j = 0; j < COUNT(odd); j++) {
                double a = odd[i], b = odd[j], r[6];
                float f = 0;
                int32_t n = 0, t = 0;
                __asm__ volatile("ldmxcsr %0" : : "m"(control));
                __asm__ volatile("movsd %6, %%xmm1; addsd %7, %%xmm1; movsd %%xmm1, %0;"
                                 "movsd %6, %%xmm1; subsd %7, %%xmm1; movsd %%xmm1, %1;"
                                 "movsd %6, %%xmm1; mulsd %7, %%xmm1; movsd %%xmm1, %2;"
                                 "movsd %6, %%xmm1; divsd %7, %%xmm1; movsd %%xmm1, %3;"
                                 "movsd %6, %%xmm1; minsd %7, %%xmm1; movsd %%xmm1, %4;"
                                 "sqrtsd %7, %%xmm1; movsd %%xmm1, %5"
                                 : "=m"(r[0]), "=m"(r[1]), "=m"(r[2]), "=m"(r[3]), "=m"(r[4]), "=m"(r[5])
                                 : "m"(a), "m"(b)
                                 : "xmm1");
                __asm__ volatile("cvtsd2ss %3, %%xmm1; movss %%xmm1, %0; cvtsd2si %3, %1; cvttsd2si %3, %2"
                                 : "=m"(f), "=r"(n), "=r"(t)
                                 : "m"(a)
                                 : "xmm1");
                word condition;
                __asm__ volatile("movsd %1, %%xmm2; ucomisd %2, %%xmm2; " PUSHF "; pop %0" : "=r"(condition) : "m"(a), "m"(b) : "xmm2", "cc");
                __asm__ volatile("stmxcsr %0" : "=m"(flags));
                hash = mix_bytes(hash, r, sizeof r);
                hash = mix_bytes(hash, &f, sizeof f);
                hash = mix(hash, (uint32_t)n ^ (uint64_t)(uint32_t)t << 32);
                hash = mix(hash, (condition & ARITHMETIC) | flags << 16);
            }
        control = 0x1f80;
        __asm__ volatile("ldmxcsr %0" : : "m"(control));
        printf("sse mode %u: %016llx\n", mode, (unsigned long long)hash);
    }
}

/* ── x87: every precision and rounding, its stack and condition codes ── */
static void x87(void)
{
    for (unsigned mode = 0; mode < 12; mode++) {
        static const unsigned short precisions[] = {0x000, 0x200, 0x300};
        unsigned short control = (unsigned short)(0x7f | precisions[mode / 4] | (mode & 3) << 10), status = 0;
        uint64_t hash = 0;
        for (size_t i = 0; i < COUNT(odd); i++)
            for (size_t j = 0; j < COUNT(odd); j++) {
                uint8_t wide[10];
                double back, root;
                int64_t integer;
                __asm__ volatile("fninit; fldcw %5; fldl %6; fldl %7; fadd %%st(1), %%st; fmul %%st(1), %%st; fdivp;"
                                 "fld %%st(0); fsqrt; fstpl %2; fld %%st(0); frndint; fistpll %3; fstl %1; fnstsw %4; fstpt %0"
                                 : "=m"(wide), "=m"(back), "=m"(root), "=m"(integer), "=m"(status)
                                 : "m"(control), "m"(odd[i]), "m"(odd[j]));
                hash = mix_bytes(hash, wide, sizeof wide);
                hash = mix(hash, bits_of(back) ^ bits_of(root));
                hash = mix(hash, (uint64_t)integer);
                hash = mix(hash, status);
                __asm__ volatile("fninit; fldl %1; fldl %2; fucompp; fnstsw %0" : "=m"(status) : "m"(odd[i]), "m"(odd[j]));
                hash = mix(hash, status & 0x4700);
                word flags;
                __asm__ volatile("fninit; fldl %1; fldl %2; fcomi %%st(1), %%st; fcmovbe %%st(1), %%st; fstpl %3; " PUSHF "; pop %0"
                                 : "=r"(flags)
                                 : "m"(odd[i]), "m"(odd[j]), "m"(back)
                                 : "cc", "memory");
                hash = mix(hash, (flags & 0x45) ^ bits_of(back));
            }
        __asm__ volatile("fninit");
        printf("x87 mode %u: %016llx\n", mode, (unsigned long long)hash);
    }
    /* overflow and underflow of its stack; the tags; FXSAVE without its pointers */
    static uint8_t image[512] __attribute__((aligned(16)));
    unsigned short status;
    __asm__ volatile("fninit; fld1; fldpi; fldz; fldl2e; fldln2; fldlg2; fldl2t; fld1; fld1; fnstsw %0" : "=m"(status));
    printf("stack overflow: %x\n", status);
    __asm__ volatile("fninit; fld1; ffree %%st(0); fincstp; fstp %%st(3); fnstsw %0" : "=m"(status));
    printf("stack underflow: %x\n", status);
    __asm__ volatile("fninit; fldpi; fld1; fdecstp; fxsave %0; fninit" : "=m"(image));
    printf("image: %016llx\n", (unsigned long long)mix_bytes(mix_bytes(0, image, 5), image + 32, 8 * 16));
    /* MMX marks everything valid, EMMS everything empty; both share registers with the x87 */
    uint64_t value = 0x0102030405060708, seen;
    uint8_t wide[10];
    __asm__ volatile("fninit; fld1; movq %2, %%mm3; paddb %%mm3, %%mm3; movq %%mm3, %0; emms; fld1; fldpi; faddp; fstpt %1; fninit"
                     : "=m"(seen), "=m"(wide)
                     : "m"(value));
    printf("mmx: %llx %016llx\n", (unsigned long long)seen, (unsigned long long)mix_bytes(0, wide, 10));
    long double x = 0.7L, y;
    uint64_t hash = 0;
    for (int i = 0; i < 50; i++) {
        __asm__ volatile("fldt %1; fsin; fldt %1; fcos; fpatan; fldt %1; f2xm1; faddp; fldt %1; fabs; fld1; fxch; fyl2x; faddp; fstpt %0"
                         : "=m"(y)
                         : "m"(x));
        x = x * 0.93L + y * 0.001L;
        hash = mix_bytes(hash, &y, 10);
    }
    say("functions", hash);
    uint8_t decimal[10];
    long double number = 1234567890123.0L;
    __asm__ volatile("fldt %1; fbstp %0" : "=m"(decimal) : "m"(number));
    say("decimal", mix_bytes(0, decimal, 10));
}

/* ── AVX: upper halves kept, zeroed, and lost; unaligned; gathers; fused ── */
__attribute__((target("avx2,fma,bmi2"))) static void avx(void)
{
    static float in[64];
    static int32_t indices[8] = {3, 60, 7, 1, 31, 33, 2, 50};
    uint8_t out[32];
    uint64_t hash = 0;
    for (int i = 0; i < 64; i++)
        in[i] = (float)(i * i % 37) / 7.0f - 2;
    __m256 a = _mm256_loadu_ps(in + 1), b = _mm256_loadu_ps(in + 9), c;
    for (int i = 0; i < 200; i++) {
        c = _mm256_add_ps(_mm256_mul_ps(a, b), _mm256_loadu_ps(in + i % 50));
        c = _mm256_blendv_ps(c, a, b);
        a = _mm256_permute2f128_ps(c, b, 0x21);
        b = _mm256_sub_ps(_mm256_min_ps(c, _mm256_set1_ps(3)), _mm256_set1_ps(1));
        _mm256_storeu_ps((float *)(void *)out, c);
        hash = mix_bytes(hash, out, 32);
    }
    say("avx", hash);
    __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)in), y = x;
    for (int i = 0; i < 200; i++) {
        x = _mm256_add_epi32(_mm256_mullo_epi32(x, y), _mm256_set1_epi32(i));
        y = _mm256_xor_si256(_mm256_shuffle_epi8(x, y), _mm256_sllv_epi32(y, _mm256_and_si256(x, _mm256_set1_epi32(31))));
        y = _mm256_permutevar8x32_epi32(y, x);
        _mm256_storeu_si256((__m256i *)(void *)out, y);
        hash = mix_bytes(hash, out, 32);
    }
    __m256i gathered = _mm256_i32gather_epi32((const int *)(const void *)in, _mm256_loadu_si256((const __m256i *)(const void *)indices), 4);
    _mm256_storeu_si256((__m256i *)(void *)out, gathered);
    say("avx2", mix_bytes(hash, out, 32));
    /* A legacy SSE instruction keeps the upper half, a VEX one of 128 bits clears it, VZEROUPPER clears them all. */
    uint8_t kept[3][32];
    __asm__ volatile("vmovups %3, %%ymm4; vmovaps %%ymm4, %%ymm5; vmovaps %%ymm4, %%ymm6;"
                     "addps %%xmm4, %%xmm4; vaddps %%xmm5, %%xmm5, %%xmm5; vmovups %%ymm4, %0; vmovups %%ymm5, %1;"
                     "vzeroupper; vmovups %%ymm6, %2"
                     : "=m"(kept[0]), "=m"(kept[1]), "=m"(kept[2])
                     : "m"(*(const uint8_t(*)[32])(const void *)in)
                     : "xmm4", "xmm5", "xmm6");
    say("upper halves", mix_bytes(0, kept, sizeof kept));
    if (has("fma")) {
        __m256d p = _mm256_set_pd(1.1, -2.2, 3.3, 1e-200), q = _mm256_set1_pd(1.0000001);
        for (int i = 0; i < 100; i++)
            p = _mm256_fmadd_pd(p, q, _mm256_fnmadd_pd(q, q, p));
        _mm256_storeu_pd((double *)(void *)out, p);
        say("fma", mix_bytes(0, out, 32));
    }
    if (has("bmi2")) {
        uint32_t n = 0x12345678;
        for (int i = 0; i < 300; i++)
            n = _pdep_u32(n * 7, 0xf0f0ff0f) ^ _pext_u32(n, 0x7fff1234) ^ (uint32_t)i;
        say("bmi2", n);
    }
    /* Other processes, and the kernel, do not change the registers. */
    uint8_t before[32], after[32];
    _mm256_storeu_si256((__m256i *)(void *)before, y);
    __asm__ volatile("vmovups %1, %%ymm7\n\t"
                     "mov $2000, %%ecx\n"
                     "1:\tvaddps %%ymm7, %%ymm7, %%ymm3\n\tdec %%ecx\n\tjnz 1b\n\t"
                     "vmovups %%ymm7, %0"
                     : "=m"(after)
                     : "m"(before)
                     : "xmm7", "xmm3", "ecx", "cc");
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (child == 0) {
            __asm__ volatile("vzeroall" : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7");
            _exit(0);
        }
        __asm__ volatile("vmovups %0, %%ymm7" : : "m"(before) : "xmm7");
        sched_yield();
        waitpid(child, NULL, 0);
    }
    say("across processes", mix_bytes(0, after, 32));
}

/* ── integers in vectors, SSE4 and AES where they are ── */
__attribute__((target("sse4.2,aes,pclmul"))) static void more(void)
{
    __m128i x = _mm_set_epi32(1, -2, 3, -4), y = _mm_set_epi32(77, 5, -6, 123456);
    uint8_t out[16];
    uint64_t hash = 0;
    for (int i = 0; i < 200; i++) {
        x = _mm_add_epi32(_mm_mullo_epi32(x, y), _mm_min_epi32(x, y));
        y = _mm_shuffle_epi8(_mm_packus_epi32(x, y), _mm_and_si128(x, _mm_set1_epi8(15)));
        if (has("aes"))
            y = _mm_aesenc_si128(y, x);
        if (has("pclmulqdq"))
            x = _mm_xor_si128(x, _mm_clmulepi64_si128(x, y, 0x11));
        _mm_storeu_si128((__m128i *)(void *)out, y);
        hash = mix_bytes(hash, out, 16);
        hash = mix(hash, (uint32_t)_mm_crc32_u32((uint32_t)i, (uint32_t)hash));
        hash = mix(hash, (uint32_t)_mm_cmpestri(x, 9, y, 12, _SIDD_UBYTE_OPS | _SIDD_CMP_EQUAL_ANY));
    }
    say("sse4", hash);
}

int main(void)
{
    sse_scalars();
    x87();
    if (has("sse4_1") && has("sse4_2"))
        more();
    if (has("avx") && has("avx2"))
        avx();
    return 0;
}
