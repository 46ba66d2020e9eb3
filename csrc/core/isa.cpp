#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "core/amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace isthmus {
namespace {

constexpr Isa all_isas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};
constexpr int unresolved = -1;
std::atomic<int> chosen{unresolved};

bool supports(Isa isa) {
#if defined(__x86_64__)
  // These built-ins also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Every CPU with the one has the other.
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512_bf16;
    case Isa::amx:
      return avx512_bf16 && request_amx();
  }
#endif
  return isa == Isa::baseline;
}

std::string names_of(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa default_isa() {
  const char* wanted = std::getenv("ISTHMUS_ISA");
  if (wanted == nullptr || *wanted == '\0') return available_isas().back();
  const Isa isa = parse_isa(wanted);
  if (!supports(isa)) {
    throw std::invalid_argument("ISTHMUS_ISA is '" + std::string(wanted) +
                                "', which this CPU lacks; available: " + names_of(available_isas()));
  }
  return isa;
}

}  // namespace

bool request_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & amx_bf16) == 0 || (edx & amx_tile) == 0) return false;
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  static const bool granted = syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
  return granted;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

Isa parse_isa(const std::string& name) {
  for (Isa isa : all_isas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set level '" + name + "'; expected one of " +
                              names_of({std::begin(all_isas), std::end(all_isas)}));
}

std::vector<Isa> available_isas() {
  std::vector<Isa> available;
  for (Isa isa : all_isas) {
    if (supports(isa)) available.push_back(isa);
  }
  return available;
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == unresolved) {
    reset_isa();
    isa = chosen.load(std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(Isa isa) {
  if (!supports(isa)) {
    throw std::invalid_argument("instruction set level '" + std::string(isa_name(isa)) +
                                "' is not available on this CPU; available: " + names_of(available_isas()));
  }
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

void reset_isa() { chosen.store(static_cast<int>(default_isa()), std::memory_order_relaxed); }

}  // namespace isthmus
