"""Causal tracing: which hidden states carry a fact from the subject to the answer, and so where a model can be edited.

Meng et al. 2022 (ROME), https://arxiv.org/abs/2202.05262, section 2. Noise on the subject's embeddings makes the model
lose its answer; then the clean state of one token at one layer is put back, and what p(answer) gains by that is the
indirect effect of that state.
"""

from .drawing import Map as Map
from .drawing import check_drawable as check_drawable
from .proposing import Proposal as Proposal
from .proposing import Scan as Scan
from .proposing import propose as propose
from .proposing import scan as scan
from .restoring import Kind as Kind
from .restoring import known as known
from .restoring import noise_of as noise_of
from .tracing import ROLES as ROLES
from .tracing import Average as Average
from .tracing import Trace as Trace
from .tracing import average as average
from .tracing import trace as trace
