/* Disk and network loads of bench.pv: each prints "PV: NAME BYTES-OR-COUNT NANOSECONDS". */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ALIGN 4096
#define CHUNK (256 << 10)

static void die(const char *what)
{
    printf("PV: failed %s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* pv disk NAME read|write|random DEVICE BYTES BLOCK: past the page cache, one request after the other. */
static int disk(char **argument)
{
    int writes = !strcmp(argument[1], "write"), random = !strcmp(argument[1], "random");
    uint64_t size = strtoull(argument[3], NULL, 0), block = strtoull(argument[4], NULL, 0);
    uint64_t count = size / block, state = 88172645463325252u;
    int fd = open(argument[2], (writes ? O_RDWR : O_RDONLY) | O_DIRECT);
    void *buffer;
    if (fd < 0 || posix_memalign(&buffer, ALIGN, block))
        die("open");
    memset(buffer, 0x5a, block);
    if (random)
        count = count < 4000 ? count : 4000;
    uint64_t start = now();
    for (uint64_t number = 0; number < count; number++) {
        uint64_t place = number;
        if (random) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            place = state % (size / block);
        }
        ssize_t done = writes ? pwrite(fd, buffer, block, (off_t)(place * block))
                              : pread(fd, buffer, block, (off_t)(place * block));
        if (done != (ssize_t)block)
            die(argument[1]);
    }
    if (writes && fsync(fd))
        die("fsync");
    printf("PV: %s %llu %llu\n", argument[0], (unsigned long long)(random ? count : count * block),
           (unsigned long long)(now() - start));
    close(fd);
    return 0;
}

static void exactly(int fd, void *data, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t got = read(fd, (char *)data + done, length - done);
        if (got <= 0)
            die("read");
        done += (size_t)got;
    }
}

/* pv serve PORT: each connection brings a letter and a number of bytes or rounds (64 bits): S sends so many, R receives
   them and answers with a byte, E answers so many single bytes, Q is the end. The host has the clock. */
static int serve(char **argument)
{
    static char buffer[CHUNK];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argument[0]))};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
        die("listen");
    puts("PV: listening 0 0");
    fflush(stdout);
    for (;;) {
        struct {
            char kind;
            uint64_t count;
        } __attribute__((packed)) wish;
        int peer = accept(listener, NULL, NULL);
        if (peer < 0)
            die("accept");
        setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        exactly(peer, &wish, sizeof wish);
        uint64_t left = wish.count;
        while (left) {
            size_t part = left < CHUNK ? (size_t)left : CHUNK;
            ssize_t done = 1;
            if (wish.kind == 'S')
                done = write(peer, buffer, part);
            else if (wish.kind == 'R')
                done = read(peer, buffer, part);
            else if (wish.kind == 'E') {
                exactly(peer, buffer, 1);
                done = write(peer, buffer, 1);
            }
            if (done <= 0)
                die("transfer");
            left -= (uint64_t)done;
        }
        if (wish.kind == 'R' && write(peer, buffer, 1) != 1)
            die("answer");
        close(peer);
        if (wish.kind == 'Q')
            return 0;
    }
}

int main(int count, char **argument)
{
    if (count == 7 && !strcmp(argument[1], "disk"))
        return disk(argument + 2);
    if (count == 3 && !strcmp(argument[1], "serve"))
        return serve(argument + 2);
    fputs("pv disk NAME read|write|random DEVICE BYTES BLOCK, or pv serve PORT\n", stderr);
    return 2;
}
