// What bounds of rounding errors are made of, for sums in the compute type C.
#pragma once

namespace isthmus {
namespace {

template <class C>
constexpr double rounding_unit = sizeof(C) == 4 ? 0x1p-24 : 0x1p-53;
// No product of two vectors with smaller squares overflows. Longer ones are *wild*: never screened, always scored
// exactly.
template <class C>
constexpr double tame_square = sizeof(C) == 4 ? 0x1p120 : 0x1p1000;

}  // namespace
}  // namespace isthmus
