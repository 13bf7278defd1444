// linear attention: how a problem is cut into runs, and the launches of the forward and the backward.
#include "linear_kernels.cuh"

namespace vicinal::cuda {

namespace {

// A call: sizes, runs of queries and keys, and the workspace in floats.
struct Call {
  Linear a;
  Scope scope;
  LinearRuns queries, keys;
  int32_t K, Kd;         // Kd: 0 where not normalised
  bool own_den, simple;  // simple: no tensor cores
  int64_t size() const { return int64_t{K} * a.dim_v + Kd; }
  int k_slices() const { return ceil_div(K, kSide); }
  int v_slices() const { return ceil_div(a.dim_v, kSide); }
  int z_slices() const { return own_den ? ceil_div(Kd, kSide) : 0; }
  int64_t per_token() const { return a.batch * a.heads * a.n_q; }
};

LinearRuns runs_of(const Linear& a, Scope scope, int64_t tokens) {
  LinearRuns r{a.cu_seqlens, a.sequences, tokens, 0, 0, 0, 1, 0, kSide};
  if (scope == kWithin && a.mask == kMaskCausal && a.chunk_size > 0) {
    r.tile = static_cast<int32_t>(std::min<int64_t>(kSide, (a.chunk_size + 15) / 16 * 16));
  } else if (scope == kWithin && a.mask != kMaskCausal) {
    r.tile = static_cast<int32_t>(kSide / a.block_size * a.block_size);
  }
  r.run = scope == kWithin ? kRunTiles * r.tile : long_run(scope == kReadAll ? tokens : a.block_size);
  r.period = r.run;
  if (scope == kReadBlocks) {
    r.period = a.block_size;
    r.pieces = ceil_div(a.block_size, r.run);
  }
  r.slots_each = (tokens + r.period - 1) / r.period * r.pieces;
  r.slots = a.cu_seqlens ? (tokens / r.period + a.sequences) * r.pieces : a.sequences * r.slots_each;
  return r;
}

Call call_of(const Linear& a) {
  Call c{};
  c.a = a;
  c.scope = a.mask == kMaskFull                              ? kReadAll
            : a.mask == kMaskCausal || a.block_size <= kSide ? kWithin
                                                             : kReadBlocks;
  c.queries = runs_of(a, c.scope, a.n_q);
  c.keys = runs_of(a, c.scope, a.n_k);
  const int extra = a.constant != 0;
  c.own_den = a.normalize && a.q_den.data;
  c.K = a.dim + extra;
  c.Kd = !a.normalize ? 0 : c.own_den ? a.dim_den + extra : c.K;
  // Of few features or tokens gradients cancel, and tensor cores would have little to do.
  c.simple = a.dtype == kF32 || c.K <= 8 || std::max(a.n_q, a.n_k) <= 16;
  return c;
}

int alignment_of(const Strided& x, int64_t bytes) {
  if (x.stride_d != 1) return 0;
  return alignment(Rows{x.data, x.stride_b, x.stride_n, x.stride_h}, bytes);
}

int64_t bytes_of(DType dtype) { return dtype == kF32 ? 4 : 2; }

Operand operand(const Linear& a, const Strided& x, int32_t dim, bool of_qk) {
  Operand o{};
  o.x = x;
  o.dtype = a.dtype;
  o.map = kMapIdentity;
  o.dim = o.width = dim;
  o.shared = of_qk ? a.heads / a.heads_qk : 1;
  o.factor = 1.0f;
  o.align = alignment_of(x, bytes_of(a.dtype));
  return o;
}

struct Operands {
  Operand f, p, fd, pd, v, r;

  Operands(const Call& c, const Strided& dout) {
    const Linear& a = c.a;
    f = operand(a, a.q, a.dim, true), p = operand(a, a.k, a.dim, true);
    v = operand(a, a.v, a.dim_v, false), r = operand(a, dout, a.dim_v, false);
    f.map = a.map_q, f.param = static_cast<float>(a.param_q), f.factor = static_cast<float>(a.scale);
    p.map = a.map_k, p.param = static_cast<float>(a.param_k);
    fd = operand(a, a.q_den, a.dim_den, true), pd = operand(a, a.k_den, a.dim_den, true);
    fd.factor = f.factor;
    if (!c.own_den) fd = f, pd = p;
    for (Operand* o : {&f, &fd}) o->constant = 1.0f;
    for (Operand* o : {&p, &pd}) o->constant = static_cast<float>(a.constant);
    for (Operand* o : {&f, &p, &fd, &pd}) o->width = o->dim + (a.constant != 0);
    for (Operand* o : {&p, &pd, &v}) o->keys = true;
    r.scaled = a.normalize;
  }
};

const float* floats(const void* data) { return static_cast<const float*>(data); }
float* floats(void* data) { return static_cast<float*>(data); }

// Adds up the floats of a workspace; its addresses are null until there is one.
struct Carver {
  float* base;
  int64_t used = 0;
  float* take(int64_t count) {
    float* at = base ? base + used : nullptr;
    used += (count + 3) / 4 * 4;
    return at;
  }
};

States states_of(const Call& c, float* runs, const void* end_s, const void* end_z) {
  return {runs, floats(end_s), floats(end_z), int64_t{c.K} * c.a.dim_v, c.Kd, c.a.heads};
}

template <class Params, class Launch>
cudaError_t with_type(const Call& c, const Params& p, Launch launch) {
  if (c.simple) return launch(float(), p);
  return c.a.dtype == kBF16 ? launch(bf16(), p) : launch(tf32(), p);
}

cudaError_t sums(const Call& c, const LinearSums& p, cudaStream_t stream) {
  return with_type(c, p,
                   [&](auto type, const LinearSums& x) { return launch_sums<decltype(type)>(x, stream); });
}

cudaError_t rows(const Call& c, const LinearRows& p, cudaStream_t stream) {
  return with_type(c, p,
                   [&](auto type, const LinearRows& x) { return launch_rows<decltype(type)>(x, stream); });
}

// What all launches over rows have in common.
LinearRows rows_of(const Call& c, RowsRole role, const States& states, const TokenNumbers& numbers) {
  LinearRows p{};
  p.a = c.a;
  p.runs = role == kRowsOut || role == kRowsDq ? c.queries : c.keys;
  p.scope = c.scope;
  p.role = role;
  p.states = states;
  p.numbers = numbers;
  p.tiles = ceil_div(p.runs.run, p.runs.tile);
  p.slices = role == kRowsOut || role == kRowsDv ? c.v_slices() : c.k_slices();
  p.group = role == kRowsOut || role == kRowsDv ? 1 : c.a.heads / c.a.heads_qk;
  p.product = true;
  return p;
}

void write_to(const Call& c, LinearRows& p, const Strided& to) {
  p.to = to;
  p.pairs = alignment_of(to, bytes_of(c.a.dtype)) >= 4;
}

// Sums of the keys before every run and of all keys. `write`: those of runs are wanted.
cudaError_t key_sums(const Call& c, const Operands& o, float* runs, float* keep, float* last_s, float* last_z,
                     bool write, cudaStream_t stream) {
  const States to = states_of(c, runs, nullptr, nullptr);
  const LinearSums p{c.a, c.keys, {},           o.p,          o.v,          o.pd,
                     to,  keep,   c.k_slices(), c.v_slices(), c.z_slices(), false};
  const cudaError_t error = sums(c, p, stream);
  if (error != cudaSuccess) return error;
  const LinearScan scan{
      c.keys,  to,    keep, floats(c.a.initial_s), floats(c.a.initial_z), last_s, last_z, nullptr,
      nullptr, false, write};
  return launch_scan(scan, stream);
}

struct FwdPlan {
  float *runs, *keep;
  int64_t total;

  FwdPlan(const Call& c, float* workspace) {
    Carver carver{workspace};
    runs = carver.take(c.keys.slots * c.a.heads * c.size());
    keep = carver.take(c.keys.slots * c.a.heads);
    total = carver.used;
  }
};

struct BwdPlan {
  float *runs, *keep, *grads, *total_s, *total_z, *dots, *of_queries, *of_keys, *of_states;
  int32_t parts;  // of of_queries, of_keys and of_states
  int64_t total;

  BwdPlan(const Call& c, bool ddecay, float* workspace) {
    Carver carver{workspace};
    const int64_t heads = c.a.heads, ends = c.a.sequences * heads;
    const bool before = c.scope != kReadAll;
    runs = carver.take(before ? c.keys.slots * heads * c.size() : 0);
    keep = before ? carver.take(c.keys.slots * heads) : nullptr;
    grads = carver.take(c.queries.slots * heads * c.size());
    total_s = carver.take(ends * c.K * c.a.dim_v), total_z = carver.take(ends * c.Kd);
    dots = carver.take(c.a.normalize ? c.v_slices() * c.per_token() : 0);
    parts = c.k_slices() + c.z_slices();
    of_queries = carver.take(ddecay ? parts * c.per_token() : 0);
    of_keys = carver.take(ddecay ? parts * c.per_token() : 0);
    of_states = carver.take(ddecay ? parts * c.per_token() : 0);
    total = carver.used;
  }
};

cudaError_t refuse(const Linear& a) {
  const bool refused = a.dtype == kF64 || a.dim < 1 || a.dim_v < 1 || (a.decay && a.mask != kMaskCausal);
  return refused ? cudaErrorInvalidValue : cudaSuccess;
}

bool nothing_to_do(const Linear& a) { return !a.heads || !a.sequences || (!a.batch && !a.cu_seqlens); }

// Runs what is left to run, after an error nothing.
struct Sequence {
  cudaError_t error = cudaSuccess;
  template <class Launch>
  void then(Launch launch) {
    if (error == cudaSuccess) error = launch();
  }
};

void clear_rest(const Call& c, Sequence& run, const Strided& x, int64_t tokens, int heads, int dim,
                cudaStream_t stream, float value = 0.0f, bool acc = false) {
  const LinearRest p{x, acc ? kF32 : c.a.dtype, c.a.cu_seqlens, c.a.sequences, tokens, heads, dim, value};
  run.then([&] { return launch_rest(p, stream); });
}

cudaError_t forward(const LinearFwd& w, float* workspace, cudaStream_t stream) {
  const Call c = call_of(w.a);
  const FwdPlan plan(c, workspace);
  const Operands o(c, Strided{});
  Sequence run;
  run.then([&] {
    return key_sums(c, o, plan.runs, plan.keep, floats(w.final_s), floats(w.final_z), c.scope != kReadAll,
                    stream);
  });
  const States states = states_of(c, plan.runs, w.final_s, w.final_z);
  LinearRows p = rows_of(c, kRowsOut, states, {});
  p.left = o.f, p.right = o.p, p.column = o.v;
  if (c.own_den) p.left_den = o.fd, p.right_den = o.pd;
  p.den = floats(w.den);
  write_to(c, p, w.out);
  run.then([&] { return rows(c, p, stream); });
  clear_rest(c, run, w.out, c.a.n_q, c.a.heads, c.a.dim_v, stream);
  if (w.den) {
    clear_rest(c, run, {w.den, 0, 1, c.a.n_q, 1}, c.a.n_q, c.a.heads, 1, stream, 1.0f, true);
  }
  return run.error;
}

// The backward of one call: its launches in order.
struct Backward {
  const LinearBwd& w;
  const Call c;
  const BwdPlan plan;
  const Operands o;
  const cudaStream_t stream;
  States states, grads;
  TokenNumbers numbers{};
  Sequence run;

  Backward(const LinearBwd& bwd, float* workspace, cudaStream_t s)
      : w(bwd), c(call_of(bwd.a)), plan(c, bwd.ddecay, workspace), o(c, bwd.dout), stream(s) {
    states = states_of(c, plan.runs, w.final_s, w.final_z);
    grads = states_of(c, plan.grads, plan.total_s, plan.total_z);
    if (c.a.normalize) numbers = {floats(w.den), plan.dots, c.v_slices()};
  }

  // num . r of every query: d, without the rounding of out.
  void dots() {
    if (!c.a.normalize) return;
    LinearRows p = rows_of(c, kRowsOut, states, {floats(w.den), nullptr, 0});
    p.left = o.f, p.right = o.p, p.column = o.v, p.own = o.r;
    p.dots = plan.dots;
    run.then([&] { return rows(c, p, stream); });
  }
  void query_sums() {
    const LinearSums p{c.a,   c.queries, numbers,      o.f,          o.r,          o.fd,
                       grads, nullptr,   c.k_slices(), c.v_slices(), c.z_slices(), true};
    run.then([&] { return sums(c, p, stream); });
    const LinearScan scan{c.queries,
                          grads,
                          plan.keep,
                          floats(w.dfinal_s),
                          floats(w.dfinal_z),
                          plan.total_s,
                          plan.total_z,
                          floats(w.dinitial_s),
                          floats(w.dinitial_z),
                          true,
                          c.scope != kReadAll};
    run.then([&] { return launch_scan(scan, stream); });
  }
  void set_overlaps(LinearRows& p, RowsRole role, float* overlaps, int64_t first) const {
    if (!w.ddecay) return;
    p.overlaps = overlaps + first;
    if (role == kRowsDk) p.state_overlaps = plan.of_states + first;
  }
  // dq, dk and, apart where they differ, those of the denominator's features.
  void features(RowsRole role, const States& x, const Operand& left, const Operand& right, const Operand& own,
                const Operand& column, const Strided& to, float* overlaps) {
    LinearRows p = rows_of(c, role, x, numbers);
    p.left = left, p.right = right, p.column = column, p.own = own;
    p.slopes = c.a.normalize && !c.own_den;
    set_overlaps(p, role, overlaps, 0);
    write_to(c, p, to);
    run.then([&] { return rows(c, p, stream); });
  }
  void den_features(RowsRole role, const States& x, const Operand& own, const Operand& column,
                    const Strided& to, float* overlaps) {
    if (!c.a.q_den.data) return;
    LinearRows p = rows_of(c, role, x, numbers);
    p.column = column, p.own = own;
    p.slopes = true;
    p.product = false;
    p.slices = ceil_div(column.width, kSide);
    set_overlaps(p, role, overlaps, c.k_slices() * c.per_token());
    write_to(c, p, to);
    run.then([&] { return rows(c, p, stream); });
  }
  void values() {
    LinearRows p = rows_of(c, kRowsDv, grads, numbers);
    p.left = o.p, p.right = o.f, p.column = o.r;
    write_to(c, p, w.dv);
    run.then([&] { return rows(c, p, stream); });
  }
  void decay_gradient() {
    if (!w.ddecay) return;
    const LinearDecayGrad p{c.a,        c.keys,          states,       grads,
                            plan.keep,  plan.of_queries, plan.of_keys, plan.of_states,
                            plan.parts, floats(w.ddecay)};
    run.then([&] { return launch_decay_grad(p, stream); });
  }
  void rest() {
    const Linear& a = c.a;
    clear_rest(c, run, w.dq, a.n_q, a.heads_qk, a.dim, stream);
    clear_rest(c, run, w.dk, a.n_k, a.heads_qk, a.dim, stream);
    clear_rest(c, run, w.dv, a.n_k, a.heads, a.dim_v, stream);
    clear_rest(c, run, w.dq_den, a.n_q, a.heads_qk, a.dim_den, stream);
    clear_rest(c, run, w.dk_den, a.n_k, a.heads_qk, a.dim_den, stream);
    clear_rest(c, run, {w.ddecay, 0, a.heads, 1, 1}, a.n_k, a.heads, 1, stream, 0.0f, true);
  }

  cudaError_t all() {
    if (c.scope != kReadAll) {
      run.then([&] { return key_sums(c, o, plan.runs, plan.keep, nullptr, nullptr, true, stream); });
    }
    dots();
    features(kRowsDq, states, o.r, o.v, o.f, o.p, w.dq, plan.of_queries);
    den_features(kRowsDq, states, o.fd, o.pd, w.dq_den, plan.of_queries);
    query_sums();
    features(kRowsDk, grads, o.v, o.r, o.p, o.f, w.dk, plan.of_keys);
    den_features(kRowsDk, grads, o.pd, o.fd, w.dk_den, plan.of_keys);
    values();
    decay_gradient();
    rest();
    return run.error;
  }
};

}  // namespace

int64_t linear_fwd_workspace(const LinearFwd& p) {
  if (nothing_to_do(p.a) || refuse(p.a) != cudaSuccess) return 0;
  return FwdPlan(call_of(p.a), nullptr).total * static_cast<int64_t>(sizeof(float));
}

int64_t linear_bwd_workspace(const LinearBwd& p) {
  if (nothing_to_do(p.a) || refuse(p.a) != cudaSuccess) return 0;
  return BwdPlan(call_of(p.a), p.ddecay, nullptr).total * static_cast<int64_t>(sizeof(float));
}

int linear_fwd(const LinearFwd& p, void* workspace, void* stream) {
  if (nothing_to_do(p.a)) return cudaSuccess;
  const cudaError_t refused = refuse(p.a);
  return refused != cudaSuccess ? refused : forward(p, floats(workspace), static_cast<cudaStream_t>(stream));
}

int linear_bwd(const LinearBwd& p, void* workspace, void* stream) {
  if (nothing_to_do(p.a)) return cudaSuccess;
  const cudaError_t refused = refuse(p.a);
  if (refused != cudaSuccess) return refused;
  return Backward(p, floats(workspace), static_cast<cudaStream_t>(stream)).all();
}

}  // namespace vicinal::cuda
