"""Several adapters under one budget, and limits on what is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

import lorashrink as ls
from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.calibration.statistics import adapter_key, write_adapters
from lorashrink.cli import app
from lorashrink.engine.gram import Grams
from lorashrink.errors import InputError, OutputError, RecipeError, UsageError
from lorashrink.linking.matching import match
from lorashrink.recipes.choice import Member, caps, score, select, select_together
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.terms import LayerFacts
from lorashrink.results.shrinking import Report
from lorashrink.shrinking import cluster

MIB = 2**20
RECIPE = "fro_ckpt,bytes,size="


# --- the choice ---------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> list[LayerFacts]:
    facts = []
    for _ in range(draw(st.integers(1, 4))):
        # few values, so that scores are often equal
        sigma = sorted(draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7, 4.0]), min_size=1, max_size=6)))[::-1]
        numbers = draw(st.sampled_from([50, 80, 128]))
        fro = draw(st.sampled_from([1.0, 3.0]))
        facts.append(LayerFacts(np.array(sigma), numbers, 2 * numbers, False, base_fro=fro))
    return facts


def member(facts: list[LayerFacts], weight: float = 1.0, fixed: int = 40) -> Member:
    def file_size(widths: Sequence[int], threshold: float | None) -> int:
        return fixed + sum(width * layer.bytes_per_rank for width, layer in zip(widths, facts, strict=True))

    return Member(facts, file_size, weight)


def size_of(members: Sequence[Member], widths: Sequence[Sequence[int]]) -> int:
    return sum(member.file_size(chosen, None) for member, chosen in zip(members, widths, strict=True))


def lost(members: Sequence[Member], widths: Sequence[Sequence[int]]) -> float:
    """Σ (weight·σ/‖W‖)² of the dimensions that are not kept."""
    return sum(
        (member.weight**2) * float((facts.sigma[width:] ** 2).sum()) / facts.base_fro**2
        for member, chosen in zip(members, widths, strict=True)
        for facts, width in zip(member.layers, chosen, strict=True)
    )


stacks = st.lists(st.tuples(layers(), st.sampled_from([1.0, 0.5, -2.0])), min_size=2, max_size=4).map(
    lambda drawn: [member(facts, weight) for facts, weight in drawn]
)


@given(stacks, st.integers(200, 9000), st.sampled_from(["", ",min_rank=1", ",multiple=2", ",uniform", ",max_rank=2"]))
def test_the_common_threshold_is_the_lowest_that_fits(stack: list[Member], budget: int, more: str) -> None:
    recipe = Recipe.parse(f"{RECIPE}{budget / MIB!r}{more}")
    limit = int(recipe.value * MIB)

    def widths(threshold: float) -> list[tuple[int, ...]]:
        """The ranks of each file alone, by the same recipe with a threshold."""
        alone = replace(recipe, select="thr")
        chosen = []
        for one_file in stack:
            moved = replace(alone, value=threshold - math.log10(abs(one_file.weight)))
            chosen.append(select(moved, one_file.layers, one_file.file_size).widths)
        return chosen

    try:
        selections = select_together(recipe, stack)
    except RecipeError:
        assert size_of(stack, widths(math.inf)) > limit
        return
    assert size_of(stack, [selection.widths for selection in selections]) <= limit
    scores = np.concatenate(
        [score(recipe, facts) + math.log10(abs(member.weight)) for member in stack for facts in member.layers]
    )
    levels = np.unique(scores[np.isfinite(scores)])
    (threshold,) = {selection.threshold for selection in selections}
    if threshold is None:
        # Everything is kept, or nothing but what `min_rank` demands.
        everything = widths(-math.inf)
        rest = everything if size_of(stack, everything) <= limit else widths(math.inf)
        assert [selection.widths for selection in selections] == rest
        return
    assert threshold in levels
    # halfway between two scores, which are rounded otherwise here
    lower = [threshold, *levels[levels < threshold][::-1], -1e9]
    assert [selection.widths for selection in selections] == widths((lower[0] + lower[1]) / 2)
    assert size_of(stack, widths((lower[1] + lower[2]) / 2)) > limit


@given(stacks, st.integers(600, 9000))
def test_no_shares_of_the_budget_lose_less(stack: list[Member], budget: int) -> None:
    """Of all choices of its size a common threshold loses least."""
    recipe = Recipe.parse(f"{RECIPE}{budget / MIB!r}")
    together = select_together(recipe, stack)
    full_ranks = [[facts.rank for facts in member.layers] for member in stack]
    total = size_of(stack, full_ranks)
    shares = [budget * size_of([member], [ranks]) / total for member, ranks in zip(stack, full_ranks, strict=True)]
    try:
        apart = [
            select(replace(recipe, value=share / MIB), member.layers, member.file_size)
            for member, share in zip(stack, shares, strict=True)
        ]
    except RecipeError:
        return
    kept, kept_apart = ([selection.widths for selection in selections] for selections in (together, apart))
    gone = [
        float(value) + math.log10(abs(member.weight))
        for member, chosen in zip(stack, kept, strict=True)
        for facts, width in zip(member.layers, chosen, strict=True)
        for value in score(recipe, facts)[width : facts.rank]
    ]
    worth = 10 ** (2 * max(gone)) if gone else 0.0  # of one more byte
    spare = size_of(stack, kept_apart) - size_of(stack, kept)
    assert lost(stack, kept) <= lost(stack, kept_apart) + worth * spare + 1e-9


@given(layers(), st.integers(2, 4), st.integers(400, 9000))
def test_equal_adapters_get_equal_ranks(facts: list[LayerFacts], count: int, budget: int) -> None:
    recipe = Recipe.parse(f"{RECIPE}{budget / MIB!r}")
    first, *others = select_together(recipe, [member(facts)] * count)
    assert all(selection.widths == first.widths for selection in others)


@given(stacks, st.integers(600, 9000))
def test_the_order_of_adapters_does_not_matter(stack: list[Member], budget: int) -> None:
    recipe = Recipe.parse(f"{RECIPE}{budget / MIB!r}")
    forward, backward = select_together(recipe, stack), select_together(recipe, stack[::-1])
    assert [selection.widths for selection in forward] == [selection.widths for selection in backward[::-1]]


# --- files --------------------------------------------------------------------------------------


def scaled(source: Path, path: Path, factor: float, seed: int = 0) -> Path:
    """The adapter times `factor`, with a little noise on the factor of each layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source)
    for key, tensor in tensors.items():
        if key.endswith("up.weight"):
            tensors[key] = (tensor.float() * factor * (0.5 + torch.rand(1, generator=generator))).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture
def stack(adapter: Path, tmp_path: Path) -> list[Path]:
    strengths = {"strong": 3.0, "middle": 1.0, "weak": 0.4}
    return [
        scaled(adapter, tmp_path / "in" / f"{name}.safetensors", factor, seed)
        for seed, (name, factor) in enumerate(strengths.items())
    ]


def outputs(report: Report) -> dict[str, Path]:
    """Stem of the source -> output."""
    assert not report.failed
    return {Path(result.source).stem: Path(result.output) for result in report.results}


def ranks(report: Report) -> dict[str, dict[str, int]]:
    return {
        Path(result.source).stem: {row.name: row.rank_after for row in result.layers if row.rank_after}
        for result in report.results
    }


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("megabytes", [0.2, 0.35, 0.5])
def test_a_common_budget_is_filled_and_keeps_more_than_shares(
    stack: list[Path], base: Path, tmp_path: Path, megabytes: float
) -> None:
    report = ls.resize(stack, base=base, recipes=f"{RECIPE}{megabytes}", stack=True, output=tmp_path / "together")
    written = outputs(report)
    total = sum(path.stat().st_size for path in written.values())
    (budget,) = report.stacks
    assert (budget.adapters, budget.budget, budget.bytes) == (3, int(megabytes * MIB), total)
    assert budget.budget - 800 < total <= budget.budget
    assert {result.threshold for result in report.results} == {budget.threshold}
    assert {json.loads(metadata(path)["resize_params"])["threshold"] for path in written.values()} == {budget.threshold}
    assert {metadata(path)["lorashrink.recipe"] for path in written.values()} == {budget.recipe}
    before = sum(path.stat().st_size for path in stack)
    apart = [
        ls.resize(
            path, base=base, recipes=f"{RECIPE}{megabytes * path.stat().st_size / before}", output=tmp_path / "apart"
        )
        for path in stack
    ]

    def lost_of_base(*reports: Report) -> float:
        return sum(row.rle_ckpt**2 for report in reports for result in report.results for row in result.layers)

    assert lost_of_base(report) < 0.98 * lost_of_base(*apart)


def test_a_weight_counts_in_the_choice_and_is_not_written(stack: list[Path], base: Path, tmp_path: Path) -> None:
    half = ls.resize(
        [f"{stack[0]}:-0.5", *stack[1:]], base=base, recipes=f"{RECIPE}.35", stack=True, output=tmp_path / "a"
    )
    quiet = scaled(stack[0], tmp_path / "in" / "half.safetensors", 1.0)
    tensors = load_file(stack[0])
    save_file({key: tensor * (0.5 if "up" in key else 1) for key, tensor in tensors.items()}, quiet)
    halved = ls.resize([quiet, *stack[1:]], base=base, recipes=f"{RECIPE}.35", stack=True, output=tmp_path / "b")
    assert ranks(half)["strong"] == ranks(halved)["half"]
    assert ranks(half)["weak"] == ranks(halved)["weak"]
    before, kept = deltas(stack[0]), deltas(outputs(half)["strong"])
    for name, rank in ranks(half)["strong"].items():
        expected = by_the_book(before[name], torch.ones(1, 1), rank, math.inf, math.inf, 1)
        assert_close(kept[name], expected, rtol=1e-2, atol=2e-3 * float(expected.norm()))


def test_bytes_do_not_depend_on_run_or_order(stack: list[Path], base: Path, tmp_path: Path) -> None:
    first, second = (
        outputs(ls.resize(adapters, base=base, recipes=f"{RECIPE}.3", stack=True, output=tmp_path / name))
        for name, adapters in (("a", stack), ("b", stack[::-1]))
    )
    assert {name: path.read_bytes() for name, path in first.items()} == {
        name: path.read_bytes() for name, path in second.items()
    }


def test_copies_get_equal_ranks(adapter: Path, base: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(adapter, tmp_path / f"{name}.safetensors")) for name in "abc"]
    report = ls.resize(copies, base=base, recipes=f"{RECIPE}.3", stack=True, output=tmp_path / "out")
    first, *others = (path.read_bytes() for path in outputs(report).values())
    assert all(contents == first for contents in others)


def test_several_recipes_have_a_budget_each(stack: list[Path], tmp_path: Path) -> None:
    report = ls.resize(stack, recipes="bytes,size=.2:size=.4", stack=True, output=tmp_path)
    assert [budget.recipe for budget in report.stacks] == ["bytes=1,size=0.2", "size=0.4"]
    assert all(budget.bytes <= budget.budget for budget in report.stacks)
    assert len(report.results) == 6


def test_a_dry_run_of_a_stack_reports_its_sizes(stack: list[Path], base: Path, tmp_path: Path) -> None:
    options = {"base": base, "recipes": f"{RECIPE}.3", "stack": True, "output": tmp_path / "out"}
    planned = ls.resize(stack, dry_run=True, **options)
    assert not (tmp_path / "out").exists()
    done = ls.resize(stack, **options)
    assert planned.stacks == done.stacks
    assert [result.bytes_after for result in planned.results] == [
        Path(result.output).stat().st_size for result in done.results
    ]


def test_an_equal_stack_is_skipped_and_another_refused(stack: list[Path], base: Path, tmp_path: Path) -> None:
    options = {"base": base, "recipes": f"{RECIPE}.3", "stack": True, "output": tmp_path / "out", "skip_existing": True}
    first = ls.resize(stack, **options)
    contents = {name: path.read_bytes() for name, path in outputs(first).items()}
    again = ls.resize(stack[::-1], **options)
    assert all(result.skipped for result in again.results)
    assert again.stacks == first.stacks
    outputs(first)["middle"].unlink()
    partly = ls.resize(stack, **options)
    in_order = sorted(partly.results, key=lambda result: result.source)
    assert [result.skipped for result in in_order] == [False, True, True]
    assert {name: path.read_bytes() for name, path in outputs(partly).items()} == contents
    for changed in (stack[:2], [*stack[:2], f"{stack[2]}:0.9"]):
        with pytest.raises(OutputError, match="stack are shrunk together"):
            ls.resize(changed, **options)
    scaled(stack[2], stack[2], 1.1)
    with pytest.raises(OutputError, match="stack are shrunk together"):
        ls.resize(stack, **options)
    with pytest.raises(OutputError, match="stack are shrunk together"):
        ls.resize(stack, **{**options, "recipes": f"{RECIPE}.3", "dtype": "bf16"})
    alone = ls.resize(stack[0], **{**options, "stack": False})
    assert "made from another source, base, recipe, options" in alone.failed[0].error


def test_an_adapter_without_kept_dimensions_is_a_failure(adapter: Path, tmp_path: Path) -> None:
    faint = scaled(adapter, tmp_path / "faint.safetensors", 1e-4)
    report = ls.resize([adapter, faint], recipes="size=.15", stack=True, output=tmp_path / "out")
    assert [Path(result.source) for result in report.results] == [adapter]
    assert [(Path(failure.source), "min_rank=1" in failure.error) for failure in report.failed] == [(faint, True)]
    assert report.stacks[0].bytes <= report.stacks[0].budget
    report = ls.resize([adapter, faint], recipes="size=.25,min_rank=1", stack=True, output=tmp_path / "out")
    assert set(ranks(report)["faint"].values()) == {1}
    assert report.stacks[0].bytes <= report.stacks[0].budget


def test_a_damaged_adapter_takes_no_part_of_the_budget(stack: list[Path], tmp_path: Path) -> None:
    tensors = load_file(stack[1])
    key = next(key for key in tensors if "up" in key)
    tensors[key][0, 0] = math.nan
    save_file(tensors, stack[1])
    report = ls.resize([*stack, tmp_path / "no"], recipes="bytes,size=.3", stack=True, output=tmp_path / "out")
    assert [Path(failure.source).stem for failure in report.failed] == ["middle", "no"]
    alone = ls.resize([stack[0], stack[2]], recipes="bytes,size=.3", stack=True, output=tmp_path / "alone")
    assert ranks(report) == ranks(alone)
    assert report.stacks[0].adapters == 2


def test_calibrated_scores_share_a_budget(stack: list[Path], base: Path, tmp_path: Path) -> None:
    grams, names = {}, {}
    with open_base(base) as opened:
        for path in stack:
            with open_adapter(path) as source:
                names[adapter_key(source)] = path.name
                for layer in source:
                    up, down = layer.delta.up.double(), layer.delta.down.double()
                    grams[f"{adapter_key(source)}/{layer.name}"] = Grams(down @ down.T, up.T @ up)
        write_adapters(tmp_path / "statistics.safetensors", grams, names, opened, {})
    report = ls.resize(
        stack,
        recipes="calib,bytes,size=.3",
        calibration=tmp_path / "statistics.safetensors",
        stack=True,
        output=tmp_path / "out",
    )
    (budget,) = report.stacks
    assert budget.bytes == sum(path.stat().st_size for path in outputs(report).values())
    assert budget.budget - 800 < budget.bytes <= budget.budget


@pytest.mark.parametrize(
    ("texts", "options", "error", "says"),
    [
        (["a", "b"], {"recipes": "fro_lora,thr=-1"}, RecipeError, "this recipe has thr="),
        (["a"], {}, UsageError, "is alone"),
        (["a", "a"], {}, UsageError, "is in the stack twice"),
        (["a", "b:0"], {}, UsageError, "weight 0"),
        (["a", "b:nan"], {}, UsageError, "no weight"),
        (["a", "a:1,b:0.5"], {}, UsageError, "is a sum"),
        (["a", "b"], {"recipes": "size=.001"}, RecipeError, "the smallest possible is size="),
        (["a", "nothing*"], {}, InputError, "nothing.* cannot be read|no file matches"),
        (["a", "b"], {"group_by_base": "bases.toml"}, UsageError, "one base"),
    ],
)
def test_wrong_stacks_are_refused(
    adapter: Path, tmp_path: Path, texts: list[str], options: dict, error: type[Exception], says: str
) -> None:
    for name in "ab":
        shutil.copy(adapter, tmp_path / name)
    (tmp_path / "bases.toml").write_text("sdxl = 'x.safetensors'\n")
    paths = [",".join(str(tmp_path / part) for part in text.split(",")) for text in texts]
    options = {key: tmp_path / text if key == "group_by_base" else text for key, text in options.items()}
    with pytest.raises(error, match=says):
        ls.resize(paths, **{"recipes": "size=.3", **options}, stack=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_smallest_possible_size_is_possible(stack: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the smallest possible") as caught:
        ls.resize(stack, recipes="size=.001,min_rank=1", stack=True, output=tmp_path / "out")
    smallest = str(caught.value).rpartition("size=")[2].rstrip(".")
    report = ls.resize(stack, recipes=f"size={smallest},min_rank=1", stack=True, output=tmp_path / "out")
    assert report.stacks[0].bytes <= report.stacks[0].budget
    assert len(outputs(report)) == 3


def test_a_cluster_does_no_stacks(stack: list[Path]) -> None:
    with pytest.raises(UsageError, match="--stack does not work with --ray"):
        cluster.resize(stack, recipes="size=.3", stack=True)


def test_the_command_prints_the_budget(stack: list[Path], base: Path, tmp_path: Path) -> None:
    arguments = ["resize", "--stack", "--base", base, "-r", f"{RECIPE}.3", "-o", tmp_path / "out", *stack]
    words = [str(argument) for argument in arguments]
    text = CliRunner().invoke(app, words).stdout
    assert "3 adapters under one budget: " in text
    document = json.loads(CliRunner().invoke(app, [*words, "--force", "--json"]).stdout)
    (budget,) = document["stacks"]
    assert budget["bytes"] == sum(result["bytes_after"] for result in document["results"]) <= budget["budget"]
    assert {result["threshold"] for result in document["results"]} == {budget["threshold"]}


# --- limits -------------------------------------------------------------------------------------


def deltas(path: Path) -> dict[str, Tensor]:
    """Layer -> ΔW as a float64 matrix."""
    with open_adapter(path) as opened:
        return {layer.name: layer.delta.dense().double().flatten(1) for layer in opened}


def weights(adapter: Path, base: Path) -> dict[str, Tensor]:
    """Layer -> weight of the base as a float64 matrix."""
    with open_adapter(adapter) as opened, open_base(base) as against:
        views = match(opened, against)
        return {
            layer.name: against.weight(against_views).double().flatten(1)
            for layer, against_views in zip(opened, views, strict=True)
            if against_views
        }


def by_the_book(delta: Tensor, weight: Tensor, rank: int, clip: float, fro_limit: float, rescale: float) -> Tensor:
    """The expected ΔW, by a dense decomposition."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    s = abs(rescale) * s[:rank]
    s = s.clamp(max=clip * float(torch.linalg.matrix_norm(weight, 2)))
    if s.norm() > fro_limit * weight.norm():
        s = s * fro_limit * weight.norm() / s.norm()
    return math.copysign(1, rescale) * u[:, :rank] @ torch.diag(s) @ v[:rank]


@pytest.mark.parametrize(
    ("clip", "fro_limit", "rescale"),
    [(0.02, math.inf, 1), (math.inf, 0.02, 1), (0.03, 0.03, -2.5), (math.inf, 1e-3, 0.5)],
)
def test_limits_are_those_of_the_dense_decomposition(
    adapter: Path, base: Path, tmp_path: Path, clip: float, fro_limit: float, rescale: float
) -> None:
    limits = {"clip": clip, "fro_limit": fro_limit}
    report = ls.resize(
        adapter,
        base=base,
        recipes=f"rank=3,rescale={rescale}",
        output=tmp_path,
        dtype="fp32",
        **{key: value for key, value in limits.items() if value < math.inf},
    )
    (result,) = report.results
    before, after, against = deltas(adapter), deltas(outputs(report)["lora"]), weights(adapter, base)
    rows, capped = {row.name: row for row in result.layers}, {cap.name: cap for cap in result.capped}
    assert capped
    gone, kept, total = 0.0, 0.0, 0.0
    for name, delta in after.items():
        expected = by_the_book(before[name], against[name], 3, clip, fro_limit, rescale)
        assert_close(delta, expected, rtol=1e-4, atol=2e-6 * float(expected.norm()))
        plain = by_the_book(before[name], against[name], 3, math.inf, math.inf, rescale)
        assert (name in capped) == bool((plain - expected).norm() > 1e-9 * plain.norm())
        if name in capped:
            cap, norm = capped[name], torch.linalg.matrix_norm
            assert (cap.spectral_before, cap.fro_before) == pytest.approx(
                (float(norm(plain, 2)), float(plain.norm())), rel=1e-5
            )
            assert (cap.spectral_after, cap.fro_after) == pytest.approx(
                (float(norm(delta, 2)), float(delta.norm())), rel=1e-5
            )
            assert cap.spectral_after <= clip * float(norm(against[name], 2)) * (1 + 1e-5)
            assert cap.fro_after <= fro_limit * float(against[name].norm()) * (1 + 1e-5)
        error = float((before[name] - delta / rescale).norm() / before[name].norm())
        assert rows[name].rle_lora == pytest.approx(error, rel=1e-3, abs=1e-6)
        share = float((delta / rescale).norm() / before[name].norm()) ** 2
        assert rows[name].energy == pytest.approx(share, rel=1e-4)
        gone, kept = gone + error**2 * float(before[name].norm()) ** 2, kept + float((delta / rescale).norm()) ** 2
        total += float(before[name].norm()) ** 2
    assert result.relative_error == pytest.approx(math.sqrt(gone / total), rel=1e-4)
    assert result.energy == pytest.approx(kept / total, rel=1e-4)
    entries = metadata(Path(result.output))
    assert float(entries["lorashrink.energy"]) == pytest.approx(kept / total, abs=1e-6)
    assert result.bytes_after == Path(result.output).stat().st_size


def test_both_factors_share_a_limit(adapter: Path, base: Path, tmp_path: Path) -> None:
    tensors = load_file(outputs(ls.resize(adapter, base=base, recipes="rank=3,clip=0.02", output=tmp_path))["lora"])
    for key, up in tensors.items():
        if key.endswith("lora_up.weight"):
            down = tensors[key.replace("_up", "_down")]
            norms = [up.float().flatten(1).norm(dim=0), down.float().flatten(1).norm(dim=1)]
            assert_close(norms[0], norms[1], rtol=3e-3, atol=1e-4)


def test_an_unreached_limit_changes_no_number(adapter: Path, base: Path, tmp_path: Path) -> None:
    plain = ls.resize(adapter, base=base, recipes="rank=3", output=tmp_path)
    limited = ls.resize(adapter, base=base, recipes="rank=3", clip=1e6, fro_limit=1e6, output=tmp_path)
    assert not limited.results[0].capped
    assert not limited.results[0].warnings
    assert Path(limited.results[0].output).name == "lora_clip1000000_frolimit1000000_rank3.safetensors"
    before, after = (load_file(outputs(report)["lora"]) for report in (plain, limited))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert limited.results[0].energy == pytest.approx(plain.results[0].energy, abs=1e-9)


def test_limits_belong_to_the_identity_of_a_run(adapter: Path, base: Path, tmp_path: Path) -> None:
    options = {"base": base, "recipes": "rank=3", "output": tmp_path / "out", "skip_existing": True, "clip": 0.02}
    (first,) = ls.resize(adapter, **options).results
    assert first.capped
    for _ in range(2):  # from the journal, and without it from the file
        (again,) = ls.resize(adapter, **options).results
        assert again.skipped
        assert again.relative_error == pytest.approx(first.relative_error, abs=1e-6)
        assert again.energy == pytest.approx(first.energy, abs=1e-6)
        for path in (tmp_path / "out").glob(".lorashrink*"):
            path.unlink()
    assert not ls.resize(adapter, **{**options, "clip": 0.03}).results[0].skipped


@pytest.fixture
def unusual(tmp_path: Path) -> Path:
    """An adapter with a layer that the base lacks, a LoKr layer and a full difference."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "lora_unet_nowhere.lora_up.weight": noise(24, 4),
        "lora_unet_nowhere.lora_down.weight": noise(4, 24),
        "lora_unet_input_blocks_4_1_proj_in.lokr_w1": noise(4, 4),
        "lora_unet_input_blocks_4_1_proj_in.lokr_w2": noise(6, 6),
        "lora_unet_input_blocks_4_1_proj_out.diff": noise(24, 24, 1, 1),
    }
    save_file(tensors, tmp_path / "unusual.safetensors")
    return tmp_path / "unusual.safetensors"


def test_layers_that_stay_above_a_limit_get_a_warning(unusual: Path, base: Path, tmp_path: Path) -> None:
    report = ls.resize(unusual, base=base, recipes="rank=5,clip=0.02", form="lora", output=tmp_path / "a", dtype="fp32")
    before, after = deltas(unusual), deltas(outputs(report)["unusual"])
    names = {cap.name for cap in report.results[0].capped}
    assert names == {"lora_unet_input_blocks_4_1_proj_in", "lora_unet_input_blocks_4_1_proj_out"}
    for name, weight in weights(unusual, base).items():
        expected = by_the_book(before[name], weight, 5, 0.02, math.inf, 1)
        assert_close(after[name], expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    (warning,) = report.results[0].warnings
    assert warning.startswith("clip= does not limit 1 layer, first lora_unet_nowhere")
    u, sigma, right = torch.linalg.svd(before["lora_unet_nowhere"])
    plain = u[:, :5] @ torch.diag(sigma[:5]) @ right[:5]
    assert_close(after["lora_unet_nowhere"], plain, rtol=1e-4, atol=1e-4)
    (smaller,) = ls.resize(unusual, base=base, recipes="rank=5,clip=0.02", output=tmp_path / "b").results
    assert [cap.name for cap in smaller.capped] == ["lora_unet_input_blocks_4_1_proj_out"]
    (note,) = [warning for warning in smaller.warnings if "stay in their own form" in warning]
    assert note.startswith("1 layers, first lora_unet_input_blocks_4_1_proj_in, are above clip= but")
    assert "--as lora" in note
    assert {row.name: row.energy for row in smaller.layers}["lora_unet_input_blocks_4_1_proj_in"] == 1


@pytest.mark.parametrize("text", ["rank=4,clip=1", "fro_lora,thr=-1,fro_limit=.1"])
def test_limits_need_a_base_and_are_not_for_calibrated_recipes(adapter: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="compares with the base model"):
        ls.resize(adapter, recipes=text, output=tmp_path)
    with pytest.raises(RecipeError, match="calib goes by others"):
        ls.resize(adapter, recipes="calib,rank=2", clip=1, output=tmp_path)
    with pytest.raises(RecipeError, match="clip is given twice"):
        ls.resize(adapter, recipes="rank=4,clip=1", clip=1, output=tmp_path)
    with pytest.raises(RecipeError, match="above 0"):
        ls.resize(adapter, recipes="rank=4", fro_limit=-1, output=tmp_path)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.sampled_from([1.0, -3.0, 0.25]),
)
@settings(max_examples=100)
def test_limits_hold_and_keep_the_order(sigma: list[float], clip: float, fro: float, rescale: float) -> None:
    recipe = Recipe.parse(f"rank=8,clip={clip!r},fro_limit={fro!r},rescale={rescale}")
    facts = LayerFacts(np.array(sorted(sigma)[::-1]), 9, 18, False, base_fro=2.0, base_spn=0.5)
    factors = caps(recipe, facts, range(len(sigma)))
    written = abs(rescale) * facts.sigma * (1 if factors is None else factors)
    assert written.max() <= 0.5 * clip * (1 + 1e-9)
    assert np.linalg.norm(written) <= 2 * fro * (1 + 1e-9)
    assert all(low <= high * (1 + 1e-12) for high, low in pairwise(written))
    assert factors is None or ((factors > 0) & (factors <= 1)).all()
    assert (factors is None) == bool(
        abs(rescale) * max(sigma) <= 0.5 * clip and abs(rescale) * np.linalg.norm(facts.sigma) <= 2 * fro
    )


def test_the_command_prints_limited_layers(adapter: Path, base: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    line = ("resize", "--clip", "0.02", "--fro-limit", "0.05", "-r", "rank=3", "-o", tmp_path, base, adapter)
    assert " layers limited, most " in run(*line)
    assert "\nlimited lora_unet_" in run(*line, "--force", "-v")
    (result,) = json.loads(run(*line, "--force", "--json"))["results"]
    assert result["recipe"] == "rank=3,clip=0.02,fro_limit=0.05"
    assert set(result["capped"][0]) == {"name", "spectral_before", "spectral_after", "fro_before", "fro_after"}
    assert 0 < result["kept_energy"] < 1


def test_limits_and_a_common_budget_go_together(stack: list[Path], base: Path, tmp_path: Path) -> None:
    limited = ls.resize(stack, base=base, recipes=f"{RECIPE}.3", clip=0.02, stack=True, output=tmp_path)
    assert all(result.capped for result in limited.results if "strong" in result.source)
    assert limited.stacks[0].bytes == sum(path.stat().st_size for path in outputs(limited).values())
    assert limited.stacks[0].bytes <= limited.stacks[0].budget
