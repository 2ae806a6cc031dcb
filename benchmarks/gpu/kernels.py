"""Parts of `python -m benchmarks.gpu` that compile, tune and time kernels."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.gpu.job import Facts, Job, attempt, bench
from lampq_rt import tuning
from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import impl, offline, tables, tune
from lampq_rt.kernels.gpu.work import LinearWork

GEMM_EPILOGUES = (
    ("float", 3072, 768, False), ("requant", 3072, 768, False), ("requant", 3072, 768, True),
    ("residual", 768, 3072, False), ("residual", 768, 768, False), ("heads", 2304, 768, False),
)  # fmt: skip
"""Of ViT-Base: epilogue, N, K, GELU."""

GEMM_WIDTHS = ((8, 8, False), (8, 4, False), (8, 4, True), (4, 4, False))
"""Of input and weight, and whether the weight's codes name levels."""

AHEAD = (("vit_base_patch16_224", 64), ("vit_base_patch16_224", 1), ("deit_small_patch16_224", 64))
"""Models and batches whose candidates are compiled before anything is timed."""

LAST_SECONDS = 15
"""No kernel is begun with less time left than this: to compile one that was not compiled ahead takes a few."""

MOST_WORKERS = 16
"""More processes compile no faster than they start."""


def compile_ahead(job: Job) -> Facts:
    """Fill Triton's cache with what the next parts launch, on all cores: compiling takes most of their time."""
    arch, workers, until = tuning.gpu_architecture(), compile_workers(), job.until - LAST_SECONDS
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        counts = pool.starmap(compile_share, [(arch, share, workers, until) for share in range(workers)])
    made, failed, left = (sum(column) for column in zip(*counts, strict=True))
    seconds = time.monotonic() - started
    summary = f"{made} kernels in {seconds:.0f} s, {failed} that do not compile, {left} left"
    return {"made": made, "failed": failed, "left": left, "seconds": seconds, "workers": workers, "summary": summary}


def compile_workers() -> int:
    """Processes that compile: two fewer than the cores that this one may use, which may be few of a machine's."""
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 2))


def compile_share(arch: str, share: int, shares: int, until: float) -> tuple[int, int, int]:
    """Compile every `shares`-th kernel from number `share` on until that time; how many were made, failed, are left."""
    made, failed = 0, 0
    launches = list({launch.key: launch for launch in launches_ahead(arch)}.values())[share::shares]
    for done, launch in enumerate(launches):
        if time.time() > until:
            return made, failed, len(launches) - done
        try:
            offline.build(launch)
            made += 1
        except Exception:  # the part that launches it will say why
            failed += 1
    return made, failed, 0


def launches_ahead(arch: str) -> list[offline.Launch]:
    """What `correctness`, `gemm` and the tuner start on `arch`, the checks' kernels first."""
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.checks import in_one_kernel, rows_config

    with offline.recording(arch) as launches:
        for _, name, args in cases():
            getattr(impl, name)(*args)
            if name == "linear_residual_layernorm" and (config := rows_config(args)) is not None:
                in_one_kernel(config, args)
        for work, levels in gemm_works():
            table = torch.empty(reference.LEVELS, dtype=torch.int8, device="meta") if levels else None
            for _, launch in tune.starts(work, levels=table):
                launch()
        for name, batch in AHEAD:
            for work in model_works(name, batch):
                for _, launch in tune.starts(work):
                    launch()
    return launches


def gemm_works() -> Iterator[tuple[LinearWork, bool]]:
    """Linears of ViT-Base at batch 64, and whether their weights' codes name levels."""
    for epilogue, n, k, gelu in GEMM_EPILOGUES:
        for a_bits, w_bits, levels in GEMM_WIDTHS:
            yield LinearWork(epilogue, 64 * 197, n, k, a_bits, w_bits, gelu=gelu, heads=12, tokens=197), levels


def model_works(name: str, batch: int) -> list[LinearWork]:
    """Every linear that a model launches at that batch."""
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return tuning.launches(model, (3, *model.patch_embed.img_size), [batch])


def ceilings(job: Job) -> Facts:
    """What this GPU gives at best: copy, bf16 and int8 matmul."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy_ms = bench(lambda: y.copy_(x))["median"]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    bf16_ms = bench(lambda: a @ a)["median"]
    q = torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8)
    int8_ms = bench(lambda: torch._int_mm(q, q.t()))["median"]
    gb_s, bf16, int8 = 2 * x.numel() / copy_ms / 1e6, 2 * 8192**3 / bf16_ms / 1e9, 2 * 8192**3 / int8_ms / 1e9
    summary = f"copy {gb_s:.0f} GB/s, bf16 {bf16:.0f} TFLOP/s, int8 (cuBLASLt) {int8:.0f} TOP/s"
    name = torch.cuda.get_device_name()
    return {"copy_gb_s": gb_s, "bf16_tflops": bf16, "int8_tops": int8, "gpu": name, "summary": summary}


def gemm(job: Job) -> Facts:
    """TOP/s of the linears of ViT-Base at batch 64, by epilogue, each at its best configuration.

    4-bit weights are also timed with levels; a best configuration of its own would ask for keys of its own in tables.
    What an earlier call timed on such a GPU stands.
    """
    arch, gpu, works = tuning.gpu_architecture(), torch.cuda.get_device_name(), list(gemm_works())
    same = job.earlier if job.earlier.get("gpu") == gpu else {}
    rows = {row["key"]: row for row in same.get("rows", ()) if "tops" in row}
    entries = dict(same.get("entries", {}))

    def timed(work: LinearWork, levels: bool) -> Facts:
        try:
            best = tune.tune_linear(work, levels=levels, stop=lambda: job.left() < LAST_SECONDS)
        except tune.Stopped:
            return {}
        config = best.config and best.config.to_json()
        if not levels:
            entries[work.key] = config
            tables.save(arch, {work.key: best.config})
        return {"ms": best.ms, "rule_ms": best.rule_ms, "config": config, "tops": work.operations / best.ms / 1e9}

    facts = _gemm_facts(rows, arch, gpu, entries, len(works))
    for work, levels in works:
        key = work.key + (" weight levels" if levels else "")
        if key in rows:
            continue
        row = attempt(lambda work=work, levels=levels: timed(work, levels))
        if not row:
            break
        rows[key] = {"key": key, **row}
        job.save(facts := _gemm_facts(rows, arch, gpu, entries, len(works)))
    return facts


def _gemm_facts(rows: dict[str, Facts], arch: str, gpu: str, entries: Facts, asked: int) -> Facts:
    top = max((r for r in rows.values() if "tops" in r), key=lambda r: r["tops"], default=None)
    best = f"best {top['tops']:.0f} TOP/s ({top['key']})" if top else "none ran"
    facts: Facts = {"rows": list(rows.values()), "arch": arch, "gpu": gpu, "entries": entries}
    left = asked - len(rows)
    return {**facts, "left": left, "summary": f"{len(rows)} linears, {left} left, {best}"}


def attention(job: Job) -> Facts:
    """Attention of ViT-Base at batch 64 against bf16 scaled_dot_product_attention."""
    b, h, n, d = 64, 12, 197, 64
    q, k, v = (torch.randint(-127, 128, (b, h, n, d), device="cuda", dtype=torch.int8) for _ in range(3))
    v = reference.transpose_v(v)
    c, s = torch.full((h,), 1e-3, device="cuda"), torch.ones(h, device="cuda")
    ours, log2, cubic = (
        bench(lambda p=p: impl.attention(q, k, v, c, s, *p, 1.0, 0, 8, torch.int8))
        for p in ((8, "rowmax"), (4, "log2"), (4, "cubic"))
    )
    f = torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16)
    sdpa = bench(lambda: torch.nn.functional.scaled_dot_product_attention(f, f, f))
    ratio = sdpa["median"] / ours["median"]
    summary = f"{ours['median']:.3f} ms, {ratio:.2f} x SDPA bf16; log2 P {log2['median']:.3f}, "
    summary += f"cubic P {cubic['median']:.3f} ms"
    return {"ours_ms": ours, "log2_ms": log2, "cubic_ms": cubic, "sdpa_bf16_ms": sdpa, "summary": summary}


def tune_model(job: Job) -> Facts:
    """Tune the linears of one model at one batch, for the user's table; a copy of it is written to the job's folder.

    Entries are those of all its linears, also of what an earlier call tuned: the next machine's table begins with them.
    """
    name, batch = job.args[0], int(job.args[1])
    arch, entries = tuning.gpu_architecture(), Facts()
    works = model_works(name, batch)

    def facts(left: int) -> Facts:
        summary = f"{len(entries)} shapes tuned for {arch}, {left} left"
        return {"arch": arch, "entries": entries, "left": left, "summary": summary}

    try:
        for work, _ in tune.tune_all(works, arch, stop=lambda: job.left() < LAST_SECONDS):
            table = tables.read(tables.user_table(arch))
            config = table[work.key]
            entries[work.key] = config and config.to_json()
            tables.save(arch, table, job.folder / f"{arch}.json")
            job.save(facts(len(works) - len(entries)))
    except tune.Stopped:
        return facts(len(works) - len(entries))
    return facts(0)  # what nothing runs of is not left
