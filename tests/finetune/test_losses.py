"""The sparse divergence: zero where it must be, never above the whole, unbiased from draws, with the right gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as plain_loss
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.logit_cache import CachedLogits, LogitWriter, Sparse
from distill.logits import sparsify
from finetune.losses import BINS, SUMS, Head, Targets, renormalised, sparse_divergence, summary, targets_of
from recipes.errors import DataError
from recipes.schema_teacher import Logits

Tensor = torch.Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(logits: Tensor, seed: int = 0, **spec: Any) -> tuple[Targets, Tensor]:
    """Targets of teacher logits (n, V), and the tokens that stand there."""
    generator = torch.Generator().manual_seed(seed)
    actual = torch.randint(0, logits.shape[1], (len(logits),), generator=generator)
    return targets_of(sparsify(logits, actual, Logits(**spec), generator), actual), actual


def live(logits: Tensor, seed: int = 0, **spec: Any) -> tuple[Targets, Tensor]:
    """The same without the cache's rounding: log-probabilities and tails in float64."""
    generator = torch.Generator().manual_seed(seed)
    actual = torch.randint(0, logits.shape[1], (len(logits),), generator=generator)
    kept = sparsify(logits, actual, Logits(**spec), generator)
    exact = (logits.double() / Logits(**spec).temperature).log_softmax(-1)
    place = np.repeat(np.arange(len(logits)), kept.counts), kept.ids.astype(np.int64)
    outside = exact.index_put(tuple(map(torch.from_numpy, place)), exact.new_tensor(-torch.inf)).logsumexp(-1)
    parts: Any = {**vars(kept), "log_probs": exact.numpy()[place], "tail": outside.numpy()}
    return targets_of(Sparse(**parts), actual), actual


def of_logits(student: Tensor, targets: Targets, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of given student logits: hidden states that the identity as head turns into them."""
    return sparse_divergence(student, Head(torch.eye(student.shape[1], dtype=student.dtype)), targets, **options)


def full(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the whole vocabulary, per position, float64."""
    q, p = ((z.double() / temperature).log_softmax(-1) for z in (student, teacher))
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, t: Targets, o: dict[str, Any]) -> Tensor:
    """The definition, with every tensor whole, for autograd."""
    z = torch.nn.functional.linear(hidden, weight, bias) * o["scale"]
    z = z if o["softcap"] is None else torch.tanh(z / o["softcap"]) * o["softcap"]
    log_q = (z / o["temperature"]).log_softmax(-1)
    inside = torch.zeros_like(z, dtype=torch.bool).scatter(1, t.ids, True)
    rest = log_q.masked_fill(inside, -torch.inf).logsumexp(-1)
    entries = torch.where(t.mass > 0, t.mass * (t.log_probs - log_q.gather(1, t.ids)), 0.0).sum()
    tail = torch.where(t.tail.isfinite(), t.tail.exp() * (t.tail - rest), 0.0).sum()
    hard = plain_loss(z, t.actual, reduction="sum")
    return (1 - o["cross_entropy"]) * o["temperature"] ** 2 * (entries + tail) + o["cross_entropy"] * hard


SPECS: list[dict[str, Any]] = [
    {"k": 5},
    {"k": 50},
    {"kind": "sampled", "draws": 12},
    {"kind": "sampled", "draws": 12, "spread": 1.6},
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradient_is_the_dense_definitions(spec: dict[str, Any], temperature: float, share: float) -> None:
    n, d, size = 23, 16, 50
    for scale, softcap, biased in ((1.0, None, False), (1.0, None, True), (0.5, 3.0, True)):
        hidden, weight = normal(n, d, seed=1, dtype=torch.double), normal(size, d, seed=2, dtype=torch.double)
        bias = normal(size, seed=3, dtype=torch.double) if biased else None
        leaves = [p.requires_grad_() for p in (hidden, weight, bias) if p is not None]
        targets, _ = made(2 * normal(n, size, seed=4), temperature=temperature, **spec)
        targets = targets.map(lambda part: part.double() if part.is_floating_point() else part)
        o = {"cross_entropy": share, "temperature": temperature, "scale": scale, "softcap": softcap}
        expected = dense(hidden, weight, bias, targets, o)
        loss, _ = sparse_divergence(
            hidden, Head(weight, bias, scale, softcap), targets, share, temperature, num_items=1, positions=7
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        wanted, found = torch.autograd.grad(expected, leaves), torch.autograd.grad(loss, leaves)
        for one, other in zip(wanted, found, strict=True):
            assert float((one - other).abs().max()) < 1e-11 * float(one.abs().max())


@pytest.mark.parametrize("spec", [{"k": 4}, {"k": 200}, {"kind": "sampled"}, {"k": 8, "temperature": 2.0}], ids=str)
def test_a_student_that_is_the_teacher_has_no_loss(spec: dict[str, Any]) -> None:
    teacher = 3 * normal(300, 200)
    targets, _ = live(teacher, **spec)
    temperature = spec.get("temperature", 1.0)
    student = teacher.clone().requires_grad_()
    loss, _ = of_logits(student, targets, temperature=temperature)
    assert abs(float(loss)) < 1e-6
    off, _ = of_logits(teacher + 0.3 * normal(300, 200, seed=1), targets, temperature=temperature)
    assert float(off) > 1e-2
    if spec.get("kind") != "sampled":  # of draws, only the mean over them is at rest
        (gradient,) = torch.autograd.grad(loss, student)
        assert float(gradient.abs().max()) < 1e-6
        rounded, _ = made(teacher, **spec)  # through float16: normalised again, the error is of second order
        assert abs(float(of_logits(teacher, rounded, temperature=temperature)[0])) < 1e-6


def test_of_the_cache_is_of_the_live_logits(tmp_path: Path) -> None:
    teacher, student = 3 * normal(200, 150), 3 * normal(200, 150) + normal(200, 150, seed=1)
    for number, spec in enumerate(SPECS):
        generator = torch.Generator().manual_seed(0)
        actual = torch.randint(0, 150, (200,), generator=generator)
        kept = sparsify(teacher, actual, Logits(**spec), generator)
        with LogitWriter(tmp_path / str(number), {}) as writer:
            writer.add("a", kept)
        targets = targets_of(CachedLogits(tmp_path / str(number))["a"], actual)
        losses, gradients = [], []
        for one in (targets, live(teacher, **spec)[0]):
            leaf = student.clone().requires_grad_()
            loss, _ = of_logits(leaf, one, cross_entropy=0.1)
            losses.append(float(loss))
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
        assert float(difference) < 1e-3
        assert losses[1] > 0.1


def test_with_a_tail_it_never_exceeds_the_whole_and_reaches_it() -> None:
    for seed in range(40):
        size, sharpness = (5, 30, 400)[seed % 3], (0.1, 1.0, 4.0, 12.0)[seed % 4]
        teacher, student = sharpness * normal(12, size, seed=seed), sharpness * normal(12, size, seed=1000 + seed)
        whole = full(student, teacher)
        for i in range(12):
            row, before = slice(i, i + 1), -1e-6
            for k in (1, 2, 4, 20, size):
                targets, _ = live(teacher[row], k=k)
                found = float(of_logits(student[row].double(), targets)[0])
                assert before - 1e-5 <= found <= float(whole[i]) * (1 + 1e-5) + 1e-5  # more tokens, never less
                before = found
            assert found == pytest.approx(float(whole[i]), rel=1e-4, abs=1e-5)


def test_temperature_is_on_both_sides_and_the_gradient_keeps_its_size() -> None:
    teacher, student = 4 * normal(40, 60), 4 * normal(40, 60, seed=1)
    for temperature in (0.5, 1.0, 3.0):
        targets, _ = live(teacher, k=60, temperature=temperature)
        loss, _ = of_logits(student, targets, temperature=temperature)
        expected = temperature**2 * full(student, teacher, temperature).mean()
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_cross_entropy_is_the_plain_loss_at_temperature_1() -> None:
    student = 3 * normal(50, 80)
    targets, actual = made(normal(50, 80, seed=1), k=4, temperature=4.0)
    loss, sums = of_logits(student, targets, cross_entropy=1.0, temperature=4.0)
    assert float(loss) == pytest.approx(float(plain_loss(student, actual)), rel=1e-6)
    assert summary(sums)["token_loss"] == pytest.approx(float(loss), rel=1e-6)


def bias_of(found: Tensor, exact: Tensor) -> float:
    """Largest distance of a mean over draws from what it should be, in standard errors. found: (draws, ...)."""
    error = found.std(0) / len(found) ** 0.5
    return float(((found.mean(0) - exact).abs() / error.clamp(min=1e-12)).max())


@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.0, 2.0)])
def test_draws_are_unbiased_and_renormalised_ones_are_not(spread: float, temperature: float) -> None:
    draws, size = 3000, 30
    teacher, student = 2 * normal(1, size), 2 * normal(1, size, seed=1)
    spec = {"kind": "sampled", "draws": 8, "spread": spread, "temperature": temperature}
    targets, _ = live(teacher.expand(draws, size), seed=5, **spec)

    def losses_and_gradients(targets: Targets) -> Tensor:
        leaf = student.double().expand(draws, size).contiguous().requires_grad_()
        loss, _ = of_logits(leaf, targets, temperature=temperature, num_items=1)
        (gradient,) = torch.autograd.grad(loss, leaf)
        log_q = (leaf.detach() / temperature).log_softmax(-1).gather(1, targets.ids)
        entries = torch.where(targets.mass > 0, targets.mass * (targets.log_probs - log_q), 0.0).sum(-1)
        assert float(temperature**2 * entries.sum()) == pytest.approx(float(loss), rel=1e-5)
        return torch.cat([temperature**2 * entries[:, None], gradient], 1)

    leaf = student.double().requires_grad_()
    whole = temperature**2 * full(leaf, teacher, temperature)
    exact = torch.cat([whole.detach(), torch.autograd.grad(whole.sum(), leaf)[0][0]])
    found = losses_and_gradients(targets)
    assert bias_of(found, exact) < 4
    biased = losses_and_gradients(renormalised(targets))
    assert bias_of(biased, exact) > 20
    # and the head alone, scaled up to 1, whose error no averaging removes: against the spread of the draws
    head = renormalised(live(teacher.expand(draws, size), k=8, temperature=temperature)[0])
    off = (losses_and_gradients(head)[0] - exact).abs() / (found.std(0) / draws**0.5).clamp(min=1e-12)
    assert float(off.max()) > 20


def test_slices_and_precision_change_nothing_that_counts() -> None:
    hidden, weight = normal(100, 24), normal(70, 24, seed=1)
    for spec in SPECS:
        targets, _ = made(2 * normal(100, 70, seed=2), **spec)
        results = []
        for positions, dtype in ((100, torch.float64), (1, torch.float64), (33, torch.float32), (40, torch.bfloat16)):
            leaves = [p.to(dtype).requires_grad_() for p in (hidden, weight)]
            loss, _ = sparse_divergence(leaves[0], Head(leaves[1]), targets, 0.1, positions=positions)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        with torch.autocast("cpu", torch.bfloat16):
            leaves = [p.clone().requires_grad_() for p in (hidden, weight)]
            loss, _ = sparse_divergence(leaves[0], Head(leaves[1]), targets, 0.1)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        half = [p.half().requires_grad_() for p in (hidden, weight)]
        loss, _ = sparse_divergence(half[0], Head(half[1]), targets, 0.1)
        results.append([loss, *(g.float() for g in torch.autograd.grad(loss, half))])
        for other, most in zip(results[1:], (1e-6, 1e-5, 2e-2, 2e-2, 2e-3), strict=True):
            for one, same in zip(results[0], other, strict=True):
                assert float((one - same).norm() / one.norm()) < most
        assert [g.dtype for g in results[4][1:]] == [torch.float32] * 2


def test_the_mean_is_over_the_items_of_the_whole_step() -> None:
    student = normal(12, 40)
    targets, _ = made(normal(12, 40, seed=1), k=4)
    whole, sums = of_logits(student, targets, cross_entropy=0.2)
    pieces = [
        of_logits(student[a:b], targets.map(lambda part, a=a, b=b: part[a:b]), cross_entropy=0.2, num_items=12)
        for a, b in ((0, 1), (1, 8), (8, 8), (8, 12))
    ]
    assert float(sum(loss for loss, _ in pieces)) == pytest.approx(float(whole), rel=1e-6)
    together = torch.stack([seen for _, seen in pieces]).sum(0)
    assert summary(together) == pytest.approx(summary(sums), rel=1e-5)
    leaf = student[:0].clone().requires_grad_()
    nothing, seen = of_logits(leaf, targets.map(lambda part: part[:0]))
    nothing.backward()
    assert float(nothing) == 0 and leaf.grad is not None and summary(seen) == {}


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_tensor_holds_the_logits_of_all_positions(temperature: float) -> None:
    n, d, size, slice_ = 2048, 16, 1000, 64
    hidden, weight = normal(n, d).requires_grad_(), normal(size, d, seed=1).requires_grad_()
    targets, _ = made(normal(n, size, seed=2), k=8, temperature=temperature)
    with Largest() as seen:
        loss, _ = sparse_divergence(hidden, Head(weight), targets, 0.1, temperature, positions=slice_)
        loss.backward()
    assert seen.elements == slice_ * size  # 32 times less than n * size
    with Largest() as seen, torch.no_grad():
        sparse_divergence(hidden, Head(weight), targets, 0.1, temperature, positions=slice_)
    assert seen.elements == slice_ * size


def test_metrics_are_what_they_say() -> None:
    teacher = torch.log(torch.tensor([[0.6, 0.3, 0.1, 1e-9], [0.1, 0.2, 0.3, 0.4]]))
    student = torch.log(torch.tensor([[0.5, 0.25, 0.25, 1e-9], [0.7, 0.1, 0.1, 0.1]]))
    actual = torch.tensor([0, 3])
    targets = targets_of(sparsify(teacher, actual, Logits(k=2)), actual)
    loss, sums = of_logits(student, targets)
    found = summary(sums)
    assert found["head_mass"] == pytest.approx((0.9 + 0.7) / 2, rel=1e-3)
    assert found["student_head_mass"] == pytest.approx((0.75 + 0.2) / 2, rel=1e-5)
    assert found["agreement"] == 0.5 and found["mean_token_accuracy"] == 0.5
    # confidences 0.5 (right) and 0.7 (wrong), in bins of their own
    assert found["calibration_error"] == pytest.approx((0.5 + 0.7) / 2, rel=1e-5)
    assert found["divergence"] == pytest.approx(float(loss), rel=1e-6)
    assert found["token_loss"] == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2, rel=1e-5)
    assert len(sums) == len(SUMS) + 3 * BINS and not sums.requires_grad
    warm, _ = made(teacher, k=2, temperature=5.0)
    sure = summary(of_logits(student, warm, temperature=5.0)[1])  # confidence stays at temperature 1
    assert sure["token_loss"] == pytest.approx(summary(of_logits(student, warm)[1])["token_loss"])


def test_positions_with_fewer_tokens_and_tokens_ruled_out() -> None:
    teacher = normal(3, 20, dtype=torch.double)
    teacher[:, 5] = -torch.inf
    kept = sparsify(teacher, torch.tensor([0, 1, 2]), Logits(k=20))
    student = normal(3, 20, seed=1, dtype=torch.double)
    loss, _ = of_logits(student, targets_of(kept, [0, 1, 2]))
    reference = full(student, teacher.masked_fill(teacher == -torch.inf, -1e9)).mean()
    assert float(loss) == pytest.approx(float(reference), rel=1e-4)

    top = sparsify(teacher[:, :5], torch.tensor([0, 1, 2]), Logits(k=3))
    ragged = Sparse(np.array([3, 1, 3], np.uint16), *(np.delete(v, [4, 5]) for v in (top.ids, top.log_probs)), None,
                    top.actual, top.tail.copy())  # fmt: skip
    ragged.tail[1] = np.log1p(-np.exp(np.float64(top.log_probs[3])))
    together = of_logits(student[:, :5].requires_grad_(), targets_of(ragged, [0, 1, 2]), num_items=1)[0]
    alone = 0.0
    for i, k in ((0, 3), (1, 1), (2, 3)):
        kept = sparsify(teacher[i : i + 1, :5], torch.tensor([0]), Logits(k=k))
        alone += float(of_logits(student[i : i + 1, :5], targets_of(kept, [0]), num_items=1)[0])
    assert float(together) == pytest.approx(alone, rel=1e-3)


def test_ids_beyond_the_students_go_to_the_tail() -> None:
    teacher = normal(4, 24, dtype=torch.double)
    actual = torch.tensor([0, 1, 2, 3])
    wide = sparsify(teacher, actual, Logits(k=24))
    narrow = targets_of(wide, actual, vocabulary=20)
    assert int(narrow.ids.max()) == 19
    beyond = teacher.softmax(-1)[:, 20:].sum(-1)
    assert narrow.tail.exp().tolist() == pytest.approx(beyond.tolist(), rel=2e-3)
    with pytest.raises(DataError, match="not among the student's"):
        targets_of(sparsify(teacher, actual, Logits(k=1)), actual, vocabulary=1)
