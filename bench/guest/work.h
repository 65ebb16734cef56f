/* Work whose rate is measured: the same static program runs in guests and on the host. */
#ifndef WORK_H
#define WORK_H

#include <stddef.h>
#include <stdint.h>

struct work {
    const char *name;
    const char *unit;    /* what is counted */
    uint64_t units;      /* how many of them one call of run() does */
    void (*prepare)(void); /* or NULL; not measured */
    uint64_t (*run)(void); /* returns a checksum, the same from every call */
    void (*finish)(void);  /* or NULL; not measured */
};

/* CPU-bound; kernels.c. */
extern const struct work kernels[];
extern const size_t kernels_count;

/* The operating system's part; system.c. */
extern const struct work system_work[];
extern const size_t system_work_count;

/* Ends the program with a sentence. */
void die(const char *what) __attribute__((noreturn));

#define NOINLINE __attribute__((noinline))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static inline uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

/* A linear congruential generator (the multiplier is Knuth's MMIX one); the high half is the good one. */
static inline uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

#endif
