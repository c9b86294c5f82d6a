/* Threads for the jobs of one call: started for it and joined at its end, so that nothing is left behind that a fork, a
 * signal or the end of the interpreter could trip over. They know nothing of Python, so none waits for its lock. */

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define HAS_THREADS 1
#endif

enum { MOST_THREADS = 64 };

struct share {
    entry *call;
    int64_t level, wide;
    const void *jobs;
    int64_t count, *next;
    double *work;
};

static void *take_share(void *of) {
    struct share *s = of;
    s->call(s->level, s->wide, s->jobs, s->count, s->next, s->work);
    return 0;
}

/* Calls an entry from up to `threads` threads at once, this one among them, each with `room` numbers of `work`. */
void fedgram_spread(entry *call, int64_t level, int64_t wide, const void *jobs, int64_t count, int64_t threads,
                    double *work, int64_t room) {
    int64_t next = 0;
#ifdef HAS_THREADS
    struct share shares[MOST_THREADS];
    pthread_t started[MOST_THREADS];
    int64_t others = 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals stay with the threads that the program knows */
    for (; others < least(threads, MOST_THREADS) - 1; others++) {
        shares[others] = (struct share){call, level, wide, jobs, count, &next, work + (others + 1) * room};
        if (pthread_create(started + others, 0, take_share, shares + others)) break; /* the others do it all */
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
#endif
    call(level, wide, jobs, count, &next, work);
#ifdef HAS_THREADS
    for (int64_t i = 0; i < others; i++) pthread_join(started[i], 0);
#endif
}
