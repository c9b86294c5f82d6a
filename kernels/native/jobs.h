/* What works on jobs, for this extension and for that of flora_na: rows of a table that threads take one by one (spread.h),
 * with scratch space of a thread's own. `level` is at most fedgram_level(); lower ones are for tests. `wide`: in double,
 * else in float, where there is a choice. */

#include <stdint.h>

typedef void entry(int64_t level, int64_t wide, const void *jobs, int64_t count, int64_t *next, double *work);

#define JOBS(name, job)                                                                                                \
    static void name##_jobs(int64_t, int64_t, const struct job *, int64_t, int64_t *, double *);                       \
    void fedgram_##name(int64_t level, int64_t wide, const void *jobs, int64_t count, int64_t *next, double *work) {   \
        name##_jobs(level, wide, jobs, count, next, work);                                                             \
    }                                                                                                                  \
    static void name##_jobs(int64_t level, int64_t wide, const struct job *jobs, int64_t count, int64_t *next, double *work)
#define EACH for (int64_t i = take(next); i < count; i = take(next))

/* A job that no thread has taken yet, or `count`: threads share `next`. */
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
