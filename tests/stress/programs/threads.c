/* Threads: locks by futex, LOCK instructions, thread-local storage, conditions, barriers. Sums come out whole or not. */
#include "common.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define THREADS 4
#define TURNS 4000

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static volatile uint64_t guarded[4];
static struct {
    uint8_t padding[60]; /* the next one crosses a cache line, which LOCK stands */
    uint32_t split;
    uint32_t added, exchanged, bits[8], counted;
    uint64_t wide;
    uint8_t byte;
} __attribute__((packed, aligned(64))) shared;
static __thread uint64_t own;
static volatile int turn;

static void *worker(void *argument)
{
    uint32_t number = (uint32_t)(word)argument;
    own = number;
    pthread_barrier_wait(&barrier);
    for (uint32_t i = 0; i < TURNS; i++) {
        pthread_mutex_lock(&mutex);
        for (int j = 0; j < 4; j++)
            guarded[j] += (unsigned)j + 1;
        if (i % 64 == 0)
            sched_yield(); /* while it is held */
        pthread_mutex_unlock(&mutex);
        __asm__ volatile("lock incl %0" : "+m"(shared.split) : : "cc");
        uint32_t one = 3;
        __asm__ volatile("lock xaddl %1, %0" : "+m"(shared.added), "+r"(one) : : "cc");
        uint32_t old = shared.exchanged, next;
        uint8_t done;
        do {
            next = old * 5 + 1 - old * 4; /* old + 1 */
            __asm__ volatile("lock cmpxchgl %3, %0; sete %2" : "+m"(shared.exchanged), "+a"(old), "=q"(done) : "r"(next) : "cc");
        } while (!done);
        uint32_t bit = i * 7 % 256;
        __asm__ volatile("lock btcl %1, %0" : "+m"(shared.bits[bit / 32]) : "r"(bit % 32) : "cc");
        uint64_t before = *(volatile uint64_t *)&shared.wide, after;
        do
            after = before + 0x100000001;
        while (!__sync_bool_compare_and_swap(&shared.wide, before, after) && (before = *(volatile uint64_t *)&shared.wide, 1));
        __asm__ volatile("lock addb $1, %0; lock orl $0x80, %1; lock subl $2, %1" : "+m"(shared.byte), "+m"(shared.counted) : : "cc");
        own += i;
    }
    return (void *)(word)own;
}

static void *player(void *argument)
{
    int number = (int)(word)argument;
    for (int i = 0; i < 300; i++) {
        pthread_mutex_lock(&mutex);
        while (turn % THREADS != number)
            pthread_cond_wait(&condition, &mutex);
        turn++;
        guarded[0] = mix(guarded[0], (uint64_t)turn);
        pthread_cond_broadcast(&condition);
        pthread_mutex_unlock(&mutex);
    }
    return NULL;
}

static void *short_lived(void *argument) { return (void *)((word)argument * 3); }

int main(void)
{
    pthread_t threads[THREADS];
    uint64_t hash = 0;
    void *result;
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (word i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, worker, (void *)i))
            die("pthread_create");
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], &result);
        hash = mix(hash, (word)result);
    }
    say("own", hash);
    printf("guarded %llu %llu %llu %llu\n", (unsigned long long)guarded[0], (unsigned long long)guarded[1],
           (unsigned long long)guarded[2], (unsigned long long)guarded[3]);
    printf("atomic %u %u %u %llx %u\n", shared.split, shared.added, shared.exchanged, (unsigned long long)shared.wide, shared.byte);
    say("bits", mix_bytes(0, shared.bits, sizeof shared.bits));
    guarded[0] = 0;
    for (word i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, player, (void *)i);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    printf("turns %d %016llx\n", turn, (unsigned long long)guarded[0]);
    for (word i = 0; i < 200; i++) {
        pthread_create(&threads[0], NULL, short_lived, (void *)i);
        pthread_join(threads[0], &result);
        hash = mix(hash, (word)result);
    }
    say("short-lived", hash);
#ifdef __x86_64__
    static uint64_t pair[2] __attribute__((aligned(16)));
    for (uint64_t i = 0; i < 1000; i++) {
        uint64_t low = i % 3 ? pair[0] : 12345, high = pair[1];
        uint8_t done;
        __asm__ volatile("lock cmpxchg16b %0; sete %3" : "+m"(pair), "+a"(low), "+d"(high), "=q"(done) : "b"(i * 3), "c"(~i) : "cc");
        hash = mix(hash, done + low + high);
    }
    say("pair", mix(hash, pair[0] ^ pair[1]));
#endif
    return 0;
}
