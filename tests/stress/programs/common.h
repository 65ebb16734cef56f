/* What the programs share: hashes, registers of a signal's context, code made at run time. Outputs are deterministic:
 * no addresses, no times, no undefined flags. */
#ifndef COMMON_H
#define COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096u
#define NOINLINE __attribute__((noinline, noclone))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* CF PF AF ZF SF OF */
#define ARITHMETIC 0x8d5u

#ifdef __x86_64__
#define IP REG_RIP
#define SP REG_RSP
#define AX REG_RAX
#define BX REG_RBX
#define CX REG_RCX
#define DX REG_RDX
#define SI REG_RSI
#define DI REG_RDI
#define BP REG_RBP
#define PUSHF "pushfq"
#define POPF "popfq"
#define S "q"
#define W "8"
#define NAX "rax"
#define NCX "rcx"
#define NDX "rdx"
#define NSI "rsi"
#define NDI "rdi"
#define NSP "rsp"
#define NBX "rbx"
#else
#define IP REG_EIP
#define SP REG_ESP
#define AX REG_EAX
#define BX REG_EBX
#define CX REG_ECX
#define DX REG_EDX
#define SI REG_ESI
#define DI REG_EDI
#define BP REG_EBP
#define PUSHF "pushfl"
#define POPF "popfl"
#define S "l"
#define W "4"
#define NAX "eax"
#define NCX "ecx"
#define NDX "edx"
#define NSI "esi"
#define NDI "edi"
#define NSP "esp"
#define NBX "ebx"
#endif

typedef uintptr_t word;

static inline uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

static inline uint64_t mix_bytes(uint64_t hash, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ at[i]) * 0x100000001b3u;
    return mix(hash, bytes);
}

static inline uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

static inline void say(const char *what, uint64_t value) { printf("%s %llx\n", what, (unsigned long long)value); }

static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

static inline uint8_t *pages(size_t count, int protection)
{
    void *at = mmap(NULL, count * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

static inline void protect(void *at, size_t count, int protection)
{
    if (mprotect(at, count * PAGE, protection))
        die("mprotect");
}

static inline void catch_signal(int number, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigemptyset(&action.sa_mask);
    if (sigaction(number, &action, NULL))
        die("sigaction");
}

static inline word reg(void *context, int number)
{
    return (word)((ucontext_t *)context)->uc_mcontext.gregs[number];
}

static inline void set_reg(void *context, int number, word value)
{
    ((ucontext_t *)context)->uc_mcontext.gregs[number] = (greg_t)value;
}

#define RWX (PROT_READ | PROT_WRITE | PROT_EXEC)
#define RW (PROT_READ | PROT_WRITE)
#define RX (PROT_READ | PROT_EXEC)

#endif
