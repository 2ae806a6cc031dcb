"""Steps: zero is exact, nothing observed breaks them, clips are the best of their grid, and the table fits the plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt import backends
from lampq_rt.calibrate.observe import LinearObservation, PVObservation, QKObservation, observe
from lampq_rt.calibrate.search import SEARCHES, Steps, fpcs, output_error, weight_mse, weight_scale
from lampq_rt.calibrate.search.base import affine_steps, range_steps
from lampq_rt.calibrate.steps import searched, site_params
from lampq_rt.compiler import check_sites
from lampq_rt.errors import DataError, FormatError, UnknownNameError
from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS, Format
from lampq_rt.kernels import reference
from lampq_rt.plan import Plan
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.simulate import SimulatedLinear, Simulation
from tests.plans import by_width

ROWS, FEATURES, CHANNELS = 128, 24, 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operand(name: str) -> Tensor:
    """Inputs [ROWS, FEATURES] of the kinds that networks have, and that they should not have."""
    x = torch.randn(ROWS, FEATURES, generator=generator())
    x[:, 3] = 0.25  # a constant channel
    x[:, 4] = 0.0  # a dead one
    if name == "outliers":
        x[5, 7], x[90, 2] = 60.0, -35.0
    elif name == "gelu":
        x = torch.nn.functional.gelu(3 * x)
    elif name == "massive":
        x[11] *= 400.0
    elif name == "positive":
        x = x.abs() + 5.0
    elif name == "constant":
        x = torch.full_like(x, -3.0)
    elif name == "zero":
        x = torch.zeros_like(x)
    elif name == "tiny":
        x = x * 1e-42
    elif name == "huge":
        x = x * 1e37
    return x


OPERANDS = ("normal", "outliers", "gelu", "massive", "positive", "constant", "zero", "tiny", "huge")


def linear_seen(x: Tensor, row_weight: Tensor | None = None) -> LinearObservation:
    return LinearObservation(x, float(x.min()), float(x.max()), row_weight)


def weight_hat(bits: int, channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """A weight and itself quantised, fp32 [channels, FEATURES]."""
    w = (
        torch.randn(channels, FEATURES, generator=generator(1))
        * torch.rand(FEATURES, generator=generator(2)).mul(3).exp()
    )
    quantizer = QUANTIZERS.get("uniform")
    return w, quantizer.fake_quantize(w, weight_scale(w, bits)[:, None], None, bits, weight=True)


def fake(x: Tensor, steps: Steps, bits: int) -> Tensor:
    return QUANTIZERS.get("uniform").fake_quantize(x, steps.scale, steps.zero_point, bits)


def check_steps(steps: Steps, fmt: Format, shape: tuple[int, ...] = ()) -> None:
    """As plans demand; zero has a code of its own."""
    assert steps.scale.dtype == torch.float32 and steps.scale.shape == shape
    assert bool((steps.scale > 0).all() and steps.scale.isfinite().all() and steps.scale.reciprocal().isfinite().all())
    assert (steps.zero_point is None) == fmt.symmetric
    if steps.zero_point is not None:
        low, high = reference.code_range(fmt.bits)
        assert steps.zero_point.dtype == torch.int32 and steps.zero_point.shape == ()
        assert low <= int(steps.zero_point) <= high
    assert float(fake(torch.zeros(1), Steps(steps.scale.view(-1)[:1], steps.zero_point), fmt.bits)) == 0.0


@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("name", OPERANDS)
def test_any_input_gets_steps_with_an_exact_zero(search: str, name: str) -> None:
    seen = linear_seen(operand(name))
    for bits in (3, 8):
        w, w_hat = weight_hat(bits)
        for symmetric in (True, False):
            fmt = Format(bits, "uniform", "tensor", symmetric)
            check_steps(SEARCHES.get(search).linear(seen, w)(fmt, w_hat), fmt)


def test_minmax_steps_are_those_of_the_range() -> None:
    """[-1, 3] at 2 bits: steps of 4/3, zero at code -2 + 0.75 -> -1; symmetric: the top code is 3."""
    seen = LinearObservation(torch.zeros(1, 1), -1.0, 3.0)
    solve = SEARCHES.get("minmax").linear(seen, torch.ones(1, 1))
    affine = solve(Format(2, "uniform", "tensor", False), torch.ones(1, 1))
    assert affine.zero_point is not None
    assert (float(affine.scale), int(affine.zero_point)) == (pytest.approx(4 / 3), -1)
    symmetric = solve(Format(8, "uniform", "tensor", True), torch.ones(1, 1))
    assert float(symmetric.scale) == pytest.approx(3 / 127) and symmetric.zero_point is None


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", OPERANDS[:6])
def test_output_error_is_never_worse_than_minmax(bits: int, name: str) -> None:
    """In its own measure, with rows that count unequally, through the Gram matrix (wide) and without (narrow)."""
    x = operand(name)
    seen = linear_seen(x, torch.rand(ROWS, generator=generator(3)) + 0.5)
    for channels in (CHANNELS, 7):
        w, w_hat = weight_hat(bits, channels)
        worth = output_error.row_worth(seen, w).double()
        for symmetric in (True, False):
            fmt = Format(bits, "uniform", "tensor", symmetric)
            errors = {}
            for search in ("minmax", "output-error"):
                e = (fake(x, SEARCHES.get(search).linear(seen, w)(fmt, w_hat), bits) - x).double() @ w_hat.double().t()
                errors[search] = float((e.square().sum(1) * worth).sum())
            assert errors["output-error"] <= errors["minmax"] * (1 + 1e-5)
            if name == "outliers":
                assert errors["output-error"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("name", ["normal", "outliers", "gelu"])
def test_output_error_comes_close_to_an_exhaustive_search(bits: int, name: str) -> None:
    """Over every third of the fine grid's pairs of factors."""
    seen = linear_seen(operand(name))
    w, w_hat = weight_hat(bits)
    error = output_error._ExactError(seen, output_error.row_worth(seen, w), Format(bits, symmetric=False), w_hat)
    steps = SEARCHES.get("output-error").linear(seen, w)(error.fmt, w_hat)
    grid = range(0, output_error.FINE + 1, 3)
    least = min(error((i, j)) for i in grid for j in grid)
    assert error.measure(steps) <= 1.05 * least


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", OPERANDS[:6])
def test_fpcs_is_never_worse_than_a_grid_of_percentiles(bits: int, name: str) -> None:
    """In its own measure; and where the ends of a range shrink ("output-error"), at most a little."""
    x = operand(name)
    seen = linear_seen(x, torch.rand(ROWS, generator=generator(3)) + 0.5)
    for channels in (CHANNELS, 7):
        w, w_hat = weight_hat(bits, channels)
        error = output_error.LayerError(
            x, output_error.row_worth(seen, w), fmt := Format(bits, "uniform", "tensor", False), w_hat
        )
        grid = [(float(x.quantile(1 - p)), float(x.quantile(p))) for p in (0.9, 0.95, 0.99, 0.999, 1.0)]
        found = error.measure(SEARCHES.get("fpcs").linear(seen, w)(fmt, w_hat))
        least = min(error.measure(range_steps(low, high, fmt)) for low, high in grid)
        assert found <= least * (1 + 1e-5)
        assert found <= 1.02 * error.measure(SEARCHES.get("output-error").linear(seen, w)(fmt, w_hat))


@pytest.mark.parametrize("symmetric", [True, False])
def test_fpcs_keeps_the_best_of_its_starts(symmetric: bool) -> None:
    """More rows than candidates are judged on: the starts kept are judged on all rows with the rest."""
    x = torch.randn(1000, FEATURES, generator=generator(5)) ** 3
    seen, (w, w_hat), fmt = linear_seen(x), weight_hat(4), Format(4, "uniform", "tensor", symmetric)
    error = output_error.LayerError(x, output_error.row_worth(seen, w), fmt, w_hat)
    found = error.measure(SEARCHES.get("fpcs").linear(seen, w)(fmt, w_hat))
    assert found <= 1.02 * min(error.measure(range_steps(*ends, fmt)) for ends in fpcs._ranges(seen))


def test_a_massive_row_does_not_decide_the_step() -> None:
    """A row counts at most as much as the median row does at the same relative error; dead inputs all count 1."""
    seen = linear_seen(operand("massive"))
    w, w_hat = weight_hat(8)
    worth = output_error.row_worth(seen, w)
    energy = (seen.rows @ w.t()).square().sum(1)
    assert float(worth.max()) == 1.0 and float((worth * energy).max()) <= float(energy.median()) * (1 + 1e-5)
    steps = SEARCHES.get("output-error").linear(seen, w)(Format(4, symmetric=False), w_hat)
    assert float(steps.scale) < 0.5 * (seen.high - seen.low) / 15
    mostly_dead = torch.zeros(ROWS, FEATURES)
    mostly_dead[0] = 1.0
    assert torch.equal(output_error.row_worth(linear_seen(mostly_dead), w), torch.ones(ROWS))


def test_rows_that_count_more_keep_their_range() -> None:
    """The class token's outlier survives once the token has its share."""
    x = operand("normal")
    x[0, 7] = 12.0
    w, w_hat = weight_hat(6)
    share = torch.ones(ROWS)
    share[0] = ROWS / 3
    tops = {}
    for key, row_weight in (("alone", None), ("weighted", share / share.mean())):
        steps = SEARCHES.get("output-error").linear(linear_seen(x, row_weight), w)(Format(6, symmetric=False), w_hat)
        tops[key] = float(fake(torch.tensor([1e6]), steps, 6))
    assert tops["alone"] < 10.0 < tops["weighted"]


def test_percentile_takes_the_best_percentile() -> None:
    """On 100,000 values, two of them outliers, the range of 99.99 % wins; without outliers, the whole one."""
    x = torch.rand(1000, 100, generator=generator()) * 2 - 1
    w = torch.ones(1, 100)
    fmt = Format(4, "uniform", "tensor", False)
    solve = SEARCHES.get("percentile").linear(linear_seen(x), w)
    assert float(solve(fmt, w).scale) == pytest.approx(2 / 15, rel=1e-2)
    x[3, 3], x[5, 5] = 40.0, -40.0
    assert float(SEARCHES.get("percentile").linear(linear_seen(x), w)(fmt, w).scale) == pytest.approx(2 / 15, rel=1e-2)


def heads_seen(scale: tuple[float, ...] = (1.0, 20.0, 0.0)) -> tuple[QKObservation, PVObservation]:
    factor = torch.tensor(scale)[:, None, None]
    q, k, v = (torch.randn(2, 3, 19, 8, generator=generator(s)) * factor for s in (4, 5, 6))
    q[0, 0, 3, 2] += 9.0 * scale[0]
    k = k + 4.0 * torch.randn(3, 1, 8, generator=generator(7)) * factor
    rows = v.transpose(0, 1).flatten(1, 2)
    qk = QKObservation(q, k, q.abs().amax((0, 2, 3)), k.abs().amax((0, 2, 3)))
    return qk, PVObservation(rows, rows.abs().amax((1, 2)))


@pytest.mark.parametrize("search", list(SEARCHES))
def test_every_head_has_its_own_step(search: str) -> None:
    """Scaling one head scales its steps and no other's; a dead head gets step 1."""
    fmt = Format(5, "uniform", "head", True)
    found = []
    for scale in ((1.0, 20.0, 0.0), (1.0, 40.0, 0.0)):
        qk, pv = heads_seen(scale)
        steps = (*SEARCHES.get(search).qk(qk)(fmt), SEARCHES.get(search).pv(pv)(fmt))
        for s in steps:
            check_steps(s, fmt, (3,))
        found.append(torch.stack([s.scale for s in steps]))
    torch.testing.assert_close(found[1] / found[0], torch.tensor([[1.0, 2.0, 1.0]]).expand(3, 3))
    assert bool((found[0][:, 2] == 1.0).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_output_error_of_the_logits_is_never_worse_than_minmax(bits: int) -> None:
    """Logits up to a constant per row, q judged with k in floating point and k with q; v by itself."""
    qk, pv = heads_seen()
    fmt = Format(bits, "uniform", "head", True)

    def error(e_q: Tensor, k: Tensor) -> Tensor:
        e = e_q @ k.mT
        return (e - e.mean(-1, keepdim=True)).square().sum((0, 2, 3))

    def errors(search: str) -> Tensor:
        q_steps, k_steps = SEARCHES.get(search).qk(qk)(fmt)
        v_steps = SEARCHES.get(search).pv(pv)(fmt)
        q_hat, k_hat = (fake(x, Steps(s.scale[:, None, None]), bits) for x, s in ((qk.q, q_steps), (qk.k, k_steps)))
        v_hat = fake(pv.v, Steps(v_steps.scale[:, None, None]), bits)
        parts = (error(q_hat - qk.q, qk.k), error(qk.q, k_hat - qk.k), (v_hat - pv.v).square().sum((1, 2)))
        return torch.stack(parts)

    ours, widest = errors("output-error"), errors("minmax")
    assert bool((ours <= widest * (1 + 1e-4) + 1e-12).all())
    if bits == 4:
        assert float(ours[0, 0]) < 0.9 * float(widest[0, 0])


@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_weight_clip_equals_a_plain_search(bits: int) -> None:
    """Against the same grid, channel by channel, in numpy."""
    w = torch.randn(6, 50, generator=generator(8))
    w[1, 3], w[2] = 30.0, 0.0
    w[3] *= 1e-6
    found = weight_scale(w, bits)
    assert found.dtype == torch.float32 and found.shape == (6,) and float(found[2]) == 1.0
    low, high = reference.code_range(bits, weight=True)

    def error(row: np.ndarray, scale: np.floating) -> float:
        codes = np.clip(np.round(row * np.float32(np.float32(1) / scale)), low, high)
        return float(np.square((codes * scale - row).astype(np.float64)).sum())

    for row, scale in zip(w.numpy(), found.numpy(), strict=True):
        tops = np.abs(row).max() * weight_mse.clip_factors(bits).numpy()
        least = min(error(row, np.float32(c / high)) for c in tops) if tops[-1] else 0.0
        assert error(row, scale) <= least * (1 + 1e-4)


def test_weight_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(37, 3, 4, 4, generator=generator(9))
    whole = weight_scale(w, 4)
    monkeypatch.setattr(weight_mse, "_BLOCK", 100)
    assert torch.equal(weight_scale(w, 4), whole)


def test_affine_steps_widen_the_range_to_zero() -> None:
    low = torch.tensor([2.0, -6.0, 0.0], dtype=torch.float64)
    high = torch.tensor([4.0, -2.0, 0.0], dtype=torch.float64)
    scale, zero_point = affine_steps(low, high, 8)
    torch.testing.assert_close(scale, torch.tensor([4 / 255, 6 / 255, 1.0]))
    assert zero_point.tolist() == [-128, 127, -128]


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[5] = 0.0
        model.blocks[1].norm1.weight[3], model.blocks[1].norm1.bias[3] = 0.0, 0.0
    return Simulation(model.eval())


@pytest.mark.parametrize("search", list(SEARCHES))
def test_the_table_makes_plans_that_the_compiler_accepts(simulation: Simulation, search: str) -> None:
    images = torch.randn(3, 3, 32, 32, generator=generator())
    seen = observe(simulation, images, seed=0, rows=64)
    description = simulation.description
    menu = {site.name: backends.menu(site) for site in description.sites}
    calls: list[tuple[int, int]] = []
    table = by_width(searched(simulation, seen, menu, search, progress=lambda *state: calls.append(state)))
    assert calls == [(i + 1, len(menu)) for i in range(len(menu))]
    assert list(table) == list(menu)
    for bits in (*INTEGER_BITS, FLOAT_BITS):
        sites = {name: row[bits] for name, row in table.items()}
        check_sites(description, Plan("test", "", sites))
        assert all(params.params == description.site(name).params for name, params in sites.items())
    assert not any(row[FLOAT_BITS].tensors for row in table.values())
    again = by_width(searched(simulation, observe(simulation, images, seed=0, rows=64), menu, search))
    for site in description.sites:
        module = simulation.module(site.name)
        weight = module.original.weight if isinstance(module, SimulatedLinear) else None
        alone = site_params(site, backends.formats(site.kind, 4), seen[site.name], weight, search)
        for other in (again[site.name][4], alone):
            assert other.formats == table[site.name][4].formats
            assert other.tensors.keys() == table[site.name][4].tensors.keys()
            assert all(torch.equal(other.tensors[key], t) for key, t in table[site.name][4].tensors.items())


def test_what_is_refused(simulation: Simulation) -> None:
    seen = observe(simulation, torch.randn(1, 3, 32, 32, generator=generator()), seed=0)
    site = simulation.description.site("blocks.0.attn.proj")
    formats = backends.formats(site.kind, 4)
    weight = torch.ones(32, 32)
    with pytest.raises(UnknownNameError, match="minmax, output-error, percentile"):
        site_params(site, formats, seen[site.name], weight, "nonsense")
    with pytest.raises(FormatError, match=r"'blocks\.0\.attn\.proj'.* 4 bits twice"):
        list(searched(simulation, seen, {site.name: [formats, formats]}, "minmax"))
    weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"'blocks\.0\.attn\.proj'.*weight"):
        site_params(site, formats, seen[site.name], weight)
