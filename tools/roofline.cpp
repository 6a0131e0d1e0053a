// The machine's own limit: vector multiply-adds with nothing to load.
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));

#if defined(__x86_64__)
#define KEEP(v) asm volatile("" : "+v"(v))
#else
#define KEEP(v) asm volatile("" : "+w"(v))
#endif

extern "C" double multiply_adds(long rounds, int threads) {  // how many were done
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([rounds] {
      Vec a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, scale = Vec{} + 0.999f, shift = Vec{} + 0.001f;
      for (long round = 0; round < rounds; ++round) {  // ten sums: more than latency times throughput
        a = a * scale + shift, b = b * scale + shift, c = c * scale + shift, d = d * scale + shift, e = e * scale + shift;
        f = f * scale + shift, g = g * scale + shift, h = h * scale + shift, i = i * scale + shift, j = j * scale + shift;
        KEEP(a); KEEP(b); KEEP(c); KEEP(d); KEEP(e); KEEP(f); KEEP(g); KEEP(h); KEEP(i); KEEP(j);
      }
    });
  }
  for (std::thread& one : all) one.join();
  return 10.0 * kLanes * double(rounds) * threads;
}
