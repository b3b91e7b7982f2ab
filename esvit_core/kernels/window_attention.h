/* Attention within the windows of a map, forward and backward, one window and head at a time, for one head width:
 * window_attention_32.c and window_attention_64.c define HEAD and the names of the two functions and include this file.
 *
 * Queries, keys and values are read from the tokens in task, and the results are written in task. Intermediate values
 * stay in a core's cache and are not saved: the backward pass recomputes the attention weights from the log-sum-exps.
 * esvit_core/kernels/window_attention.py calls it; esvit_core/models/layers/windows.py has the same in torch. */

#include "vector_math.h"

enum {
    MAX_TOKENS = 64,  /* maximum positions per window; the length of a row of logits */
    ROWS = 70,  /* MAX_TOKENS, rounded up so that blocks of 3, 5 and 10 rows fit */
    LANES = 16, /* partial sums per row */
};

/* Matrix products are accumulated in registers: floats per register, columns per block, registers for sums. */
#ifdef __AVX512F__
enum { WIDE = 16, COLUMNS = 64, SUMS = 20 };
#else
enum { WIDE = 8, COLUMNS = 32, SUMS = 12 };
#endif

static const float MASKED_LOGIT = -1e30f; /* logit of a position beyond N */

typedef float vector __attribute__((vector_size(4 * WIDE)));
typedef float four __attribute__((vector_size(16)));
typedef float matrix[ROWS][HEAD] __attribute__((aligned(64)));
typedef float square[ROWS][MAX_TOKENS] __attribute__((aligned(64)));
typedef float columns[HEAD][MAX_TOKENS] __attribute__((aligned(64)));

typedef struct {
    const void *qkv;      /* (B, L, 3 heads HEAD), float32 or bfloat16 */
    int64_t is_bf16;      /* dtype of every void pointer */
    const float *fill;    /* (3 heads HEAD), query, key and value of padding */
    const int64_t *index; /* (windows, N), token at each position, -1 for padding */
    const float *bias;    /* (heads, N, MAX_TOKENS), or NULL; columns from N on are ignored */
    const float *mask;    /* (windows, N, MAX_TOKENS), likewise */
    float scale;
    int64_t L, windows, heads, N;
} attention_args;

/* Prefetch the values of the next head into the cache. */
static inline void prefetch(const attention_args *args, const void *from, int64_t start)
{
    int size = args->is_bf16 ? 2 : 4, line = 64;
    const char *at = (const char *)from + start * size;
    for (int byte = 0; byte < HEAD * size; byte += line)
        __builtin_prefetch(at + byte);
}

/* Find the positions of a window that hold a token; return their number. */
static int64_t tokens_of(const attention_args *args, int64_t window, int64_t *positions)
{
    int64_t count = 0;
    for (int64_t n = 0; n < args->N; n++)
        if (args->index[window * args->N + n] >= 0)
            positions[count++] = n;
    return count;
}

/* Gather the values at `offset` of each token of a window, times `factor`. With `fill`, every position gets a row and
 * padding gets `fill`; without it, only tokens get consecutive rows. The remaining rows are 0. */
static void gather(const attention_args *args, const void *from, int64_t wide, int64_t image, int64_t window,
                   int64_t offset, const float *fill, float factor, matrix out)
{
    const int64_t *index = args->index + window * args->N;
    int64_t row = 0;
    for (int64_t n = 0; n < args->N; n++) {
        if (index[n] < 0) {
            for (int d = 0; fill && d < HEAD; d++)
                out[row][d] = fill[offset + d] * factor;
            row += fill != NULL;
            continue;
        }
        int64_t start = (image * args->L + index[n]) * wide + offset;
        prefetch(args, from, start + HEAD);
        if (args->is_bf16)
            for (int d = 0; d < HEAD; d++)
                out[row][d] = bf16_to_float(((const uint16_t *)from)[start + d]) * factor;
        else
            for (int d = 0; d < HEAD; d++)
                out[row][d] = ((const float *)from)[start + d] * factor;
        row++;
    }
    memset(out[row], 0, (ROWS - row) * sizeof *out);
}

/* Scatter values back to the tokens, likewise: rows of padding are added to `fill`; without it, all rows are tokens. */
static void scatter(const attention_args *args, void *to, int64_t wide, int64_t image, int64_t window, int64_t offset,
                    float *fill, matrix values)
{
    const int64_t *index = args->index + window * args->N;
    int64_t row = 0;
    for (int64_t n = 0; n < args->N; n++) {
        if (index[n] < 0) {
            for (int d = 0; fill && d < HEAD; d++)
                fill[offset + d] += values[row][d];
            row += fill != NULL;
            continue;
        }
        int64_t start = (image * args->L + index[n]) * wide + offset;
        prefetch(args, to, start + HEAD);
        if (args->is_bf16)
            for (int d = 0; d < HEAD; d++)
                ((uint16_t *)to)[start + d] = float_to_bf16(values[row][d]);
        else
            memcpy((float *)to + start, values[row], HEAD * sizeof(float));
        row++;
    }
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t four_lanes __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_lanes){__VA_ARGS__})
#endif

/* Transpose in blocks of four by four. */
static void transpose(matrix from, columns to)
{
    for (int n = 0; n < MAX_TOKENS; n += 4)
        for (int d = 0; d < HEAD; d += 4) {
            four rows[4], low[2], high[2];
            for (int i = 0; i < 4; i++)
                rows[i] = *(four *)(from[n + i] + d);
            for (int i = 0; i < 2; i++) {
                low[i] = SHUFFLE(rows[2 * i], rows[2 * i + 1], 0, 4, 1, 5);
                high[i] = SHUFFLE(rows[2 * i], rows[2 * i + 1], 2, 6, 3, 7);
            }
            *(four *)(to[d] + n) = SHUFFLE(low[0], low[1], 0, 1, 4, 5);
            *(four *)(to[d + 1] + n) = SHUFFLE(low[0], low[1], 2, 3, 6, 7);
            *(four *)(to[d + 2] + n) = SHUFFLE(high[0], high[1], 0, 1, 4, 5);
            *(four *)(to[d + 3] + n) = SHUFFLE(high[0], high[1], 2, 3, 6, 7);
        }
}

/* Sum LANES floats pairwise; a compiler would add them one after the other. */
static inline float sum_of(const float *lanes)
{
    const four *parts = (const four *)lanes;
    four sums = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* out[n] = factor * sum over m < terms of a[n * down + m * right] b[m], where b and out have rows of `width` floats, a
 * compile-time constant. A block has as many rows as there are registers for their sums. */
static inline __attribute__((always_inline)) void product(const float *a, int64_t down, int64_t right, const float *b,
                                                          int64_t rows, int64_t terms, float factor, int width, float *out)
{
    const int columns = width < COLUMNS ? width : COLUMNS, across = columns / WIDE, block = SUMS / across;
    for (int first = 0; first < width; first += columns)
        for (int64_t n = 0; n < rows; n += block) {
            vector sums[SUMS] = {0};
            for (int64_t m = 0; m < terms; m++) {
                const vector *row = (const vector *)(b + m * width + first);
#pragma GCC unroll 10
                for (int i = 0; i < block; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < across; j++)
                        sums[i * across + j] += a[(n + i) * down + m * right] * row[j];
            }
#pragma GCC unroll 10
            for (int i = 0; i < block; i++)
#pragma GCC unroll 4
                for (int j = 0; j < across; j++)
                    ((vector *)(out + (n + i) * width + first))[j] = factor * sums[i * across + j];
        }
}

static void add(const float *row, float *out)
{
#pragma omp simd
    for (int m = 0; m < MAX_TOKENS; m++)
        out[m] += row[m];
}

/* Load queries (of tokens only), keys and values of a window and head, and compute its logits (tokens, MAX_TOKENS) with
 * bias and mask. */
static void load(const attention_args *args, int64_t image, int64_t window, int64_t head, const int64_t *positions,
                 int64_t tokens, matrix q, matrix k, matrix v, square logits)
{
    columns across;
    int64_t width = args->heads * HEAD, at = head * HEAD;
    gather(args, args->qkv, 3 * width, image, window, at, NULL, args->scale, q);
    gather(args, args->qkv, 3 * width, image, window, width + at, args->fill, 1, k);
    gather(args, args->qkv, 3 * width, image, window, 2 * width + at, args->fill, 1, v);
    transpose(k, across);
    product(q[0], HEAD, 1, across[0], tokens, HEAD, 1, MAX_TOKENS, logits[0]);
    for (int64_t n = 0; n < tokens; n++) {
        if (args->bias)
            add(args->bias + (head * args->N + positions[n]) * MAX_TOKENS, logits[n]);
        if (args->mask)
            add(args->mask + (window * args->N + positions[n]) * MAX_TOKENS, logits[n]);
        for (int64_t m = args->N; m < MAX_TOKENS; m++)
            logits[n][m] = MASKED_LOGIT;
    }
}

/* Compute the windows first to last - 1, counted over all images: out (B, L, heads HEAD), and the log-sum-exps of the
 * logits, sums (B, windows, heads, N), of a window's tokens consecutively. */
int attend(const attention_args *args, int64_t first, int64_t last, void *out, float *sums)
{
    matrix q, k, v, result;
    square weights;
    float peaks[MAX_TOKENS], totals[MAX_TOKENS];
    int64_t width = args->heads * HEAD, N = args->N, positions[MAX_TOKENS];
    memset(weights, 0, sizeof weights);
    for (int64_t task = first; task < last; task++) {
        int64_t image = task / args->windows, window = task % args->windows;
        int64_t tokens = tokens_of(args, window, positions);
        for (int64_t head = 0; head < args->heads; head++) {
            int64_t at = head * HEAD;
            load(args, image, window, head, positions, tokens, q, k, v, weights);
            for (int64_t n = 0; n < tokens; n++) {
                float *row = weights[n], largest = -INFINITY, lanes[LANES] __attribute__((aligned(64))) = {0};
#pragma omp simd reduction(max : largest)
                for (int m = 0; m < MAX_TOKENS; m++)
                    largest = row[m] > largest ? row[m] : largest;
#pragma GCC unroll 4
                for (int j = 0; j < MAX_TOKENS; j += LANES)
#pragma omp simd
                    for (int l = 0; l < LANES; l++) {
                        row[j + l] = fast_exp(row[j + l] - largest);
                        lanes[l] += row[j + l];
                    }
                peaks[n] = largest;
                totals[n] = sum_of(lanes);
            }
            product(weights[0], MAX_TOKENS, 1, v[0], tokens, N, 1, HEAD, result[0]);
            for (int64_t n = 0; n < tokens; n++) {
                float inverse = 1 / totals[n];
#pragma omp simd
                for (int d = 0; d < HEAD; d++)
                    result[n][d] *= inverse;
            }
            for (int64_t n = 0; n < tokens; n++)
                sums[(task * args->heads + head) * N + n] = peaks[n] + logf(totals[n]);
            scatter(args, out, width, image, window, at, NULL, result);
        }
    }
    return 0;
}

/* Compute the gradient of qkv from that of `out`; add those of fill (3 heads HEAD) and, unless it is NULL, of bias
 * (heads, N, MAX_TOKENS) to the values already there. */
int attend_backward(const attention_args *args, int64_t first, int64_t last, const void *of_out, const float *sums,
                    void *of_qkv, float *of_fill, float *of_bias)
{
    matrix q, k, v, o, result;
    columns across;
    square weights, change;
    int64_t width = args->heads * HEAD, N = args->N, positions[MAX_TOKENS];
    memset(weights, 0, sizeof weights);
    memset(change, 0, sizeof change);
    for (int64_t task = first; task < last; task++) {
        int64_t image = task / args->windows, window = task % args->windows;
        int64_t tokens = tokens_of(args, window, positions);
        for (int64_t head = 0; head < args->heads; head++) {
            int64_t at = head * HEAD;
            load(args, image, window, head, positions, tokens, q, k, v, weights);
            gather(args, of_out, width, image, window, at, NULL, 1, o);
            for (int64_t n = 0; n < tokens; n++) {
                float sum = sums[(task * args->heads + head) * N + n], *row = weights[n];
#pragma omp simd
                for (int m = 0; m < MAX_TOKENS; m++)
                    row[m] = fast_exp(row[m] - sum);
            }
            product(weights[0], 1, MAX_TOKENS, o[0], N, tokens, 1, HEAD, result[0]);
            scatter(args, of_qkv, 3 * width, image, window, 2 * width + at, of_fill, result);
            transpose(v, across);
            product(o[0], HEAD, 1, across[0], tokens, HEAD, 1, MAX_TOKENS, change[0]);
            for (int64_t n = 0; n < tokens; n++) {
                float *row = change[n], lanes[LANES] __attribute__((aligned(64))) = {0};
#pragma GCC unroll 4
                for (int j = 0; j < MAX_TOKENS; j += LANES)
#pragma omp simd
                    for (int l = 0; l < LANES; l++)
                        lanes[l] += weights[n][j + l] * row[j + l];
                float mean = sum_of(lanes);
#pragma omp simd
                for (int m = 0; m < MAX_TOKENS; m++)
                    row[m] = weights[n][m] * (row[m] - mean);
                if (of_bias)
                    add(row, of_bias + (head * N + positions[n]) * MAX_TOKENS);
            }
            product(change[0], MAX_TOKENS, 1, k[0], tokens, N, args->scale, HEAD, result[0]);
            scatter(args, of_qkv, 3 * width, image, window, at, NULL, result);
            product(change[0], 1, MAX_TOKENS, q[0], N, tokens, 1, HEAD, result[0]);
            scatter(args, of_qkv, 3 * width, image, window, width + at, of_fill, result);
        }
    }
    return 0;
}
