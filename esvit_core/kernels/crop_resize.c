/* Cut out crops of an 8-bit RGB image and resize them (bicubic, antialiased), bit for bit as torch and PIL do.
 *
 * The result is that of torch's F.interpolate on uint8: weights of 16 bits, first along the rows, rounded to 8 bits, then
 * along the columns. Torch handles one output pixel at a time, three channels wide. Here the image is transposed once for
 * all its crops, so that both directions are sums of whole vectors. Neighbors lie in pairs, because the products of two
 * 16-bit numbers with two weights and their sum are one instruction. esvit_core/kernels/image_ops.py calls these functions. */

#include "image_ops.h"

#if defined(__AVX2__)
#include <immintrin.h>

#define BLOCK 16 /* rows, and columns, that are processed together */
#define CHANNELS 3

/* The weights of one direction: output i is the sum over k < number[i] of values[i * taps + k] * input[first[i] + k], over
 * 2^precision. The numbers are even: the last weight may be 0. */
struct weights {
    int64_t *first, *number;
    int16_t *values;
    int64_t taps;
    int precision;
};

static double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1)
        return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2)
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
    return 0;
}

/* Return 0, or 1 if out of memory. */
static int make_weights(struct weights *w, int64_t from, int64_t to)
{
    double scale = (double)from / to, support = scale >= 1 ? 2 * scale : 2, inverse = scale >= 1 ? 1 / scale : 1;
    int64_t most = (int64_t)ceil(support) * 2 + 1;
    w->taps = (most + 1) / 2 * 2;
    w->first = malloc(to * sizeof *w->first);
    w->number = malloc(to * sizeof *w->number);
    w->values = calloc(to * w->taps, sizeof *w->values);
    double *exact = calloc(to * w->taps, sizeof *exact), largest = 0;
    if (!w->first || !w->number || !w->values || !exact) {
        free(exact);
        return 1;
    }
    for (int64_t i = 0; i < to; i++) {
        double center = scale * (i + 0.5), total = 0, *row = exact + i * w->taps;
        int64_t low = (int64_t)(center - support + 0.5), high = (int64_t)(center + support + 0.5);
        low = low < 0 ? 0 : low;
        high = high > from ? from : high;
        int64_t number = high - low > most ? most : high - low;
        w->first[i] = low;
        w->number[i] = (number + 1) / 2 * 2;
        for (int64_t k = 0; k < number; k++)
            total += row[k] = cubic((k + low - center + 0.5) * inverse);
        for (int64_t k = 0; k < number; k++) {
            row[k] = total != 0 ? row[k] / total : row[k];
            largest = row[k] > largest ? row[k] : largest;
        }
    }
    for (w->precision = 0; w->precision < 22; w->precision++)
        if ((int)(0.5 + largest * (1 << (w->precision + 1))) >= 1 << 15)
            break;
    for (int64_t i = 0; i < to * w->taps; i++) {
        double value = exact[i] * (1 << w->precision);
        w->values[i] = (int16_t)(value < 0 ? value - 0.5 : value + 0.5);
    }
    free(exact);
    return 0;
}

static void free_weights(struct weights *w)
{
    free(w->first);
    free(w->number);
    free(w->values);
}

/* Two weights beside each other. */
static inline int32_t pair_of(const int16_t *weights)
{
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return pair;
}

/* For 16 values of each channel, sum(weights[k] * input[k]) over 2^precision as bytes.
 *
 * input + k * step holds 16 pairs: the values k and k + 1. Channel c of the input is c * in_step bytes further; its result is
 * written to out + c * out_step. */
static inline void sum_pairs(const uint8_t *input, int64_t step, int64_t in_step, const int16_t *weights, int64_t number,
                             int precision, uint8_t *out, int64_t out_step)
{
    int32_t half = precision ? 1 << (precision - 1) : 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __m512i total[CHANNELS];
    for (int c = 0; c < CHANNELS; c++)
        total[c] = _mm512_set1_epi32(half);
    for (int64_t k = 0; k < number; k += 2) {
        __m512i weight = _mm512_set1_epi32(pair_of(weights + k));
        for (int c = 0; c < CHANNELS; c++) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)(input + k * step + c * in_step));
#if defined(__AVX512VNNI__)
            total[c] = _mm512_dpwssd_epi32(total[c], _mm512_cvtepu8_epi16(bytes), weight);
#else
            total[c] = _mm512_add_epi32(total[c], _mm512_madd_epi16(_mm512_cvtepu8_epi16(bytes), weight));
#endif
        }
    }
    for (int c = 0; c < CHANNELS; c++) {
        total[c] = _mm512_max_epi32(_mm512_sra_epi32(total[c], _mm_cvtsi32_si128(precision)), _mm512_setzero_si512());
        _mm_storeu_si128((__m128i *)(out + c * out_step), _mm512_cvtusepi32_epi8(total[c]));
    }
#else
    __m256i low[CHANNELS], high[CHANNELS];
    for (int c = 0; c < CHANNELS; c++)
        low[c] = high[c] = _mm256_set1_epi32(half);
    for (int64_t k = 0; k < number; k += 2) {
        __m256i weight = _mm256_set1_epi32(pair_of(weights + k));
        for (int c = 0; c < CHANNELS; c++) {
            const __m128i *bytes = (const __m128i *)(input + k * step + c * in_step);
            __m256i first = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes));
            __m256i second = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes + 1));
            low[c] = _mm256_add_epi32(low[c], _mm256_madd_epi16(first, weight));
            high[c] = _mm256_add_epi32(high[c], _mm256_madd_epi16(second, weight));
        }
    }
    for (int c = 0; c < CHANNELS; c++) {
        __m256i first = _mm256_sra_epi32(low[c], _mm_cvtsi32_si128(precision));
        __m256i second = _mm256_sra_epi32(high[c], _mm_cvtsi32_si128(precision));
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
        __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(out + c * out_step), packed);
    }
#endif
}

/* A stage of a transposition: the bytes of the vectors i and i + 8 in turn. */
static inline void merge_halves(const __m128i *in, __m128i *out)
{
    for (int i = 0; i < 8; i++) {
        out[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 8]);
        out[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 8]);
    }
}

/* Transpose 16 x 16 bytes. */
static inline void transpose(const uint8_t *in, int64_t in_stride, uint8_t *out, int64_t out_stride)
{
    __m128i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = _mm_loadu_si128((const __m128i *)(in + i * in_stride));
    merge_halves(a, b);
    merge_halves(b, a);
    merge_halves(a, b);
    merge_halves(b, a);
    for (int i = 0; i < 16; i++)
        _mm_storeu_si128((__m128i *)(out + i * out_stride), a[i]);
}

/* The bytes of two vectors in turn. */
static inline void interleave(const uint8_t *first, const uint8_t *second, uint8_t *out)
{
    __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi8(a, b));
    _mm_storeu_si128((__m128i *)(out + BLOCK), _mm_unpackhi_epi8(a, b));
}

/* Transpose an image, (height, width, 3), in strips of 16 rows: (strips, width, 3, 16, 2). The last axis is a value and its
 * right neighbor, which is 0 at the border. Returns 0, or 1 if out of memory. */
static int image_strips(const uint8_t *image, int64_t height, int64_t width, uint8_t *strips)
{
    int64_t bytes = CHANNELS * width, padded = (bytes + BLOCK - 1) / BLOCK * BLOCK + BLOCK;
    uint8_t *turned = calloc(padded, BLOCK), block[BLOCK * BLOCK];
    if (!turned)
        return 1;
    for (int64_t y = 0; y < height; y += BLOCK, strips += 2 * BLOCK * bytes) {
        int64_t rows = height - y < BLOCK ? height - y : BLOCK;
        for (int64_t x = 0; x < bytes; x += BLOCK) {
            int64_t number = bytes - x < BLOCK ? bytes - x : BLOCK;
            if (rows == BLOCK && number == BLOCK) {
                transpose(image + y * bytes + x, bytes, turned + x * BLOCK, BLOCK);
                continue;
            }
            memset(block, 0, sizeof block);
            for (int64_t i = 0; i < rows; i++)
                memcpy(block + i * BLOCK, image + (y + i) * bytes + x, number);
            transpose(block, BLOCK, turned + x * BLOCK, BLOCK);
        }
        for (int64_t x = 0; x < bytes; x++)
            interleave(turned + x * BLOCK, turned + (x + CHANNELS) * BLOCK, strips + 2 * BLOCK * x);
    }
    free(turned);
    return 0;
}

/* Write the values x to x + 15 of a line, as far as there are so many, or their mirror image. */
static inline void write_values(const uint8_t *bytes, int64_t x, float *line, int64_t size, int64_t flip)
{
    if (size - x < BLOCK) {
        for (int64_t i = x; i < size; i++)
            line[flip ? size - 1 - i : i] = bytes[i - x];
        return;
    }
    const __m128i mirrored = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m128i values = _mm_loadu_si128((const __m128i *)bytes);
    if (flip)
        values = _mm_shuffle_epi8(values, mirrored);
    float *out = line + (flip ? size - BLOCK - x : x);
    _mm256_storeu_ps(out, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(values)));
    _mm256_storeu_ps(out + BLOCK / 2, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(values, BLOCK / 2))));
}

/* Cut out a crop and resize it; values 0 to 255. The strips are those of image_strips. Returns 0, or 1 if out of memory. */
static int resize_crop(const uint8_t *strips, int64_t image_width, const struct crop *crop)
{
    int64_t size = crop->size, stride = (size + BLOCK - 1) / BLOCK * BLOCK, row = CHANNELS * stride;
    int64_t strip = crop->top / BLOCK, above = crop->top % BLOCK;
    int64_t rows = (above + crop->height + BLOCK - 1) / BLOCK * BLOCK, column = 2 * BLOCK * CHANNELS; /* bytes */
    struct weights across = {0}, along = {0};
    int failed = make_weights(&across, crop->width, size) || make_weights(&along, crop->height, size);
    uint8_t *narrow = calloc(row, BLOCK);            /* a strip, resized along its rows: (3, stride, 16) */
    uint8_t *middle = malloc((rows + 1) * row);      /* the same of all strips, as rows: (rows, 3, stride) */
    uint8_t *pairs = malloc(2 * rows * row);         /* each value and the one below it */
    if (failed || !narrow || !middle || !pairs) {
        failed = 1;
        goto end;
    }
    for (int64_t y = 0; y < rows; y += BLOCK, strip++) {
        const uint8_t *input = strips + column * (strip * image_width + crop->left);
        for (int64_t i = 0; i < size; i++)
            sum_pairs(input + column * across.first[i], column, 2 * BLOCK, across.values + i * across.taps,
                      across.number[i], across.precision, narrow + i * BLOCK, stride * BLOCK);
        for (int64_t x = 0; x < row; x += BLOCK)
            transpose(narrow + x * BLOCK, BLOCK, middle + y * row + x, row);
    }
    memset(middle + rows * row, 0, row);
    for (int64_t i = 0; i < rows * row; i += BLOCK)
        interleave(middle + i, middle + i + row, pairs + 2 * i);
    for (int64_t y = 0; y < size; y++) {
        const uint8_t *input = pairs + 2 * row * (above + along.first[y]);
        for (int64_t x = 0; x < size; x += BLOCK) {
            uint8_t bytes[CHANNELS * BLOCK];
            sum_pairs(input + 2 * x, 2 * row, 2 * stride, along.values + y * along.taps, along.number[y], along.precision,
                      bytes, BLOCK);
            for (int64_t c = 0; c < CHANNELS; c++)
                write_values(bytes + c * BLOCK, x, crop->out + (c * size + y) * size, size, crop->flip);
        }
    }
end:
    free_weights(&across);
    free_weights(&along);
    free(narrow);
    free(middle);
    free(pairs);
    return failed;
}

/* Make n crops of an image, (height, width, 3), and normalize them: * scales + shifts, of the three channels. Returns 0, or
 * 1 if out of memory. */
int make_crops(const uint8_t *image, int64_t height, int64_t width, const struct crop *crops, int64_t n, const float *scales,
               const float *shifts)
{
    uint8_t *strips = malloc((height + BLOCK - 1) / BLOCK * BLOCK * width * 2 * CHANNELS);
    int failed = !strips || image_strips(image, height, width, strips);
    for (int64_t i = 0; i < n && !failed; i++)
        failed = resize_crop(strips, width, crops + i) || augment_colors(crops + i, scales, shifts);
    free(strips);
    return failed;
}
#endif
