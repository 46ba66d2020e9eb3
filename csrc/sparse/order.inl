// The order by latent.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// The latent of each entry, -1 for those that the order leaves out.
template <class T>
void latents_in_use(const CodeLayout& code, const T* values, int64_t* latents) {
  parallel_for(code.entries, grain_elements, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) latents[e] = load_one(values + e) == 0 ? -1 : code.indices[e];
  });
}

// The row of each entry.
void rows_of_entries(const CodeLayout& code, int64_t* rows) {
  parallel_for(code.rows, row_grain(code, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t e = first_entry(code, row); e < first_entry(code, row + 1); ++e) rows[e] = row;
    }
  });
}

void latent_order(const SortLatents& args) {
  const CodeLayout& code = args.code;
  Buffer<int64_t> latents(args.values != nullptr ? code.entries : 0), row_of(code.entries);
  if (args.values != nullptr) {
    dispatch_dtype(args.dtype,
                   [&]<class T>() { latents_in_use(code, static_cast<const T*>(args.values), latents.data); });
  }
  const int64_t* indices = args.values != nullptr ? latents.data : code.indices;
  sort_by_group(indices, code.entries, args.features, args.starts, args.order_entries);
  rows_of_entries(code, row_of.data);
  parallel_for(code.entries, grain_elements, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const bool sorted = p < args.starts[args.features];
      if (!sorted) args.order_entries[p] = -1;
      args.order_rows[p] = sorted ? row_of.data[args.order_entries[p]] : -1;
    }
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
