"""EasyEdit's scripts run with the import changed; what differs is named."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import errata
from errata import LM, UsageError
from errata.bench import run
from errata.easyeditor import (
    BaseEditor,
    FTHyperParams,
    GraceHyperParams,
    IKEHyperParams,
    KnowEditDataset,
    MEMITHyperParams,
    ROMEHyperParams,
    ZsreDataset,
)
from tests import tiny

ROME = """
alg_name: "ROME"
model_name: "almanac"
stats_dir: "./data/stats"
device: cpu
layers: [3]
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 7
v_weight_decay: 1e-3
clamp_norm_factor: 6
kl_factor: 0.0625
mom2_adjustment: true
context_template_length_params: [[5, 2], [10, 3]]
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
fp16: false
"""
MEMIT = """
alg_name: "MEMIT"
model_name: "almanac"
device: cpu
layers: [1, 2, 3]
clamp_norm_factor: 4
v_weight_decay: 1e-3
mom2_update_weight: 20
batch_size: 2
"""

README = """
from easyeditor import BaseEditor
from easyeditor import METHODHyperParams
hparams = METHODHyperParams.from_hparams('./hparams/METHOD/model')
prompts = [
    'What university did Watts Humphrey attend?',
    'Which family does Ramalinaceae belong to',
    'What role does Denny Herzig play in football?'
]
ground_truth = ['Illinois Institute of Technology', 'Lecanorales', 'defender']
target_new = ['University of Michigan', 'Lamiinae', 'winger']
editor = BaseEditor.from_hparams(hparams)
locality_inputs = {
    'neighborhood':{
        'prompt': ['Joseph Fischhof, the', 'Larry Bird is a professional', 'In Forssa, they understand'],
        'ground_truth': ['piano', 'basketball', 'Finnish']
    },
    'distracting': {
        'prompt': ['Ray Charles, the violin Hauschka plays the instrument', 'Grant Hill is a professional soccer Magic Johnson is a professional', 'The law in Ikaalinen declares the language Swedish In Loviisa, the language spoken is'],
        'ground_truth': ['piano', 'basketball', 'Finnish']
    }
}
metrics, edited_model, _ = editor.edit(
    prompts=prompts,
    ground_truth=ground_truth,
    target_new=target_new,
    locality_inputs=locality_inputs,
    sequential_edit=False # True: start continuous editing
)
"""
"""The example of EasyEdit's README (steps 2 to 6), as it stands there."""

FACTS = dict(
    prompts=["The mother tongue of Danielle Darrieux is", "Anaal Nathrakh, that was created in"],
    target_new=["English", "Philadelphia"],
    ground_truth=["French", "Birmingham"],
    subject=["Danielle Darrieux", "Anaal Nathrakh"],
    rephrase_prompts=["Danielle Darrieux, a native", "Anaal Nathrakh was founded in"],
    locality_inputs={
        "near": {"prompt": ["The native language of Raymond Barre is", None], "ground_truth": ["French", None]},
        "several": {
            "prompt": [["BBC One, by", "Percy Snow, the"], "BBC One, by"],
            "ground_truth": [["BBC", "x"], "BBC"],
        },
    },
    portability_inputs={"hop": {"prompt": ["Danielle Darrieux speaks", "x is"], "ground_truth": ["English", "y"]}},
)


@pytest.fixture(scope="module")
def rome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseEditor]:
    path = tmp_path_factory.mktemp("hparams") / "almanac.yaml"
    path.write_text(ROME)
    editor = BaseEditor.from_hparams(ROMEHyperParams.from_hparams(str(path).removesuffix(".yaml")))
    yield editor
    editor.restore()


def test_edit_gives_their_form_and_scores_that_are_the_benchs(rome: BaseEditor):
    before = tiny.state(errata.load("almanac").model)["numbers"]
    rows, model, patch = rome.edit(**FACTS)
    first, second = rows
    assert first["case_id"] == 0
    assert first["requested_rewrite"]["subject"] == "Danielle Darrieux"
    assert first["pre"]["rewrite_acc"] == [0.0]
    assert first["post"]["rewrite_acc"] == [1.0]
    assert set(first["post"]) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
    assert set(first["post"]["locality"]) == {"near_output", "near_acc", "several_output", "several_acc"}
    assert set(second["post"]["locality"]) == {"several_output", "several_acc"}  # None is not asked
    assert len(first["post"]["locality"]["several_acc"]) == 2
    assert set(first["pre"]["portability"]) == {"hop_acc"}
    assert first["protocol"] == {"name": "forced", "evaluated": "after each edit"}

    lm = errata.load("almanac")
    edit = patch.edits[0]
    probes = errata.Probe("paraphrase", FACTS["rephrase_prompts"][1], edit.target)
    report = run(rome.method, lm, [errata.Case(0, edit, (probes,))])
    assert report.rows[0]["metrics"]["generalization"]["forced"] == second["post"]["rephrase_acc"][0]

    # Pitfall 1: the model handed back is the edited one, by the last edit alone; and it comes back to the bit.
    assert model is rome.model
    assert patch.edits == (errata.Edit(FACTS["prompts"][1], "Anaal Nathrakh", "Philadelphia", "Birmingham"),)
    assert "Philadelphia" in rome.lm.generate(FACTS["prompts"][1], max_new_tokens=6)
    assert "English" not in rome.lm.generate(FACTS["prompts"][0], max_new_tokens=6)
    rome.restore()
    after = tiny.state(rome.model)["numbers"]
    assert all(tiny.same_bits(v, after[k]) for k, v in before.items())


def test_sequential_edits_stay_go_on_from_call_to_call_and_are_scored_at_the_end(rome: BaseEditor):
    rome.restore()
    one = dict(prompts=FACTS["prompts"][0], target_new="English", subject="Danielle Darrieux", sequential_edit=True)
    rows, _, patch = rome.edit(**one)
    assert rows[0]["protocol"]["evaluated"] == "after all edits"
    rows, _, patch = rome.edit(FACTS["prompts"][1], "Philadelphia", subject="Anaal Nathrakh", sequential_edit=True)
    assert [e.target for e in patch.edits] == ["English", "Philadelphia"]
    assert "English" in rome.lm.generate(FACTS["prompts"][0], max_new_tokens=6)
    assert "Philadelphia" in rome.lm.generate(FACTS["prompts"][1], max_new_tokens=6)
    rome.restore()


def test_generate_edit_gives_what_the_model_says(rome: BaseEditor):
    rows, *_ = rome.generate_edit(FACTS["prompts"][0], "English", subject="Danielle Darrieux")
    assert rows[0]["pre"]["rewrite_ans"].startswith("French")
    assert rows[0]["post"]["rewrite_ans"].startswith("English")
    rome.restore()


def test_batch_edit_takes_batch_size_at_once(tmp_path: Path):
    (tmp_path / "m.yaml").write_text(MEMIT)
    editor = BaseEditor.from_hparams(MEMITHyperParams.from_hparams(str(tmp_path / "m.yaml")))
    cases = errata.data.load("counterfact-mini", n=3)
    edits = [c.edit for c in cases]
    rows, _, patch = editor.batch_edit(
        [e.text for e in edits], [e.target for e in edits], subject=[e.subject for e in edits]
    )
    assert [r["post"]["rewrite_acc"] for r in rows] == [[1.0]] * 3
    assert patch.edits == (errata.Edit(edits[2].prompt, edits[2].subject, edits[2].target),)  # of the last batch
    editor.restore()


FILES = {
    "FT": "alg_name: FT\nmodel_name: almanac\ndevice: cpu\nlayers: [3]\nlr: 5e-3\nnum_steps: 25\n"
    "objective_optimization: target_new\nnorm_constraint: false\nweight_decay: 0\n",
    "GRACE": "alg_name: GRACE\nmodel_name: almanac\ndevice: cpu\n"
    "inner_params:\n- model.layers[6].mlp.down_proj.weight\nedit_lr: 1.0\nn_iter: 30\neps: 1.0\n",
    "SERAC": "alg_name: SERAC\nmodel_name: almanac\ndevice: cpu\n",
    "LoRA": "alg_name: LoRA\nmodel_name: almanac\ndevice: cpu\nlora_type: lora\nlayers: [3]\nnum_steps: 20\nlr: 1e-2\n"
    "rank: 4\nlora_alpha: 32\nlora_dropout: 0.0\ntarget_modules: [down_proj]\n",
    "MELO": "alg_name: MELO\nmodel_name: almanac\ndevice: cpu\ngrace:\n  num_iter: 30\n  edit_lr: 1e-2\n",
    "WISE": "alg_name: WISE\nmodel_name: almanac\ndevice: cpu\nn_iter: 40\n",
}


def started(script: str, name: str = "METHOD") -> dict:
    """What a script of theirs leaves behind, run with the import changed."""
    classes = {"GRACE": "GraceHyperParams", "SERAC": "SERACHparams"}
    script = script.replace("METHODHyperParams", classes.get(name, f"{name}HyperParams")).replace("METHOD", name)
    space: dict = {}
    exec(script.replace("from easyeditor", "from errata.easyeditor"), space)  # noqa: S102 - the script is above
    return space


@pytest.mark.parametrize("name", FILES)
def test_their_readme_runs_with_only_the_import_changed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a subject, as there."""
    (tmp_path / "hparams" / name).mkdir(parents=True)
    (tmp_path / "hparams" / name / "model.yaml").write_text(FILES[name])
    monkeypatch.chdir(tmp_path)
    space = started(README, name)
    assert len(space["metrics"]) == 3
    mean = sum(row["post"]["rewrite_acc"][0] for row in space["metrics"]) / 3
    assert mean > sum(row["pre"]["rewrite_acc"][0] for row in space["metrics"]) / 3 + 0.3
    assert set(space["metrics"][0]["post"]["locality"]) >= {"neighborhood_acc", "distracting_acc"}
    space["editor"].restore()


def test_the_model_stays_edited_when_the_editor_is_gone():
    """Pitfall 1 again: a function that hands back the edited model alone."""

    def corrected() -> tuple:
        hparams = FTHyperParams(
            model_name="almanac", device="cpu", layers=[3], lr=5e-3, objective_optimization="target_new"
        )
        editor = BaseEditor.from_hparams(hparams)
        return editor.edit("The mother tongue of Danielle Darrieux is", "English")[1], editor.tok

    model, tok = corrected()
    gc.collect()
    assert "English" in LM(model, tok).generate("The mother tongue of Danielle Darrieux is", max_new_tokens=3)


def test_a_script_that_ends_without_restore_ends_quietly():
    script = """
from errata.easyeditor import BaseEditor, GraceHyperParams
editor = BaseEditor.from_hparams(GraceHyperParams(model_name="almanac", device="cpu", n_iter=1))
editor.edit("The mother tongue of Danielle Darrieux is", "English")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_of_several_edits_is_rolled_back():
    hparams = GraceHyperParams(model_name="almanac", device="cpu", n_iter=20)
    editor = BaseEditor.from_hparams(hparams)
    editor.edit(FACTS["prompts"], FACTS["target_new"], sequential_edit=True)
    editor.rolllback("English")  # their README's spelling
    said = editor.lm.generate(FACTS["prompts"], max_new_tokens=6)
    assert "English" not in said[0]
    assert "Philadelphia" in said[1]
    with pytest.raises(UsageError, match=r"no edit to 'English'; it carries \['Philadelphia'\]"):
        editor.rollback("English")
    editor.restore()


def test_ike_takes_its_demonstrations_from_their_data_set(tmp_path: Path):
    row = {
        "subject": "Zed",
        "src": "The tongue of Zed is",
        "alt": "Zeddish",
        "answers": ["x"],
        "rephrase": "Zed speaks",
    }
    (tmp_path / "z.json").write_text(json.dumps([row]))
    editor = BaseEditor.from_hparams(IKEHyperParams(model_name="almanac", device="cpu", k=1))
    asked = {"subject": "Danielle Darrieux", "train_ds": ZsreDataset(str(tmp_path / "z.json"))}
    _, _, patch = editor.edit(FACTS["prompts"][0], "English", **asked)
    assert "Zeddish" in editor.method.context(editor.lm, patch.edits[0])
    editor.restore()


def test_a_method_that_looks_for_the_subject_says_so(rome: BaseEditor):
    with pytest.raises(UsageError, match=r"give subject=\[...\]"):
        rome.edit("The mother tongue of Danielle Darrieux is", "English")
    with pytest.raises(UsageError, match="there is no argument of edit 'subjects'; did you mean 'subject'"):
        rome.edit("The mother tongue of Danielle Darrieux is", "English", subjects="Danielle Darrieux")
    with pytest.raises(UsageError, match="target_new has 2 values for 1 prompts"):
        rome.edit("The mother tongue of Danielle Darrieux is", ["a", "b"], subject="Danielle Darrieux")
    with pytest.raises(UsageError, match=r"locality_inputs\['near'\] lacks ground_truth"):
        rome.edit("The mother tongue of Danielle Darrieux is", "a", locality_inputs={"near": {"prompt": ["x"]}})
    with pytest.raises(UsageError, match="prompts is missing"):
        rome.edit()


def test_dataset_classes_give_their_rows(tmp_path: Path):
    row = {
        "subject": "A B",
        "prompt": "The land of A B is",
        "target_new": "Peru",
        "portability": {"Reasoning": [{"prompt": "The town of A B is", "ground_truth": [["Lima", "lima"]]}]},
        "locality": {"Relation_Specificity": [{"prompt": "The age of A B is", "ground_truth": [["9"]]}]},
    }
    (tmp_path / "k.json").write_text(json.dumps([row]))
    (found,) = KnowEditDataset(str(tmp_path / "k.json"), size=1)
    assert (found["prompt"], found["subject"], found["target_new"]) == ("The land of A B is", "A B", "Peru")
    assert found["portability_r"] == [{"prompt": "The town of A B is", "ground_truth": ["Lima", "lima"]}]
    assert found["locality_rs"][0]["ground_truth"] == ["9"]
    assert found["portability_s"] is None
    zsre = {"subject": "A", "src": "Where is A?", "alt": "Peru", "answers": ["Cuba"], "rephrase": "A is where?"}
    (tmp_path / "z.json").write_text(json.dumps([{**zsre, "loc": "nq question: who", "loc_ans": "me"}]))
    (found,) = ZsreDataset(str(tmp_path / "z.json"))
    assert (found["ground_truth"], found["rephrase_prompt"]) == ("Cuba", "A is where?")
    assert (found["locality_prompt"], found["locality_ground_truth"]) == ("nq question: who", "me")
