"""A family of ops from one declaration: schemas, one overload per backend and direction, fakes, autograd,
vmap.

`vicinal::<family>_fwd.<backend>(tensors, options) -> outputs` and
`vicinal::<family>_bwd.<backend>(gradients of outputs, outputs, tensors, options, packed) -> gradients`.
Backends mix: what the forward of one returned, the backward of another takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("vicinal", "DEF")
# (family and direction, backend) -> what the op runs, for calls that nothing else would see
IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., tuple[Tensor, ...]]] = {}
PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Family:
    """Names of a family's tensors ("name" or "name?" for optional ones), options ("type name"), outputs, and
    the tensors that get gradients. `packed`: the first three tensors may come as one [B, *space, 3, H, D]
    tensor; their gradient then comes so. `fake_fwd(tensors, options)` and `fake_bwd(outputs, tensors,
    options, packed)` allocate as the launchers do. `reads`: the outputs that the backward reads, which are
    saved and passed to it; None means all. A gradient of the first output that is missing is passed as zeros
    if that output is read, else as None."""

    name: str
    tensors: tuple[str, ...]
    options: tuple[str, ...]
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
    fake_fwd: Callable[..., Tensor | tuple[Tensor, ...]]
    fake_bwd: Callable[..., tuple[Tensor, ...]]
    reads: tuple[str, ...] | None = None

    @property
    def saved(self) -> tuple[str, ...]:
        return self.outputs if self.reads is None else self.reads

    def schemas(self) -> tuple[str, str]:
        def arguments(names: Sequence[str]) -> str:
            return ", ".join(f"Tensor{'?' if n.endswith('?') else ''} {n.rstrip('?')}" for n in names)

        tensors, options = arguments(self.tensors), ", ".join(self.options)
        grads = arguments([f"d{name}?" for name in self.outputs])
        forward = f"({tensors}, {options}) -> ({', '.join(['Tensor'] * len(self.outputs))})"
        given = ", ".join(part for part in (grads, arguments(self.saved), tensors, options) if part)
        backward = f"({given}, bool packed) -> ({', '.join(['Tensor'] * len(self.gradients))})"
        return forward, backward


def empty_gradient(like: Tensor) -> Tensor:
    """Stands for "no gradient" in the fixed arity of a backward op."""
    return torch.empty(0, dtype=like.dtype, device=like.device)


def define(
    family: Family,
    backend: str,
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Register one backend's overloads. forward(*tensors, *options); backward(*grads, *saved outputs,
    *tensors, *options, packed). The forward of a family with one output returns it alone, as does
    `fake_fwd`."""
    n_tensors, n_outputs, n_saved = len(family.tensors), len(family.outputs), len(family.saved)

    def fake_forward(*args: Any) -> Tensor | tuple[Tensor, ...]:
        return family.fake_fwd(args[:n_tensors], args[n_tensors:])

    def fake_backward(*args: Any) -> tuple[Tensor, ...]:
        rest = args[n_outputs:]
        tensors = rest[n_saved : n_saved + n_tensors]
        return family.fake_bwd(rest[:n_saved], tensors, rest[n_saved + n_tensors : -1], args[-1])

    fwd_schema, bwd_schema = family.schemas()
    directions: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
        (f"{family.name}_fwd", fwd_schema, forward, fake_forward),
        (f"{family.name}_bwd", bwd_schema, backward, fake_backward),
    )
    for op, schema, implementation, fake in directions:
        name = f"{op}.{backend}"
        IMPLEMENTATIONS[op, backend] = implementation
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, implementation, "CPU")
        LIBRARY.impl(name, implementation, "CUDA")
        torch.library.register_fake(f"vicinal::{name}", fake, lib=LIBRARY)


def unobserved(tensors: Sequence[Any]) -> bool:
    """Whether an op of these tensors would do no more than run its implementation: nothing traces,
    transforms, intercepts or profiles it, and they are ordinary tensors on the CPU. Dispatch takes longer
    than the kernel of a small window."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or not t.is_cpu or t.is_neg() or t._is_zerotensor()):
            return False
    return True


class OnceDifferentiable(torch.autograd.Function):
    """apply(what, n, *gradients, *sources) -> the n gradients, which depend on the sources but refuse to say
    how.

    torch's once_differentiable leaves out the sources, so that a second derivative which has another path to
    them would silently lose this one.
    """

    @staticmethod
    def forward(ctx: Any, what: str, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.what} is differentiable once; backend='reference' is differentiable any number of times"
        )


def _distinct(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """A view of each tensor that was there before: Dynamo refuses one tensor as two inputs."""
    found: list[Any] = []
    for t in tensors:
        again = t is not None and any(t is other for other in found)
        found.append(t.view_as(t) if again else t)
    return tuple(found)


def autograd_function(
    family: Family, finish: Callable[..., list[Tensor | None]]
) -> Callable[..., tuple[Tensor, ...]]:
    """apply(backend, packed, options, *tensors) -> outputs, differentiable once.

    When packed, the first tensor is [B, *space, 3, H, D] and the next two are None. finish(grads, tensors)
    turns the op's gradients (one per family.gradients, None where there is none) into those of all tensors.
    """
    fwd = getattr(torch.ops.vicinal, f"{family.name}_fwd")
    bwd = getattr(torch.ops.vicinal, f"{family.name}_bwd")
    places = [family.outputs.index(name) for name in family.saved]
    n_saved = len(places)

    forward, backward = f"{family.name}_fwd", f"{family.name}_bwd"

    def run(
        backend: str, packed: bool, options: tuple[Any, ...], tensors: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        call = IMPLEMENTATIONS[forward, backend] if unobserved(tensors) else getattr(fwd, backend)
        split = (*tensors[0].unbind(-3), *tensors[3:]) if packed else tensors
        outputs: Any = call(*split, *options)
        return (outputs,) if len(family.outputs) == 1 else outputs

    def save(ctx: Any, settings: tuple[Any, ...], tensors: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        ctx.save_for_backward(*(outputs[i] for i in places), *tensors)
        ctx.backend, ctx.packed, ctx.options = settings
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        outputs, tensors = saved[:n_saved], saved[n_saved:]
        split = (*tensors[0].unbind(-3), *tensors[3:]) if ctx.packed else tensors
        if grads[0] is None and 0 in places:
            grads = (torch.zeros_like(outputs[0]), *grads[1:])
        direct = unobserved(saved) and unobserved(grads)
        call = IMPLEMENTATIONS[backward, ctx.backend] if direct else getattr(bwd, ctx.backend)
        raw = call(*grads, *outputs, *split, *ctx.options, ctx.packed)
        found = [None if g.dim() == 1 and g.numel() == 0 else g for g in raw]
        return (None, None, None, *finish(found, split, ctx.packed))

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, backend: str, packed: bool, options: Any, *tensors: Any) -> tuple[Tensor, ...]:
            outputs = run(backend, packed, options, tensors)
            save(ctx, (backend, packed, options), tensors, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return differentiate(ctx, *grads)
            with torch.no_grad():
                found = differentiate(ctx, *grads)
            wanted = [g for g in found if g is not None]
            sources = [t for t in (*ctx.saved_tensors, *grads) if t is not None]
            what = f"{family.name} attention of backend {ctx.backend!r}"
            refusing = iter(OnceDifferentiable.apply(what, len(wanted), *wanted, *sources))
            return tuple(None if g is None else next(refusing) for g in found)

    class Transformable(torch.autograd.Function):
        """The twin for torch.func: functorch wants a separate setup_context, and a rule for vmap."""

        @staticmethod
        def forward(backend: str, packed: bool, options: Any, *tensors: Any) -> tuple[Tensor, ...]:
            return run(backend, packed, options, tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            save(ctx, inputs[:3], inputs[3:], output)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return differentiate(ctx, *grads)

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[Any, ...], backend: str, packed: bool, options: Any, *tensors: Any
        ) -> Any:
            """One call per example: options and small tensors may differ between them."""
            dims = in_dims[3:]
            results = [
                Transformable.apply(
                    backend,
                    packed,
                    options,
                    *[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)],
                )
                for i in range(info.batch_size)
            ]
            outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
            return outputs, tuple(0 for _ in outputs)

    def apply(backend: str, packed: bool, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        if torch._C._are_functorch_transforms_active():
            return Transformable.apply(backend, packed, options, *tensors)
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
            return run(backend, packed, options, tensors)
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        return Differentiable.apply(backend, packed, options, *tensors)

    return apply
