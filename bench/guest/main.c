/* Measures how much work a second this machine does, by CLOCK_MONOTONIC.
 *
 *   work NAME SECONDS              repeats the work NAME for that long
 *   work time NAME UNITS COMMAND…  runs a command once, which does so many units; its output is the checksum
 *   work data BYTES                writes that much text, always the same, for programs to chew on
 *   work exit                      ends with 7; what fork-exec-exit starts
 *   work list                      the names
 *
 * "WORK: start" comes right before what is measured, and right after it one line with the result:
 *   WORK: name=sha256 units=1234 ns=2000123456 check=0123456789abcdef unit=KiB
 * so that a host that watches the lines come can compare its clock with ours.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "work.h"

void die(const char *what)
{
    fprintf(stderr, "work: %s\n", what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A line in one write, so that it comes out whole. */
static void say(const char *line)
{
    size_t length = strlen(line);
    if (write(STDOUT_FILENO, line, length) != (ssize_t)length)
        exit(1);
}

static void result(const char *name, uint64_t units, uint64_t ns, uint64_t check, const char *unit)
{
    char line[256];
    snprintf(line, sizeof line, "WORK: name=%s units=%llu ns=%llu check=%016llx unit=%s\n", name, (unsigned long long)units,
             (unsigned long long)ns, (unsigned long long)check, unit);
    say(line);
}

static int measure(const struct work *work, double seconds)
{
    if (work->prepare)
        work->prepare();
    uint64_t check = work->run(), calls = 0, end;
    say("WORK: start\n");
    uint64_t start = now_ns(), limit = start + (uint64_t)(seconds * 1e9);
    do {
        if (work->run() != check)
            die("a checksum differs from the one before");
        calls++;
        end = now_ns();
    } while (end < limit);
    result(work->name, calls * work->units, end - start, check, work->unit);
    if (work->finish)
        work->finish();
    return 0;
}

static int time_command(const char *name, uint64_t units, char **command)
{
    static uint8_t buffer[1 << 16];
    int output[2], status;
    uint64_t check = 0xcbf29ce484222325u; /* FNV-1a */
    ssize_t got;
    if (pipe(output))
        die("pipe failed");
    say("WORK: start\n");
    uint64_t start = now_ns();
    pid_t child = fork();
    if (child == 0) {
        dup2(output[1], STDOUT_FILENO);
        close(output[0]);
        close(output[1]);
        execvp(command[0], command);
        perror(command[0]);
        _exit(127);
    }
    close(output[1]);
    while ((got = read(output[0], buffer, sizeof buffer)) > 0)
        for (ssize_t i = 0; i < got; i++)
            check = (check ^ buffer[i]) * 0x100000001b3u;
    if (child < 0 || waitpid(child, &status, 0) != child || status)
        die("the command failed");
    result(name, units, now_ns() - start, check, "units");
    return 0;
}

/* Words with the frequencies of a language, roughly: it compresses about as text does. */
static int write_data(uint64_t bytes)
{
    static char words[512][12];
    static char buffer[1 << 16];
    uint64_t seed = 5;
    size_t used = 0;
    for (size_t i = 0; i < COUNT(words); i++) {
        size_t length = 2 + next_random(&seed) % 9;
        for (size_t j = 0; j < length; j++)
            words[i][j] = (char)('a' + next_random(&seed) % 26);
    }
    while (bytes) {
        uint32_t r = next_random(&seed);
        const char *word = words[(r >> 8) % 512 * ((r & 0xff) + 1) >> 8];
        for (; *word && bytes; word++, bytes--)
            buffer[used++] = *word;
        if (bytes) {
            buffer[used++] = r >> 28 ? ' ' : '\n';
            bytes--;
        }
        if (used > sizeof buffer - 64 || !bytes) {
            for (size_t done = 0; done < used;) {
                ssize_t wrote = write(STDOUT_FILENO, buffer + done, used - done);
                if (wrote <= 0)
                    die("the data could not be written");
                done += (size_t)wrote;
            }
            used = 0;
        }
    }
    return 0;
}

static const struct work *find(const char *name)
{
    for (size_t i = 0; i < kernels_count; i++)
        if (!strcmp(kernels[i].name, name))
            return &kernels[i];
    for (size_t i = 0; i < system_work_count; i++)
        if (!strcmp(system_work[i].name, name))
            return &system_work[i];
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "exit"))
        return 7;
    if (argc == 2 && !strcmp(argv[1], "list")) {
        for (size_t i = 0; i < kernels_count; i++)
            puts(kernels[i].name);
        for (size_t i = 0; i < system_work_count; i++)
            puts(system_work[i].name);
        return 0;
    }
    if (argc == 3 && !strcmp(argv[1], "data"))
        return write_data(strtoull(argv[2], NULL, 10));
    if (argc > 4 && !strcmp(argv[1], "time"))
        return time_command(argv[2], strtoull(argv[3], NULL, 10), argv + 4);
    const struct work *work = argc == 3 ? find(argv[1]) : NULL;
    double seconds = work ? atof(argv[2]) : 0;
    if (!work || !(seconds > 0)) {
        fprintf(stderr, "usage: work NAME SECONDS | time NAME UNITS COMMAND… | data BYTES | exit | list\n");
        return 2;
    }
    return measure(work, seconds);
}
