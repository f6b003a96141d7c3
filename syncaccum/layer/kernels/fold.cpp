// A commit's arithmetic, compiled: all layers in one pass. syncaccum/window/fold.py has it in torch's operations.
//
// Ranks with and without this library must get the same bits. So each operation here rounds as torch's does, in the
// same order: build.py forbids the compiler to fuse two of them.

#include <cstdint>
#include <numeric>

namespace {

// `old` and the global batch's value, weighed; rounded to the dtype of the statistics.
template <class T>
inline void move(T& old, double value, double factor) {
  old = static_cast<T>(static_cast<double>(old) * (1 - factor) + value * factor);
}

template <class T>
double fold(int64_t layers, const int64_t* widths, const double* factors, const double* sums, T* means) {
  T* variances = means + std::accumulate(widths, widths + layers, int64_t{0});
  double checksum = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t width = widths[layer];
    const double n = sums[0], factor = factors[layer], unbiased = n / (n - 1);
    const double *total = sums + 1, *total_sq = total + width;
#pragma omp simd reduction(+ : checksum)
    for (int64_t c = 0; c < width; ++c) {
      const double mean = total[c] / n, found = total_sq[c] / n - mean * mean;
      // Rounding can leave a constant channel below zero. std::max(0, NaN) would hide a NaN.
      const double variance = found < 0 ? 0 : found;
      move(means[c], mean, factor);
      move(variances[c], variance * unbiased, factor);
      checksum += static_cast<double>(means[c]) + static_cast<double>(variances[c]);
    }
    sums = total_sq + width;
    means += width;
    variances += width;
  }
  return checksum;
}

}  // namespace

extern "C" {

// `sums` are the packed moments of each layer's global batch. `statistics`, all running means and then all running
// variances, become the new ones, of each layer by its factor. The sum of them all is returned: it shows NaN and Inf.
double syncaccum_fold(int64_t layers, const int64_t* widths, const double* factors, const double* sums,
                      int32_t is_double, void* statistics) {
  return is_double ? fold(layers, widths, factors, sums, static_cast<double*>(statistics))
                   : fold(layers, widths, factors, sums, static_cast<float*>(statistics));
}

}  // extern "C"
