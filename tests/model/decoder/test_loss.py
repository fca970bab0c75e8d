"""The chunked loss of the head against plain torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.decoder.loss import linear_cross_entropy
from tests.model import parts

T, V, D = 23, 57, 16


def reference(hidden, weight, targets, bias, softcap, scale=1.0):
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def inputs(dtype: torch.dtype, bias: bool, trained: bool = True, targets: int = T):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, requires_grad=True):
        # Values that bf16 holds exactly, so that every dtype has the same fp64 reference.
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16()
        return values.to(dtype).requires_grad_(requires_grad)

    hidden, weight = normal(targets, D), normal(V, D, requires_grad=trained)
    labels = torch.randint(V, (targets,), generator=generator)
    return hidden, weight, labels, normal(V, requires_grad=trained) if bias else None


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1.0, 2.0), (0.3, None), (3.0, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, T, 1000])
def test_loss_and_gradients_equal_plain_torch_in_fp64(dtype, tolerance, scale, softcap, bias, chunk):
    found, exact = inputs(dtype, bias), inputs(torch.float64, bias)
    loss = linear_cross_entropy(*found, scale, softcap, chunk_logits=chunk * V)
    expected = reference(*exact, softcap, scale)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for ours, theirs in zip(found, exact, strict=True):
        if ours is not None and ours.is_floating_point():
            assert ours.grad.dtype == dtype
            error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
            assert error < tolerance


def test_sums_over_many_chunks_are_not_rounded_to_bf16():
    found, exact = inputs(torch.bfloat16, True, targets=2048), inputs(torch.float64, True, targets=2048)
    linear_cross_entropy(*found, chunk_logits=8 * V).backward()
    reference(*exact, None).backward()
    for ours, theirs in zip(found[1:2] + found[3:], exact[1:2] + exact[3:], strict=True):
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < 4e-3


def test_no_targets_give_a_zero_loss_with_a_graph():
    hidden, weight, targets, _ = inputs(torch.float32, False, targets=0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, D) and weight.grad.abs().sum() == 0


class _Watch(TorchDispatchMode):
    """The largest tensor of logits that any operation returns, and how many gradients of the weight."""

    largest, weight_gradients = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == V and t.shape != (D, V):
                self.largest = max(self.largest, t.numel())
            if isinstance(t, torch.Tensor) and t.shape == (V, D):
                self.weight_gradients += 1
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_logits_of_one_chunk_at_most_are_alive(trained):
    hidden, weight, targets, _ = inputs(torch.float32, False, trained, targets=640)
    saved: list[int] = []

    def count(t):
        saved.append(t.numel())
        return t

    with _Watch() as watch, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        linear_cross_entropy(hidden, weight, targets, chunk_logits=10 * V).backward()
    assert watch.largest == 10 * V
    assert sum(saved) == hidden.numel() + trained * weight.numel()  # no logits wait for the backward pass
    assert bool(watch.weight_gradients) == trained
    with _Watch() as watch:
        reference(hidden, weight, targets, None, None)
    assert watch.largest == 640 * V  # what the watch sees without chunks


def test_without_gradients_none_are_computed():
    hidden, weight, targets, _ = inputs(torch.float32, False)
    with torch.no_grad(), _Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad and watch.weight_gradients == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "phi"])
def test_the_whole_model_trains_as_with_plain_cross_entropy(name, tied, monkeypatch):
    """Tied and untied heads, biases and caps, through `VisionLanguageModel`; chunks of three targets."""
    monkeypatch.setattr("model.decoder.loss.CHUNK_LOGITS", 3 * parts.VOCABULARY)
    model = parts.build(parts.config(), name).eval()
    if tied:
        model.llm.get_output_embeddings().weight = model.llm.get_input_embeddings().weight
    batch = parts.batch(rows=[0, 1], images=[0, 1])
    weights = model.condition(batch).weights.for_rows(batch.rows)
    logits = model.llm(input_ids=batch.input_ids, perceptual_weights=weights).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    trained = [p for n, p in model.named_parameters() if n.startswith(("llm", "connector"))]
    theirs = torch.autograd.grad(expected, trained)
    loss = model(batch).loss_sum
    ours = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
