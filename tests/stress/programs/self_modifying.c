/* Code that changes: by its own stores, from other mappings, across pages, with its page's permissions, in a child. */
#include "common.h"

#include <sys/wait.h>

typedef uint32_t function(void);

/* mov eax, value; ret */
static size_t put_constant(uint8_t *at, uint32_t value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
    return 6;
}

static uint32_t call(const void *code)
{
    function *f;
    memcpy(&f, &code, sizeof f);
    return f();
}

static void rewritten(void)
{
    uint8_t *code = pages(1, RWX);
    uint64_t hash = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        put_constant(code + i % 7 * 5, i * 77);
        hash = mix(hash, call(code + i % 7 * 5));
    }
    say("rewritten", hash);
    /* Only the operand, byte by byte, of code that has run often. */
    put_constant(code, 0);
    for (uint32_t i = 0; i < 2000; i++) {
        for (int again = 0; again < 3; again++)
            hash = mix(hash, call(code));
        code[1 + i % 4] = (uint8_t)(i * 13);
    }
    say("operand", hash);
    munmap(code, PAGE);
}

static void permissions(void)
{
    uint8_t *code = pages(2, RW);
    uint64_t hash = 0;
    for (uint32_t i = 0; i < 300; i++) {
        uint8_t *at = code + PAGE - 1 - i % 6; /* over the boundary in every way */
        protect(code, 2, RW);
        put_constant(at, i * 1234567);
        protect(code, 2, RX);
        hash = mix(hash, call(at));
        hash = mix(hash, call(at));
    }
    say("permissions", hash);
    /* One of the two pages at a time. */
    protect(code, 2, RWX);
    for (uint32_t i = 0; i < 300; i++) {
        uint8_t *at = code + PAGE - 3;
        if (i == 0)
            put_constant(at, 0);
        at[i & 1 ? 1 : 4] = (uint8_t)i; /* page one, page two */
        hash = mix(hash, call(at));
    }
    say("one page of two", hash);
    munmap(code, 2 * PAGE);
}

static void aliases(void)
{
    int file = memfd_create("code", 0);
    if (file < 0 || ftruncate(file, 2 * PAGE))
        die("memfd");
    uint8_t *write = mmap(NULL, 2 * PAGE, RW, MAP_SHARED, file, 0);
    uint8_t *run = mmap(NULL, 2 * PAGE, RX, MAP_SHARED, file, 0);
    uint8_t *also = mmap(NULL, 2 * PAGE, RX, MAP_SHARED, file, 0);
    if (write == MAP_FAILED || run == MAP_FAILED || also == MAP_FAILED)
        die("mmap");
    uint64_t hash = 0;
    for (uint32_t i = 0; i < 500; i++) {
        put_constant(write + PAGE - 2, i * 99);
        getppid(); /* serialises: the way through the kernel and back by IRET or SYSRET is what programs rely on */
        hash = mix(hash, call(run + PAGE - 2));
        hash = mix(hash, call(also + PAGE - 2));
        if (i % 5 == 0) {
            uint32_t value = i ^ 0xabcdef;
            uint8_t bytes[6];
            put_constant(bytes, value);
            if (pwrite(file, bytes, sizeof bytes, PAGE - 2) != sizeof bytes) /* the kernel writes */
                die("pwrite");
            hash = mix(hash, call(run + PAGE - 2));
        }
    }
    say("aliases", hash);
    close(file);
}

static void replaced(void)
{
    uint8_t *at = pages(1, RWX);
    uint64_t hash = 0;
    for (uint32_t i = 0; i < 200; i++) {
        if (munmap(at, PAGE))
            die("munmap");
        uint8_t *again = mmap(at, PAGE, RWX, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (again != at)
            die("mmap");
        put_constant(at + 64, i * 3 + 1);
        hash = mix(hash, call(at + 64));
        if (i % 3 == 0) {
            madvise(at, PAGE, MADV_DONTNEED);
            put_constant(at + 64, i * 5 + 2);
            hash = mix(hash, call(at + 64));
        }
    }
    say("replaced", hash);
    /* The same page at another address. */
    uint8_t *place = pages(8, PROT_NONE);
    put_constant(at + 64, 4711);
    for (uint32_t i = 0; i < 40; i++) {
        uint8_t *to = mremap(at, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place + i % 8 * PAGE);
        if (to == MAP_FAILED)
            die("mremap");
        at = to;
        at[65] = (uint8_t)i;
        hash = mix(hash, call(at + 64));
    }
    say("moved", hash);
}

static void in_a_child(void)
{
    uint8_t *own = pages(1, RWX);
    uint8_t *shared = mmap(NULL, PAGE, RWX, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    put_constant(own, 1);
    put_constant(shared, 1);
    uint64_t hash = mix(call(own), call(shared));
    for (uint32_t i = 0; i < 20; i++) {
        pid_t child = fork();
        if (child == 0) {
            put_constant(own, i + 50);
            put_constant(shared, i + 60);
            _exit((int)(call(own) == i + 50 && call(shared) == i + 60 ? i : 255));
        }
        int status;
        waitpid(child, &status, 0);
        hash = mix(hash, (uint64_t)status);
        hash = mix(hash, call(own) * 1000 + call(shared));
    }
    say("child", hash);
}

/* Stores into the instructions right behind them, within what any translator takes for one block. */
static void ahead(void)
{
    uint8_t *code = pages(2, RWX);
    uint64_t hash = 0;
    for (uint32_t i = 0; i < 400; i++) {
        uint8_t *at = code + PAGE - 20 + i % 16, *start = at;
#ifdef __x86_64__
        /* mov byte [rip + 1], i: the byte behind is B8, then its operand's first one */
        *at++ = 0xc6, *at++ = 0x05, *at++ = 1, *at++ = 0, *at++ = 0, *at++ = 0, *at++ = (uint8_t)i;
#else
        word target = (word)(at + 8);
        *at++ = 0xc6, *at++ = 0x05, memcpy(at, &target, 4), at += 4, *at++ = (uint8_t)i;
#endif
        at += put_constant(at, 0x11111100);
        hash = mix(hash, call(start));
        hash = mix(hash, call(start));
    }
    say("ahead", hash);
    /* A loop that counts up the operand of an instruction in itself:
       mov ecx, 100; xor eax, eax; again: add eax, 1; inc byte [operand]; dec ecx; jnz again; ret */
    uint8_t *at = code;
    static const uint8_t head[] = {0xb9, 100, 0, 0, 0, 0x31, 0xc0, 0x83, 0xc0, 1};
    memcpy(at, head, sizeof head);
    uint8_t *operand = at + 9;
    at += sizeof head;
#ifdef __x86_64__
    int32_t displacement = (int32_t)(operand - (at + 6));
#else
    word displacement = (word)operand;
#endif
    *at++ = 0xfe, *at++ = 0x05, memcpy(at, &displacement, 4), at += 4;
    *at++ = 0xff, *at++ = 0xc9, *at++ = 0x75;
    *at = (uint8_t)(code + 7 - (at + 1)), at++;
    *at++ = 0xc3;
    for (int i = 0; i < 20; i++)
        hash = mix(hash, call(code));
    say("loop", hash);
    /* REP MOVSB over the code that it is part of: the bytes behind it come from elsewhere. */
    for (uint32_t i = 0; i < 100; i++) {
        uint8_t source[16];
        put_constant(source, i * 31);
        uint8_t *spot = code + 512;
        memset(spot, 0x90, 32);
        spot[0] = 0xf3, spot[1] = 0xa4; /* rep movsb */
        put_constant(spot + 2, 0xdead);
        word count = 6, from = (word)source, to = (word)(spot + 2), result = (word)spot;
        __asm__ volatile("call *%%" NAX : "+a"(result), "+c"(count), "+S"(from), "+D"(to) : : "memory", "cc");
        hash = mix(hash, (uint32_t)result);
    }
    say("string store", hash);
}

int main(void)
{
    rewritten();
    permissions();
    aliases();
    replaced();
    in_a_child();
    ahead();
    return 0;
}
