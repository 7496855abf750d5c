"""EasyEdit's training example and then its README's MEND run with only the import changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import errata
from errata import UsageError
from errata.bench.answer import ask
from errata.data import Probe
from errata.easyeditor import BaseEditor, EditTrainer, MENDHyperParams, SERACTrainingHparams, ZsreDataset
from errata.editor import Editor
from tests import tiny
from tests.easyeditor.test_editor import README, started

TRAIN = """
from easyeditor import EditTrainer, MENDTrainingHparams, ZsreDataset

training_hparams = MENDTrainingHparams.from_hparams('hparams/TRAINING/MEND/llama-7b.yaml')
train_ds = ZsreDataset('./data/zsre/zsre_mend_train.json', config=training_hparams)
eval_ds = ZsreDataset('./data/zsre/zsre_mend_eval.json', config=training_hparams)
trainer = EditTrainer(
    config=training_hparams,
    train_set=train_ds,
    val_set=eval_ds
)
trainer.run()
"""
"""The training example of EasyEdit's README, as it stands there."""

MEND = """
model_name: almanac
inner_params:
- model.layers.2.mlp.down_proj.weight
- model.layers.3.mlp.down_proj.weight
archive: {archive}
{alg}: MEND
lr: 1e-3
edit_lr: 2e-3
cedit: 1.0
cloc: 1.0
rank: 16
device: cuda:0
batch_size: 1
accumulate_bs: 4
max_iters: 16
val_interval: 8
"""


def write(rows: list[errata.Case], path: Path) -> None:
    """Cases as ZsRE has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for case in rows:
        same, near = (next(p for p in case.probes if p.kind == kind) for kind in ("paraphrase", "neighbourhood"))
        row = {"subject": case.edit.subject, "src": case.edit.text, "alt": case.edit.target, "rephrase": same.prompt}
        found.append({**row, "answers": [case.edit.truth], "loc": near.prompt, "loc_ans": near.answer})
    path.write_text(json.dumps(found))


def test_their_training_example_and_their_readme_run_with_only_the_import_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    cases = errata.data.load("counterfact-mini", n=20, part="train")
    write(cases[:14], Path("data/zsre/zsre_mend_train.json"))
    write(cases[14:], Path("data/zsre/zsre_mend_eval.json"))
    for path, alg, archive in (
        ("hparams/TRAINING/MEND/llama-7b.yaml", "alg", "null"),
        ("hparams/MEND/model.yaml", "alg_name", "./results/models/MEND/almanac"),
    ):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text(MEND.format(alg=alg, archive=archive))

    trainer = started(TRAIN)["trainer"]
    about = Editor.load("results/models/MEND/almanac").about
    assert about["training"]["cases"] == 14  # and nothing was learned from those that say when to stop
    assert [look["step"] for look in about["training"]["losses"]] == [0, 2, 4]
    assert len(Path("results/models/MEND/almanac.jsonl").read_text().splitlines()) == 4 + 3
    tiny.state(trainer.model)

    space = started(README, "MEND")
    editor = space["editor"]
    assert len(space["metrics"]) == 3
    for prompt, target in zip(space["prompts"], space["target_new"], strict=True):
        asked = [Probe("efficacy", prompt, target)]
        editor.edit(prompts=[prompt], target_new=[target])
        after = ask(editor.lm, asked)[0].answer.logprob
        editor.restore()
        assert after > ask(editor.lm, asked)[0].answer.logprob + 0.3


def test_an_editor_that_is_missing_or_is_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    lm = tiny.trained("llama")
    values = {
        "model_name": (lm.model, lm.tokenizer),
        "inner_params": ["model.layers.1.mlp.down_proj.weight"],
        "rank": 4,
    }
    with pytest.raises(UsageError, match="MEND needs an editor that was trained for .*, and the file names none"):
        BaseEditor.from_hparams(MENDHyperParams(**values))
    with pytest.raises(UsageError, match="there is no file 'results/x'"):
        BaseEditor.from_hparams(MENDHyperParams(**values, archive="results/x"))
    how = errata.MEND(at=(1,), rank=4)
    how.train(lm, tiny.cases(), errata.train.Course(steps=0, batch=4, held=2), out="e.safetensors")
    with pytest.raises(
        UsageError, match="the editor was trained with at = .*gate_proj.*, and the file says .*down_proj"
    ):
        BaseEditor.from_hparams(MENDHyperParams(**values, archive="e.safetensors"))


def test_a_training_goes_on_from_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    lm = tiny.trained("llama")
    write(tiny.cases(), Path("z.json"))
    data = ZsreDataset("z.json")
    values = {"model_name": (lm.model, lm.tokenizer), "batch_size": 4, "max_iters": 4, "val_interval": 2, "lr": 1e-3}

    class Killed(Exception):
        pass

    def kill(step: int, losses: dict[str, float], held: bool) -> None:
        if step == 3:
            raise Killed

    trainer = EditTrainer(SERACTrainingHparams(**values), data, data)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("errata.easyeditor.learned._tell", kill)
        trainer.run()
    assert Editor.load(trainer.save_path).about["progress"]["step"] == 2
    found = trainer.run()
    assert "progress" not in Editor.load(trainer.save_path).about
    assert [look["step"] for look in found.about["training"]["losses"]] == [0, 2, 4]
