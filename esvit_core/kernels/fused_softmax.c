/* Fused softmax kernels of the objective with many prototypes, one row at a time.
 *
 * A row of 65,536 logits fits in a core's cache, so each logit is read from memory once and its gradient written once.
 * esvit_core/kernels/fused_softmax.py calls these functions and has the same two in torch. */

#include "vector_math.h"

/* Return a row as float32; a bfloat16 row is converted into `buffer`. */
static const float *load_row(const void *logits, int64_t row, int64_t K, int is_bf16, float *buffer)
{
    if (!is_bf16)
        return (const float *)logits + row * K;
    const uint16_t *values = (const uint16_t *)logits + row * K;
#pragma omp simd
    for (int64_t k = 0; k < K; k++)
        buffer[k] = bf16_to_float(values[k]);
    return buffer;
}

/* out = softmax((logits - center) / temperature) for n rows. Returns 0, or 1 if out of memory. */
int teacher_softmax(const void *logits, int is_bf16, int64_t K, const float *center, float inverse_temp,
                    const int64_t *rows, int64_t n, float *out)
{
    float *buffer = is_bf16 ? malloc(K * sizeof *buffer) : NULL;
    if (is_bf16 && !buffer)
        return 1;
    for (int64_t i = 0; i < n; i++) {
        const float *z = load_row(logits, rows[i], K, is_bf16, buffer);
        float *p = out + i * K;
        float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t k = 0; k < K; k++)
            largest = z[k] - center[k] > largest ? z[k] - center[k] : largest;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < K; k++) {
            p[k] = fast_exp((z[k] - center[k] - largest) * inverse_temp);
            total += p[k];
        }
        float inverse = 1 / total;
#pragma omp simd
        for (int64_t k = 0; k < K; k++)
            p[k] *= inverse;
    }
    free(buffer);
    return 0;
}

/* For n rows, with z = logits / temperature and t the mean of the Q matched targets: values = logsumexp(z) - t . z and
 * out = scale (softmax(z) - t). `out` may be NULL or alias the logits. Returns 0, or 1 if out of memory. */
int soft_cross_entropy(const void *logits, int64_t n, int is_bf16, int64_t K, float inverse_temp, const float *targets,
                       const int64_t *matches, int64_t Q, const float *scale, float *values, void *out)
{
    float *scratch = malloc(2 * K * sizeof *scratch);
    if (!scratch)
        return 1;
    float *buffer = scratch, *mean = scratch + K;
    for (int64_t row = 0; row < n; row++) {
        const float *z = load_row(logits, row, K, is_bf16, buffer);
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
            total += fast_exp((z[k] - largest) * inverse_temp);
            score += (z[k] - largest) * t[k]; /* subtract the largest: t sums to one, and the sum stays small */
        }
        float log_total = logf(total), factor = scale[row];
        values[row] = log_total - score * inverse_temp;
        if (!out)
            continue;
        float *gradient = is_bf16 ? buffer : (float *)out + row * K;
#pragma omp simd
        for (int64_t k = 0; k < K; k++)
            gradient[k] = (fast_exp((z[k] - largest) * inverse_temp - log_total) - t[k]) * factor;
        if (is_bf16) {
            uint16_t *out16 = (uint16_t *)out + row * K;
#pragma omp simd
            for (int64_t k = 0; k < K; k++)
                out16[k] = float_to_bf16(gradient[k]);
        }
    }
    free(scratch);
    return 0;
}
