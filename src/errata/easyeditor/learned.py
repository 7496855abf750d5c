"""EasyEdit's learned editors: the settings of each, and the `EditTrainer` that trains one.

One file says how an editor is trained, and where the trained one is. It is written where EasyEdit writes its own,
`results_dir/models/ALG/MODEL`, which the files for editing name as `archive`. What EasyEdit wrote there is a pickle,
and is not read.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from .. import editor as editors
from .. import presets
from ..editor import Editor
from ..errors import UsageError
from ..lm import LM
from ..parts.taps import places
from ..train import Course, Losses, Trained
from ..typed import checked
from .datasets import Dataset
from .hparams import HyperParams
from .keys import Choice, Fields, Reader, Unused, Values, beside, given, modules, only

log = logging.getLogger(__name__)

COURSE = "course."
"""Begins the names of fields that say how an editor is trained."""


def _per_step(values: Values) -> int:
    """EasyEdit's batches to one step of the optimiser, which is what errata counts."""
    edits = int(values.get("n_edits", 1))
    return int(values.get("accumulate_bs", math.ceil(edits / int(values.get("batch_size", edits)))))


def _steps(field: str) -> Reader:
    return lambda value, values: {COURSE + field: max(1, int(value) // _per_step(values))}


def _patience(value: Any, values: Values) -> Fields:
    """EasyEdit waits for so many batches, errata for so many looks at the validation part."""
    return {f"{COURSE}patience": max(1, int(value) // int(values.get("val_interval", value)))}


class LearnedHyperParams(HyperParams):
    """What the learned editors share."""

    keys = {
        "archive": given("editor"),
        "lr": f"{COURSE}rate",
        "grad_clip": f"{COURSE}clip",
        "seed": f"{COURSE}seed",
        "max_iters": _steps("steps"),
        "val_interval": _steps("every"),
        "early_stop_patience": _patience,
        "batch_size": lambda value, values: {f"{COURSE}batch": int(value) * _per_step(values)},
        "n_edits": beside,
        "accumulate_bs": beside,
        "train_base": only(False),
        "opt": only("Adam"),
        "early_stop_key": Unused("training stops by the total loss of the validation part"),
        "eval_only": Unused("an editor is trained by EditTrainer alone, and measured by errata.bench"),
        "final_eval": Unused("errata.bench measures a trained editor"),
        "dropout": Unused("the model is in eval mode"),
        "no_grad_layers": Unused("what needs no gradient gets none"),
        "lr_lr": Unused("the rates of the edit are learned as fast as the rest"),
        "lr_scale": Unused("the rates of the edit are those that were learned"),
        **dict.fromkeys(("val_batch_size", "val_steps"), Unused("64 cases of the validation set are looked at")),
        **dict.fromkeys(("save", "model_save_pt"), Unused("the state is written at every look at the validation part")),
        **dict.fromkeys(
            ("silent", "verbose", "debug", "log_interval", "eval_log_interval", "log_errors"),
            Unused("the losses of every step are in a file beside the editor"),
        ),
    }

    def settings(self, lm: LM) -> Fields:
        return {k: v for k, v in super().settings(lm).items() if not k.startswith(COURSE)}

    def prepared(self, lm: LM) -> Trained:
        """The method with its trained editor."""
        how = self.method.preset(lm, **self.settings(lm))
        assert isinstance(how, Trained)
        if not how.editor:
            raise UsageError(
                f"{self.alg_name} needs an editor that was trained for {lm.name}, and the file names none; "
                "train one with EditTrainer, then give its file as archive"
            )
        self._check_editor(lm, editors.find(how.editor))
        return how

    def untrained(self, lm: LM) -> Trained:
        """The method as the training of an editor begins with it."""
        how = self.method.preset(lm, **{k: v for k, v in self.settings(lm).items() if k != "editor"})
        assert isinstance(how, Trained)
        return how

    def training(self, lm: LM) -> Course:
        """How an editor is trained; what the file lacks is the preset's."""
        said = {k.removeprefix(COURSE): v for k, v in super().settings(lm).items() if k.startswith(COURSE)}
        return Course(**{**presets.course(self.errata_name, lm), **checked(Course, said, "a training")})

    def _check_editor(self, lm: LM, editor: Editor) -> None:
        """Whether the editor has the matrices and the network that the file names."""
        was, said = editor.about["settings"], self.settings(lm)
        for field in said.keys() & {"at", "rank", "depth"}:
            trained, wanted = was[field], said[field]
            if field == "at":
                trained, wanted = ([site.name for site in places(lm, at)] for at in (trained, wanted))
            if trained != wanted:
                raise UsageError(f"the editor was trained with {field} = {trained}, and the file says {wanted}")


class TapHyperParams(LearnedHyperParams):
    """What the editors share that work on a gradient: which matrices, and what the edit counts in training."""

    keys = {
        "inner_params": modules("at"),
        "cedit": lambda value, values: {"weight": float(value) / float(values.get("cloc", 1.0))},
        "cloc": beside,
        "cbase": Unused("the base is not trained"),
    }


PUBLISHED: Fields = {"whiten": False, "polyak": False}
"""EasyEdit's rates are of inputs as they are, and all of a length; those of errata's preset for almanac are neither."""


class MENDHyperParams(TapHyperParams):
    """MEND's."""

    alg_name, errata_name = "MEND", "mend"
    keys = {
        "edit_lr": lambda value, _: {"step": value, "tokens": "all", **PUBLISHED},
        "rank": "rank",
        "n_hidden": lambda value, _: {"depth": int(value) + 1},
        "hidden_dim": only(None),
        "mlp_class": only("IDMLP"),
        "act": only("relu"),
        "init": only("id"),
        **dict.fromkeys(("norm", "combine", "shared"), only(True)),
        **dict.fromkeys(("one_sided", "x_only", "delta_only"), only(False)),
    }


class MENDTrainingHparams(MENDHyperParams):
    """MEND's, for `EditTrainer`."""


class MALMENHyperParams(TapHyperParams):
    """MALMEN's."""

    alg_name, errata_name = "MALMEN", "malmen"
    keys = {
        "lr": lambda value, _: {"step": value, "ridge": 1.0, "rounds": 1, **PUBLISHED},
        "meta_lr": f"{COURSE}rate",
        "max_grad_norm": f"{COURSE}clip",
        "loc_coef": lambda value, _: {"weight": 1 / float(value)},
        "rank": "rank",
        "n_blocks": "depth",
        "token": Choice({"mask": {"tokens": "all"}, "ans": {"tokens": "target"}}),
        "editor_batch_size": Unused("edits are run in passes as large as memory allows"),
    }


class MALMENTrainingHparams(MALMENHyperParams):
    """MALMEN's, for `EditTrainer`."""


class KEHyperParams(TapHyperParams):
    """KE's, of which EasyEdit has the files alone."""

    alg_name, errata_name = "KE", "ke"
    keys = {"edit_lr": Unused("an update is at most `step` gradients long, which is the preset's")}


class KETrainingHparams(KEHyperParams):
    """KE's, for `EditTrainer`."""


class SERACHparams(LearnedHyperParams):
    """SERAC's."""

    alg_name, errata_name = "SERAC", "serac"
    keys = {
        "inner_params": Unused("the base is not changed"),
        **dict.fromkeys(
            ("small_name", "cls_name", "cls_class", "lora", "freeze", "freeze_cntr", "dist_heads", "cos", "square"),
            Unused("both networks are of the model's own vocabulary, and none is pretrained"),
        ),
        **dict.fromkeys(
            ("edit_lr", "edit_bs", "cedit", "cloc", "cbase", "unlikelihood", "supervised", "soft_weighting"),
            Unused("only the classifier is learned, from prompts inside and outside a scope"),
        ),
        **dict.fromkeys(
            ("cross_attend", "checkpoint_grad", "bound_embeds", "use_all_negatives"),
            Unused("the classifier compares vectors of whole texts"),
        ),
    }


class SERACTrainingHparams(SERACHparams):
    """SERAC's, for `EditTrainer`."""


class EditTrainer:
    """Trains the editor of a learned method.

    Args:
        config: the settings, of a `*TrainingHparams` class.
        train_set: what is learned from.
        val_set: what says when to stop, and is not learned from.
    """

    def __init__(self, config: LearnedHyperParams, train_set: Dataset, val_set: Dataset) -> None:
        self.config, self.train_set, self.val_set = config, train_set, val_set
        self.lm = config.loaded()
        self.model = self.lm.model
        folder = Path(getattr(config, "results_dir", None) or "./results")
        name = self.lm.name.rstrip("/").rpartition("/")[2]
        self.save_path = folder / "models" / config.alg_name / name
        """Where the trained editor is written. A training that was stopped goes on from what is there."""

    def run(self) -> Editor:
        """Train, and write the editor to `save_path`; the losses of every step are beside it, in JSON lines."""
        self.save_path.parent.mkdir(parents=True, exist_ok=True)
        how, course = self.config.untrained(self.lm), self.config.training(self.lm)
        places = {"out": self.save_path, "log": self.save_path.with_name(f"{self.save_path.name}.jsonl")}
        return how.train(self.lm, self.train_set.cases, course, held=self.val_set.cases, progress=_tell, **places)


def _tell(step: int, losses: Losses, held: bool) -> None:
    if held:
        log.info("step %d, validation: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in losses.items()))
