// Gradients of a softmax over the codes. Its probabilities are computed again, strip by strip, and turned into the
// gradients w of the logits:
//
//     Σ p c with gradient g        w = p (g·c - g·Σ p c)
//     entropy H, usage Σ_i p       w = p (h_k - Σ_j p_j h_j - e (log p + H)),   h and e their gradients
//     -log p_index                 w = e (p - [k = index])
//
// and then, as the w of a row add up to 0,
//
//     ∂/∂u_i = slope Σ_k w v_k          ∂/∂v_k = slope (Σ_i w u_i - [euclidean] v_k Σ_i w)
//
// which are two products more: Σ_k w v_k as in forward.inl, and Σ_i w u_i after a transposition of w in registers.
//
// Arithmetic: 6·N·K·D operations, 10·N·K·D for Σ p c. Memory: sums over rows are made chunk by chunk and added in
// order; the chunks together take at most 4·K·D + N·D numbers (twice that for Σ p c).

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Σ_i w_ik u_i for each code k, in panels of codes.
template <class C>
struct CodeGradients {
  static constexpr int64_t width = panel_width<C>;

  const int64_t codes, dim, chunks;
  const int64_t panel, matrix;  // elements: [padded(dim), width], and all of them
  Buffer<C> partial;            // [chunks, ⌈codes / width⌉, padded(dim), width]

  CodeGradients(int64_t codes_, int64_t dim_, int64_t chunks_)
      : codes(codes_),
        dim(dim_),
        chunks(chunks_),
        panel(Columns<C>::padded(dim) * width),
        matrix(divide_up(codes, width) * panel),
        partial(chunks * matrix) {}

  void begin(int64_t chunk) const {
    for (int64_t i = 0; i < matrix; ++i) partial.data[chunk * matrix + i] = 0;
  }

  // Of one panel of a block of rows and the weights [strip.count, width] of a strip.
  void add(int64_t chunk, const Strip& strip, const Columns<C>& rows, int64_t row_panel, const C* weights) const {
    alignas(64) C by_row[width * width];
    for (int64_t k = 0; k < strip.count; k += width) {
      pack_rows<width>(weights + k * width, width, smaller(strip.count - k, width), width, by_row);
      rows.add({row_panel * width, width}, by_row, of(chunk, strip.first + k));
    }
  }

  // Adds the chunks up; then visit(k, d, the sums at d, …) for each code.
  template <class Visit>
  void for_each_code(Visit&& visit) const {
    parallel_for(divide_up(codes, width), grain_elements / (chunks * panel + 1) + 1, [&](int64_t begin, int64_t end) {
      Buffer<C> sums(panel);
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t i = 0; i < panel; i += lanes<C>) {
          Vec<C> sum = {};
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(of(chunk, p * width) + i);
          store(sums.data + i, sum);
        }
        for_each_column<C>(sums.data, dim, smaller(codes - p * width, width),
                           [&](int64_t j, int64_t d, Vec<C> of_code) { visit(p * width + j, d, of_code); });
      }
    });
  }

 private:
  C* of(int64_t chunk, int64_t first_code) const { return partial.data + chunk * matrix + first_code / width * panel; }
};

// What all gradients share: from w to x and the codebook.
template <class T>
struct Gradients {
  using C = Compute<T>;

  const Assignment& args;
  const Codes<T>& codes;
  const int64_t head;
  T *const grad_x, *const grad_codebook;
  const RowChunks<C> chunks;
  const bool euclidean = args.metric == Metric::euclidean;
  const Columns<C> columns;         // of the codes
  const CodeGradients<C> to_codes;  // Σ w u
  const CodeSums<C> weights;        // Σ w
  const CodeGradients<C> averaged;  // what comes directly, beside the logits

  Gradients(const Assignment& args_, const Codes<T>& codes_, int64_t head_, void* grad_x_, void* grad_codebook_,
            bool averages)
      : args(args_),
        codes(codes_),
        head(head_),
        grad_x(static_cast<T*>(grad_x_)),
        grad_codebook(static_cast<T*>(grad_codebook_)),
        chunks(RowChunks<C>::summed(args.rows, args.codes)),
        columns(grad_x != nullptr ? args.codes : 0, args.dim),
        to_codes(args.codes, args.dim, grad_codebook != nullptr ? chunks.count : 0),
        weights(args.codes, grad_codebook != nullptr && euclidean ? chunks.count : 0),
        averaged(args.codes, args.dim, grad_codebook != nullptr && averages ? chunks.count : 0) {
    if (grad_x != nullptr) columns.pack(codes.points.data, codes.stride);
  }

  void begin(int64_t chunk) const {
    if (to_codes.chunks > 0) to_codes.begin(chunk);
    if (weights.chunks > 0) weights.begin(chunk);
    if (averaged.chunks > 0) averaged.begin(chunk);
  }

  // The codes of a head: from sums over rows to gradients.
  void write_codes() const {
    if (grad_codebook == nullptr) return;
    Buffer<C> sums(codes.count * codes.stride), direct(codes.count * codes.stride);
    to_codes.for_each_code([&](int64_t k, int64_t d, Vec<C> sum) { store(sums.data + k * codes.stride + d, sum); });
    if (averaged.chunks > 0) {
      averaged.for_each_code([&](int64_t k, int64_t d, Vec<C> sum) { store(direct.data + k * codes.stride + d, sum); });
    }
    T* out = grad_codebook + head * codes.count * codes.dim;
    for (int64_t k = 0; k < codes.count; ++k) {
      C* sum = sums.data + k * codes.stride;
      const C* point = codes.points.data + k * codes.stride;
      const C weight = euclidean ? weights.total(k) : C(0);
      for (int64_t d = 0; d < codes.stride; d += lanes<C>) {
        store(sum + d, codes.slope * (load(sum + d) - weight * load(point + d)));
      }
      codes.space.pull_back(point, codes.norms.data[k], sum);
      for (int64_t d = 0; d < codes.dim; d += lanes<C>) {
        Vec<C> total = load(sum + d);
        if (averaged.chunks > 0) total += load(direct.data + k * codes.stride + d);
        store_first(out + k * codes.dim + d, total, codes.dim - d);
      }
    }
  }
};

// The gradients of one block of rows: sums over codes, finished by write().
template <class T>
struct BlockGradients {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>;

  const Gradients<T>& all;
  const RowBlock<T>& block;
  const int64_t chunk, size;
  Buffer<C> sums;         // [panels, padded(dim), width]: Σ_k w v_k
  const Columns<C> rows;  // of the block

  BlockGradients(const Gradients<T>& all_, const RowBlock<T>& block_, int64_t chunk_)
      : all(all_),
        block(block_),
        chunk(chunk_),
        size(Columns<C>::padded(all.args.dim) * width),
        sums(block.panels() * size),
        rows(block.panels() * width, all.args.dim) {
    for (int64_t i = 0; i < block.panels() * size; ++i) sums.data[i] = 0;
    if (all.to_codes.chunks > 0) rows.pack(block.points.rows.data, block.points.stride);
  }

  // The w of a panel of rows and a strip of codes.
  void add(int64_t panel, const Strip& strip, const C* w) const {
    if (all.grad_x != nullptr) all.columns.add(strip, w, sums.data + panel * size);
    if (all.to_codes.chunks > 0) all.to_codes.add(chunk, strip, rows, panel, w);
    if (all.weights.chunks > 0) all.weights.add(chunk, strip, w);
  }

  void write() const {
    if (all.grad_x == nullptr) return;
    const int64_t dim = all.args.dim, stride = block.points.stride;
    Buffer<C> grads(width * stride);
    for (int64_t p = 0; p < block.panels(); ++p) {
      for_each_column<C>(sums.data + p * size, dim, block.rows_in(p), [&](int64_t j, int64_t d, Vec<C> sum) {
        store(grads.data + j * stride + d, all.codes.slope * sum);
      });
      for (int64_t j = 0; j < block.rows_in(p); ++j) write_row(p * width + j, grads.data + j * stride);
    }
  }

 private:
  void write_row(int64_t r, C* grad) const {
    const int64_t dim = all.args.dim, row = block.first + r;
    all.codes.space.pull_back(block.points.row(r), block.norms.data[r], grad);
    for (int64_t d = 0; d < dim; d += lanes<C>) {
      const Vec<C> value = block.hidden(row) ? Vec<C>{} : load(grad + d);
      store_first(all.grad_x + row * dim + d, value, dim - d);
    }
  }
};

// Calls each(block, gradients) with every block of a head, and writes what the gradients add up to.
template <class T, class Each>
void differentiate(const Gradients<T>& all, const int64_t* indices, int64_t products, Each&& each) {
  for_each_block(
      all.codes, all.args, indices, all.head, all.chunks, products, [&](int64_t chunk) { all.begin(chunk); },
      [&](const RowBlock<T>& block, int64_t chunk) {
        const BlockGradients<T> gradients(all, block, chunk);
        each(block, gradients);
        gradients.write();
      });
  all.write_codes();
}

// ---- soft assignment -----------------------------------------------------------------------------------------------

// The incoming gradient g of a block of rows.
template <class T>
struct IncomingRows {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>;

  RowPanels<C> grads;
  Lanes<C> centre[RowPanels<C>::max_panels];  // g·Σ p c, less that of the origin

  IncomingRows(const SoftQuantizeBackward& args, const RowBlock<T>& block) : grads(args.of.dim) {
    const int64_t dim = args.of.dim;
    for (int64_t r = 0; r < block.panels() * width; ++r) {
      const int64_t row = block.first + r;
      const bool present = r < block.count && !block.hidden(row);
      Vec<C> product = {};
      for (int64_t d = 0; d < grads.stride; d += lanes<C>) {
        const int64_t at = row * dim + d, left = present ? dim - d : 0;
        const Vec<C> g = load_first(static_cast<const T*>(args.grad) + (present ? at : 0), left);
        store(grads.row(r) + d, g);
        product += g * load_first(static_cast<const C*>(args.centred) + (present ? at : 0), left);
      }
      centre[r / width].set(r % width, sum_lanes<C>(product));
    }
    grads.pack(block.count, 1);
  }
};

template <class T>
void soft_quantize_backward_of(const SoftQuantizeBackward& args, const RowBlock<T>& block,
                               const BlockGradients<T>& gradients) {
  using C = Compute<T>;
  const Codes<T>& codes = block.codes;
  const Noise<C> noise(args.gumbel, codes.count);
  const IncomingRows<T> incoming(args, block);
  const CodeGradients<C>& averaged = gradients.all.averaged;
  const Columns<C> columns(averaged.chunks > 0 ? block.panels() * block.width : 0, codes.dim);
  if (averaged.chunks > 0) columns.pack(incoming.grads.rows.data, incoming.grads.stride);
  Buffer<C> logits(strip_codes * block.width), w(strip_codes * block.width);
  for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
    const Probabilities<T> probabilities(block, p, args.normalizer, args.of);
    noise.add(block, p, strip, vanishing_below(probabilities.peak), logits.data);
    probabilities.fill(strip.count, logits.data);
    if (averaged.chunks > 0) averaged.add(gradients.chunk, strip, columns, p, logits.data);
    codes.products(strip, incoming.grads.panel(p), w.data);
    const Lanes<C> centre = incoming.centre[p];
    for_each_vector<C>(strip.count, [&](int h, int64_t k, int64_t at) {
      const Vec<C> product = codes.norms.data[strip.first + k] * load(w.data + at);
      store(w.data + at, load(logits.data + at) * (product - centre.v[h]));
    });
    gradients.add(p, strip, w.data);
  });
}

void soft_quantize_backward(const SoftQuantizeBackward& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, args.gumbel.relaxation);
      const Gradients<T> gradients(of, codes, head, args.grad_x, args.grad_codebook, true);
      differentiate(gradients, nullptr, 5 * of.codes * of.dim,
                    [&](const RowBlock<T>& block, const BlockGradients<T>& of_block) {
                      soft_quantize_backward_of(args, block, of_block);
                    });
    }
  });
}

// ---- statistics ----------------------------------------------------------------------------------------------------

// Σ_k p_k h_k of a block.
template <class T>
void mean_usage_gradient(const SoftStatisticsBackward& args, const RowBlock<T>& block, const Compute<T>* grad_usage,
                         Compute<T>* logits, Lanes<Compute<T>>* means) {
  using C = Compute<T>;
  for_each_strip(block, logits, [&](int64_t p, const Strip& strip) {
    Probabilities<T>(block, p, args.normalizer, args.of).fill(strip.count, logits);
    Lanes<C> mean = means[p];
    for_each_vector<C>(strip.count, [&](int h, int64_t k, int64_t at) {
      mean.v[h] += load(logits + at) * grad_usage[strip.first + k];
    });
    means[p] = mean;
  });
}

template <class T>
void soft_statistics_backward_of(const SoftStatisticsBackward& args, int64_t head, const RowBlock<T>& block,
                                 const BlockGradients<T>& gradients) {
  using C = Compute<T>;
  Buffer<C> logits(strip_codes * block.width);
  const C* grad_usage = static_cast<const C*>(args.grad_usage);
  Lanes<C> means[RowPanels<C>::max_panels] = {};
  if (grad_usage != nullptr) {
    grad_usage += head * args.of.codes;
    mean_usage_gradient(args, block, grad_usage, logits.data, means);
  }
  const C *entropies = static_cast<const C*>(args.entropy), *grad_entropy = static_cast<const C*>(args.grad_entropy);
  for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
    const Probabilities<T> probabilities(block, p, args.normalizer, args.of);
    const auto zero = Lanes<C>::of(0);
    const auto slope = grad_entropy == nullptr ? zero : Lanes<C>::load(block, p, grad_entropy, C(0));
    const auto entropy = Lanes<C>::load(block, p, entropies, C(0)), mean = means[p];
    for_each_vector<C>(strip.count, [&](int h, int64_t k, int64_t at) {
      const Vec<C> log_p = load(logits.data + at) - probabilities.peak.v[h] - probabilities.log_sum.v[h];
      const Vec<C> probability = exp(log_p);
      const C usage = grad_usage == nullptr ? C(0) : grad_usage[strip.first + k];
      const Vec<C> pull = (usage - mean.v[h]) - slope.v[h] * (log_p + entropy.v[h]);
      store(logits.data + at, probability == 0 ? Vec<C>{} : probability * pull);
    });
    gradients.add(p, strip, logits.data);
  });
}

void soft_statistics_backward(const SoftStatisticsBackward& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, 1);
      const Gradients<T> gradients(of, codes, head, args.grad_x, args.grad_codebook, false);
      differentiate(gradients, nullptr, 4 * of.codes * of.dim,
                    [&](const RowBlock<T>& block, const BlockGradients<T>& of_block) {
                      soft_statistics_backward_of(args, head, block, of_block);
                    });
    }
  });
}

// ---- cross-entropy -------------------------------------------------------------------------------------------------

template <class T>
void cross_entropy_backward_of(const CodeCrossEntropyBackward& args, const RowBlock<T>& block,
                               const BlockGradients<T>& gradients) {
  using C = Compute<T>;
  Buffer<C> logits(strip_codes * block.width);
  for_each_strip(block, logits.data, [&](int64_t p, const Strip& strip) {
    Probabilities<T>(block, p, args.normalizer, args.of).fill(strip.count, logits.data);
    const auto slope = Lanes<C>::load(block, p, static_cast<const C*>(args.grad), C(0));
    for_each_vector<C>(
        strip.count, [&](int h, int64_t, int64_t at) { store(logits.data + at, slope.v[h] * load(logits.data + at)); });
    Chosen<C>(block, p, args.indices).in(strip, [&](int64_t j, int64_t at) { logits.data[at] -= slope.get(j); });
    gradients.add(p, strip, logits.data);
  });
}

void cross_entropy_backward(const CodeCrossEntropyBackward& args) {
  const Assignment& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    for (int64_t head = 0; head < of.heads; ++head) {
      const Codes<T> codes(of, head, 1);
      const Gradients<T> gradients(of, codes, head, args.grad_x, args.grad_codebook, false);
      differentiate(gradients, args.indices, 3 * of.codes * of.dim,
                    [&](const RowBlock<T>& block, const BlockGradients<T>& of_block) {
                      cross_entropy_backward_of(args, block, of_block);
                    });
    }
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
