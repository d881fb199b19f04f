"""The HTML report: whole, offline, escaped, and drawn by a real browser without errors; results as DataFrames."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import refmodels
from debug.capture.prompts import random_prompts
from debug.comparison.compare import diff_engine
from debug.comparison.logits import LogitComparison
from debug.comparison.results import Between, Culprit, Diagnosis, DiffResult, Evidence, ObserverEffect, TapDistance
from debug.drift import DriftResult, measure_drift
from debug.report import write_report
from debug.report.figures import curves, heat_map
from export.bundle import export_model
from refmodels.errors import LogitLockError
from tests.support import mutate, mutations
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source
from tests.support.marks import quick_first
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.torch_gpu.engine import TorchEngine

CASE = "qwen_ntk"
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&amp;\"'"


def run(engine: Engine, steps: int = 3) -> DiffResult:
    source = case_source(CASE)
    truth = refmodels.load(source, dtype=torch.float64)
    rounded = refmodels.load(source, dtype=engine.dtype)
    return diff_engine(engine, truth, rounded, random_prompts(source.spec.vocab_size, (20, 13, 9), seed=0), steps=steps)


def of_bundle(bundle: Path, target: Path, *faults: mutate.Fault) -> DiffResult:
    return run(
        OnnxRuntimeEngine(mutate.mutated(bundle, target, mutate.both(*faults)), emulate_rounding=True, threads=1)
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "bundle"
    export_model(case_source(CASE), precision="fp16", attention="decomposed", output=output)
    return output


@pytest.fixture(scope="module")
def diverged(bundle: Path) -> DiffResult:
    """Two faults in two blocks."""
    torch.set_num_threads(1)
    spec = case_source(CASE).spec
    twice = next(m for m in mutations.mutations(spec, 0) if m.name == "rope twice")
    swapped = mutate.swapped("blocks.1.mlp.gate.weight", "blocks.1.mlp.up.weight")
    result = of_bundle(bundle, bundle.parent / "two", twice.apply, swapped)
    result.context = {"model": CASE, "precision": "fp16", "checkpoint_hash": "0123abc"}
    result.token_texts = {t.token: f"«{t.token}»" for t in result.logit_tokens}
    return result


@pytest.fixture(scope="module")
def nonfinite(bundle: Path) -> DiffResult:
    poison = mutate.edit("blocks.1.attn_norm.weight", lambda w: w * math.nan)
    return of_bundle(bundle, bundle.parent / "nan", poison)


@pytest.fixture(scope="module")
def aligned() -> DiffResult:
    return run(TorchEngine(refmodels.load(case_source(CASE), dtype=torch.float16)))


@pytest.fixture(scope="module")
def drifted() -> DriftResult:
    source = case_source(CASE)
    truth, rounded = (refmodels.load(source, dtype=d) for d in (torch.float64, torch.bfloat16))
    engine = TorchEngine(refmodels.load(case_source("qwen_ntk_off"), dtype=torch.bfloat16))
    return measure_drift(engine, truth, rounded, random_prompts(source.spec.vocab_size, (20, 13), seed=0), steps=4)


@pytest.fixture(scope="module", params=["aligned", "diverged", "nonfinite"])
def any_result(request: pytest.FixtureRequest) -> DiffResult:
    result: DiffResult = request.getfixturevalue(request.param)
    return result


# Reading a page


@dataclass
class Page(HTMLParser):
    """Tags with their attributes, text outside of scripts, and what is in each script."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    scripts: list[str] = field(default_factory=list)
    style: str = ""
    _in: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in == "style":
            self.style += data
        else:
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.scripts[0])
        return value

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(result: DiffResult, tmp_path: Path, **options: Any) -> Page:
    path = tmp_path / "report.html"
    write_report(result, path, **options)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def test_the_environment_is_that_of_the_result(aligned: DiffResult, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(dataclasses.replace(aligned, environment={"torch": "9.9.9+elsewhere"}), page)
    assert "9.9.9+elsewhere" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", quick_first(get_args(get_type_hints(Culprit)["kind"])))
@pytest.mark.slow
def test_every_kind_of_culprit_has_its_words(kind: Any, diverged: DiffResult, tmp_path: Path) -> None:
    culprits = [dataclasses.replace(diverged.culprits[0], kind=kind)]
    page = tmp_path / "page.html"
    write_report(dataclasses.replace(diverged, culprits=culprits), page)
    assert culprits[0].tap in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_offline(any_result: DiffResult, tmp_path: Path) -> None:
    page = page_of(any_result, tmp_path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "srcset", "action", "data", "poster", "background"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert "url(" not in page.style and "@import" not in page.style
    # One data block, plotly and our own; both scripts by their hash, and nothing may be loaded.
    assert len(page.scripts) == 3 and len(page.scripts[1]) > 1_000_000
    policy = next(m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2
    assert "http" not in policy and "unsafe-inline" not in policy.partition("script-src")[2]
    own = page.scripts[0] + page.scripts[2] + page.style + page.text
    assert not re.search(r"https?:|//[a-z]", own)


@pytest.mark.slow
def test_everything_is_there(any_result: DiffResult, tmp_path: Path) -> None:
    page = page_of(any_result, tmp_path, command="logitlock diff 'a b' --html x", environment={"torch": "9.9"})
    assert any_result.verdict.upper() in page.text
    assert {t.tap for t in any_result.taps} <= set(re.findall(r"[\w.]+", page.text))
    for culprit in any_result.culprits:
        assert page.text.count(culprit.tap) >= 3
        for found in culprit.diagnosis:
            assert found.fault in page.text
            assert f"{found.local_before:.3g}" in page.text and f"{found.local_after:.3g}" in page.text
        for head in culprit.evidence.heads:
            assert f"{head:.3g}" in page.text
    for value in ("logitlock diff 'a b' --html x", "9.9", any_result.engine, any_result.reference, any_result.floor):
        assert value in page.text
    places = {a["data-figure"] for a in page.named("div") if "data-figure" in a}
    assert places == set(page.figures) == {"heat", "prefill", "decode", "kl", "margins"}
    assert ("Culprits" in page.text) == bool(any_result.culprits)
    assert "Observer effect" not in page.text


def test_diverged(diverged: DiffResult, tmp_path: Path) -> None:
    page = page_of(diverged, tmp_path)
    assert [c.tap for c in diverged.culprits][:1] == ["blocks.0.key"] and "blocks.1.mlp.gate" in page.text
    assert "rope applied twice" in page.text and "gate and up exchanged" in page.text
    assert "«" in page.text and "0123abc" in page.text
    assert "key 0" in page.text and "query 0" in page.text
    # The blocks of culprits are open, the others closed.
    tree = page.text[page.text.index("Modules") :]
    assert tree.count("wrong") == 2
    shown = [t for t in page.named("details") if "class" not in t]
    assert ["open" in t for t in shown] == [False, True, True, False]


def test_nonfinite(nonfinite: DiffResult, tmp_path: Path) -> None:
    page = page_of(nonfinite, tmp_path)
    assert "NONFINITE" in page.text and "NaN or Inf from finite inputs" in page.text
    marks = next(t for t in page.figures["heat"]["data"] if t.get("name") == "NaN or Inf")
    assert len(marks["x"]) == sum(t.nonfinite > 0 for t in nonfinite.taps)


def test_systematic_accumulated_and_unknown(aligned: DiffResult, tmp_path: Path) -> None:
    found = Diagnosis(fault="wrong eps", local_before=3e-4, local_after=2e-4, ratio_after=0.0, significance=54.5)
    made = Culprit(
        tap="blocks.1.mlp_norm", phase="prefill", step=0, kind="systematic", local=3e-4, floor=3e-4, ratio=1.1,
        worst=(0, 3), occurrences=4, diagnosis=[found],
    )  # fmt: skip
    others = [
        dataclasses.replace(made, tap="blocks.1.mlp.act", kind="local", ratio=33.0, diagnosis=[]),
        dataclasses.replace(
            made, tap="logits", kind="accumulated", diagnosis=[], evidence=Evidence(channels=[(77, 0.625)])
        ),
    ]
    page = page_of(dataclasses.replace(aligned, verdict="diverged", culprits=[made, *others]), tmp_path)
    for text in ("wrong eps", "54.5", "standard deviations", "Unknown", "no module is wrong by itself", "62.5%", "77"):
        assert text in page.text, text
    # In the verdict, and in the table of the diagnosis.
    assert page.text.count("54.5") == 2


def test_observer_effect_comes_first(aligned: DiffResult, tmp_path: Path) -> None:
    effect = ObserverEffect(changed=True, max_abs=0.123, top1_changed=17)
    page = page_of(dataclasses.replace(aligned, observer_effect=effect), tmp_path)
    assert page.text.index("Observer effect") < page.text.index("ALIGNED")
    assert "0.123" in page.text and "17 greedy tokens" in page.text


def test_the_other_side(aligned: DiffResult, diverged: DiffResult, tmp_path: Path) -> None:
    between = Between(
        kl_mean=0.0123, kl_max=0.0456, top1=0.5, max_abs=7.25,
        taps=[TapDistance(tap="blocks.1.key", rel_l2=0.0789, max_abs=1.0, cosine=0.99)],
    )  # fmt: skip
    page = page_of(dataclasses.replace(aligned, other=diverged, between=between), tmp_path)
    for text in ("The other executor", "DIVERGED", "rope applied twice", "0.0123", "0.0456", "7.25", "0.0789"):
        assert text in page.text, text


@pytest.mark.slow
def test_drift(aligned: DiffResult, drifted: DriftResult, tmp_path: Path) -> None:
    assert drifted.differences
    page = page_of(aligned, tmp_path, drift=drifted)
    carried = page.figures["drift_kl"]["data"][0]
    assert carried["y"] == [s.kl for s in drifted.steps] and len(page.figures["drift_kl"]["data"]) == 3
    assert page.figures["drift_cache"]["data"][0]["y"] == [s.cache_error for s in drifted.steps]
    assert all(f"{d.margin:.3g}" in page.text for d in drifted.differences)
    same = page_of(aligned, tmp_path, drift=dataclasses.replace(drifted, differences=[]))
    assert "are the same for 5 tokens" in same.text


def test_values_are_escaped(diverged: DiffResult, drifted: DriftResult, tmp_path: Path) -> None:
    clean = page_of(diverged, tmp_path, drift=drifted, environment={})
    hostile = dataclasses.replace(
        diverged,
        taps=[dataclasses.replace(t, tap=t.tap.replace("mlp.gate", f"mlp.{HOSTILE}")) for t in diverged.taps],
        culprits=[
            dataclasses.replace(
                c,
                tap=c.tap.replace("mlp.gate", f"mlp.{HOSTILE}"),
                diagnosis=[dataclasses.replace(d, fault=HOSTILE) for d in c.diagnosis],
                evidence=dataclasses.replace(c.evidence, head_names=[HOSTILE] * len(c.evidence.heads)),
            )
            for c in diverged.culprits
        ],
        engine=HOSTILE,
        prompts=HOSTILE,
        context={"bundle": HOSTILE, HOSTILE: HOSTILE},
        token_texts={t: HOSTILE for t in diverged.token_texts},
    )
    page = page_of(hostile, tmp_path, drift=drifted, command=HOSTILE, environment={HOSTILE: HOSTILE})
    kinds = [[tag for tag, _ in p.tags if tag not in ("dt", "dd", "dl", "h3", "pre", "code")] for p in (clean, page)]
    assert kinds[0] == kinds[1]
    assert "<" not in page.scripts[0]
    assert len(page.scripts) == 3 and page.scripts[1:] == clean.scripts[1:]
    assert page.text.count(HOSTILE) > 20
    # plotly reads tags in labels.
    assert "<img" not in json.dumps(page.figures) and "&lt;img" in json.dumps(page.figures)


@pytest.mark.slow
def test_figures_are_what_plotly_knows(diverged: DiffResult, drifted: DriftResult, tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    page = page_of(diverged, tmp_path, drift=drifted)
    for name, figure in page.figures.items():
        Figure(json.loads(re.sub(r'"@\w+"', '"#123456"', json.dumps(figure))))
        colours = set(re.findall(r'"@(\w+)"', json.dumps(figure)))
        for theme in re.findall(r"(?:light|dark): \{(.*?)\}", page.scripts[2], re.DOTALL):
            assert colours <= set(re.findall(r"(\w+): \"#", theme)), name


def test_heat_map_and_curves_show_the_numbers(diverged: DiffResult) -> None:
    names = list(dict.fromkeys(t.tap for t in diverged.taps))
    heat = heat_map(diverged)["data"][0]
    alarm = math.log10(diverged.multiple)
    for tap in diverged.taps:
        cell = heat["z"][tap.step][names.index(tap.tap)]
        assert (cell > alarm) == (tap.ratio > diverged.multiple), tap
        assert heat["customdata"][tap.step][names.index(tap.tap)][0] == tap.tap
    # The colours change at the alarm.
    at = (alarm - heat["zmin"]) / (heat["zmax"] - heat["zmin"])
    assert [c for p, c in heat["colorscale"] if p == pytest.approx(at)] == ["@calm1", "@wrong0"]
    prefill = {t.tap: t for t in diverged.taps if not t.step}
    accumulated, floor, local, _, wrong = curves(diverged, "prefill")["data"]
    assert accumulated["y"][-1] == prefill["logits"].accumulated
    assert floor["y"][-1] == prefill["logits"].accumulated_floor
    assert local["y"][names.index("blocks.1.mlp.gate")] == prefill["blocks.1.mlp.gate"].local
    assert {names[i] for i in wrong["x"]} == {t.tap for t in prefill.values() if t.ratio > diverged.multiple}
    decode = curves(diverged, "decode")["data"][2]["y"]
    worst = max((t for t in diverged.taps if t.tap == "blocks.0.key" and t.step), key=lambda t: t.ratio)
    assert decode[names.index("blocks.0.key")] == worst.local


# Writing


def test_the_file_appears_whole_or_not_at_all(
    aligned: DiffResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    before = '<meta name="generator" content="LogitLock">before'
    path.write_text(before)

    def full(self: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LogitLockError, match="No space left"):
        write_report(aligned, path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    with pytest.raises(LogitLockError, match="is a directory"):
        write_report(aligned, tmp_path)
    with pytest.raises(LogitLockError, match="there is no directory"):
        write_report(aligned, tmp_path / "none" / "report.html")


def test_without_the_extra(aligned: DiffResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plotly", "plotly.offline", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LogitLockError, match=r"plotly: pip install 'logitlock\[report\]'"):
        write_report(aligned, tmp_path / "report.html")
    with pytest.raises(LogitLockError, match=r"pandas: pip install 'logitlock\[report\]'"):
        aligned.to_frame()
    # Before anything is run: the bundle does not even exist.
    logitlock("diff", "--bundle", tmp_path / "none", "--html", tmp_path / "x.html").assert_bad_input("plotly")


@pytest.mark.slow
def test_command(bundle: Path, diverged: DiffResult, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    options = ("diff", "--model", GOLDENS / CASE, "--steps", "1", "--html", path, "--bundle")
    assert logitlock(*options, bundle).code == 0
    text = path.read_text(encoding="utf-8")
    assert "ALIGNED" in text and "--steps 1 --html" in text and "onnxruntime" in text
    found = logitlock(*options, bundle.parent / "two", "--json")
    assert found.code == 1 and json.loads(found.out)["verdict"] == "diverged"
    assert "DIVERGED" in path.read_text(encoding="utf-8")


# Results


def test_logit_tokens_are_what_the_sums_are_made_of(diverged: DiffResult) -> None:
    tokens, logits = diverged.logit_tokens, diverged.logits
    assert len(tokens) == logits.tokens == 20 + 13 + 9 + 3 * 3
    assert sum(t.flip for t in tokens) == logits.flips > 0
    assert sum(t.beyond_rounding for t in tokens) == logits.margin_flips > 0
    assert max(t.kl for t in tokens) == logits.kl_max and max(t.error for t in tokens) == logits.max_abs
    assert sum(t.kl for t in tokens) / len(tokens) == pytest.approx(logits.kl_mean)
    assert max(t.floor_kl for t in tokens) == logits.floor_kl_max
    prompts = random_prompts(case_source(CASE).spec.vocab_size, (20, 13, 9), seed=0)
    for token in tokens:
        length = diverged.prompt_lengths[token.row]
        if token.step:
            before = next(t for t in tokens if (t.row, t.index) == (token.row, token.index - 1))
            # The engine is fed its own greedy tokens.
            assert (token.position, token.index, token.token) == (0, length + token.step - 1, before.chosen)
        else:
            assert token.index == token.position - (20 - length)
            assert token.token == int(prompts.ids[token.row, token.position])
        limit = 2 * max(t.floor_error for t in tokens)
        assert token.beyond_rounding == (token.flip and token.margin > limit)
    assert "logit_tokens" not in diverged.to_json()
    listed = json.loads(json.dumps(diverged.to_json(tokens=True), allow_nan=False))["logit_tokens"]
    assert len(listed) == len(tokens) and listed[0]["kl"] == tokens[0].kl and listed[0]["flip"] == tokens[0].flip


def test_flips_within_rounding() -> None:
    """Two flips; the floor is off by 0.1, so a lead of 0.15 may be rounded away and one of 2 may not."""
    truth = torch.tensor([[1.0, 0.85, 0.0], [3.0, 1.0, 0.0]])
    flipped = truth.flip(1)
    logits = LogitComparison()
    logits.add(truth, truth + torch.tensor([0.1, 0.0, 0.0]), flipped, flipped)
    assert (logits.result().flips, logits.result().margin_flips) == (2, 1)


@pytest.mark.slow
def test_frames(diverged: DiffResult, drifted: DriftResult) -> None:
    frame = diverged.to_frame()
    assert len(frame) == len(diverged.taps) and not frame.duplicated(["tap", "step"]).any()
    row = frame.set_index(["tap", "step"]).loc[("blocks.1.mlp.gate", 2)]
    tap = next(t for t in diverged.taps if (t.tap, t.step) == ("blocks.1.mlp.gate", 2))
    assert (row.local, row.ratio, row.worst_row, row.worst_position) == (tap.local, tap.ratio, *tap.worst)
    assert set(frame[frame.ratio > diverged.multiple].tap) == {c.tap for c in diverged.culprits}
    steps = drifted.to_frame()
    assert list(steps.step) == [0, 1, 2, 3, 4] and list(steps.kl) == [s.kl for s in drifted.steps]


# A real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--disable-background-networking",
    "--virtual-time-budget=8000", "--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Loads a page without a network; what the browser printed, and its console."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser(diverged: DiffResult, drifted: DriftResult, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(diverged, page, drift=drifted)
    for flags, colour in (((), "rgb(27, 35, 48)"), ((DARK,), "rgb(230, 234, 240)")):
        document, console = browse(page, tmp_path / "profile", "--dump-dom", *flags)
        assert console == []
        for name in ("heat", "prefill", "decode", "kl", "margins", "drift_kl", "drift_cache"):
            drawn = re.search(rf'data-figure="{name}".*?</figure>', document, re.DOTALL)
            assert drawn is not None and 'class="main-svg"' in drawn[0], name
            # Not only an empty frame.
            assert re.search(r"<image|class=\"point\"|js-line", drawn[0]), name
        assert colour in document
    picture = tmp_path / "report.png"
    for width in (1280, 500):
        _, console = browse(page, tmp_path / "profile", f"--screenshot={picture}", f"--window-size={width},2000")
        content = picture.read_bytes()
        assert console == [] and struct.unpack(">II", content[16:24]) == (width, 2000) and len(content) > 50_000


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_browser_keeps_other_scripts_out(aligned: DiffResult, tmp_path: Path) -> None:
    """The policy in the page holds even if a value were not escaped."""
    page = tmp_path / "report.html"
    write_report(aligned, page)
    text = page.read_text(encoding="utf-8")
    attack = "<script>document.title='taken'</script><img src='http://example.invalid/x.png'>"
    page.write_text(text.replace("<main>", f"<main>{attack}"), encoding="utf-8")
    document, console = browse(page, tmp_path / "profile", "--dump-dom")
    assert "<title>taken" not in document
    assert sum("Content Security Policy" in line for line in console) == 2
