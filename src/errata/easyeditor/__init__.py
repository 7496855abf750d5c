"""EasyEdit's door: its documented interface (https://github.com/zjunlp/EasyEdit) on errata's methods.

    from errata.easyeditor import BaseEditor, ROMEHyperParams

Scripts and YAML files written for EasyEdit run with the import changed. What differs is said where it matters: a YAML
key without a counterpart is named with the reason, `edited_model` really is edited, and sequential scores are taken
after all edits.
"""

from .datasets import CounterFactDataset, KnowEditDataset, WikiRecentDataset, ZsreDataset
from .editor import BaseEditor
from .hparams import HyperParams
from .learned import (
    EditTrainer,
    KEHyperParams,
    KETrainingHparams,
    MALMENHyperParams,
    MALMENTrainingHparams,
    MENDHyperParams,
    MENDTrainingHparams,
    SERACHparams,
    SERACTrainingHparams,
)
from .methods import (
    AlphaEditHyperParams,
    EMMETHyperParams,
    FTHyperParams,
    GraceHyperParams,
    IKEHyperParams,
    KNHyperParams,
    LoRAHyperParams,
    MELOHyperParams,
    MEMITHyperParams,
    PMETHyperParams,
    QLoRAHyperParams,
    R_ROMEHyperParams,
    ROMEHyperParams,
    UltraEditHyperParams,
    WISEHyperParams,
)

__all__ = [
    "BaseEditor",
    "EditTrainer",
    "HyperParams",
    "ROMEHyperParams",
    "R_ROMEHyperParams",
    "MEMITHyperParams",
    "EMMETHyperParams",
    "PMETHyperParams",
    "AlphaEditHyperParams",
    "UltraEditHyperParams",
    "KNHyperParams",
    "FTHyperParams",
    "LoRAHyperParams",
    "QLoRAHyperParams",
    "MENDHyperParams",
    "MENDTrainingHparams",
    "MALMENHyperParams",
    "MALMENTrainingHparams",
    "KEHyperParams",
    "KETrainingHparams",
    "GraceHyperParams",
    "MELOHyperParams",
    "WISEHyperParams",
    "SERACHparams",
    "SERACTrainingHparams",
    "IKEHyperParams",
    "ZsreDataset",
    "CounterFactDataset",
    "KnowEditDataset",
    "WikiRecentDataset",
]
