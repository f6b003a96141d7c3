// A commit's arithmetic, compiled: all layers in one pass. syncaccum/window/fold.py has it in torch's operations.
//
// Ranks with and without this library must get the same bits. So each operation here rounds as torch's does, in the
// same order: build.py forbids the compiler to fuse two of them.

#include <cstdint>
#include <numeric>

// What syncaccum/window/compiled_fold.py packs; each field has eight bytes.
extern "C" struct SyncaccumFold {
  int64_t layers;
  const int64_t* widths;
  const double* factors;  // how much each layer takes of the new
  const double* sums;     // packed moments of each layer's global batch
  void* statistics;       // all running means, then all running variances: they become the new ones
  int64_t is_double;      // else they are float
};

namespace {

template <class T>
inline void move(T& old, double value, double factor) {
  old = static_cast<T>(static_cast<double>(old) * (1 - factor) + value * factor);
}

template <class T>
double fold(const SyncaccumFold& call) {
  T* means = static_cast<T*>(call.statistics);
  T* variances = means + std::accumulate(call.widths, call.widths + call.layers, int64_t{0});
  const double* sums = call.sums;
  double checksum = 0;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    const int64_t width = call.widths[layer];
    const double n = sums[0], factor = call.factors[layer], unbiased = n / (n - 1);
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

// The sum of all new statistics: it shows NaN and Inf.
extern "C" double syncaccum_fold(const SyncaccumFold* call) {
  return call->is_double ? fold<double>(*call) : fold<float>(*call);
}
