// What this processor has. Built for any x86-64: the other files may use no instruction before this has said yes.

extern "C" const char* rg_digest() { return RILLGATE_DIGEST; }

extern "C" int rg_is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
