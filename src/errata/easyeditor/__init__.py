"""EasyEdit's door: its documented interface (https://github.com/zjunlp/EasyEdit) on errata's methods.

    from errata.easyeditor import BaseEditor, ROMEHyperParams

Scripts and YAML files written for EasyEdit run with the import changed. What differs is said where it matters: a YAML
key without a counterpart is named with the reason, `edited_model` really is edited, and sequential scores are taken
after all edits.
"""

from .datasets import CounterFactDataset, KnowEditDataset, WikiRecentDataset, ZsreDataset
from .editor import BaseEditor
from .hparams import (
    AlphaEditHyperParams,
    EMMETHyperParams,
    FTHyperParams,
    GraceHyperParams,
    HyperParams,
    IKEHyperParams,
    KNHyperParams,
    MEMITHyperParams,
    PMETHyperParams,
    R_ROMEHyperParams,
    ROMEHyperParams,
    UltraEditHyperParams,
)

__all__ = [
    "BaseEditor",
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
    "GraceHyperParams",
    "IKEHyperParams",
    "ZsreDataset",
    "CounterFactDataset",
    "KnowEditDataset",
    "WikiRecentDataset",
]
