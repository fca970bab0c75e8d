"""The op on the CPU and reference backends: values, gradients, registrations, and what it saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model.ops import Rows, lowrank_delta, lowrank_linear, lowrank_linear_group, set_backend, split_perceptual
from model.ops.backend import backend_for
from model.ops.op import lowrank_linear_backward_op, lowrank_linear_op

D_IN, RANK, D_OUT, LENGTH = 12, 4, (10, 6), 5

LAYOUTS = {
    "row i is sample i": (None, 3, (3, LENGTH)),
    "two rows each": (Rows.padded([0, 0, 1, 1, 2, 2], 3), 3, (6, LENGTH)),
    "shared, missing, unused": (Rows.padded([1, 0, -1, 1, 0, 0], 3), 3, (6, LENGTH)),
    "no sample at all": (Rows.padded([-1, -1], 0), 0, (2, LENGTH)),
    "packed": (Rows.packed([0, 4, 4, 5, 11], [1, 0, -1, 1], 2), 2, (11,)),
    "packed equally": (Rows.packed([0, 4, 8], [0, 1], 2), 2, (8,)),
    "one token per row": (None, 4, (4,)),
    "no rows": (Rows.padded([], 2), 2, (0, LENGTH)),
}


def inputs(where: str, dtype: torch.dtype = torch.float64) -> tuple[Rows | None, list[Tensor]]:
    """rows, and x, weights, biases, a, b of a group of two, in that order."""
    rows, samples, lead = LAYOUTS[where]
    torch.manual_seed(0)
    shapes = [(*lead, D_IN), *((n, D_IN) for n in D_OUT), *((n,) for n in D_OUT)]
    shapes += [(samples, D_IN, RANK)] * 2 + [(RANK, n) for n in D_OUT]
    return rows, [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def group(rows: Rows | None, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    x, *rest = tensors
    return lowrank_linear_group(x, rest[:2], rest[4:6], rest[6:8], 0.5, biases=rest[2:4], rows=rows)


def sample_of_token(where: str) -> Tensor:
    rows, samples, lead = LAYOUTS[where]
    if rows is None:
        return torch.arange(samples).repeat_interleave(lead[1] if len(lead) == 2 else 1)
    if rows.offsets is None:
        return torch.tensor(rows.sample, dtype=torch.long).repeat_interleave(LENGTH)
    return torch.tensor(rows.sample).repeat_interleave(torch.tensor(rows.offsets).diff())


@pytest.fixture
def reference():
    set_backend("reference")
    yield
    set_backend("auto")


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_values_are_the_formula(where, backend):
    """Against one line per token that shares no code with either backend."""
    rows, tensors = inputs(where)
    set_backend(backend)
    got = group(rows, tensors)
    set_backend("auto")
    x, *rest = (t.detach() for t in tensors)
    owners = sample_of_token(where).tolist()
    for g, y in enumerate(got):
        w, bias, a, b = rest[g], rest[2 + g], rest[4 + g], rest[6 + g]
        tokens = x.reshape(-1, D_IN)
        want = [w @ t + bias + (0.5 * (t @ a[s]) @ b if s >= 0 else 0) for t, s in zip(tokens, owners, strict=True)]
        want = torch.stack(want) if want else torch.zeros(0, D_OUT[g], dtype=torch.float64)
        torch.testing.assert_close(y.reshape(-1, D_OUT[g]), want, rtol=1e-12, atol=1e-12)
        assert y.shape == (*x.shape[:-1], D_OUT[g])


@pytest.mark.parametrize("where", LAYOUTS)
def test_gradients_are_those_of_autograd(where):
    rows, tensors = inputs(where)
    seed = torch.Generator().manual_seed(1)

    def gradients(backend):
        set_backend(backend)
        seed.manual_seed(1)
        loss = sum((y * torch.randn(y.shape, generator=seed, dtype=y.dtype)).sum() for y in group(rows, tensors))
        set_backend("auto")
        return torch.autograd.grad(loss, tensors, materialize_grads=True)

    for got, want in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("where", ["row i is sample i", "shared, missing, unused", "packed"])
def test_gradcheck(where):
    rows, tensors = inputs(where)
    assert torch.autograd.gradcheck(lambda *t: group(rows, list(t)), tensors)
    x, a, b = tensors[0], tensors[5], tensors[7]
    assert torch.autograd.gradcheck(lambda *t: lowrank_delta(*t, 0.5, rows=rows), (x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["two rows each", "shared, missing, unused"])
def test_error_of_each_dtype(dtype, where):
    """Forward and gradients against float64 on the same rounded inputs."""
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    rows, tensors = inputs(where, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]

    def everything(tensors):
        outputs = group(rows, tensors)
        return [*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), tensors)]

    for got, want in zip(everything(tensors), everything(wide), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_rows_without_image_are_the_plain_layer_exactly():
    rows, (x, w, _, bias, _, a, _, b, _) = inputs("shared, missing, unused", torch.float32)
    y = lowrank_linear(x, w, a, b, 0.5, bias=bias, rows=rows)
    plain = F.linear(x, w, bias)
    missing = torch.tensor(rows.sample) == -1
    assert torch.equal(y[missing], plain[missing])
    b_infinite = torch.full_like(b, float("inf"))
    assert lowrank_linear(x, w, a, b_infinite, 0.5, bias=bias, rows=rows)[missing].isfinite().all()
    assert (lowrank_delta(x, a, b_infinite, 0.5, rows=rows)[missing] == 0).all()


def test_tensor_rows_equal_prepared_rows():
    rows, (x, w, _, _, _, a, _, b, _) = inputs("shared, missing, unused")
    assert torch.equal(
        lowrank_linear(x, w, a, b, 0.5, rows=torch.tensor(rows.sample)), lowrank_linear(x, w, a, b, 0.5, rows=rows)
    )


def test_non_contiguous_inputs():
    _, (x, w, _, _, _, a, _, b, _) = inputs("row i is sample i")
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (x, w, a, b)]
    assert not any(t.is_contiguous() for t in strided)

    def run(x, w, a, b):
        y = lowrank_linear(x, w, a, b, 0.5)
        return [y, *torch.autograd.grad(y[..., ::2].square().sum(), (x, w, a, b))]

    for got, want in zip(run(*strided), run(x, w, a, b), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("where", ["row i is sample i", "shared, missing, unused"])
def test_opcheck(where):
    rows, samples, _ = LAYOUTS[where]
    rows = rows or Rows.padded(range(samples), samples)
    _, (x, *rest) = inputs(where)
    s = rows.segments(LENGTH, x.device)
    tokens = x.detach().reshape(-1, D_IN).requires_grad_()
    args = (tokens, rest[:2], rest[2:4], rest[4:6], rest[6:8], s.tensors(), s.per_sample, s.max_len, 0.5)
    torch.library.opcheck(lowrank_linear_op, args)

    *y, z = (t.detach() for t in lowrank_linear_op(*args))
    tokens, weights, _, a, b, *layout = (
        [t.detach() for t in arg] if isinstance(arg, list) else arg.detach() if isinstance(arg, Tensor) else arg
        for arg in args
    )
    for needs in ((True,) * 5, (True, True, True, False, False), (False, True, False, False, False)):
        torch.library.opcheck(lowrank_linear_backward_op, (y, tokens, weights, a, b, z, *layout, *needs))


def test_only_needed_gradients_are_formed():
    _, (x, w, _, bias, _, a, _, b, _) = inputs("row i is sample i")
    frozen = [t.detach() for t in (x, w, bias)]
    y = lowrank_linear(frozen[0], frozen[1], a, b, 0.5, bias=frozen[2])
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    tokens = x[..., 0].numel()
    # dz and dB on the output side, dA on the input side; no dx, no dW.
    assert counter.get_total_flops() == 2 * tokens * RANK * (2 * D_OUT[0] + D_IN)
    assert a.grad is not None
    assert b.grad is not None


def test_flops_are_those_of_the_matrix_products(reference):
    """The formulas against torch's own count of the reference's products."""
    counts = {}
    for backend in ("cpu", "reference"):
        set_backend(backend)
        _, tensors = inputs("row i is sample i")
        with FlopCounterMode(display=False) as counter:
            outputs = group(None, tensors)
            forward = counter.get_total_flops()
            sum(y.sum() for y in outputs).backward()
        counts[backend] = (forward, counter.get_total_flops())
    assert counts["cpu"] == counts["reference"]


def test_saved_for_backward_is_x_and_z():
    """Nothing else per token: d_in + G · r elements, so the frozen LLM pays r elements per projection."""
    _, (x, *rest) = inputs("row i is sample i", torch.float32)
    x = x * 1  # an activation, not a leaf
    factors = {t.untyped_storage().data_ptr() for t in rest}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in factors:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        group(None, [x, *rest])
    tokens = x[..., 0].numel()
    assert sum(saved.values()) == tokens * 4 * (D_IN + 2 * RANK)


def test_gradient_checkpointing_changes_nothing():
    _, (x, w, _, _, _, a, _, b, _) = inputs("row i is sample i", torch.float32)

    def gradients(run):
        return torch.autograd.grad(run(x, w, a, b).square().sum(), (x, w, a, b))

    def layer(x, w, a, b):
        return lowrank_linear(x, w, a, b, 0.5).relu()

    plain = gradients(layer)
    recomputed = gradients(lambda *t: checkpoint(layer, *t, use_reentrant=False))
    assert all(torch.equal(p, r) for p, r in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(dtype):
    _, (x, w, _, _, _, a, _, b, _) = inputs("row i is sample i", torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = lowrank_linear(x, w, a, b, 0.5)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y.float().sum(), (x, w, a, b))
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("where", ["row i is sample i", "shared, missing, unused"])
def test_compiles_without_graph_break(where):
    rows, tensors = inputs(where, torch.float32)
    rows = rows or Rows.padded(range(3), 3)
    rows.segments(LENGTH, torch.device("cpu"))

    def run(*tensors):
        return [y.relu() for y in group(rows, list(tensors))]

    def everything(run):
        outputs = run(*tensors)
        return [*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), tensors)]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(everything(compiled), everything(run), strict=True):
        torch.testing.assert_close(got, want)


def test_weight_storage_may_be_swapped_between_forward_and_backward():
    """ZeRO-3 frees a weight after the forward and gathers it into new memory for the backward."""
    _, (x, w, _, _, _, a, _, b, _) = inputs("row i is sample i")
    weight = nn.Parameter(w.detach().clone())
    want = torch.autograd.grad(lowrank_linear(x, weight, a, b, 0.5).sum(), (x, a, b, weight))
    y = lowrank_linear(x, weight, a, b, 0.5)
    weight.data = torch.empty(0, dtype=w.dtype)
    weight.data = w.detach().clone()
    for g, v in zip(torch.autograd.grad(y.sum(), (x, a, b, weight)), want, strict=True):
        assert torch.equal(g, v)


def test_split_hands_out_views_and_collects_the_gradient():
    generated = torch.randn(3, 4, D_IN, RANK, requires_grad=True)
    parts = split_perceptual(generated)
    assert len(parts) == 4
    assert all(torch.equal(part, generated[:, i]) for i, part in enumerate(parts))
    assert all(p.untyped_storage().data_ptr() == generated.untyped_storage().data_ptr() for p in parts)
    sum((i + 1) * part.sum() for i, part in enumerate(parts)).backward()
    assert torch.equal(generated.grad, torch.arange(1.0, 5.0)[None, :, None, None].expand_as(generated))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 5, D_IN)}, "x must be"),
        ({"a": torch.zeros(3, D_IN + 1, RANK)}, "a must be"),
        ({"b": torch.zeros(RANK + 1, 10)}, "b must be"),
        ({"weight": torch.zeros(9, D_IN)}, "weight must be"),
        ({"bias": torch.zeros(9)}, "bias must be"),
        ({"weight": torch.zeros(10, D_IN, dtype=torch.float64)}, "one dtype"),
        ({"rows": Rows.padded([0, 1], 3)}, "10 tokens"),
        ({"rows": Rows.padded([0, 1, 1], 2)}, "2 samples"),
        ({"rows": torch.tensor([0, 1, 3])}, "sample 3"),
    ],
)
def test_misuse_is_named(change, message):
    arguments = {
        "x": torch.zeros(3, LENGTH, D_IN),
        "weight": torch.zeros(10, D_IN),
        "a": torch.zeros(3, D_IN, RANK),
        "b": torch.zeros(RANK, 10),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        lowrank_linear(**(arguments | change))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="choose one of auto, reference"):
        set_backend("cuda")


def test_triton_backends_are_refused_where_they_cannot_run():
    assert set_backend("auto", torch.device("cpu")) == "cpu"
    for name in ("hybrid", "fused"):
        with pytest.raises(ValueError, match=f"ops.backend={name} needs .*; set ops.backend=auto"):
            set_backend(name, torch.device("cpu"))
    assert backend_for(torch.device("cpu")) == "cpu"
