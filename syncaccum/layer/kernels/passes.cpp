// The passes over data in CPU memory, compiled: sums of a micro-batch, and what is applied to each value.
//
// Plain C functions, without torch's headers: one build serves every torch that has torch_parallel_for.
// syncaccum/layer/native.py calls them and says what the arguments are. syncaccum/layer/passes.py has the formulas.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

namespace {

// torch's own, so that these passes run in torch's threads, as many as torch.set_num_threads says.
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

// A task is so many values at least: some time above what it takes to start one.
constexpr int64_t kTask = 16384;
// A thread gets so many at least: torch's own GRAIN_SIZE.
constexpr int64_t kGrain = 32768;
// Columns: each task has sums of its own for each channel, which are added at the end. So few tasks, and not too small.
constexpr int64_t kMostTasks = 256;
constexpr int64_t kFewestLines = 32;
// Columns of few channels: neighbouring values side by side, as if they were channels, fill the vector registers.
constexpr int64_t kWidth = 64;
// Rows: where channels are many and small, a task is a whole one. Its gradient then follows while it is in the cache.
constexpr int64_t kManyChannels = 64;
constexpr int64_t kCachedBytes = 1 << 20;
// Rows: so many sums stay in the vector registers.
constexpr int64_t kLanes = 32;

// --- The four dtypes. Arithmetic is in float, or double for double; sums are double for all.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Without branches, so that the compiler can use vector registers.
// Exponents move from bias 15 to bias 127; the largest one means Inf or NaN, the smallest a denormal number.
inline float widen(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  const uint32_t moved = magnitude + (112u << 23);
  const float denormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  uint32_t result = exponent == 0x0f800000 ? moved + (112u << 23) : moved;
  result = exponent == 0 ? bits_of(denormal) : result;
  return float_of(result | static_cast<uint32_t>(value.bits & 0x8000) << 16);
}

// All round to nearest, ties to even, as torch does.
inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void narrow(float value, Half& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // The addition aligns the ten bits of a denormal number, and rounds.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t result = magnitude < (113u << 23) ? denormal : normal;
  result = magnitude >= (143u << 23) ? (magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u) : result;
  out.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000));
}

template <class T>
using Wide = decltype(widen(T()));

enum Dtype : int64_t { kFloat, kDouble, kBFloat16, kHalf };

template <class F>
void with_dtype(int64_t dtype, F f) {
  switch (dtype) {
    case kFloat: return f(float());
    case kDouble: return f(double());
    case kBFloat16: return f(BFloat16());
    case kHalf: return f(Half());
  }
}

// --- What each value gives and gets.

// Two sums: of u and u w. In the forward u = w = x - c; in the backward u = dy and w = x - c.
template <bool kBackward, class T>
inline void add_terms(const T* dy, const T* x, int64_t i, double c, double& first, double& second) {
  const double w = static_cast<double>(widen(x[i])) - c;
  const double u = kBackward ? static_cast<double>(widen(dy[i])) : w;
  first += u;
  second += u * w;
}

enum Apply { kOutput, kGradient, kGradientOfConstants };

// Per channel: a dy + b (x - c) + k. c is the center rounded: the difference is exact where it is small, and what
// rounding took from c is in k.
template <class W>
struct Coefficients {
  std::vector<W> a, b, c, k;

  explicit Coefficients(int64_t size) : a(size), b(size), c(size), k(size) {}

  void set(int64_t i, double a_, double b_, double center, double k_) {
    a[i] = static_cast<W>(a_);
    b[i] = static_cast<W>(b_);
    c[i] = static_cast<W>(center);
    k[i] = static_cast<W>(k_ - b_ * (center - static_cast<double>(c[i])));
  }
};

template <Apply kApply, class T, class W>
inline void apply_one(const T* dy, const T* x, T* out, int64_t i, W a, W b, W c, W k) {
  if constexpr (kApply == kOutput) {
    narrow((widen(x[i]) - c) * b + k, out[i]);
  } else if constexpr (kApply == kGradient) {
    narrow(widen(dy[i]) * a + ((widen(x[i]) - c) * b + k), out[i]);
  } else {
    narrow(widen(dy[i]) * a, out[i]);
  }
}

// --- Walking memory.

template <class T>
struct Data {
  int64_t outer, channels, inner;  // rows are (N, C, L); columns (values, C, 1)
  const T* dy;
  const T* x;
  T* out;

  int64_t count() const { return outer * inner; }
};

// (N, C, L): a task is a piece of one channel, some rows or part of one.
template <class T>
class Rows {
 public:
  explicit Rows(const Data<T>& data) : d_(data) {
    const int64_t bytes = 2 * d_.count() * static_cast<int64_t>(sizeof(T));
    is_whole_ = d_.channels >= kManyChannels && bytes <= kCachedBytes;
    const int64_t groups = is_whole_ ? 1 : std::clamp<int64_t>(d_.count() / kTask, 1, d_.outer);
    rows_ = (d_.outer + groups - 1) / groups;
    groups_ = (d_.outer + rows_ - 1) / rows_;
    pieces_ = is_whole_ ? 1 : std::max<int64_t>(1, d_.inner / kTask);
    length_ = (d_.inner + pieces_ - 1) / pieces_;
  }

  int64_t tasks() const { return groups_ * pieces_ * d_.channels; }
  int64_t task_size() const { return rows_ * length_; }
  int64_t sums_per_task() const { return 2; }
  bool is_whole() const { return is_whole_; }
  int64_t width() const { return d_.channels; }

  template <bool kBackward>
  void add(int64_t task, const double* centers, double* sums) const {
    const double c = centers[task % d_.channels];
    // Sums side by side, over all strips: an addition need not wait for the one before.
    double first[kLanes] = {}, second[kLanes] = {};
    each_strip(task, [&](int64_t start, int64_t length) {
      const T *dy = d_.dy + start, *x = d_.x + start;
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes)
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes; ++lane)
          add_terms<kBackward>(dy, x, i + lane, c, first[lane], second[lane]);
      for (int64_t lane = 0; i + lane < length; ++lane)
        add_terms<kBackward>(dy, x, i + lane, c, first[lane], second[lane]);
    });
    sums[0] = std::accumulate(first, first + kLanes, 0.0);
    sums[1] = std::accumulate(second, second + kLanes, 0.0);
  }

  void finish(const double* partial, double* first, double* second) const {
    std::fill_n(first, d_.channels, 0.0);
    std::fill_n(second, d_.channels, 0.0);
    for (int64_t task = 0; task < tasks(); ++task) {
      first[task % d_.channels] += partial[2 * task];
      second[task % d_.channels] += partial[2 * task + 1];
    }
  }

  template <Apply kApply, class W>
  void apply(int64_t task, const Coefficients<W>& by) const {
    const int64_t channel = task % d_.channels;
    const W a = by.a[channel], b = by.b[channel], c = by.c[channel], k = by.k[channel];
    each_strip(task, [&](int64_t start, int64_t length) {
      const T *dy = d_.dy + start, *x = d_.x + start;
      T* out = d_.out + start;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) apply_one<kApply>(dy, x, out, i, a, b, c, k);
    });
  }

 private:
  // Neighbouring tasks are neighbouring channels: neighbours in memory.
  template <class F>
  void each_strip(int64_t task, F f) const {
    const int64_t channel = task % d_.channels;
    const int64_t group = task / d_.channels / pieces_, piece = task / d_.channels % pieces_;
    const int64_t begin = piece * length_, end = std::min(d_.inner, begin + length_);
    if (begin >= end) return;
    for (int64_t n = group * rows_; n < std::min(d_.outer, (group + 1) * rows_); ++n)
      f((n * d_.channels + channel) * d_.inner + begin, end - begin);
  }

  Data<T> d_;
  bool is_whole_;
  int64_t rows_, groups_, pieces_, length_;
};

// (values, C): a task is some lines. A line is one value of each channel, or several where channels are few.
template <class T>
class Columns {
 public:
  explicit Columns(const Data<T>& data) : d_(data) {
    values_ = std::clamp<int64_t>(kWidth / d_.channels, 1, d_.outer);
    width_ = values_ * d_.channels;
    const int64_t all = (d_.outer + values_ - 1) / values_;
    lines_ = std::max({kFewestLines, kTask / width_, (all + kMostTasks - 1) / kMostTasks});
    tasks_ = (all + lines_ - 1) / lines_;
    // As even as can be: the last task is waited for.
    lines_ = (all + tasks_ - 1) / tasks_;
    tasks_ = (all + lines_ - 1) / lines_;
  }

  int64_t tasks() const { return tasks_; }
  int64_t task_size() const { return lines_ * width_; }
  int64_t sums_per_task() const { return 2 * width_; }
  bool is_whole() const { return false; }
  int64_t width() const { return width_; }

  template <bool kBackward>
  void add(int64_t task, const double* centers, double* sums) const {
    double* __restrict first = sums;
    double* __restrict second = sums + width_;
    std::fill_n(sums, 2 * width_, 0.0);
    const auto [begin, end] = bounds(task);
    const T *dy = d_.dy, *x = d_.x;
    int64_t start = begin;
    // Four lines at once: their terms meet in registers before they go to the sums in the cache.
    for (; start + 4 * width_ <= end; start += 4 * width_) {
#pragma omp simd
      for (int64_t i = 0; i < width_; ++i) {
        double u = 0, uw = 0;
        for (int64_t line = 0; line < 4; ++line)
          add_terms<kBackward>(dy, x, start + line * width_ + i, centers[i], u, uw);
        first[i] += u;
        second[i] += uw;
      }
    }
    for (; start < end; start += width_) {
      const int64_t length = std::min(width_, end - start);
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) add_terms<kBackward>(dy, x, start + i, centers[i], first[i], second[i]);
    }
  }

  void finish(const double* partial, double* first, double* second) const {
    std::vector<double> lines(2 * width_);
    for (int64_t task = 0; task < tasks_; ++task)
      for (int64_t i = 0; i < 2 * width_; ++i) lines[i] += partial[task * 2 * width_ + i];
    std::fill_n(first, d_.channels, 0.0);
    std::fill_n(second, d_.channels, 0.0);
    for (int64_t i = 0; i < width_; ++i) {
      first[i % d_.channels] += lines[i];
      second[i % d_.channels] += lines[width_ + i];
    }
  }

  template <Apply kApply, class W>
  void apply(int64_t task, const Coefficients<W>& by) const {
    const auto [begin, end] = bounds(task);
    for (int64_t start = begin; start < end; start += width_) {
      const int64_t length = std::min(width_, end - start);
      const T *dy = d_.dy + start, *x = d_.x + start;
      T* out = d_.out + start;
      const W *a = by.a.data(), *b = by.b.data(), *c = by.c.data(), *k = by.k.data();
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) apply_one<kApply>(dy, x, out, i, a[i], b[i], c[i], k[i]);
    }
  }

 private:
  std::pair<int64_t, int64_t> bounds(int64_t task) const {
    const int64_t size = d_.outer * d_.channels;
    return {task * lines_ * width_, std::min(size, (task + 1) * lines_ * width_)};
  }

  Data<T> d_;
  int64_t values_, width_, lines_, tasks_;
};

// --- Running tasks in torch's threads.

template <class Order, class F>
void run(ParallelFor parallel_for, const Order& order, F f) {
  // Backwards: a second pass finds in the cache what the first one read last.
  auto some = [](int64_t begin, int64_t end, void* context) {
    for (int64_t task = end; task-- > begin;) (*static_cast<F*>(context))(task);
  };
  parallel_for(0, order.tasks(), std::max<int64_t>(1, kGrain / order.task_size()), some, &f);
}

// One vector for each channel, repeated where a line has several values of each.
template <class Order>
std::vector<double> spread(const Order& order, const double* vector, int64_t channels) {
  std::vector<double> all(order.width());
  for (int64_t i = 0; i < order.width(); ++i) all[i] = vector[i % channels];
  return all;
}

template <class T, class F>
void with_order(const Data<T>& data, F f) {
  if (data.inner > 1) return f(Rows<T>(data));
  f(Columns<T>(data));
}

// --- C-sized arithmetic, in double.

// A vector of any of the dtypes; null stands for a constant.
struct Vector {
  const void* data;
  int64_t dtype;

  double at(int64_t i, double otherwise) const {
    double value = otherwise;
    if (data)
      with_dtype(dtype, [&](auto like) { value = static_cast<double>(widen(static_cast<const decltype(like)*>(data)[i])); });
    return value;
  }
};

void store(void* data, int64_t dtype, int64_t i, double value) {
  if (!data) return;
  with_dtype(dtype, [&](auto like) {
    using T = decltype(like);
    narrow(static_cast<Wide<T>>(value), static_cast<T*>(data)[i]);
  });
}

double value_or(const double* vector, int64_t i, double otherwise) { return vector ? vector[i] : otherwise; }

// What to subtract from a channel: the median of its first, its middle and its last value. No value is further from
// the mean than sqrt(n) deviations, so that double loses n times 1e-16 of the variance at most, however large the mean
// is; a median of three mostly loses nothing.
template <class T>
double choose_origin(const T* x, int64_t channel, int64_t outer, int64_t channels, int64_t inner) {
  auto value = [&](int64_t n, int64_t i) -> double { return widen(x[(n * channels + channel) * inner + i]); };
  const double first = value(0, 0), middle = value(outer / 2, inner / 2), last = value(outer - 1, inner - 1);
  const double median = std::max(std::min(first, middle), std::min(std::max(first, middle), last));
  return std::isfinite(median) ? median : 0;
}

// Of one channel: sum, sum of squares, mean, population variance, from the sums of x - origin.
struct ChannelMoments {
  double total, square, mean, variance;

  ChannelMoments(double n, double origin, double first, double second) {
    const double step = first / n, found = second / n - step * step;
    mean = origin + step;
    // std::max(0, NaN) would hide a NaN.
    variance = found < 0 ? 0 : found;
    total = n * mean;
    square = n * (variance + mean * mean);
  }
};

// What a forward applies: nothing; a normalizer that is given; or one of syncaccum/layer/policies.py.
enum Policy : int64_t { kNone, kGiven, kRunning, kBatch, kRenorm, kWindow };

}  // namespace

// What syncaccum/layer/native.py packs. Null stands for what is not there; each field has eight bytes.
extern "C" {

struct SyncaccumForward {
  ParallelFor parallel_for;
  int64_t dtype, outer, channels, inner;
  const void* x;
  void* y;
  double* moments;  // n, then sums, sums of squares, means and population variances
  int64_t policy;
  double eps, prior_count, r_max, d_max;
  const void* committed_mean;
  int64_t mean_dtype;
  const void* committed_variance;
  int64_t variance_dtype;
  const double* others;  // packed moments
  double *center, *scale, *gain, *offset;  // read if the policy is kGiven, else written
  const void* weight;
  int64_t weight_dtype;
  const void* bias;
  int64_t bias_dtype;
};

struct SyncaccumBackward {
  ParallelFor parallel_for;
  int64_t dtype, outer, channels, inner;
  const void *dy, *x;
  void* dx;
  double* sums;
  int64_t sums_known;
  const double *center, *scale, *gain, *offset;
  const void* weight;
  int64_t weight_dtype;
  double feedback;          // NaN stands for statistics that are constants
  const double* feedbacks;  // for each channel another one
  const double* owed;       // what others add to the two sums that the gradient of x takes
  void* dweight;
  int64_t dweight_dtype;
  void* dbias;
  int64_t dbias_dtype;
};

}  // extern "C"

namespace {

using ForwardCall = SyncaccumForward;
using BackwardCall = SyncaccumBackward;

// The normalizer of one channel. Formulas and their sources are in policies.py.
void write_normalizer(const ForwardCall& call, double n, int64_t c, double mean, double variance) {
  if (call.policy == kBatch) {
    call.center[c] = mean;
    call.scale[c] = 1 / std::sqrt(variance + call.eps);
    return;
  }
  if (call.policy == kWindow) {
    const double all = call.others[0] + n;
    const double center = (call.others[1 + c] + n * mean) / all;
    const double square = (call.others[1 + call.channels + c] + n * (variance + mean * mean)) / all;
    const double found = square - center * center;
    call.center[c] = center;
    call.scale[c] = 1 / std::sqrt((found < 0 ? 0 : found) + call.eps);
    return;
  }
  const double mu = Vector{call.committed_mean, call.mean_dtype}.at(c, 0);
  const double v = Vector{call.committed_variance, call.variance_dtype}.at(c, 1);
  const double committed_scale = 1 / std::sqrt(v + call.eps);
  if (call.policy == kRunning) {
    call.center[c] = mu;
    call.scale[c] = committed_scale;
    return;
  }
  const double w = n / (n + call.prior_count), rest = call.prior_count / (n + call.prior_count), step = mean - mu;
  call.center[c] = mean - rest * step;
  call.scale[c] = 1 / std::sqrt(w * variance + rest * v + w * rest * step * step + call.eps);
  // std::clamp lets a NaN through.
  call.gain[c] = std::clamp(committed_scale / call.scale[c], 1 / call.r_max, call.r_max);
  call.offset[c] = std::clamp(w * step * committed_scale, -call.d_max, call.d_max);
}

template <class T, class Order>
void forward(const ForwardCall& call, const Order& order) {
  const T* x = static_cast<const T*>(call.x);
  const int64_t channels = call.channels;
  const double n = static_cast<double>(call.outer * call.inner);
  const bool is_known = call.policy == kGiven || call.policy == kRunning;
  Coefficients<Wide<T>> by(call.y ? order.width() : 0);
  const Vector weight{call.weight, call.weight_dtype}, bias{call.bias, call.bias_dtype};
  auto set_coefficient = [&](int64_t i) {
    const int64_t c = i % channels;
    const double factor = weight.at(c, 1);
    const double shift = value_or(call.offset, c, 0) * factor + bias.at(c, 0);
    by.set(i, 0, call.scale[c] * value_or(call.gain, c, 1) * factor, call.center[c], shift);
  };
  auto set_coefficients = [&] {
    for (int64_t i = 0; i < order.width(); ++i) set_coefficient(i);
  };
  if (call.policy == kRunning)
    for (int64_t c = 0; c < channels; ++c) write_normalizer(call, n, c, 0, 0);
  if (call.y && is_known) set_coefficients();
  if (!call.moments) {
    run(call.parallel_for, order, [&](int64_t task) { order.template apply<kOutput>(task, by); });
    return;
  }
  std::vector<double> origin(channels);
  for (int64_t c = 0; c < channels; ++c) origin[c] = choose_origin(x, c, call.outer, channels, call.inner);
  call.moments[0] = n;
  auto finish = [&](int64_t c, double first, double second) {
    const ChannelMoments m(n, origin[c], first, second);
    double* of_channel = call.moments + 1 + c;
    of_channel[0] = m.total;
    of_channel[channels] = m.square;
    of_channel[2 * channels] = m.mean;
    of_channel[3 * channels] = m.variance;
    if (call.y && !is_known) write_normalizer(call, n, c, m.mean, m.variance);
  };
  if (order.is_whole()) {
    run(call.parallel_for, order, [&](int64_t c) {
      double sums[2];
      order.template add<false>(c, origin.data(), sums);
      finish(c, sums[0], sums[1]);
      if (!call.y) return;
      if (!is_known) set_coefficient(c);
      order.template apply<kOutput>(c, by);
    });
    return;
  }
  const auto origins = spread(order, origin.data(), channels);
  std::vector<double> partial(order.tasks() * order.sums_per_task()), first(channels), second(channels);
  // Both at once where the output waits for no moment: each task reads its values twice, then from the cache.
  run(call.parallel_for, order, [&](int64_t task) {
    order.template add<false>(task, origins.data(), &partial[task * order.sums_per_task()]);
    if (call.y && is_known) order.template apply<kOutput>(task, by);
  });
  order.finish(partial.data(), first.data(), second.data());
  for (int64_t c = 0; c < channels; ++c) finish(c, first[c], second[c]);
  if (call.y && !is_known) {
    set_coefficients();
    run(call.parallel_for, order, [&](int64_t task) { order.template apply<kOutput>(task, by); });
  }
}

template <class T, class Order>
void backward(const BackwardCall& call, const Order& order) {
  const int64_t channels = call.channels;
  double *first = call.sums, *second = call.sums + channels;
  const bool is_constant = std::isnan(call.feedback) && !call.feedbacks;
  Coefficients<Wide<T>> by(order.width());
  const Vector weight{call.weight, call.weight_dtype};
  auto set_coefficient = [&](int64_t i) {
    const int64_t c = i % channels;
    const double a = call.scale[c] * value_or(call.gain, c, 1) * weight.at(c, 1);
    const double pull = is_constant ? 0 : -a * value_or(call.feedbacks, c, call.feedback);
    const double sum_dy = first[c] + value_or(call.owed, c, 0);
    const double sum_dy_xhat = second[c] + value_or(call.owed, channels + c, 0);
    by.set(i, a, is_constant ? 0 : pull * call.scale[c] * sum_dy_xhat, call.center[c], is_constant ? 0 : pull * sum_dy);
  };
  auto set_coefficients = [&] {
    for (int64_t i = 0; i < order.width(); ++i) set_coefficient(i);
  };
  const bool at_once = call.dx && is_constant;
  const bool by_channel = call.dx && !is_constant && !call.sums_known && order.is_whole();
  if (at_once) set_coefficients();
  if (by_channel) {
    run(call.parallel_for, order, [&](int64_t c) {
      double sums[2];
      order.template add<true>(c, call.center, sums);
      first[c] = sums[0];
      second[c] = sums[1] * call.scale[c];
      set_coefficient(c);
      order.template apply<kGradient>(c, by);
    });
  } else if (!call.sums_known) {
    const auto centers = spread(order, call.center, channels);
    std::vector<double> partial(order.tasks() * order.sums_per_task());
    run(call.parallel_for, order, [&](int64_t task) {
      order.template add<true>(task, centers.data(), &partial[task * order.sums_per_task()]);
      if (at_once) order.template apply<kGradientOfConstants>(task, by);
    });
    order.finish(partial.data(), first, second);
    for (int64_t c = 0; c < channels; ++c) second[c] *= call.scale[c];
  } else if (at_once) {
    run(call.parallel_for, order, [&](int64_t task) { order.template apply<kGradientOfConstants>(task, by); });
  }
  for (int64_t c = 0; c < channels; ++c) {
    store(call.dweight, call.dweight_dtype, c, second[c] * value_or(call.gain, c, 1) + first[c] * value_or(call.offset, c, 0));
    store(call.dbias, call.dbias_dtype, c, first[c]);
  }
  if (call.dx && !is_constant && !by_channel) {
    set_coefficients();
    run(call.parallel_for, order, [&](int64_t task) { order.template apply<kGradient>(task, by); });
  }
}

}  // namespace

extern "C" {

// build.py's fingerprint of this file: native.py refuses a library that was built from another one.
extern const char syncaccum_source[];
const char syncaccum_source[] = SYNCACCUM_SOURCE;

// Moments of x where `moments` is given, and (x - center) scale gain weight + ... where `y` is.
void syncaccum_forward(const SyncaccumForward* call) {
  with_dtype(call->dtype, [&](auto like) {
    using T = decltype(like);
    const T* x = static_cast<const T*>(call->x);
    with_order(Data<T>{call->outer, call->channels, call->inner, x, x, static_cast<T*>(call->y)},
               [&](const auto& order) { forward<T>(*call, order); });
  });
}

// The sums of dy and dy x_hat, unless they are known; gradients of weight and bias, and of x, where these are given.
void syncaccum_backward(const SyncaccumBackward* call) {
  with_dtype(call->dtype, [&](auto like) {
    using T = decltype(like);
    const Data<T> data{call->outer, call->channels, call->inner, static_cast<const T*>(call->dy),
                       static_cast<const T*>(call->x), static_cast<T*>(call->dx)};
    with_order(data, [&](const auto& order) { backward<T>(*call, order); });
  });
}

}  // extern "C"
