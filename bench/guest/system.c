/* Work for the operating system: processes, page faults, system calls, pipes. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "work.h"

static uint64_t wait_for(pid_t child)
{
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child)
        die("fork or waitpid failed");
    return (uint64_t)status;
}

/* The exit status is the checksum: a child that crashes or is lost changes it. */
static uint64_t fork_exit_run(void)
{
    pid_t child = fork();
    if (child == 0)
        _exit(7);
    return wait_for(child);
}

static uint64_t fork_exec_exit_run(void)
{
    static char *const arguments[] = {"work", "exit", NULL};
    static char *const environment[] = {NULL};
    pid_t child = fork();
    if (child == 0) {
        execve("/proc/self/exe", arguments, environment);
        _exit(1);
    }
    return wait_for(child);
}

/* Each page is read first (the zero page is mapped) in one half, written first (a page is allocated) in the other. */
#define FAULT_PAGES 256
static volatile uint8_t *fault_area;

static void fault_prepare(void)
{
    fault_area = mmap(NULL, FAULT_PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fault_area == MAP_FAILED)
        die("mmap failed");
}

static uint64_t fault_run(void)
{
    uint64_t hash = 0;
    for (size_t page = 0; page < FAULT_PAGES; page++) {
        volatile uint8_t *at = fault_area + page * 4096 + page;
        if (page & 1)
            *at = (uint8_t)(page * 3);
        hash = mix(hash, *at);
    }
    if (madvise((void *)fault_area, FAULT_PAGES * 4096, MADV_DONTNEED))
        die("madvise failed");
    return hash;
}

static void fault_finish(void) { munmap((void *)fault_area, FAULT_PAGES * 4096); }

/* A system call that does nothing and that no library answers by itself. */
static uint64_t syscall_run(void)
{
    uint64_t first = (uint64_t)syscall(SYS_getppid);
    for (int i = 1; i < 200; i++)
        if ((uint64_t)syscall(SYS_getppid) != first)
            die("getppid changed its mind");
    return 200;
}

/* A byte to another process and the answer back: two switches of address spaces. */
static int to_child[2], from_child[2];
static pid_t echo_process;

static void pipe_prepare(void)
{
    if (pipe(to_child) || pipe(from_child))
        die("pipe failed");
    echo_process = fork();
    if (echo_process == 0) {
        uint8_t byte;
        close(to_child[1]);
        while (read(to_child[0], &byte, 1) == 1) {
            byte = (uint8_t)(byte * 5 + 1);
            if (write(from_child[1], &byte, 1) != 1)
                break;
        }
        _exit(0);
    }
    close(to_child[0]);
    close(from_child[1]);
}

static uint64_t pipe_run(void)
{
    uint64_t hash = 0;
    uint8_t byte = 1;
    for (int i = 0; i < 20; i++) {
        if (write(to_child[1], &byte, 1) != 1 || read(from_child[0], &byte, 1) != 1)
            die("the echo process is gone");
        hash = mix(hash, byte);
    }
    return hash;
}

static void pipe_finish(void)
{
    close(to_child[1]);
    close(from_child[0]);
    wait_for(echo_process);
}

const struct work system_work[] = {
    {"fork-exec-exit", "processes", 1, NULL, fork_exec_exit_run, NULL},
    {"fork-exit", "processes", 1, NULL, fork_exit_run, NULL},
    {"page-fault", "faults", FAULT_PAGES, fault_prepare, fault_run, fault_finish},
    {"syscall", "calls", 200, NULL, syscall_run, NULL},
    {"pipe", "round trips", 20, pipe_prepare, pipe_run, pipe_finish},
};
const size_t system_work_count = COUNT(system_work);
