// Included by screen.inl: what is multiplied in place of a vector of x or of the weights, and how much that leaves out.
//
// A vector v is written as words: v~, a unit times what the words hold. Fine words are numbers of the compute type.
// Coarse ones are four bytes, or a pair of bfloat16, of which the products run at four times and at twice the rate.

// Lengths are overestimated by this much, which covers their own evaluation.
constexpr double outward = 1 + 0x1p-20;
// Shorter vectors count as this long: then no product of lengths and roundings vanishes, nor does what underflows.
template <class C>
constexpr double least_length = sizeof(C) == 4 ? 0x1p-49 : 0x1p-450;

// Of a vector v and its words v~.
struct Extent {
  double length;    // at least |v~|: infinite for a wild vector, 0 for zeros alone
  double loss;      // at least |v - v~|
  double unit = 1;  // of the words
  int32_t sum = 0;  // of bytes

  static Extent wild() { return {__builtin_inf(), 0}; }
  bool is_wild() const { return !(length < __builtin_inf()); }
};

template <class T>
inline bool all_zero(const T* v, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) {
    if (load_one(v + i) != 0) return false;
  }
  return true;
}

inline double at_least(double value, double least) { return value > least ? value : least; }

// Numbers of the compute type, as they are.
template <class C_>
struct Fine {
  using C = C_;
  using Sum = Vec<C>;

  static int64_t depth(int64_t cols) { return cols; }
  // How often a sum of products and a bias is rounded, at most, and then some.
  static double roundings(int64_t cols) { return 2 * (static_cast<double>(cols) + 16); }

  ISTHMUS_INLINE static Sum multiply_add(C x, Vec<C> w, Sum sum) { return sum + x * w; }
  ISTHMUS_INLINE static Vec<C> number(Sum sum) { return sum; }

  template <bool Row, class T>
  static Extent write(const T* v, int64_t cols, C* words) {
    Vec<C> squares = {};
    for (int64_t k = 0; k < cols; k += lanes<C>) {
      const Vec<C> part = load_first(v + k, cols - k);
      store_first(words + k, part, cols - k);
      squares += part * part;
    }
    // The least length is much more than that of components whose squares vanish.
    const double square = static_cast<double>(sum_lanes<C>(squares)), count = static_cast<double>(cols);
    if (!(square < tame_square<C>)) return Extent::wild();
    if (all_zero(v, cols)) return {0, 0};
    const double enlarge = outward * (1 + rounding_unit<C> * (count + 16));
    return {at_least(__builtin_sqrt(square) * enlarge, least_length<C>) * enlarge, 0};
  }
};

#if defined(__AVX512VNNI__)
// Four bytes: the components in units of the largest over 127. Sums of products are exact integers. The instruction
// multiplies unsigned bytes by signed ones, so rows of x have 128 added, and 128 Σ w is taken off at the start.
struct Bytes {
  using C = float;
  using Sum = i32v;
  static constexpr int64_t least_cols = 32, most_cols = 16384;  // sums stay below 2²⁹

  static int64_t depth(int64_t cols) { return divide_up(cols, 4); }
  static double roundings(int64_t) { return 32; }

  ISTHMUS_INLINE static Sum multiply_add(float x, f32v w, Sum sum) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)_mm512_set1_ps(x), (__m512i)w);
  }
  ISTHMUS_INLINE static f32v number(Sum sum) { return __builtin_convertvector(sum, f32v); }

  template <bool Row, class T>
  static Extent write(const T* v, int64_t cols, float* words) {
    f32v top = {}, finite = {};
    for (int64_t k = 0; k < cols; k += lanes<float>) {
      const f32v part = load_first(v + k, cols - k);
      top = greater(abs(part), top);
      finite += part - part;
    }
    const float largest = largest_lane<float>(top);
    const double count = static_cast<double>(cols), most = static_cast<double>(largest);
    if (!(most * most * count < tame_square<float>) || sum_lanes<float>(finite) != 0) return Extent::wild();
    if (largest == 0) return write_units<Row>(v, cols, 1, words), Extent{0, 0};
    const float unit = static_cast<float>(at_least(most / 127, least_length<float> / 128));
    const Extent units = write_units<Row>(v, cols, unit, words);
    // A component in units is rounded twice before its integer is taken off.
    const double scale = static_cast<double>(unit), enlarge = 1 + 0x1p-22 * (count + 16);
    return {at_least(scale * enlarge * __builtin_sqrt(units.length) * outward, least_length<float>),
            scale * (enlarge * __builtin_sqrt(units.loss) + 0x1p-16 * __builtin_sqrt(count)) * outward, scale,
            units.sum};
  }

  // In units: the squares of both lengths, and the sum of the components.
  template <bool Row, class T>
  static Extent write_units(const T* v, int64_t cols, float unit, float* words) {
    f32v squares = {}, lost = {};
    i32v sum = {};
    const float inverse = 1 / unit;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
    for (int64_t k = 0; k < cols; k += lanes<float>) {
      const f32v exact = load_first(v + k, cols - k) * inverse;
      const i32v units = (i32v)_mm512_cvtps_epi32((__m512)exact);
      const f32v whole = __builtin_convertvector(units, f32v), rest = exact - whole;
      squares += whole * whole;
      lost += rest * rest;
      sum += units;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + k), _mm512_cvtepi32_epi8((__m512i)(units + (Row ? 128 : 0))));
    }
    return {static_cast<double>(sum_lanes<float>(squares)), static_cast<double>(sum_lanes<float>(lost)), 1,
            _mm512_reduce_add_epi32((__m512i)sum)};
  }
};
#endif

#if defined(__AVX512BF16__)
// A pair of bfloat16: the components rounded.
struct Pairs {
  using C = float;
  using Sum = f32v;
  static constexpr int64_t least_cols = 16, most_cols = INT64_MAX;

  static int64_t depth(int64_t cols) { return divide_up(cols, 2); }
  static double roundings(int64_t cols) { return Fine<float>::roundings(cols); }

  ISTHMUS_INLINE static Sum multiply_add(float x, f32v w, Sum sum) {
    return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)w);
  }
  ISTHMUS_INLINE static f32v number(Sum sum) { return sum; }

  template <bool Row, class T>
  static Extent write(const T* v, int64_t cols, float* words) {
    BFloat16* halves = reinterpret_cast<BFloat16*>(words);
    f32v lost = {};
    for (int64_t k = 0; k < cols; k += lanes<float>) {
      const f32v whole = load_first(v + k, cols - k);
      store(halves + k, whole);
      const f32v rest = whole - load(halves + k);
      lost += rest * rest;
    }
    const double square = exact_score(v, v, cols, 0), loss = static_cast<double>(sum_lanes<float>(lost));
    if (!(square < tame_square<float>)) return Extent::wild();
    if (all_zero(v, cols)) return {0, 0};
    // The squares of what is left out are float32: those that vanish are of less than 2⁻⁶⁰.
    const double length = __builtin_sqrt(square), enlarge = 1 + 0x1p-22 * (static_cast<double>(cols) + 16);
    const double left = enlarge * __builtin_sqrt(loss) + 0x1p-60 * __builtin_sqrt(static_cast<double>(cols));
    return {at_least((length + left) * outward, least_length<float>), left * outward};
  }
};
#endif
