/* The two loops over the prototypes that the objective of many prototypes consists of, a row at a time.
 *
 * A row of 65,536 logits stays in a core's cache, so that each is read from memory once and its gradient written once.
 * esvit_core/kernels/fused_softmax.py calls it, and has the same two functions in torch. */

#include "numbers.h"

/* Row of float32, or of bfloat16 made wide into `wide`. */
static const float *widened(const void *logits, int64_t row, int64_t K, int half, float *wide)
{
    if (!half)
        return (const float *)logits + row * K;
    const uint16_t *values = (const uint16_t *)logits + row * K;
#pragma omp simd
    for (int64_t k = 0; k < K; k++)
        wide[k] = widen(values[k]);
    return wide;
}

/* out = softmax((logits - center) / temperature) of the n given rows. Returns 0, or 1 where memory lacks. */
int sharpen(const void *logits, int half, int64_t K, const float *center, float inverse_temp, const int64_t *rows,
            int64_t n, float *out)
{
    float *wide = half ? malloc(K * sizeof *wide) : NULL;
    if (half && !wide)
        return 1;
    for (int64_t i = 0; i < n; i++) {
        const float *z = widened(logits, rows[i], K, half, wide);
        float *p = out + i * K;
        float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t k = 0; k < K; k++)
            largest = z[k] - center[k] > largest ? z[k] - center[k] : largest;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < K; k++) {
            p[k] = exponential((z[k] - center[k] - largest) * inverse_temp);
            total += p[k];
        }
        float inverse = 1 / total;
#pragma omp simd
        for (int64_t k = 0; k < K; k++)
            p[k] *= inverse;
    }
    free(wide);
    return 0;
}

/* Of n rows, with z = logits / temperature and t the mean of the Q matched targets: values = logsumexp(z) - t . z, and
 * out = scale (softmax(z) - t), which may be NULL or where the logits are. Returns 0, or 1 where memory lacks. */
int compare(const void *logits, int64_t n, int half, int64_t K, float inverse_temp, const float *targets,
            const int64_t *matches, int64_t Q, const float *scale, float *values, void *out)
{
    float *scratch = malloc(2 * K * sizeof *scratch);
    if (!scratch)
        return 1;
    float *wide = scratch, *mean = scratch + K;
    for (int64_t row = 0; row < n; row++) {
        const float *z = widened(logits, row, K, half, wide);
        const float *t = targets + matches[row * Q] * K;
        if (Q > 1) {
            memcpy(mean, t, K * sizeof *mean);
            for (int64_t q = 1; q < Q; q++) {
                const float *other = targets + matches[row * Q + q] * K;
#pragma omp simd
                for (int64_t k = 0; k < K; k++)
                    mean[k] += other[k];
            }
#pragma omp simd
            for (int64_t k = 0; k < K; k++)
                mean[k] /= Q;
            t = mean;
        }
        float largest = -INFINITY, total = 0, score = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t k = 0; k < K; k++)
            largest = z[k] > largest ? z[k] : largest;
#pragma omp simd reduction(+ : total, score)
        for (int64_t k = 0; k < K; k++) {
            total += exponential((z[k] - largest) * inverse_temp);
            score += (z[k] - largest) * t[k]; /* the largest left out: t sums to one, and the sum is smaller */
        }
        float log_total = logf(total), factor = scale[row];
        values[row] = log_total - score * inverse_temp;
        if (!out)
            continue;
        float *gradient = half ? wide : (float *)out + row * K;
#pragma omp simd
        for (int64_t k = 0; k < K; k++)
            gradient[k] = (exponential((z[k] - largest) * inverse_temp - log_total) - t[k]) * factor;
        if (half) {
            uint16_t *narrowed = (uint16_t *)out + row * K;
#pragma omp simd
            for (int64_t k = 0; k < K; k++)
                narrowed[k] = narrow(gradient[k]);
        }
    }
    free(scratch);
    return 0;
}
