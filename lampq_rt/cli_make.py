"""`lampq calibrate` and `lampq compile`: from a model and images to a plan, from a plan to a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lampq_rt.cli_common import (
    Images,
    Json,
    Labels,
    Model,
    Output,
    Seed,
    Target,
    Weights,
    check_destination,
    check_target,
    plural,
    same_model,
    true_classes,
)

if TYPE_CHECKING:
    from torch import nn

    from lampq_rt.plan import Plan


def calibrate(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option("--out", metavar="X.plan", help="Folder to write the plan to.")],
    weights: Weights = None,
    mean_bits: Annotated[
        float | None, typer.Option("--mean-bits", metavar="BITS", help="Budget: mean width of the blocks' linears.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="UNIT=LIMIT",
            help="Another budget, also several: mean_activation_bits=5, weight_bytes=15%, bops=20%, "
            "latency_ms=2@8 (batch 8), speedup=2@8.",
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="uniform, lampq, lampq-paper, repq, adalog, lampq-adalog, fast, fast+w, lampq+, lampq+a, lampq+w, "
            "lampq+f, lampq+rec, lampq+w+rec or lampq+relu. With +w activations have 8 bits. fast and fast+w take "
            "less than half of the time and know whole widths only; the last three train, which takes longest."
        ),
    ] = "lampq+w",
    labels: Labels = None,
    calib_images: Annotated[int, typer.Option(help="Images to calibrate on, drawn by the seed.", min=1)] = 32,
    train_images: Annotated[
        int, typer.Option(help="Images that recipes which train see, of the same folder.", min=1)
    ] = 512,
    seed: Seed = 0,
    target: Target = "any",
    device: Annotated[str, typer.Option(help="Where to measure: cpu or cuda.")] = "cpu",
    latency_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table for budgets of latency; by default this machine's (lampq profile)."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Under a budget of latency: also measure the compiled model, if this is the machine.")
    ] = True,
    json: Json = None,
) -> None:
    """Choose bits and scales for every layer from a few images; write a plan.

    \b
    Examples:
      lampq calibrate deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
          --images photos --mean-bits 4 --recipe fast+w --out deit_tiny.plan
      lampq calibrate vit_base_patch16_224 --images photos \\
          --budget weight_bytes=15% --budget bops=20% --recipe lampq+ --out vit_base.plan
      lampq calibrate deit_small_patch16_224 --images photos \\
          --budget latency_ms=60@8 --budget weight_bytes=12e6 --out deit_small.plan
      lampq calibrate deit_tiny_patch16_224 --weights deit_tiny.safetensors --images photos \\
          --mean-bits 3 --recipe lampq+rec --train-images 800 --out deit_tiny.plan

    \b
    A training that was stopped goes on when the same command is given again: its state is kept beside the plan,
    in X.plan.training, until the plan is written.
    """
    from lampq_rt import images as pictures
    from lampq_rt.calibrate import RECIPES, Material, checks, distributed, make_plan
    from lampq_rt.memory import return_memory
    from lampq_rt.models import check_name, load_model

    shard = distributed.current()  # of its own, unless it was started as python -m lampq_rt.calibrate by torchrun
    output = Output(json, silent=not shard.first)
    wanted, training = _budget(mean_bits, budget), RECIPES.get(recipe).schedule.steps > 0
    check_name(model)
    check_target(target)
    checks.resolve_device(device)
    state = _state(out) if training else None
    _check_plan(out, state)
    files = pictures.list_images(images)
    chosen = pictures.choose(files, calib_images, seed)
    if len(chosen) < calib_images:
        output.note(f"{images} holds {plural(len(chosen), 'image')}, fewer than the {calib_images} asked for")
    own = shard.share(chosen)
    network = shard.together(lambda: load_model(model, weights))
    truth = true_classes(labels, images, files, own, network)
    tensor = shard.together(lambda: pictures.load_images(own, pictures.preprocessing(model)))
    more = None
    if training:
        more = pictures.load_images(pictures.choose(files, train_images, seed), pictures.preprocessing(model))
    else:  # a training makes the same large blocks again in every step
        return_memory()
    started = time.perf_counter()
    plan = make_plan(
        network,
        tensor,
        budget=wanted,
        labels=truth,
        recipe=recipe,
        target=target,
        seed=seed,
        device=device,
        model_name=model,
        latency_table=latency_table,
        progress=shard.first,
        shard=shard,
        material=Material(more, state),
    )
    seconds = time.perf_counter() - started
    if shard.first:
        plan.save(out)
        if state is not None:
            state.unlink(missing_ok=True)
    measured = _measured(output, network, plan) if measure and shard.first else {}
    _report_plan(output, plan, out, len(chosen), seconds, measured)


def compile(  # noqa: A001
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", metavar="X.plan", help="Plan made for these weights.")],
    out: Annotated[Path, typer.Option("--out", metavar="X.lampq", help="File to write the checkpoint to.")],
    weights: Weights = None,
    json: Json = None,
) -> None:
    """Turn a model and its plan into an integer checkpoint that needs neither the weights nor the network.

    \b
    Examples:
      lampq compile deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
          --plan deit_tiny.plan --out deit_tiny.lampq
    """
    import lampq_rt
    from lampq_rt.inspect_plan import size, titled
    from lampq_rt.latency import check
    from lampq_rt.models import check_name, load_model, weight_bytes

    output = Output(json)
    check_name(model)
    check_destination(out, "checkpoint")
    decided = lampq_rt.Plan.load(plan)
    same_model(decided.model, model, plan)
    network = load_model(model, weights)
    started = time.perf_counter()
    with output.working("compiling"):
        fast = lampq_rt.compile(network, decided)
        fast.save(out)
    facts: dict[str, Any] = {
        "model": model,
        "checkpoint": str(out),
        "mean_bits": round(decided.mean_bits, 6),
        "disk_bytes": out.stat().st_size,
        "weight_bytes": fast.weight_bytes,
        "fp32_bytes": weight_bytes(network),
        "fallbacks": dict(fast.fallbacks),
        "seconds": round(time.perf_counter() - started, 3),
    }
    table = Table()
    for column in ("", "bytes", "of fp32"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("fp32", "fp32_bytes"), ("in memory", "weight_bytes"), ("on disk", "disk_bytes")):
        table.add_row(label, size(facts[key]), f"{100 * facts[key] / facts['fp32_bytes']:.1f} %")
    output.show(titled(f"{model}: {out}", table))
    latency = check.facts(decided, {})
    if latency:
        output.show(check.report(decided, {}))
        facts["latency"] = latency
    for reason in sorted(set(fast.fallbacks.values())):
        output.note(reason)
    output.facts(facts)


def _budget(mean_bits: float | None, limits: Sequence[str] | None) -> Any:
    """What the options say together, as a `Budget`.

    Raises:
        BudgetError: nothing, or what is no budget.
    """
    from lampq_rt.calibrate import Budget
    from lampq_rt.errors import BudgetError

    every = [*([f"mean_bits={mean_bits}"] if mean_bits is not None else []), *(limits or [])]
    if not every:
        raise BudgetError("no budget given: --mean-bits BITS, --budget UNIT=LIMIT, or both")
    return Budget.parse(*every)


def _state(out: Path) -> Path:
    """Where the state of a training is kept until its plan is written."""
    return out.with_name(f"{out.name}.training")


def _check_plan(out: Path, state: Path | None) -> None:
    """Refuse a plan, or the state of its training, that could not be written when the calibration is done.

    Raises:
        DataError: names the place and the obstacle.
    """
    from lampq_rt.plan_io import JSON_NAME, TENSORS_NAME

    check_destination(out, "plan", (JSON_NAME, TENSORS_NAME))
    if state is not None:
        check_destination(state, "state of the training")


def _measured(output: Output, network: nn.Module, plan: Plan) -> dict[int, float]:
    """Milliseconds of the compiled model, by batch size of the plan's budgets of latency, where this is its machine."""
    from lampq_rt.latency import check

    if "latency" not in plan.provenance:
        return {}
    obstacle = check.obstacle(plan)
    if obstacle is not None:
        output.note(f"the compiled model was not measured: {obstacle}")
        return {}
    with output.working("measuring the compiled model"):
        return check.measure(network, plan)


def _report_plan(
    output: Output, plan: Plan, out: Path, images: int, seconds: float, measured: dict[int, float]
) -> None:
    from lampq_rt.inspect_plan import bits_table, summary, weight_bytes
    from lampq_rt.latency.check import facts, report

    provenance = plan.provenance
    latency = facts(plan, measured)
    output.show(summary(plan), bits_table(plan))
    if latency:
        output.show(report(plan, measured))
    output.show(f"\n{out} written after {seconds:.1f} s.")
    output.facts(
        {
            "model": plan.model,
            "plan": str(out),
            "recipe": provenance["recipe"]["name"],
            "images": images,
            "seed": provenance["seed"],
            "mean_bits": round(plan.mean_bits, 6),
            "weight_bytes": weight_bytes(plan),
            "seconds": round(seconds, 3),
            "objective": provenance["objective"],
            "mip_gap": provenance["mip_gap"],
            "budget": provenance["budget"],
            **({"latency": latency} if latency else {}),
        }
    )
