// Included by cpu.inl: the divergence of diagonal Gaussians.

template <class C, ScaleType S, Prior P>
void kl_elements(const GaussianPiece<C>& x, int64_t count, C* kl) {
  for (int64_t j = 0; j < count; j += lanes<C>) {
    Vec<C> std;
    store(kl + j, kl_and_std<S, P>(x.template at<P>(j, count - j), std));
  }
}

void gaussian_kl(const GaussianKl& args) {
  dispatch_dtype(args.posterior.dtype, [&]<class T>() {
    using C = Compute<T>;
    void (*elements)(const GaussianPiece<C>&, int64_t, C*) = nullptr;
    dispatch_gaussians(args.posterior, [&]<ScaleType S, Prior P>() { elements = kl_elements<C, S, P>; });
    const RowTiles tiles = tiles_for(args.reduction);
    const Sums<C> sums(tiles, args.reduction, args.kl);
    parallel_for(tiles.items, tiles.grain(), [&](int64_t begin, int64_t end) {
      GaussianReader<T> reader(args.posterior);
      Tile<C> kl;
      for (int64_t item = begin; item < end; ++item) {
        for_each_piece(tiles, item, [&](const Piece& piece) {
          reader.prefetch(piece.first + piece.count());
          elements(reader.read(piece.first, piece.count()), piece.count(), kl.values);
          clear_masked(args.posterior, piece.first, piece.count(), kl.values);
          sums.add(piece, kl.values);
        });
      }
    });
    sums.finish();
  });
}

template <class C, ScaleType S, Prior P>
void kl_gradients(const GaussianPiece<C>& x, int64_t count, const C* to_kl, C posterior_weight, C prior_weight,
                  C* grad_mean, C* grad_scale, C* grad_prior_mean, C* grad_prior_scale) {
  using V = Vec<C>;
  for (int64_t j = 0; j < count; j += lanes<C>) {
    const int64_t left = count - j;
    const Parameters<V> slopes = kl_slopes<S, P>(x.template at<P>(j, left));
    const V g = load(to_kl + j), to_posterior = posterior_weight * g, to_prior = prior_weight * g;
    store_first(grad_mean + j, to_posterior * slopes.mean, left);
    store_first(grad_scale + j, to_posterior * slopes.scale, left);
    if constexpr (P != Prior::standard) {
      if (grad_prior_mean == nullptr) continue;
      store_first(grad_prior_mean + j, to_prior * slopes.prior_mean, left);
      store_first(grad_prior_scale + j, to_prior * slopes.prior_scale, left);
    }
  }
}

void gaussian_kl_backward(const GaussianKlBackward& args) {
  dispatch_dtype(args.posterior.dtype, [&]<class T>() {
    using C = Compute<T>;
    void (*gradients)(const GaussianPiece<C>&, int64_t, const C*, C, C, C*, C*, C*, C*) = nullptr;
    dispatch_gaussians(args.posterior, [&]<ScaleType S, Prior P>() { gradients = kl_gradients<C, S, P>; });
    const Gaussians& q = args.posterior;
    const C posterior_weight = static_cast<C>(args.posterior_weight), prior_weight = static_cast<C>(args.prior_weight);
    const RowTiles tiles = tiles_for(args.reduction);
    parallel_for(tiles.items, tiles.grain(), [&](int64_t begin, int64_t end) {
      GaussianReader<T> reader(q);
      GaussianWriter<T> writer(args.grads);
      Tile<C> to_kl;
      for (int64_t item = begin; item < end; ++item) {
        for_each_piece(tiles, item, [&](const Piece& piece) {
          const int64_t count = piece.count();
          reader.prefetch(piece.first + count);
          writer.prefetch(piece.first + count);
          const GaussianPiece<C> x = reader.read(piece.first, count);
          spread(args.reduction, piece, static_cast<const C*>(args.grad), to_kl.values);
          writer.begin(piece.first, count);
          gradients(x, count, to_kl.values, posterior_weight, prior_weight, writer.mean, writer.scale,
                    writer.prior_mean, writer.prior_scale);
          if (q.clamp.mode != Clamp::Mode::none) clamp_gradient(q.clamp, x.raw_scale, count, writer.scale);
          writer.clear_masked(q, piece.first, count);
          writer.write(piece.first, count);
        });
      }
    });
  });
}
