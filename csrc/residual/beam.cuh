// The search for the codes of all stages: stage after stage, the nearest codes of all kept sequences (codebook/), the
// best of their continuations, and what these leave over.
#pragma once

#include "codebook/exact.cuh"
#include "residual/stages.cuh"

namespace isthmus::cuda {
namespace {

// The kept sequences of a group's rows, best first.
template <class C>
struct Beam {
  int64_t width;   // sequences of a row
  C* residuals;    // [rows, width, dim]: what each leaves over
  int64_t* paths;  // [rows, width, stages]
};

// Of each sequence the codes that may continue it.
struct Continuations {
  int64_t best;      // codes of each sequence
  int64_t* nearest;  // [rows, width, best]
  double* errors;    // [rows, width, best]: |r|² with that code
  int64_t* kept;     // [rows, beam]: of a row's, the best
};

template <class T>
struct SearchLayout {
  using C = Compute<T>;
  int64_t* places;  // [groups, rows, stages]
  C* tables;        // [groups, codes, dim] in the compute type
  Beam<C> beams[2];
  Continuations continuations;
  Arena scratch;  // for the search of a stage

  SearchLayout(const ResidualSearch& args, Arena& arena) : scratch(nullptr) {
    const ResidualCodes& codes = args.codes;
    const int64_t sequences = codes.rows * args.beam;
    places = arena.take<int64_t>(codes.groups * codes.rows * codes.stages);
    tables = arena.take<C>(codes.groups * codes.codes * codes.dim);
    for (Beam<C>& beam : beams) {
      beam = {1, arena.take<C>(sequences * codes.dim), arena.take<int64_t>(sequences * codes.stages)};
    }
    continuations = {1, arena.take<int64_t>(sequences * args.beam), arena.take<double>(sequences * args.beam),
                     arena.take<int64_t>(sequences)};
    scratch = arena;
  }
};

// The problem of one stage; only shapes matter to the size of its workspace.
inline CodeSearch stage_search(const ResidualSearch& args, const Stage& stage, int64_t width) {
  return {.dtype = accumulate_dtype(args.codes.dtype),
          .metric = Metric::euclidean,
          .heads = 1,
          .rows = args.codes.rows * width,
          .codes = stage.size,
          .dim = args.codes.dim,
          .best = args.beam < stage.size ? args.beam : stage.size,
          .x = nullptr,
          .head_stride = 0,
          .row_stride = args.codes.dim,
          .codebook = nullptr,
          .mask = nullptr,
          .indices = nullptr,
          .quantized = nullptr,
          .squared_error = nullptr,
          .workspace = nullptr};
}

__device__ __forceinline__ int64_t active_stages(const ResidualSearch& args, int64_t row) {
  return args.active == nullptr ? args.codes.stages : args.active[row];
}

__global__ void __launch_bounds__(block_threads) clear_indices_kernel(ResidualSearch args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (row >= args.codes.groups * args.codes.rows) return;
  const int64_t active = active_stages(args, row);
  if (active < 0 || active > args.codes.stages) {
    printf("isthmus: stages holds %lld; expected 0 to %lld\n", static_cast<long long>(active),
           static_cast<long long>(args.codes.stages));
    __trap();
  }
  for (int64_t q = 0; q < args.codes.stages; ++q) args.indices[row * args.codes.stages + q] = -1;
}

// In the operations of the CPU's search. table: of the group and stage.
template <class C>
__global__ void __launch_bounds__(block_threads)
    errors_kernel(int64_t count, int64_t dim, const C* table, Beam<C> beam, Continuations next) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= count) return;
  const C* residual = beam.residuals + i / next.best * dim;
  const C* code = table + next.nearest[i] * dim;
  next.errors[i] = exact_sum(dim, [&](int64_t k) {
    const double difference = __dsub_rn(widen(residual[k]), widen(code[k]));
    return __dmul_rn(difference, difference);
  });
}

// The first `width` places of a stable sort by error; what is not a number comes last.
__global__ void __launch_bounds__(block_threads)
    rank_kernel(int64_t rows, int64_t found, int64_t width, Continuations next) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (row >= rows) return;
  const double* error = next.errors + row * found;
  int64_t* kept = next.kept + row * width;
  const auto precedes = [&](int64_t a, int64_t b) {
    return error[a] < error[b] || (error[a] == error[a] && error[b] != error[b]);
  };
  int64_t count = 0;
  for (int64_t i = 0; i < found; ++i) {
    int64_t place = count;
    while (place > 0 && precedes(i, kept[place - 1])) --place;
    if (place == width) continue;
    if (count < width) ++count;
    for (int64_t j = count - 1; j > place; --j) kept[j] = kept[j - 1];
    kept[place] = i;
  }
}

// A warp takes a sequence that is kept. group_row: number of the group's first row among all.
template <class C>
__global__ void __launch_bounds__(block_threads)
    extend_kernel(ResidualSearch args, int64_t group_row, Stage stage, const C* table, Beam<C> from, Beam<C> to,
                  Continuations next) {
  const int64_t sequence = warp_number(), row = sequence / to.width, dim = args.codes.dim, stages = args.codes.stages;
  if (row >= args.codes.rows) return;
  const int64_t first = row * from.width * next.best;
  const int64_t chosen = first + (args.beam == 1 ? 0 : next.kept[sequence]);
  const int64_t parent = chosen / next.best, index = next.nearest[chosen];
  const bool ends = sequence % to.width == 0 && active_stages(args, group_row + row) == stage.number + 1;
  int64_t* path = to.paths + sequence * stages;
  int64_t* result = args.indices + (group_row + row) * stages;
  for (int64_t q = warp_lane(); q <= stage.number; q += warp_size) {
    path[q] = q == stage.number ? index : from.paths[parent * stages + q];
    if (ends) result[q] = path[q];
  }
  for (int64_t k = warp_lane(); k < dim; k += warp_size) {
    to.residuals[sequence * dim + k] = from.residuals[parent * dim + k] - table[index * dim + k];
  }
}

// The sum of a row's codes, and what is left over after each, by a warp. residuals, totals: [rows of the group, dim].
template <class T>
__global__ void __launch_bounds__(block_threads)
    reconstruct_kernel(ResidualSearch args, int64_t group_row, SearchLayout<T> layout) {
  using C = Compute<T>;
  const int64_t row = warp_number(), dim = args.codes.dim, at = group_row + row;
  if (row >= args.codes.rows) return;
  C* residual = layout.beams[0].residuals + row * dim;
  C* total = layout.beams[1].residuals + row * dim;
  for (int64_t k = warp_lane(); k < dim; k += warp_size) {
    residual[k] = to_compute(static_cast<const T*>(args.codes.x)[at * dim + k]);
    total[k] = 0;
  }
  for (int64_t q = 0; q < args.codes.stages; ++q) {
    const int64_t place = layout.places[at * args.codes.stages + q];
    C sum = 0;
    for (int64_t k = warp_lane(); place >= 0 && k < dim; k += warp_size) {
      const C code = layout.tables[place * dim + k], left = residual[k] - code;
      residual[k] = left;
      total[k] += code;
      sum += left * left;
    }
    sum = warp_total(sum);
    if (warp_lane() == 0) static_cast<C*>(args.squared_error)[at * args.codes.stages + q] = sum;
  }
  for (int64_t k = warp_lane(); k < dim; k += warp_size) {
    static_cast<T*>(args.quantized)[at * dim + k] = from_compute<T>(total[k]);
  }
}

template <class T>
void search_group(const ResidualSearch& args, SearchLayout<T>& layout, int64_t group, void* stream) {
  using C = Compute<T>;
  const ResidualCodes& codes = args.codes;
  const int64_t group_row = group * codes.rows;
  layout.beams[0].width = 1;
  widen_all<T>(static_cast<const T*>(codes.x) + group_row * codes.dim, codes.rows * codes.dim,
               layout.beams[0].residuals, stream);
  for_each_stage(codes, [&](const Stage& stage) {
    const C* table = layout.tables + (group * codes.codes + stage.start) * codes.dim;
    const Beam<C>& from = layout.beams[stage.number % 2];
    Beam<C>& to = layout.beams[(stage.number + 1) % 2];
    Continuations& next = layout.continuations;

    CodeSearch search = stage_search(args, stage, from.width);
    search.x = from.residuals;
    search.codebook = table;
    search.indices = next.nearest;
    search.workspace = layout.scratch.template take<char>(0);
    codebook_search(search, stream);

    next.best = search.best;
    const int64_t found = from.width * next.best, count = codes.rows * found;
    to.width = found < args.beam ? found : args.beam;
    if (args.beam > 1) {
      launch("errors", errors_kernel<C>, divide_up(count, block_threads), block_threads, 0, stream, count, codes.dim,
             table, from, next);
      launch("rank", rank_kernel, divide_up(codes.rows, block_threads), block_threads, 0, stream, codes.rows, found,
             to.width, next);
    }
    launch("extend", extend_kernel<C>, blocks_of_warps(codes.rows * to.width), block_threads, 0, stream, args,
           group_row, stage, table, from, to, next);
  });
}

template <class T>
void search(const ResidualSearch& args, void* stream) {
  const ResidualCodes& codes = args.codes;
  Arena arena(args.workspace);
  SearchLayout<T> layout(args, arena);
  widen_all<T>(codes.tables, codes.groups * codes.codes * codes.dim, layout.tables, stream);
  launch("clear_indices", clear_indices_kernel, divide_up(codes.groups * codes.rows, block_threads), block_threads, 0,
         stream, args);
  for (int64_t group = 0; group < codes.groups; ++group) search_group<T>(args, layout, group, stream);
  find_places(codes, args.indices, layout.places, stream);
  for (int64_t group = 0; group < codes.groups; ++group) {
    launch("reconstruct", reconstruct_kernel<T>, blocks_of_warps(codes.rows), block_threads, 0, stream, args,
           group * codes.rows, layout);
  }
}

template <class T>
int64_t search_workspace(const ResidualSearch& args) {
  Arena arena(nullptr);
  SearchLayout<T>(args, arena);
  int64_t width = 1, most = 0;
  for_each_stage(args.codes, [&](const Stage& stage) {
    const CodeSearch search = stage_search(args, stage, width);
    const int64_t bytes = codebook_workspace(search), found = width * search.best;
    if (bytes > most) most = bytes;
    width = found < args.beam ? found : args.beam;
  });
  return arena.used + most;
}

}  // namespace
}  // namespace isthmus::cuda
