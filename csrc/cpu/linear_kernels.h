// The kernels of the masks, and the threads that run them.
#pragma once
#include "linear_schedule.h"

namespace vicinal::VICINAL_ISA {

// Memory of a call and of its threads. The calling thread is thread 0 of its team and holds the common part.
template <class S, class T>
struct Team {
  int threads;
  bool backward;
  size_t common = 0, own = 0;

  // carve(arena) takes the common part; extra(arena) what a thread has besides its Head.
  template <class Carve, class Extra>
  Team(const Linear& a, bool is_backward, int count, Carve carve, Extra extra)
      : threads(count < 1 ? 1 : count), backward(is_backward) {
    cpu::Arena counter(nullptr);
    carve(counter);
    common = counter.used();
    Head<S, T> head(a);
    cpu::Arena own_counter(nullptr);
    head.carve(own_counter, backward);
    extra(own_counter);
    own = own_counter.used();
    base_ = cpu::thread_scratch(common + own);
    cpu::Arena arena(base_);
    carve(arena);
  }
  template <class Carve>
  Team(const Linear& a, bool is_backward, int count, Carve carve)
      : Team(a, is_backward, count, carve, nothing) {}

  // Gives a thread's Head its memory; what `extra` takes is returned.
  template <class Extra>
  auto start(Head<S, T>& w, Extra extra) const {
    cpu::Arena arena(thread_index() == 0 ? static_cast<char*>(base_) + common : cpu::thread_scratch(own));
    w.carve(arena, backward);
    return extra(arena);
  }
  void start(Head<S, T>& w) const { start(w, nothing); }

 private:
  static void nothing(cpu::Arena&) {}
  void* base_;
};

template <class S, class T>
void full_fwd(const LinearFwd& p, int threads);
template <class S, class T>
void full_bwd(const LinearBwd& p, int threads);
template <class S, class T>
void blocks_fwd(const LinearFwd& p, int threads);
template <class S, class T>
void blocks_bwd(const LinearBwd& p, int threads);
template <class S, class T>
void causal_fwd(const LinearFwd& p, int threads);
template <class S, class T>
void causal_bwd(const LinearBwd& p, int threads);

}  // namespace vicinal::VICINAL_ISA
