// joint attention: the launches of the forward and the backward.
#include "joint.cuh"

namespace vicinal::cuda {

namespace {

Operand of_matrix(const Joint& a, const Matrix& m, int32_t dim, bool keys, double factor = 1.0) {
  Operand o{};
  o.x = {m.data, m.stride_b, m.stride_n, 0, 1};
  o.dtype = a.dtype;
  o.map = kMapIdentity;
  o.dim = o.width = dim;
  o.shared = 1;
  o.factor = static_cast<float>(factor);
  o.keys = keys && a.ignored;
  o.align = alignment(Rows{m.data, m.stride_b, m.stride_n, 0}, a.dtype == kF32 ? 4 : 2);
  return o;
}

Strided strided(const Matrix& m) { return {m.data, m.stride_b, m.stride_n, 0, 1}; }

// A matrix [B, n, width] of the workspace.
Operand in_workspace(const Joint& a, void* data, int64_t width, DType dtype) {
  Operand o = of_matrix(a, {data, a.n * width, width}, static_cast<int32_t>(width), false);
  o.dtype = dtype;
  o.align = alignment(Rows{data, a.n * width, width, 0}, dtype == kF32 ? 4 : 2);
  return o;
}

LinearRuns runs_of(const Joint& a) {
  const int64_t block = a.causal ? a.group : a.n;
  LinearRuns r{nullptr, a.batch, a.n, block, 0, 0, 1, long_run(block), kSide};
  r.pieces = ceil_div(block, r.run);
  r.slots_each = slots_of(r, a.n);
  r.slots = a.batch * r.slots_each;
  return r;
}

struct JointPlan {
  LinearRuns runs;
  float* sums[2];
  void *weights, *slopes, *gates[2];
  int64_t bytes = 0;

  template <class T>
  JointPlan(const Joint& a, bool backward, char* memory, T) {
    constexpr int64_t kBytes = kStored<T> == kBF16 ? 2 : 4;
    const auto take = [&](int64_t size) {
      char* at = memory ? memory + bytes : nullptr;
      bytes += (size + 15) / 16 * 16;
      return static_cast<void*>(at);
    };
    runs = runs_of(a);
    const int64_t sums_bytes = runs.slots * a.dim * a.dim_v * 4, pairs = a.batch * a.n * a.group * kBytes;
    sums[0] = static_cast<float*>(take(sums_bytes));
    sums[1] = a.u.data ? static_cast<float*>(take(sums_bytes)) : nullptr;
    weights = take(pairs);
    slopes = backward ? take(pairs) : nullptr;
    for (void*& gate : gates) gate = backward && a.gate ? take(a.batch * a.n * a.dim_v * kBytes) : nullptr;
  }
};

// The launches of one call, in order; after an error none.
template <class T>
struct JointCall {
  const Joint& a;
  const JointPlan plan;
  const cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  JointCall(const Joint& joint, bool backward, void* workspace, cudaStream_t s)
      : a(joint), plan(joint, backward, static_cast<char*>(workspace), T()), stream(s) {}

  int tiles() const { return ceil_div(std::min(a.group, a.n), kSide); }
  void then(cudaError_t next) {
    if (error == cudaSuccess) error = next;
  }

  // The state from left x [v | u], or its gradient.
  void state(const Operand& left, const Operand (&values)[2], double factor, bool backwards, void* to) {
    Linear fake{};
    fake.batch = fake.sequences = a.batch;
    fake.n_q = fake.n_k = a.n;
    fake.heads = fake.heads_qk = 1;
    fake.key_mask = backwards ? nullptr : a.ignored;
    JointState s{a, plan.runs, {}, static_cast<float*>(to), static_cast<float>(factor), backwards};
    for (int i = 0; i < 2; ++i) {
      if (!values[i].x.data) continue;
      const States states{plan.sums[i], nullptr, nullptr, int64_t{a.dim} * a.dim_v, 0, 1};
      LinearSums p{fake, plan.runs, {}, left, values[i], {}, states, nullptr, 0, 0, 0, backwards};
      p.k_slices = ceil_div(a.dim, kSide), p.v_slices = ceil_div(a.dim_v, kSide);
      if (error == cudaSuccess) error = launch_sums<T>(p, stream);
      s.sums[i] = plan.sums[i];
    }
    if (error == cudaSuccess) error = launch_joint_state(s, stream);
  }
  void scores(const Operand (&dout)[2], const Operand (&values)[2]) {
    JointScores p{a,
                  of_matrix(a, a.quad_q, a.dim, false),
                  of_matrix(a, a.quad_k, a.dim, true),
                  {dout[0], dout[1]},
                  {values[0], values[1]},
                  plan.weights,
                  plan.slopes,
                  tiles()};
    if (error == cudaSuccess) error = launch_joint_scores<T>(p, stream);
  }
  JointRows rows(JointRole role, int32_t width) const {
    JointRows p{};
    p.a = a;
    p.role = role;
    p.factor = 1.0f;
    p.tiles = tiles();
    p.width = width;
    p.slices = ceil_div(width, kSide);
    return p;
  }
  void run(const JointRows& p) {
    if (error == cudaSuccess) error = launch_joint_rows<T>(p, stream);
  }
  Operand pairs(void* data) const { return in_workspace(a, data, a.group, kStored<T>); }
};

template <class T>
cudaError_t forward(const JointFwd& w, void* workspace, cudaStream_t stream) {
  const Joint& a = w.a;
  JointCall<T> call(a, false, workspace, stream);
  const Operand values[2] = {of_matrix(a, a.v, a.dim_v, true), of_matrix(a, a.u, a.dim_v, true)};
  call.state(of_matrix(a, a.lin_k, a.dim, true), values, 1.0, false, w.state);
  call.scores({Operand{}, Operand{}}, {Operand{}, Operand{}});
  JointRows p = call.rows(kJointOut, a.dim_v);
  p.pairs = call.pairs(call.plan.weights);
  p.columns[0] = values[0], p.columns[1] = values[1];
  p.left[0] = of_matrix(a, a.lin_q, a.dim, false, a.lin_scale);
  p.state = static_cast<const float*>(w.state);
  p.out = strided(w.out);
  p.inner[0] = strided(w.inner_v), p.inner[1] = strided(w.inner_u);
  p.to[0] = strided(w.out), p.to[1] = strided(w.other);
  call.run(p);
  return call.error;
}

template <class T>
cudaError_t backward(const JointBwd& w, void* workspace, cudaStream_t stream) {
  const Joint& a = w.a;
  JointCall<T> call(a, true, workspace, stream);
  const JointPlan& plan = call.plan;
  const Operand values[2] = {of_matrix(a, a.v, a.dim_v, true), of_matrix(a, a.u, a.dim_v, true)};
  Operand dout[2] = {of_matrix(a, w.dout, a.dim_v, false), of_matrix(a, w.dother, a.dim_v, false)};
  if (a.gate) {
    call.then(launch_joint_gate({a, w.inner_v, w.inner_u, w.dout, {plan.gates[0], plan.gates[1]}, kStored<T>},
                                stream));
    for (int i = 0; i < 2; ++i) dout[i] = in_workspace(a, plan.gates[i], a.dim_v, kStored<T>);
  }
  call.state(of_matrix(a, a.lin_q, a.dim, false), dout, a.lin_scale, true, w.dstate);
  call.scores(dout, values);

  JointRows p = call.rows(kJointValues, a.dim_v);
  p.pairs = call.pairs(plan.weights);
  p.transposed = true;
  p.columns[0] = dout[0], p.columns[1] = dout[1];
  p.left[0] = of_matrix(a, a.lin_k, a.dim, true);
  p.state = static_cast<const float*>(w.dstate);
  p.to[0] = strided(w.dv), p.to[1] = strided(w.du);
  p.out = strided(w.dout), p.inner[0] = strided(w.inner_v), p.inner[1] = strided(w.inner_u);
  call.run(p);

  const auto of_scores = [&](const Matrix& x, bool keys, bool transposed, const Matrix& to) {
    JointRows q = call.rows(kJointPlain, a.dim);
    q.pairs = call.pairs(plan.slopes);
    q.transposed = transposed;
    q.columns[0] = of_matrix(a, x, a.dim, keys);
    q.factor = static_cast<float>(a.quad_scale);
    q.to[0] = strided(to);
    call.run(q);
  };
  of_scores(a.quad_k, true, false, w.dquad_q);
  of_scores(a.quad_q, false, true, w.dquad_k);
  const auto of_state = [&](const Operand(&left)[2], const void* state, double factor, const Matrix& to) {
    JointRows q = call.rows(kJointPlain, a.dim);
    q.left[0] = left[0], q.left[1] = left[1];
    q.state = static_cast<const float*>(state);
    q.by_values = true;
    q.factor = static_cast<float>(factor);
    q.to[0] = strided(to);
    call.run(q);
  };
  of_state(dout, w.state, a.lin_scale, w.dlin_q);
  of_state(values, w.dstate, 1.0, w.dlin_k);
  if (w.dbias)
    call.then(launch_joint_bias({a, plan.slopes, kStored<T>, static_cast<float*>(w.dbias)}, stream));
  return call.error;
}

template <class Run>
auto with_type(const Joint& a, Run run) {
  if (a.dtype == kBF16) return run(bf16());
  if (a.dtype == kF16) return run(tf32());
  return run(float());
}

bool nothing_to_do(const Joint& a) { return !a.batch || !a.n; }
bool refused(const Joint& a) { return a.dtype == kF64 || a.dim < 1 || a.dim_v < 1 || a.group < 1; }

int64_t workspace_bytes(const Joint& a, bool backward) {
  if (nothing_to_do(a) || refused(a)) return 0;
  return with_type(a, [&](auto type) { return JointPlan(a, backward, nullptr, type).bytes; });
}

}  // namespace

int64_t joint_fwd_workspace(const JointFwd& p) { return workspace_bytes(p.a, false); }
int64_t joint_bwd_workspace(const JointBwd& p) { return workspace_bytes(p.a, true); }

int joint_fwd(const JointFwd& p, void* workspace, void* stream) {
  if (nothing_to_do(p.a)) return cudaSuccess;
  if (refused(p.a)) return cudaErrorInvalidValue;
  return with_type(p.a, [&](auto type) {
    return forward<decltype(type)>(p, workspace, static_cast<cudaStream_t>(stream));
  });
}

int joint_bwd(const JointBwd& p, void* workspace, void* stream) {
  if (nothing_to_do(p.a)) return cudaSuccess;
  if (refused(p.a)) return cudaErrorInvalidValue;
  return with_type(p.a, [&](auto type) {
    return backward<decltype(type)>(p, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vicinal::cuda
