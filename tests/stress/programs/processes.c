/* Processes: fork and its copies, vfork, clone, exec, shared memory with code in it, signals between them. */
#include "common.h"

#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static uint64_t hash;
static uint8_t *shared, *own;

static int finish(pid_t child)
{
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child)
        die("wait");
    return status;
}

static void copies(void)
{
    for (unsigned i = 0; i < 16 * PAGE; i++)
        own[i] = (uint8_t)(i * 7);
    for (unsigned depth = 0; depth < 12; depth++) {
        pid_t child = fork();
        if (child == 0) {
            for (unsigned page = depth % 3; page < 16; page += 3)
                own[page * PAGE + depth] ^= 0xff;
            uint64_t mine = mix_bytes(0, own, 16 * PAGE);
            memcpy(shared + 8 * depth, &mine, 8);
            pid_t grandchild = fork();
            if (grandchild == 0) {
                memset(own, (int)depth, 16 * PAGE);
                mine = mix_bytes(mine, own, 16 * PAGE);
                memcpy(shared + 8 * depth, &mine, 8);
                _exit(3);
            }
            _exit(finish(grandchild) == 0x300 && own[5 * PAGE + 100] == (uint8_t)((5 * PAGE + 100) * 7) ? (int)depth : 99);
        }
        own[depth * PAGE]++; /* while the child may still read its copy */
        hash = mix(hash, (uint64_t)finish(child));
        hash = mix_bytes(hash, own, 16 * PAGE);
    }
    say("copies", mix_bytes(hash, shared, 8 * 12));
}

static volatile int vforked;

static NOINLINE int start_by_vfork(char *const *arguments)
{
    pid_t child = vfork();
    if (child == 0) {
        vforked++; /* in the parent's memory */
        execve("/proc/self/exe", arguments, NULL);
        _exit(1);
    }
    return finish(child);
}

static void execs(void)
{
    char text[16];
    char *arguments[] = {"processes", "child", text, NULL};
    for (int i = 0; i < 20; i++) {
        snprintf(text, sizeof text, "%d", i);
        hash = mix(hash, (uint64_t)start_by_vfork(arguments));
    }
    printf("vforked %d\n", vforked);
    say("execs", hash);
}

static int cloned(void *argument)
{
    volatile uint8_t *at = argument;
    for (int i = 0; i < 1000; i++)
        at[i] = (uint8_t)(at[i] + i);
    return 5;
}

static void clones(void)
{
    uint8_t *stack = pages(16, RW), *memory = pages(1, RW);
    for (int i = 0; i < 20; i++) {
        pid_t child = clone(cloned, stack + 16 * PAGE, CLONE_VM | SIGCHLD, memory);
        hash = mix(hash, (uint64_t)finish(child));
    }
    say("clones", mix_bytes(hash, memory, PAGE));
}

/* Code in shared memory: the child writes it, the parent runs it; and the other way round. */
static void shared_code(void)
{
    int to[2], from[2];
    uint8_t byte = 0;
    if (pipe(to) || pipe(from))
        die("pipe");
    uint8_t *code = shared + PAGE - 3; /* over a boundary */
    uint32_t (*run)(void);
    memcpy(&run, &code, sizeof run);
    pid_t child = fork();
    for (uint32_t i = 0; i < 200; i++) {
        int writes = (i & 1) == (child == 0);
        if (!writes) {
            if (read(child ? from[0] : to[0], &byte, 1) != 1)
                _exit(9);
            uint32_t value = run();
            if (child)
                hash = mix(hash, value);
            else if (value != i * 1000 + 3)
                _exit(8);
        } else {
            uint32_t value = i * 1000 + 3;
            code[0] = 0xb8;
            memcpy(code + 1, &value, 4);
            code[5] = 0xc3;
            if (run() != value)
                _exit(7);
            if (write(child ? to[1] : from[1], &byte, 1) != 1)
                _exit(6);
        }
    }
    if (child == 0)
        _exit(42);
    printf("shared code: child %x\n", finish(child));
    say("shared code", hash);
}

static volatile sig_atomic_t got;

static void received(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    got += info->si_value.sival_int;
}

static void signals(void)
{
    catch_signal(SIGUSR1, received, 0);
    sigset_t blocked, before;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_BLOCK, &blocked, &before);
    int ready[2];
    if (pipe(ready))
        die("pipe");
    pid_t child = fork();
    if (child == 0) {
        char byte = 1;
        if (write(ready[1], &byte, 1) != 1)
            _exit(99);
        while (got < 45)
            sigsuspend(&before);
        _exit(got >= 45);
    }
    char byte;
    if (read(ready[0], &byte, 1) != 1)
        die("read");
    for (int i = 0; i < 10; i++) {
        union sigval value = {.sival_int = i};
        sigqueue(child, SIGUSR1, value);
        for (int wait = 0; wait < 3; wait++)
            sched_yield();
    }
    union sigval rest = {.sival_int = 45}; /* one that comes while another is pending is lost: it is sent until it arrives */
    int status;
    while (waitpid(child, &status, WNOHANG) == 0) {
        sigqueue(child, SIGUSR1, rest);
        usleep(1000);
    }
    printf("signals: enough %x\n", status);
    /* How processes die. */
    for (int kind = 0; kind < 5; kind++) {
        child = fork();
        if (child == 0) {
            static volatile int zero;
            if (kind == 0)
                *(volatile int *)(word)zero = 1;
            else if (kind == 1)
                __asm__ volatile("ud2");
            else if (kind == 2)
                __asm__ volatile("xorl %%ecx, %%ecx; divl %%ecx" : : : NAX, NCX, NDX, "cc");
            else if (kind == 3)
                abort();
            else
                __asm__ volatile("int3");
            _exit(0);
        }
        printf("died %x\n", finish(child) & 0x7f);
    }
    signal(SIGUSR1, SIG_DFL);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "child"))
        return atoi(argv[2]) * 3 % 100;
    setvbuf(stdout, NULL, _IONBF, 0); /* children must not print it again */
    own = pages(16, RW);
    shared = mmap(NULL, 2 * PAGE, RWX, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        die("mmap");
    copies();
    execs();
    clones();
    shared_code();
    signals();
    return 0;
}
