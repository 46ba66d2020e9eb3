// The choice of instruction set: names, environment, override.
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "check.h"

using namespace isthmus;

namespace {

constexpr Isa all_isas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

void test_names() {
  for (Isa isa : all_isas) CHECK(parse_isa(isa_name(isa)) == isa);
  CHECK_THROWS(parse_isa("avx1024"));
  CHECK_THROWS(parse_isa(""));
  try {
    parse_isa("sse9");
  } catch (const std::exception& error) {
    const std::string message = error.what();
    CHECK(message.find("sse9") != std::string::npos && message.find("avx512") != std::string::npos);
  }
}

void test_available() {
  const std::vector<Isa> available = available_isas();
  CHECK(!available.empty() && available.front() == Isa::baseline);
  for (size_t i = 1; i < available.size(); ++i) CHECK(available[i - 1] < available[i]);
}

void test_set_and_reset() {
  const std::vector<Isa> available = available_isas();
  for (Isa isa : available) {
    set_isa(isa);
    CHECK(current_isa() == isa);
  }
  for (Isa isa : all_isas) {
    bool present = false;
    for (Isa other : available) present |= other == isa;
    if (present) continue;
    set_isa(Isa::baseline);
    CHECK_THROWS(set_isa(isa));
    CHECK(current_isa() == Isa::baseline);
  }
  unsetenv("ISTHMUS_ISA");
  reset_isa();
  CHECK(current_isa() == available.back());
}

void test_environment() {
  setenv("ISTHMUS_ISA", "baseline", 1);
  reset_isa();
  CHECK(current_isa() == Isa::baseline);
  setenv("ISTHMUS_ISA", "", 1);
  reset_isa();
  CHECK(current_isa() == available_isas().back());
  setenv("ISTHMUS_ISA", "no such level", 1);
  CHECK_THROWS(reset_isa());
  unsetenv("ISTHMUS_ISA");
}

struct Table {
  int level;
};

void test_tables() {
  static const Table baseline{0}, avx2{1}, avx512{2}, avx512_bf16{3}, amx{4};
  for (Isa isa : available_isas()) {
    set_isa(isa);
    CHECK((IsaTables<Table>{baseline, avx2, avx512, avx512_bf16, amx}.current().level == static_cast<int>(isa)));
  }
}

}  // namespace

int main() {
  test_names();
  test_available();
  test_set_and_reset();
  test_environment();
  test_tables();
  return failed_checks > 0;
}
