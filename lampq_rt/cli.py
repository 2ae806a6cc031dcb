"""The `lampq` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lampq_rt import cli_frontier, cli_make, cli_measure, cli_profile, cli_tune
from lampq_rt.cli_common import CommandGroup, Json, Output, check_destination, quiet
from lampq_rt.version import __version__

main = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lampq_rt {__version__}")
        raise typer.Exit()


@main.callback()
def _lampq(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make a pre-trained Vision Transformer small and fast, and keep it accurate."""
    quiet()


@main.command()
def quickstart(
    latency: Annotated[bool, typer.Option(help="Also measure a DeiT-Small, integer against floating point.")] = True,
    json: Json = None,
) -> None:
    """Run the whole job on an embedded model: no network, no data, no GPU; two minutes at most.

    \b
    Examples:
      lampq quickstart
      lampq quickstart --no-latency --json quickstart.json
    """
    from lampq_rt import quickstart as tour
    from lampq_rt.calibrate import Budget, calibrate

    output = Output(json)
    with output.working("loading the embedded model") as say:
        comparison = tour.compare(calibrate, lambda bits: Budget(mean_bits=bits), say)
    output.show(*tour.comparison_tables(comparison))
    facts = tour.comparison_facts(comparison)
    if latency:
        with output.working("building a DeiT-Small") as say:
            timing = tour.latency(say, busy=tour.is_busy(comparison))
        output.show(cli_measure.bench_table(timing.rows, f"Latency of {tour.LATENCY_MODEL} with random weights, W8A8"))
        for variant, reason in timing.left_out.items():
            output.note(f"{variant} left out: {reason}")
        facts["latency"] = timing.rows
    output.show(tour.NEXT_STEPS)
    output.facts(facts)


main.command()(cli_make.calibrate)
main.command()(cli_make.compile)
main.command(name="eval")(cli_measure.evaluate)
main.command()(cli_measure.bench)
main.command()(cli_frontier.frontier)
main.command()(cli_tune.tune)
main.command()(cli_profile.profile)


@main.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="X.plan|X.lampq", help="A plan's folder or a checkpoint.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw bits and sensitivity per layer.")
    ] = None,
    json: Json = None,
) -> None:
    """Show what a plan or checkpoint decided: bits per layer, bytes, sensitivities.

    \b
    Examples:
      lampq inspect deit_tiny.plan --plot deit_tiny.png
      lampq inspect deit_tiny.lampq --json -
    """
    import lampq_rt
    from lampq_rt import inspect_plan
    from lampq_rt.latency import check

    output = Output(json)
    if plot is not None:
        inspect_plan.check_plot(plot)
        check_destination(plot, "plot")
    extra: dict[str, int] = {}
    if path.is_file():
        loaded = lampq_rt.load(path)
        plan, extra = loaded.plan, {"disk_bytes": path.stat().st_size, "weight_bytes": loaded.weight_bytes}
    else:
        plan = lampq_rt.Plan.load(path)
    output.show(inspect_plan.summary(plan), inspect_plan.bits_table(plan))
    if check.predictions(plan):
        output.show(check.report(plan, {}))
    sensitivities = inspect_plan.sensitivity_table(plan)
    if sensitivities is not None:
        output.show(sensitivities)
    if extra:
        on_disk, in_memory = (inspect_plan.size(extra[key]) for key in ("disk_bytes", "weight_bytes"))
        output.show(f"The checkpoint takes {on_disk} on disk, its tensors {in_memory} in memory.")
    if plot is not None:
        inspect_plan.plot(plan, plot)
        output.show(f"{plot} written.")
    output.facts({**inspect_plan.facts(plan), **extra})


if __name__ == "__main__":
    main()
