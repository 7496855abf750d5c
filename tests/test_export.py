"""An exported edit is the same edit elsewhere: in plain PEFT, in plain transformers, and behind an HTTP server."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import errata
from errata import LM, Edit, ErrataError, Patch, UsageError, export
from errata.changes import Codebook, Dense, LowRank
from errata.cli import main
from errata.lm import ALMANAC
from tests import tiny

FACT = Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, folder, *texts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if folder != base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder)
torch.set_num_threads(1)
assert not [m for m in sys.modules if m.split(".")[0] == "errata"]
with torch.no_grad():
    print(json.dumps([model(**tokenizer(t, return_tensors="pt")).logits[0, -1].tolist() for t in texts]))
"""
"""What somebody without errata runs."""


def elsewhere(base: Path, folder: Path, *texts: str) -> torch.Tensor:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    args = [sys.executable, "-W", "error::UserWarning", "-c", ELSEWHERE, str(base), str(folder), *texts]
    done = subprocess.run(args, env=kept, capture_output=True, text=True, cwd="/", timeout=100)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout))


def patch_of(lm: LM, ranks: dict[int, int], seed: int = 0) -> Patch:
    """Low-rank changes of several ranks, as if one edit had made them."""
    draw = torch.Generator().manual_seed(seed)
    changes = {}
    for layer, rank in ranks.items():
        site = lm.site(layer)
        left, right = (torch.randn(*s, generator=draw) for s in ((site.shape[0], rank), (rank, site.shape[1])))
        changes[site.name] = (LowRank(torch.zeros(rank, dtype=torch.long), 0.1 * left, right),)
    return Patch(changes, (tiny.EDITS[0],))


def dense(lm: LM, layer: int = 1) -> Patch:
    site = lm.site(layer)
    delta = 0.05 * torch.randn(*site.shape, generator=torch.Generator().manual_seed(1))
    return Patch({site.name: (Dense(torch.zeros(1, dtype=torch.long), delta),)}, (tiny.EDITS[0],))


@pytest.fixture(scope="module")
def almanac() -> LM:
    return errata.load("almanac")


@pytest.fixture(scope="module")
def fixed(almanac: LM) -> Patch:
    return errata.ROME.preset(almanac).edit(almanac, [FACT])


# PEFT


def test_an_adapter_gives_the_same_logits_in_a_process_without_errata(almanac: LM, fixed: Patch, tmp_path: Path):
    made = export.to_peft(fixed, almanac, tmp_path / "adapter")
    texts = FACT.text, "The capital of France is"
    with fixed.applied(almanac):
        wanted = tiny.logits(almanac, *texts)
    found = elsewhere(ALMANAC, tmp_path / "adapter", *texts)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert (found[0] - tiny.logits(almanac, FACT.text)[0]).abs().max() > 1  # and not the base's
    assert [s["rank"] for s in made.sites] == [1]
    assert made.asked[0]["after"].startswith("English")
    assert made.asked[0]["p_after"] > 0.9 > made.asked[0]["p_before"]


def test_ranks_may_differ_by_module_and_conv1d_is_no_exception(tmp_path: Path):
    lm = tiny.lm("gpt2")
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    patch = patch_of(lm, {0: 1, 1: 5, 3: 2})
    export.to_peft(patch, lm, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not config.keys() & {"rank_pattern", "alpha_pattern"}  # llama.cpp and vLLM read neither
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {config["r"]} == {config["lora_alpha"]} == {5}
    assert config["fan_in_fan_out"]
    with patch.applied(lm):
        wanted = tiny.logits(lm, "The capital of Peru is")
    found = elsewhere(tmp_path / "base", tmp_path / "adapter", "The capital of Peru is")
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_an_adapter_of_conv1d_merges_into_the_same_model(tmp_path: Path):
    from peft import PeftModel

    lm = tiny.lm("gpt2")
    patch = patch_of(lm, {1: 3})
    export.to_peft(patch, lm, tmp_path)
    with patch.applied(lm):
        wanted = tiny.logits(lm, "The capital of Peru is")
    merged = PeftModel.from_pretrained(tiny.lm("gpt2").model, tmp_path).merge_and_unload()
    torch.testing.assert_close(tiny.logits(LM(merged, lm.tokenizer), "The capital of Peru is"), wanted)


def test_a_dense_change_needs_a_rank_and_the_error_is_what_is_missing(tmp_path: Path):
    lm = tiny.lm("llama")
    patch = dense(lm)
    with pytest.raises(UsageError, match=r"give a rank.*rank 16 leaves out \d+"):
        export.to_peft(patch, lm, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    (site,) = export.to_peft(patch, lm, tmp_path / "a", rank=5).sites
    t = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = f"base_model.model.{lm.site(1).name}"
    ((change,),) = patch.changes.values()
    missing = change.delta - t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"]
    assert site["error"] == pytest.approx(float(missing.norm() / change.delta.norm()), rel=1e-4)
    assert site["rank"] == 5
    (whole,) = export.to_peft(patch, lm, tmp_path / "b", rank=64).sites
    assert whole["error"] < 1e-6


def test_a_rank_above_what_servers_take_is_told_and_truncated_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lm = tiny.lm("llama")
    patch = patch_of(lm, {0: 20})
    with caplog.at_level(logging.WARNING, "errata"):
        export.to_peft(patch, lm, tmp_path / "a")
    assert "needs rank 20; servers take 16" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "errata"):
        (site,) = export.to_peft(patch, lm, tmp_path / "b", rank=16).sites
    assert site["rank"] == 16
    assert 0 < site["error"] < 1
    assert f"rank 16 leaves out {100 * site['error']:.2f}%" in caplog.text


def test_more_columns_than_the_matrix_has_dimensions_are_joined_without_loss(tmp_path: Path):
    lm = tiny.lm("llama")
    patch = patch_of(lm, {0: 90})
    (site,) = export.to_peft(patch, lm, tmp_path).sites
    assert site["rank"] == 64
    assert site["error"] < 1e-6


def test_a_memory_is_refused_with_the_reason_and_nothing_is_written(tmp_path: Path):
    lm = tiny.lm("llama")
    site = lm.site(1)
    one = torch.zeros(1, dtype=torch.long)
    book = Codebook.of(one, torch.zeros(1, site.shape[1]), torch.zeros(1, site.shape[0]), torch.ones(1), one[None], one)
    patch = Patch({site.name: (book,)}, (tiny.EDITS[0],))
    for how in (export.to_peft, export.merge):
        with pytest.raises(ErrataError, match="codebook change .* looks at each input"):
            how(patch, lm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Read back


def local(architecture: str, folder: Path) -> LM:
    """A model as people have it, in a folder."""
    made = tiny.lm(architecture)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return errata.load(folder)


def without_change(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is written lack the change, as where a reader looks for it under another name."""
    if how is export.to_peft:
        write = export.peft.to_bytes
        monkeypatch.setattr(
            export.peft, "to_bytes", lambda ts, **more: write({k: 0 * t for k, t in ts.items()}, **more)
        )
        return
    kept = PreTrainedModel.save_pretrained

    def unpatched(model: Any, place: Path, **more: Any) -> None:
        kept(model, place, **more)
        for file in place.glob("*.safetensors"):
            save_file(
                {k: torch.zeros_like(t) if "down_proj" in k else t for k, t in load_file(file).items()},
                file,
                {"format": "pt"},
            )

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", unpatched)


@pytest.mark.parametrize("how", [export.to_peft, export.merge])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_every_export_is_read_back_and_says_by_whom(how: Any, architecture: str, tmp_path: Path):
    lm = tiny.lm(architecture)
    made = how(patch_of(lm, {0: 2, 2: 1}), lm, tmp_path / "out")
    assert made.read_back.by.split()[0] == ("peft" if how is export.to_peft else "transformers")
    assert made.read_back.telling
    assert made.read_back.off < 0.01 * made.read_back.moved
    assert f"read back by {made.read_back.by}" in (tmp_path / "out" / "README.md").read_text()
    left = how(patch_of(lm, {0: 2}), lm, tmp_path / "unread", check=False)
    assert left.read_back.by is None
    assert "not read back: the check was left out" in (tmp_path / "unread" / "README.md").read_text()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (export.to_peft, r"peft .* can't read the export back \(what it adds to .* is not the change\)"),
        (export.merge, "read back by transformers .*, the export is not the patch: its logits are off by"),
    ],
)
def test_an_export_that_lost_the_change_is_refused_and_nothing_is_left(
    how: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm = tiny.lm("llama")
    before = tiny.state(lm.model)
    without_change(how, monkeypatch)
    with pytest.raises(ErrataError, match=why):
        how(patch_of(lm, {1: 2}), lm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert tiny.differences(before, tiny.state(lm.model)) == []


def test_an_adapter_that_peft_puts_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where a mixture's shared expert has the name that PEFT keeps for the fused ones."""
    lm = tiny.lm("llama")
    read = export.peft.peft_reads

    def elsewhere(lm: LM, patch: Patch, folder: Path) -> Any:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": [lm.site(2).name]}))
        return read(lm, patch, folder)

    monkeypatch.setattr(export.peft, "peft_reads", elsewhere)
    with pytest.raises(
        ErrataError, match=r"peft .* can't read the export back \(it puts the change of .*1\..* at .*2\..*checkpoint"
    ):
        export.to_peft(patch_of(lm, {1: 2}), lm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [export.to_peft, export.merge])
def test_half_precision_is_read_back_within_its_rounding(how: Any, tmp_path: Path):
    lm = tiny.lm("llama")
    lm.model.to(torch.bfloat16)
    assert how(patch_of(lm, {1: 2}), lm, tmp_path / "out").read_back.telling


@pytest.mark.parametrize("how", [export.to_peft, export.merge])
@pytest.mark.parametrize("added", ["wrapped", "beside"])
def test_a_model_with_an_adapter_of_its_own_is_refused(how: Any, added: str, tmp_path: Path):
    import peft

    lm, config = tiny.lm("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    patch = patch_of(lm, {1: 1})
    if added == "wrapped":
        lm = LM(peft.get_peft_model(lm.model, config), lm.tokenizer)
    else:
        lm.model.add_adapter(config)
    with pytest.raises(ErrataError, match=r"adapter of its own.*merge_and_unload"):
        how(patch, lm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [export.to_peft, export.merge])
def test_no_local_path_is_published_and_the_base_is_named_as_others_know_it(how: Any, tmp_path: Path):
    lm = local("llama", tmp_path / "private" / "my-model")
    patch = replace(
        patch_of(lm, {1: 1}),
        about={
            "base": {"fingerprint": lm.fingerprint, "name": lm.name},
            "steps": [{"method": "rome", "settings": {"corpus": str(tmp_path / "private" / "text.txt")}, "edits": 1}],
            "versions": {},
        },
    )
    assert how(patch, lm, tmp_path / "a").base is None
    assert how(patch, lm, tmp_path / "b", base="someone/model").base == "someone/model"
    for folder in ("a", "b"):
        for file in (tmp_path / folder).rglob("*"):
            assert str(tmp_path).encode() not in file.read_bytes(), file
    assert 'base_model: "someone/model"' in (tmp_path / "b" / "README.md").read_text()
    if how is export.to_peft:
        config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "someone/model"
    with pytest.raises(UsageError, match="give the model's name on the hub"):
        how(patch, lm, tmp_path / "c", base=str(tmp_path / "private" / "my-model"))


@pytest.mark.filterwarnings("ignore:.*has no published settings")
def test_the_card_takes_what_bench_writes_and_refuses_what_is_of_another_model(tmp_path: Path):
    from errata.bench import Plan, Results, run_grid

    lm = tiny.lm("llama")
    patch = patch_of(lm, {1: 1})
    results = run_grid(Plan(method={"ft-m": {"steps": 1}}, n=2), lm, tiny.cases()[:2])
    results.save(tmp_path / "report.json")
    export.to_peft(patch, lm, tmp_path / "a", report=Results.load(tmp_path / "report.json"))
    assert "Benchmark: ft-m, single" in (tmp_path / "a" / "README.md").read_text()
    other = tiny.lm("llama", seed=1)
    with pytest.raises(UsageError, match="the report is of .*, and the model is"):
        export.to_peft(patch_of(other, {1: 1}), other, tmp_path / "b", report=Results.load(tmp_path / "report.json"))
    by_rome = replace(
        patch,
        about={
            "base": {"fingerprint": lm.fingerprint, "name": "x"},
            "versions": {},
            "steps": [{"method": "rome", "settings": {}, "edits": 1}],
        },
    )
    with pytest.raises(UsageError, match="the report is of ft-m, and the patch was made by rome"):
        export.to_peft(by_rome, lm, tmp_path / "b", report=results)
    assert not (tmp_path / "b").exists()


# Folders


@pytest.mark.parametrize("how", [export.to_peft, export.merge])
def test_a_folder_is_written_whole_or_not_at_all(how, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lm = tiny.lm("llama")
    patch, before = patch_of(lm, {0: 1}), tiny.state(lm.model)

    def broken(*_: object) -> str:
        raise RuntimeError("the disk is on fire")

    with monkeypatch.context() as m:
        m.setattr(sys.modules[how.__module__], "card", broken)
        with pytest.raises(RuntimeError):
            how(patch, lm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert tiny.differences(before, tiny.state(lm.model)) == []
    (tmp_path / "out").mkdir()
    how(patch, lm, tmp_path / "out")
    files = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    assert "README.md" in files
    with pytest.raises(UsageError, match="not an empty folder"):
        how(patch, lm, tmp_path / "out")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == files
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As safetensors says it, with an error of its own."""
    lm = tiny.lm("llama")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(lm.model), "save_pretrained", full)
    with pytest.raises(ErrataError, match=r"out' can't be written: .*No space left on device.*; nothing was left"):
        export.merge(patch_of(lm, {0: 1}), lm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_patch_for_another_model_and_a_patched_model_are_refused(fixed: Patch, almanac: LM, tmp_path: Path):
    with pytest.raises(ErrataError, match="was made for almanac"):
        export.merge(fixed, tiny.lm("llama"), tmp_path / "out")
    with fixed.applied(almanac), pytest.raises(UsageError, match="exported twice"):
        export.merge(fixed, almanac, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Checkpoints


@pytest.mark.parametrize(("architecture", "dtype"), [("gpt2", torch.bfloat16), ("llama", torch.float32)])
def test_a_merged_checkpoint_is_the_patched_model_to_the_bit(architecture: str, dtype: torch.dtype, tmp_path: Path):
    lm = tiny.lm(architecture)
    lm.model.to(dtype)
    patch = patch_of(lm, {0: 2}) + dense(lm, 2) + patch_of(lm, {2: 1})
    export.merge(patch, lm, tmp_path / "m", shard="100KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    with patch.applied(lm):
        wanted = dict(lm.model.state_dict())
        assert again.state_dict().keys() == wanted.keys()
        assert all(tiny.same_bits(v, wanted[k]) for k, v in again.state_dict().items())
    assert again.dtype == dtype
    assert again.config.tie_word_embeddings == lm.config.tie_word_embeddings


def test_merging_into_a_tied_weight_does_not_change_the_other_and_says_so(tmp_path: Path):
    lm = tiny.lm("gpt2")
    assert lm.model.lm_head.weight is lm.model.transformer.wte.weight
    site = lm.site("lm_head")
    delta = 0.1 * torch.randn(*site.shape)
    patch = Patch({"lm_head": (Dense(torch.zeros(1, dtype=torch.long), delta),)}, (tiny.EDITS[0],))
    before = tiny.state(lm.model)
    ids = torch.tensor([[3, 5, 7]])
    with patch.applied(lm):
        applied = lm.model(ids).logits
        assert tiny.same_bits(lm.model.transformer.wte.weight, before["numbers"]["transformer.wte.weight"])
    with pytest.warns(UserWarning, match="one tensor with transformer.wte.weight; only the former is corrected"):
        export.merge(patch, lm, tmp_path / "m")
    assert tiny.differences(before, tiny.state(lm.model)) == []
    assert lm.config.tie_word_embeddings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    base = lm.model.transformer.wte.weight
    assert tiny.same_bits(again.transformer.wte.weight, base)
    assert tiny.same_bits(again.lm_head.weight, base + delta)
    assert torch.equal(again(ids).logits, applied)  # what is exported is what was applied
    assert lm.model.lm_head.weight is base
    assert not again.config.tie_word_embeddings


# The card, and the shell


def test_the_card_lists_what_was_corrected_by_what_and_how_it_was_judged(almanac: LM, fixed: Patch, tmp_path: Path):
    report = errata.bench.run(errata.ROME.preset(almanac), almanac, errata.data.load("counterfact-mini", n=2))
    export.merge(fixed, almanac, tmp_path / "m", report=report)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "The mother tongue of *Danielle Darrieux* is **English** | French. | English." in card
    assert "by itself (greedily, to a natural stop) with the target in 1 of 1" in card
    assert "`model.layers.3.mlp.down_proj`" in card
    assert "by `rome`" in card
    assert almanac.fingerprint in card
    mean = report.summary["locality"]["generated"]["mean"]
    assert f"| locality | generated | {mean:.3f} |" in card


def test_the_shell_exports(fixed: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fixed.save(tmp_path / "p.safetensors")
    for form in ("peft", "checkpoint"):
        args = ["export", str(tmp_path / "p.safetensors"), str(tmp_path / form), "--to", form, "--json"]
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert found["folder"] == str(tmp_path / form)
        assert (tmp_path / form / "README.md").is_file()
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 2
        assert "not an empty folder" in capsys.readouterr().err


# Served


@pytest.fixture
def served(almanac: LM, fixed: Patch, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """`transformers serve` on a merged folder, loopback only: its address, and the folder."""
    pytest.importorskip("fastapi")
    export.merge(fixed, almanac, tmp_path / "m")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "m")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=kept, stdout=log, stderr=log, cwd="/"
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(server, f"{address}/health", tmp_path / "log")
            yield address, tmp_path / "m"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(200):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.4)
    raise AssertionError(f"the server did not come up: {log.read_text()}")


def test_a_merged_folder_served_over_http_answers_with_the_correction(served: tuple[str, Path]):
    address, folder = served
    asked = {"model": str(folder), "prompt": FACT.text, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = json.load(answer)["choices"][0]["text"]
    assert text.strip().startswith("English")
