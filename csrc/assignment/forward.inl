// Samples, soft assignments, their entropy and their loss: one pass over the codes for each block of rows.
//
// A running maximum and a sum beside it stand for the softmax of each row. Noise is drawn where it can matter: a code
// whose logit plus the greatest noise there is stays below what the row has already met draws none.
//
// Arithmetic: 2·N·K·D operations for scores, as many for Σ p c and for Σ p over rows. Memory beside inputs and outputs:
// 2·K·D numbers for the codes, K·D more for Σ p c.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// ---- what a row remembers ------------------------------------------------------------------------------------------

// Below this, exp is 0.
template <class C>
constexpr C exp_floor = sizeof(C) == 4 ? C(-104) : C(-746);

template <class C>
inline Lanes<C> vanishing_below(const Lanes<C>& top) {
  return {{top.v[0] + exp_floor<C>, top.v[1] + exp_floor<C>}};
}

// log Σ exp of the logits met so far, for each row of a panel. The start below every finite number keeps sums over -inf
// free of inf - inf; a NaN is never the maximum, but stays in the sum.
template <class C>
struct LogSum {
  Lanes<C> top = Lanes<C>::of(sizeof(C) == 4 ? C(-0x1.fffffep127) : C(-0x1.fffffffffffffp1023));
  Lanes<C> sum = Lanes<C>::of(0);

  // If the maximum rises, rescale(by, factor) is called: top is `by` higher, and what was summed before is worth
  // exp(-by) = factor of it.
  template <class Rescale>
  void raise_to(const Lanes<C>& peak, Rescale&& rescale) {
    if (!any((peak.v[0] > top.v[0]) | (peak.v[1] > top.v[1]))) return;
    Lanes<C> by, factor;
    for (int h = 0; h < 2; ++h) {
      const Vec<C> raised = peak.v[h] > top.v[h] ? peak.v[h] : top.v[h];
      by.v[h] = raised - top.v[h];
      factor.v[h] = exp_of_negative(top.v[h] - raised);
      sum.v[h] *= factor.v[h];
      top.v[h] = raised;
    }
    rescale(by, factor);
  }

  // Leaves exp(logit - top) in the place of the logits of a strip, and adds them.
  void add(int64_t count, C* logits) {
    Lanes<C> total = sum;
    for_each_vector<C>(count, [&](int h, int64_t, int64_t at) {
      const Vec<C> e = exp_of_negative(load(logits + at) - top.v[h]);
      store(logits + at, e);
      total.v[h] += e;
    });
    sum = total;
  }
};

// The greatest of a strip, for each row.
template <class C>
inline Lanes<C> peak_of(int64_t count, const C* logits) {
  Lanes<C> peak = Lanes<C>::of(-static_cast<C>(__builtin_inf()));
  for_each_vector<C>(count, [&](int h, int64_t, int64_t at) {
    const Vec<C> value = load(logits + at);
    peak.v[h] = value > peak.v[h] ? value : peak.v[h];
  });
  return peak;
}

// The best code so far, for each row. Codes come in order and win by being strictly greater: the lowest of equals
// stays, and one that is not a number never enters.
template <class C>
struct Leader {
  Lanes<C> best = Lanes<C>::of(-static_cast<C>(__builtin_inf()));
  Mask<C> code[2] = {};

  void meet(const Strip& strip, const C* logits) {
    using Int = decltype(+Mask<C>{}[0]);
    Leader leader = *this;
    for_each_vector<C>(strip.count, [&](int h, int64_t k, int64_t at) {
      const Vec<C> value = load(logits + at);
      const Mask<C> wins = value > leader.best.v[h];
      leader.best.v[h] = wins ? value : leader.best.v[h];
      leader.code[h] = wins ? Mask<C>{} + static_cast<Int>(strip.first + k) : leader.code[h];
    });
    *this = leader;
  }

  template <class T>
  void write(const RowBlock<T>& block, int64_t panel, int64_t* indices) const {
    for (int64_t j = 0; j < block.rows_in(panel); ++j) {
      const int64_t row = block.row_of(panel) + j;
      indices[row] = block.hidden(row) ? -1 : static_cast<int64_t>(code[j / lanes<C>][j % lanes<C>]);
    }
  }
};

// Writes value(j) for each row of a panel, 0 for those left out.
template <class T, class C, class Value>
inline void write_rows(const RowBlock<T>& block, int64_t panel, C* out, Value&& value) {
  for (int64_t j = 0; j < block.rows_in(panel); ++j) {
    const int64_t row = block.row_of(panel) + j;
    out[row] = block.hidden(row) ? C(0) : value(j);
  }
}

// What backward needs of a softmax: log p = logit - peak - log_sum keeps the digits that log Σ exp alone would lose.
template <class C>
struct Normalizer {
  C *peak, *log_sum;

  Normalizer(void* values, const Assignment& args)
      : peak(static_cast<C*>(values)), log_sum(peak + args.heads * args.rows) {}

  template <class T>
  void write(const RowBlock<T>& block, int64_t panel, const LogSum<C>& sum) const {
    const Lanes<C> logs{{log(sum.sum.v[0]), log(sum.sum.v[1])}};
    write_rows(block, panel, peak, [&](int64_t j) { return sum.top.get(j); });
    write_rows(block, panel, log_sum, [&](int64_t j) { return logs.get(j); });
  }
};

// ---- noise ---------------------------------------------------------------------------------------------------------

// Gumbel noise of a panel of rows and a strip of codes.
template <class C>
struct Noise {
  static constexpr int64_t width = panel_width<C>;
  static constexpr int64_t no_key[2] = {};
  static constexpr C highest = sizeof(C) == 4 ? C(22.9) : C(45.1);  // of the stream; core/gumbel.h

  const bool wanted;
  const Key key;
  const int64_t codes;
  const C factor;
  Buffer<C> rows;     // [width, strip_codes]
  Buffer<C> columns;  // [strip_codes, width]

  Noise(const Gumbel& gumbel, int64_t codes_)
      : wanted(gumbel.key != nullptr),
        key(wanted ? Key(gumbel.key) : Key(no_key)),
        codes(codes_),
        factor(static_cast<C>(1 / gumbel.relaxation)),
        rows(width * strip_codes),
        columns(strip_codes * width) {}

  // Adds noise, if it is wanted, to the logits, but not to those of a row that would all stay below its `floor`.
  template <class T>
  void add(const RowBlock<T>& block, int64_t panel, const Strip& strip, const Lanes<C>& floor, C* logits) const {
    if (!wanted) return;
    const Lanes<C> peak = peak_of(strip.count, logits);
    bool drawn = false;
    for (int64_t j = 0; j < block.rows_in(panel); ++j) {
      C* of_row = rows.data + j * strip_codes;
      if (peak.get(j) + factor * highest < floor.get(j)) {
        for (int64_t k = 0; k < strip.count; ++k) of_row[k] = 0;
      } else {
        fill_gumbel(key, (block.row_of(panel) + j) * codes + strip.first, strip.count, of_row);
        drawn = true;
      }
    }
    if (!drawn) return;
    pack_rows<width>(rows.data, strip_codes, block.rows_in(panel), strip.count, columns.data);
    for (int64_t i = 0; i < strip.count * width; i += lanes<C>) {
      store(logits + i, load(logits + i) + factor * load(columns.data + i));
    }
  }
};

// ---- sample --------------------------------------------------------------------------------------------------------

void sample(const CodeSample& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    using C = Compute<T>;
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, 1);
      const auto chunks = RowChunks<C>::apart(of.rows);
      const auto body = [&](const RowBlock<T>& block, int64_t) {
        const Noise<C> noise({args.key, 1}, of.codes);
        Buffer<C> logits(strip_codes * block.width);
        Leader<C> leaders[RowPanels<C>::max_panels];
        for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
          noise.add(block, p, strip, leaders[p].best, logits.data);
          leaders[p].meet(strip, logits.data);
        });
        for (int64_t p = 0; p < block.panels(); ++p) leaders[p].write(block, p, args.indices);
      };
      for_each_block(codes, of, nullptr, head, chunks, 3 * of.codes * of.dim, [](int64_t) {}, body);
    }
  });
}

// ---- soft assignment -----------------------------------------------------------------------------------------------

template <class T>
struct SoftQuantizer {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>;

  const SoftQuantize& args;
  const Codes<T>& codes;
  const Columns<C>& columns;

  void run(const RowBlock<T>& block) const {
    const int64_t size = columns.padded(codes.dim) * width;
    const Noise<C> noise(args.gumbel, codes.count);
    Buffer<C> logits(strip_codes * width), sums(RowPanels<C>::max_panels * size);
    LogSum<C> log_sums[RowPanels<C>::max_panels];
    Leader<C> leaders[RowPanels<C>::max_panels];
    for (int64_t i = 0; i < block.panels() * size; ++i) sums.data[i] = 0;
    for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
      noise.add(block, p, strip, vanishing_below(log_sums[p].top), logits.data);
      leaders[p].meet(strip, logits.data);
      C* sum = sums.data + p * size;
      log_sums[p].raise_to(leaders[p].best, [&](const Lanes<C>&, const Lanes<C>& factor) {
        for_each_vector<C>(codes.dim,
                           [&](int h, int64_t, int64_t at) { store(sum + at, load(sum + at) * factor.v[h]); });
      });
      log_sums[p].add(strip.count, logits.data);
      weigh_by_norm(strip, logits.data);
      columns.add(strip, logits.data, sum);
    });
    const Normalizer<C> normalizer(args.normalizer, args.of);
    for (int64_t p = 0; p < block.panels(); ++p) {
      leaders[p].write(block, p, args.indices);
      normalizer.write(block, p, log_sums[p]);
      write_soft(block, p, log_sums[p].sum, sums.data + p * size);
      if (args.hard) write_hard(block, p);
    }
  }

  // A code is its point times its norm.
  void weigh_by_norm(const Strip& strip, C* weights) const {
    if (!codes.space.unit) return;
    for_each_vector<C>(strip.count, [&](int, int64_t k, int64_t at) {
      store(weights + at, load(weights + at) * codes.norms.data[strip.first + k]);
    });
  }

  void write_soft(const RowBlock<T>& block, int64_t panel, const Lanes<C>& total, const C* sum) const {
    const int64_t dim = codes.dim;
    for_each_column<C>(sum, dim, block.rows_in(panel), [&](int64_t j, int64_t d, Vec<C> of_row) {
      const int64_t row = block.row_of(panel) + j, at = row * dim + d;
      const bool hidden = block.hidden(row);
      const Vec<C> centred = hidden ? Vec<C>{} : of_row / total.get(j);
      const Vec<C> value = hidden ? Vec<C>{} : load(codes.space.origin.data + d) + centred;
      store_first(static_cast<C*>(args.centred) + at, centred, dim - d);
      if (!args.hard) store_first(static_cast<T*>(args.quantized) + at, value, dim - d);
    });
  }

  void write_hard(const RowBlock<T>& block, int64_t panel) const {
    const int64_t dim = codes.dim, first_code = block.row_of(panel) / args.of.rows * codes.count;
    for (int64_t j = 0; j < block.rows_in(panel); ++j) {
      const int64_t row = block.row_of(panel) + j, index = args.indices[row];
      T* quantized = static_cast<T*>(args.quantized) + row * dim;
      const T* code = static_cast<const T*>(args.of.codebook) + (first_code + index) * dim;
      for (int64_t d = 0; d < dim; ++d) quantized[d] = index < 0 ? T{} : code[d];
    }
  }
};

void soft_quantize(const SoftQuantize& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    using C = Compute<T>;
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, args.gumbel.relaxation);
      const Columns<C> columns(of.codes, of.dim);
      columns.pack(codes.points.data, codes.stride);
      const SoftQuantizer<T> quantizer{args, codes, columns};
      for_each_block(
          codes, of, nullptr, head, RowChunks<C>::apart(of.rows), 3 * of.codes * of.dim, [](int64_t) {},
          [&](const RowBlock<T>& block, int64_t) { quantizer.run(block); });
    }
  });
}

// ---- statistics ----------------------------------------------------------------------------------------------------

// p of a strip, in the place of its logits, once peak and log_sum are known.
template <class C>
inline void to_probabilities(int64_t count, const Lanes<C>& peak, const Lanes<C>& log_sum, C* logits) {
  for_each_vector<C>(count, [&](int h, int64_t, int64_t at) {
    store(logits + at, exp(load(logits + at) - peak.v[h] - log_sum.v[h]));
  });
}

// With t = logit - top, H = log Σ exp(t) - Σ exp(t) t / Σ exp(t): two terms that are not negative.
template <class C>
struct Entropy {
  LogSum<C> sum;
  Lanes<C> moment = Lanes<C>::of(0);  // Σ exp(t) t

  void meet(int64_t count, const C* logits) {
    const Lanes<C> before = sum.sum;
    sum.raise_to(peak_of(count, logits), [&](const Lanes<C>& by, const Lanes<C>& factor) {
      for (int h = 0; h < 2; ++h) {
        // Where nothing was summed yet, the rise is beyond every number.
        const Vec<C> moved = before.v[h] == 0 ? Vec<C>{} : by.v[h] * before.v[h];
        moment.v[h] = factor.v[h] * (moment.v[h] - moved);
      }
    });
    Entropy next = *this;
    for_each_vector<C>(count, [&](int h, int64_t, int64_t at) {
      const Vec<C> t = load(logits + at) - sum.top.v[h], e = exp_of_negative(t);
      next.sum.sum.v[h] += e;
      next.moment.v[h] += e == 0 ? Vec<C>{} : e * t;
    });
    *this = next;
  }

  template <class T>
  void write(const RowBlock<T>& block, int64_t panel, C* entropy) const {
    Lanes<C> value;
    for (int h = 0; h < 2; ++h) value.v[h] = log(sum.sum.v[h]) - moment.v[h] / sum.sum.v[h];
    write_rows(block, panel, entropy, [&](int64_t j) { return value.get(j); });
  }
};

// p of a strip in the place of its logits: 0 in rows that are left out, for which log_sum is infinite.
template <class T>
struct Probabilities {
  using C = Compute<T>;
  Lanes<C> peak, log_sum;

  Probabilities(const RowBlock<T>& block, int64_t panel, const void* normalizer, const Assignment& args) {
    const C* values = static_cast<const C*>(normalizer);
    peak = Lanes<C>::load(block, panel, values, C(0));
    log_sum = Lanes<C>::load(block, panel, values + args.heads * args.rows, static_cast<C>(__builtin_inf()));
  }

  void fill(int64_t count, C* logits) const {
    for_each_vector<C>(count, [&](int h, int64_t, int64_t at) {
      store(logits + at, exp(load(logits + at) - peak.v[h] - log_sum.v[h]));
    });
  }
};

template <class T>
void soft_statistics_of(const SoftStatistics& args, const RowBlock<T>& block, const CodeSums<Compute<T>>& usage,
                        int64_t chunk) {
  using C = Compute<T>;
  Buffer<C> logits(strip_codes * block.width);
  Entropy<C> entropies[RowPanels<C>::max_panels];
  for_each_strip(block, logits.data,
                 [&](int64_t p, const Strip& strip) { entropies[p].meet(strip.count, logits.data); });
  const Normalizer<C> normalizer(args.normalizer, args.of);
  for (int64_t p = 0; p < block.panels(); ++p) {
    entropies[p].write(block, p, static_cast<C*>(args.entropy));
    normalizer.write(block, p, entropies[p].sum);
  }
  for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
    Probabilities<T>(block, p, args.normalizer, args.of).fill(strip.count, logits.data);
    usage.add(chunk, strip, logits.data);
  });
}

void soft_statistics(const SoftStatistics& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    using C = Compute<T>;
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, 1);
      const auto chunks = RowChunks<C>::summed(of.rows, of.codes);
      const CodeSums<C> usage(of.codes, chunks.count);
      for_each_block(
          codes, of, nullptr, head, chunks, 3 * of.codes * of.dim, [&](int64_t chunk) { usage.begin(chunk); },
          [&](const RowBlock<T>& block, int64_t chunk) { soft_statistics_of(args, block, usage, chunk); });
      C* out = static_cast<C*>(args.usage) + head * of.codes;
      for (int64_t k = 0; k < of.codes; ++k) out[k] = usage.total(k);
    }
  });
}

// ---- cross-entropy -------------------------------------------------------------------------------------------------

// The codes that the rows of a panel name.
template <class C>
struct Chosen {
  int64_t code[panel_width<C>];

  template <class T>
  Chosen(const RowBlock<T>& block, int64_t panel, const int64_t* indices) {
    for (int64_t j = 0; j < panel_width<C>; ++j) {
      code[j] = j < block.rows_in(panel) ? indices[block.row_of(panel) + j] : -1;
    }
  }

  // Calls f(row of the panel, where its code is in the strip) for the codes that are.
  template <class F>
  void in(const Strip& strip, F&& f) const {
    for (int64_t j = 0; j < panel_width<C>; ++j) {
      const int64_t k = code[j] - strip.first;
      if (k >= 0 && k < strip.count) f(j, k * panel_width<C> + j);
    }
  }
};

template <class T>
void cross_entropy_of(const CodeCrossEntropy& args, const RowBlock<T>& block) {
  using C = Compute<T>;
  Buffer<C> logits(strip_codes * block.width);
  LogSum<C> sums[RowPanels<C>::max_panels];
  Lanes<C> chosen[RowPanels<C>::max_panels] = {};
  for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
    Chosen<C>(block, p, args.indices).in(strip, [&](int64_t j, int64_t at) { chosen[p].set(j, logits.data[at]); });
    sums[p].raise_to(peak_of(strip.count, logits.data), [](const Lanes<C>&, const Lanes<C>&) {});
    sums[p].add(strip.count, logits.data);
  });
  const Normalizer<C> normalizer(args.normalizer, args.of);
  for (int64_t p = 0; p < block.panels(); ++p) {
    normalizer.write(block, p, sums[p]);
    const Lanes<C> log_sum{{log(sums[p].sum.v[0]), log(sums[p].sum.v[1])}};
    write_rows(block, p, static_cast<C*>(args.loss),
               [&](int64_t j) { return sums[p].top.get(j) - chosen[p].get(j) + log_sum.get(j); });
  }
}

void cross_entropy(const CodeCrossEntropy& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, 1);
      for_each_block(
          codes, of, args.indices, head, RowChunks<Compute<T>>::apart(of.rows), 2 * of.codes * of.dim, [](int64_t) {},
          [&](const RowBlock<T>& block, int64_t) { cross_entropy_of(args, block); });
    }
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
