/* Keeps a guest's timers, signals and scheduler busy until SIGTERM, beside other work, and checks its own sums.
 * Ends with 0 if they were all right, and says how many ticks came. */
#include "../programs/common.h"

#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>

static volatile sig_atomic_t ticks, stop;

static void ticked(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    ticks++;
    __asm__ volatile("pxor %%xmm0, %%xmm0; pxor %%xmm5, %%xmm5" : : : "xmm0", "xmm5");
}

static void stopped(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    stop = 1;
}

static uint64_t sum_once(void)
{
    uint64_t hash = 1, seed = 3;
    double x = 0;
    for (int i = 0; i < 3000; i++) {
        hash = mix(hash, next_random(&seed));
        x += 1.0 / (double)(1 + (hash & 255));
    }
    return mix_bytes(hash, &x, sizeof x);
}

static int load(long microseconds)
{
    struct itimerval every = {{0, microseconds}, {0, microseconds}};
    uint64_t first = sum_once();
    setitimer(ITIMER_REAL, &every, NULL);
    while (!stop) {
        struct timespec nap = {0, 300000};
        for (int i = 0; i < 5; i++)
            if (sum_once() != first)
                return 1;
        nanosleep(&nap, NULL);
    }
    return 0;
}

int main(void)
{
    static const long periods[] = {1000, 1700, 2300};
    pid_t children[COUNT(periods)];
    int wrong = 0;
    catch_signal(SIGALRM, ticked, SA_RESTART);
    catch_signal(SIGTERM, stopped, 0);
    for (size_t i = 0; i < COUNT(periods); i++) {
        children[i] = fork();
        if (children[i] == 0) {
            int result = load(periods[i]);
            _exit(result ? 1 : ticks == 0 ? 2 : 0);
        }
    }
    while (!stop)
        nanosleep(&(struct timespec){0, 100000000}, NULL);
    for (size_t i = 0; i < COUNT(periods); i++) {
        int status;
        kill(children[i], SIGTERM);
        waitpid(children[i], &status, 0);
        wrong |= status;
    }
    return wrong ? 1 : 0;
}
