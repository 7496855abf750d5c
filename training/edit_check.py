"""ROME on almanac by hand, many edits in one pass: how editable is a model, by layer? Independent of errata on purpose.

Notable: every edit is a row (or several) of one batch: the value search adds its own delta per row, and the edited model answers with
its own rank-one change per row, `out + (x . u_i) d_i`, so a hundred edits cost two dozen passes.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.functional import log_softmax


@dataclass
class Trial:
    """One edit to try and the prompts that judge it; `others` are the same subject's other facts as (prompt, object)."""

    template: str
    subject: str
    target: str
    paraphrases: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        return self.template.replace("{}", self.subject, 1)


def pad(rows: Sequence[list[int]]) -> torch.Tensor:
    return torch.tensor([r + [0] * (max(map(len, rows)) - len(r)) for r in rows])


def last_token(tokenizer, text: str, subject: str) -> int:
    """The index of the token that ends the (last mention of the) subject."""
    end = text.rindex(subject) + len(subject)
    code = tokenizer(text, return_offsets_mapping=True)
    return max(i for i, (a, b) in enumerate(code["offset_mapping"]) if a < end and b > a)


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def moment(model, tokenizer, texts: Sequence[str], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """E[k k^T] of what down_proj reads, over all tokens of the texts but BOS and padding."""
    sums = dict.fromkeys(layers, 0.0)
    count, keep = 0, None

    def reader(n):
        def hook(_, args, __):
            k = args[0][keep].double()
            sums[n] = sums[n] + k.T @ k

        return hook

    handles = [model.model.layers[n].mlp.down_proj.register_forward_hook(reader(n)) for n in layers]
    for start in range(0, len(texts), 64):
        rows = [tokenizer(t)["input_ids"][:256] for t in texts[start : start + 64]]
        keep = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
        for i, r in enumerate(rows):
            keep[i, 1 : len(r)] = True
        with torch.no_grad():
            model.model(input_ids=pad(rows), use_cache=False)
        count += int(keep.sum())
    for h in handles:
        h.remove()
    return {n: s / count for n, s in sums.items()}


def rome(
    model, tokenizer, trials, layer, c, prefixes, *, steps=25, lr=0.5, clamp=4.0, kl=0.0625, decay=0.5, ridge=1e-2
):
    """The rank-one changes: (directions (n, d), keys' duals u (n, k), relative norms (n,), last losses (n,))."""
    per, n = len(prefixes) + 2, len(trials)  # rows an edit: bare, after each prefix, the essence
    rows, places, spans = [], [], []
    for t in trials:
        for lead in ["", *prefixes]:
            asked = lead + t.prompt
            full = tokenizer(f"{asked} {t.target}")["input_ids"]
            begin = len(tokenizer(asked)["input_ids"])
            rows.append(full[:-1])
            places.append(last_token(tokenizer, asked, t.subject))
            spans.append((begin, full))
        essence = f"{t.subject} is a"
        rows.append(tokenizer(essence)["input_ids"])
        places.append(last_token(tokenizer, essence, t.subject))
        spans.append(None)
    ids, column, row = pad(rows), torch.tensor(places), torch.arange(len(rows))
    owner = row // per
    module = model.model.layers[layer].mlp.down_proj
    seen = {}

    def read(_, args, out):
        seen["k"], seen["v"] = args[0][row, column].detach(), out[row, column].detach()

    after, base_hidden, arguments = model.model.layers[layer + 1 :], [], {}

    def record(_, args, kwargs):  # what the layer above is called with: the search starts there
        base_hidden.append((args[0] if args else kwargs["hidden_states"]).detach())
        arguments.update({k: v for k, v in kwargs.items() if k != "hidden_states"})

    recorder = after[0].register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad(), hooked(module, read):
        logits = model(input_ids=ids, use_cache=False).logits
    recorder.remove()
    ends = torch.tensor([len(r) - 1 for r in rows])
    essence_rows = row[per - 1 :: per]
    base = log_softmax(logits[essence_rows, ends[essence_rows]], -1)
    keys = seen["k"].view(n, per, -1)[:, : per - 1].mean(1)
    norm = seen["v"].view(n, per, -1)[:, 0].norm(dim=-1)
    where = [(r, b + j - 1, f[b + j]) for r, s in enumerate(spans) if s for b, f in [s] for j in range(len(f) - b)]
    at_r, at_c, want = (torch.tensor(x) for x in zip(*where, strict=True))
    share = torch.zeros(len(rows)).index_add_(0, at_r, torch.ones(len(at_r)))
    delta = torch.zeros(n, norm_size := seen["v"].shape[-1], requires_grad=True)
    assert norm_size == module.out_features

    optimizer = torch.optim.Adam([delta], lr=lr)
    for step in range(steps + 1):
        hidden = base_hidden[0].clone()
        hidden[row, column] += delta[owner]
        for block in after:
            hidden = block(hidden, **arguments)
        hidden = model.model.norm(hidden)
        logp = log_softmax(model.lm_head(hidden[at_r, at_c]), -1).gather(-1, want[:, None])[:, 0] / share[at_r]
        nll = -torch.zeros(n).index_add(0, owner[at_r], logp) / (per - 1)
        now = log_softmax(model.lm_head(hidden[essence_rows, ends[essence_rows]]), -1)
        far = (base.exp() * (base - now)).sum(-1)
        total = nll + kl * far + decay * delta.norm(dim=-1) / norm**2
        if step == steps:
            break
        active = (total > 5e-2).float().detach()
        (grad,) = torch.autograd.grad((total * active).sum(), delta)
        kept = delta.detach().clone()
        delta.grad = grad
        optimizer.step()
        with torch.no_grad():
            delta.copy_(torch.where(active[:, None] > 0, delta, kept))
            size = delta.norm(dim=-1).clamp(min=1e-9)
            delta.mul_((clamp * norm / size).clamp(max=1)[:, None])
    c = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    u = torch.linalg.solve(c, keys.double().T).T
    u = u / (u * keys.double()).sum(-1, keepdim=True)
    delta = delta.detach()
    return delta, u.float(), delta.norm(dim=-1) / norm, nll.detach()


def answers(model, tokenizer, layer, delta, u, asked: Sequence[tuple[int, str, str]]) -> list[tuple[bool, str]]:
    """For each (edit, prompt, object): does the edited model recite the object, and what is its first token."""
    out = []
    module = model.model.layers[layer].mlp.down_proj
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        full = [tokenizer(f"{p} {o}")["input_ids"] for _, p, o in part]
        begin = [len(tokenizer(p)["input_ids"]) for _, p, _ in part]
        which = torch.tensor([e for e, *_ in part])

        def change(_, args, y, which=which):
            if delta is None:
                return y
            return y + torch.einsum("bsk,bk->bs", args[0], u[which])[..., None] * delta[which][:, None]

        with torch.no_grad(), hooked(module, change):
            best = model(input_ids=pad(full), use_cache=False).logits.argmax(-1)
        for i, (f, b) in enumerate(zip(full, begin, strict=True)):
            out.append((best[i, b - 1 : len(f) - 1].tolist() == f[b:], tokenizer.decode(best[i, b - 1])))
    return out


def score(model, tokenizer, trials, layer, delta, u) -> dict[str, float]:
    """Shares: the target recited; paraphrases too; neighbours answered as before; the subject's other facts still recited."""
    asks, kinds = [], []
    for i, t in enumerate(trials):
        for kind, prompts in (("edit", [t.prompt]), ("para", t.paraphrases), ("neighbour", t.neighbours)):
            asks += [(i, p, t.target) for p in prompts]
            kinds += [kind] * len(prompts)
        asks += [(i, p, o) for p, o in t.others]
        kinds += ["others"] * len(t.others)
    before = answers(model, tokenizer, layer, None, None, asks)
    after = answers(model, tokenizer, layer, delta, u, asks)
    out = {}
    for kind in ("edit", "para", "neighbour", "others"):
        rows = [(b, a) for b, a, k in zip(before, after, kinds, strict=True) if k == kind]
        if kind == "others":
            rows = [r for r in rows if r[0][0]]
        good = [a[1] == b[1] if kind == "neighbour" else a[0] for b, a in rows]
        out[kind] = sum(good) / max(1, len(good))
    return out
