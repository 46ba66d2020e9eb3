// core/sort.h: groups are complete, ascending and stable, leave out negative indices, and sums over them do not depend
// on how work is shared.
#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "core/sort.h"

namespace isthmus {
namespace {

// A backend that takes the ranges of any number of threads, in the wrong order.
int64_t pieces = 1;
void in_pieces(int64_t count, int64_t, RangeBody body, void* context) {
  for (int64_t piece = pieces - 1; piece >= 0; --piece) {
    const int64_t begin = count * piece / pieces, end = count * (piece + 1) / pieces;
    if (begin < end) body(begin, end, context);
  }
}

enum class Usage { uniform, collapsed, one, sparse, masked, nothing };

std::vector<int64_t> draw(Usage usage, int64_t items, int64_t groups) {
  std::mt19937_64 random(7);
  const auto below = [&](int64_t bound) { return static_cast<int64_t>(random() % static_cast<uint64_t>(bound)); };
  std::vector<int64_t> index(static_cast<size_t>(items));
  for (int64_t& i : index) {
    i = usage == Usage::one                           ? groups - 1
        : usage == Usage::collapsed && below(10) != 0 ? groups / 2
        : usage == Usage::sparse                      ? below(groups) / 9 * 9
        : usage == Usage::masked                      ? below(groups + 1) - 1
        : usage == Usage::nothing                     ? -1
                                                      : below(groups);
  }
  return index;
}

// Per group: how many items, their sum, and the last one (order matters to it alone).
std::vector<double> sums_of(const SortedItems& groups, int64_t width) {
  std::vector<double> result(static_cast<size_t>(3 * groups.count), -1);
  sum_groups<double>(
      groups, width,
      [](int64_t item, int64_t, double* sum) {
        sum[0] += 1;
        sum[1] += static_cast<double>(item);
        sum[2] = sum[2] / 3 + static_cast<double>(item);
      },
      [&](int64_t group, const double* sum) { std::copy(sum, sum + 3, result.begin() + 3 * group); });
  return result;
}

void test_groups(Usage usage, int64_t items, int64_t count, int64_t width = 3) {
  const std::vector<int64_t> index = draw(usage, items, count);
  std::vector<double> expected(static_cast<size_t>(2 * count), 0);
  for (int64_t i = 0; i < items; ++i) {
    if (index[static_cast<size_t>(i)] < 0) continue;
    expected[static_cast<size_t>(2 * index[static_cast<size_t>(i)])] += 1;
    expected[static_cast<size_t>(2 * index[static_cast<size_t>(i)] + 1)] += static_cast<double>(i);
  }
  std::vector<double> first;
  for (pieces = 1; pieces <= 7; pieces += 3) {
    const Groups sorted(index.data(), items, count);
    const SortedItems groups = sorted;
    const auto left_out = std::count(index.begin(), index.end(), int64_t(-1));
    CHECK(groups.starts[0] == 0 && groups.num_items() == items - left_out);
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t i = groups.starts[g]; i < groups.starts[g + 1]; ++i) {
        const int64_t item = groups.items[i];
        CHECK(item >= 0 && item < items && index[static_cast<size_t>(item)] == g);
        CHECK(i == groups.starts[g] || groups.items[i - 1] < item);
        CHECK(groups.group_at(i) == g);
      }
    }
    const std::vector<double> sums = sums_of(groups, width);
    for (int64_t g = 0; g < count; ++g) {
      CHECK(sums[static_cast<size_t>(3 * g)] == expected[static_cast<size_t>(2 * g)]);
      CHECK(sums[static_cast<size_t>(3 * g + 1)] == expected[static_cast<size_t>(2 * g + 1)]);
    }
    if (pieces == 1) first = sums;
    CHECK(sums == first);
  }
}

void test_find_outside() {
  const int64_t index[] = {0, 4, 2, -1, 5, 3};
  CHECK(find_outside(index, 3, 5) == -1);
  CHECK(find_outside(index, 6, 5) == 3);
  CHECK(find_outside(index + 4, 2, 5) == 0);
  CHECK(find_outside(index + 4, 2, 6) == -1);
  CHECK(find_outside(index, 0, 0) == -1);
  CHECK(find_outside(index, 1, 0) == 0);
  CHECK(find_outside(index, 6, 5, -1) == 4);
  CHECK(find_outside(index, 6, 6, -1) == -1);
  std::vector<int64_t> many(5000, 7);
  CHECK(find_outside(many.data(), 5000, 8) == -1);
  for (int64_t bad : {INT64_MIN, INT64_MIN + 1, int64_t(-2), int64_t(8), INT64_MAX}) {
    for (size_t place : {size_t(0), size_t(1023), size_t(1024), size_t(4999)}) {
      many[place] = bad;
      CHECK(find_outside(many.data(), 5000, 8, -1) == static_cast<int64_t>(place));
      many[place] = 7;
    }
  }
}

}  // namespace
}  // namespace isthmus

int main() {
  using namespace isthmus;
  set_parallel_backend(in_pieces);
  for (Usage usage : {Usage::uniform, Usage::collapsed, Usage::one, Usage::sparse, Usage::masked, Usage::nothing}) {
    test_groups(usage, 0, 3);
    test_groups(usage, 1, 1);
    test_groups(usage, 512, 1);
    test_groups(usage, 513, 2);
    test_groups(usage, 5000, 300);
    test_groups(usage, 2000, 30'000);
    test_groups(usage, 70'000, 40);
    test_groups(usage, 5000, 7, 1 << 19);  // so wide that chunks hold more items
  }
  test_find_outside();
  return failed_checks > 0;
}
