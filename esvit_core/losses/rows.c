/* The two loops over the prototypes that the objective of many prototypes consists of, a row at a time.
 *
 * A row of 65,536 logits stays in a core's cache, so that each is read from memory once and its gradient written once.
 * esvit_core/losses/rows.py compiles this file, calls it, and has the same two functions in torch. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* e^x for x <= 0 within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its series up to r^7. NaN stays. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x; /* 1.6e-38, the last that is no denormal */
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r / 5040))))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Row of float32, or of bfloat16 made wide into `wide`. */
static const float *widened(const void *logits, int64_t row, int64_t K, int half, float *wide)
{
    if (!half)
        return (const float *)logits + row * K;
    const uint16_t *narrow = (const uint16_t *)logits + row * K;
#pragma omp simd
    for (int64_t k = 0; k < K; k++) {
        uint32_t bits = (uint32_t)narrow[k] << 16;
        memcpy(&wide[k], &bits, sizeof bits);
    }
    return wide;
}

/* Round to bfloat16, the nearest, halves to even; NaN stays. */
static void narrow(const float *values, uint16_t *out, int64_t K)
{
#pragma omp simd
    for (int64_t k = 0; k < K; k++) {
        uint32_t bits;
        memcpy(&bits, &values[k], sizeof bits);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        out[k] = values[k] == values[k] ? rounded : 0x7fc0;
    }
}

/* out = softmax((logits - centre) / temperature) of the n given rows. Returns 0, or 1 where memory lacks. */
int sharpen(const void *logits, int half, int64_t K, const float *centre, float inverse_temp, const int64_t *rows,
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
            largest = z[k] - centre[k] > largest ? z[k] - centre[k] : largest;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < K; k++) {
            p[k] = exponential((z[k] - centre[k] - largest) * inverse_temp);
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
        if (half)
            narrow(gradient, (uint16_t *)out + row * K, K);
    }
    free(scratch);
    return 0;
}
