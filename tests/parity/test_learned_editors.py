"""MEND and MALMEN against their authors' code: the update, given the network's weights and what the tokens showed.

`mend.safetensors` is what GradientTransform and the update of algs/mend.py (eric-mitchell/mend at e04fdb9c) made of two
matrices of one shape, 7 tokens each, with random weights (seed 0, rank 5, two layers); `malmen.safetensors` what
predict_param_shifts and update_hypernet of editor/malmen.py (ChenmienTan/malmen at 1df295dc) made of 10 tokens in two
cached batches, and the gradients that reached the network for a random gradient of the update. Both ran as published,
with modules that these functions don't call (higher, omegaconf, wandb) left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from errata import MALMEN, MEND
from errata.lm import Site
from errata.methods.malmen import solved
from errata.parts.basis import Basis
from errata.parts.hyper import Layer, TapNet
from errata.parts.near import Near
from errata.parts.taps import Taps

HERE = Path(__file__).parent
SITES = [Site(name, nn.Linear(6, 4, bias=False)) for name in ("a", "b")]


def network(method: type[MEND], given: dict[str, Tensor], names: dict[str, str]) -> nn.ModuleDict:
    """A network with the recorded weights, {ours: theirs} in each layer."""
    net = method.net(6, 4, 5, 2, 2, 1.0, method.first)
    with torch.no_grad():
        for i, layer in enumerate(net.layers):
            assert isinstance(layer, Layer)
            for ours, theirs in names.items():
                value = given[f"net/{theirs.format(i)}"]
                getattr(layer, ours).copy_(value.T if theirs.endswith((".A", ".B")) else value)
    return nn.ModuleDict({"4x6": net, "basis": Basis(())})


def statistics(net: TapNet, n: Tensor, mean: Tensor, squares: Tensor) -> None:
    for ours, value in (("n", n), ("mean", mean), ("squares", squares)):
        getattr(net.normal, ours).copy_(value)


def seen(given: dict[str, Tensor], rows: slice = slice(None)) -> Taps:
    K, G = ({name: given[f"{i}/{side}"][rows] for i, name in enumerate("ab")} for side in "KG")
    m = len(K["a"])
    return Taps(torch.zeros(m, dtype=torch.long), torch.arange(m), K, G, torch.ones(m))


def test_mends_update_is_the_authors():
    given = load_file(HERE / "mend.safetensors")
    names = {"U": "{}/u", "V": "{}/v", "bias": "{}/bias", "scale": "{}/scale", "offset": "{}/offset"}
    nets = network(MEND, given, names)
    statistics(nets["4x6"], given["net/n"], given["net/mean"], given["net/squares"])
    with torch.no_grad():
        nets["4x6"].log_rate.copy_(given["net/rate"].log())
        found = MEND(at=("a", "b")).factors(None, nets, SITES, seen(given), [])  # type: ignore[arg-type]
    for i, site in enumerate(SITES):
        _, left, right = found[site.name]
        wanted = -given[f"{i}/update"]  # they add where we descend
        torch.testing.assert_close(left.T @ right, wanted, atol=1e-6, rtol=1e-5)


@pytest.fixture
def malmen() -> tuple[dict[str, Tensor], nn.ModuleDict]:
    given = load_file(HERE / "malmen.safetensors")
    block = "blocks.{}."
    names = {"V": block + "A", "U": block + "B", "bias": block + "bias"}
    names |= {"scale": block + "scale.weight", "offset": block + "shift.weight"}
    nets = network(MALMEN, given, names)
    net = nets["4x6"]
    statistics(net, *(given[f"net/normalizer.{k}"] for k in ("n", "mean", "var")))
    with torch.no_grad():
        net.log_rate.copy_(given["net/lr.weight"][:, 0].log())
        net.log_ridge.copy_(given["net/lamda.weight"][:, 0])
    return given, nets


@pytest.mark.parametrize("sizes", [[10], [5, 5], [1] * 10])
def test_malmens_update_is_the_authors_in_any_passes(malmen, sizes):
    """Adding pass by pass is the direct normal equation: a batch of edits loses nothing by its size."""
    given, nets = malmen
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    passes = [seen(given, slice(a, a + n)) for a, n in zip(starts, sizes, strict=True)]
    with torch.no_grad():
        found = solved(MALMEN(at=("a", "b")).normal(nets, SITES, passes))
    for i, site in enumerate(SITES):
        wanted = given[f"{i}/update"]
        torch.testing.assert_close(
            found[site.name][1].float(), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4
        )
        K, net = given[f"{i}/K"].double(), nets["4x6"]
        V = net.values(given[f"{i}/K"], given[f"{i}/G"], i).double()
        direct = torch.linalg.solve(K.T @ K + net.log_ridge[i].double().exp() * torch.eye(6).double(), K.T @ V).T
        torch.testing.assert_close(found[site.name][1], direct, atol=1e-9, rtol=1e-6)


def test_the_gradients_that_reach_malmens_network_are_the_authors(malmen, monkeypatch):
    """The loss of an update pulls at it as recorded; its way on to the network is ours."""
    given, nets = malmen
    from errata.methods import malmen as module

    monkeypatch.setattr(module, "places", lambda *_: SITES)

    class Given:
        def taps(self, _which: str) -> list[Taps]:
            return [seen(given, slice(0, 5)), seen(given, slice(5, 10))]

    monkeypatch.setattr(MALMEN, "near", lambda *_: Near(Given(), [], None))

    def pulled(self, lm, basis, sites, deltas, cases, draw, before):
        sum((deltas[n] * given[f"{i}/pull"]).sum() for i, n in enumerate("ab")).backward()
        return {"total": 0.0}

    monkeypatch.setattr(MALMEN, "_asked", pulled)
    MALMEN(at=("a", "b")).learn(None, nets, [], None)  # type: ignore[arg-type]
    net = nets["4x6"]
    theirs = {"V": "A", "U": "B", "bias": "bias", "scale": "scale.weight", "offset": "shift.weight"}
    for i, layer in enumerate(net.layers):
        for ours, name in theirs.items():
            wanted = given[f"grad/blocks.{i}.{name}"]
            wanted = wanted.T if name in "AB" else wanted
            torch.testing.assert_close(
                getattr(layer, ours).grad, wanted, atol=2e-4 * wanted.abs().max().item(), rtol=1e-3
            )
    torch.testing.assert_close(net.log_ridge.grad, given["grad/lamda.weight"][:, 0], atol=1e-7, rtol=1e-3)
    by_rate = given["grad/lr.weight"][:, 0] * given["net/lr.weight"][:, 0]  # theirs is the rate, ours its logarithm
    torch.testing.assert_close(net.log_rate.grad, by_rate, atol=1e-6, rtol=1e-3)
