"""Settings that were published for a model (or tuned, for almanac), from `presets.toml`, where each has its source.

A model is recognised by the shape in its config, never by its name or path. A model that is not listed gets the
settings for any model, and a warning that says so. What `errata tune` found for a model is kept by its fingerprint, and
comes before both.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from . import loading, store
from .errors import ErrataError, UsageError, unknown
from .lm import LM


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(resources.files("errata").joinpath("presets.toml").read_text())


def settings(lineage: Sequence[str], lm: LM | str, known: Collection[str] = (), tuned: bool = True) -> dict[str, Any]:
    """The settings of a method for a model, `{field: value}`; a field of its parent's that it lacks is among them.

    Args:
        lineage: its name, then those of the methods it is derived from; the first that has settings gives them.
        lm: a loaded model, the name of a preset (`gpt2-xl`), `almanac`, or a model's folder or name on the hub.
        known: fields that the caller sets, which need no place.
        tuned: whether what `errata tune` found comes before them.
    """
    name, config = (lm.name, lm.config) if isinstance(lm, LM) else (lm, None)
    models = _tables()["models"]
    if config is None and name not in models:
        config = _config(name)
    model = name if config is None else recognised(config)
    listed = _first(models[model], lineage) if model else None
    default = listed or _scaled(lineage, config if config is not None else models[name]["match"], known)
    default = {k: frozen(v) for k, v in default.items() if k not in ("source", "depth")}
    if not tuned:
        return default
    if isinstance(lm, LM) and (kept := tuning(lineage[0], lm)) is not None:
        return default | frozen(kept["settings"])
    if listed is None:
        _warn(lineage[0], name, {field: default[field] for field in _places(lineage) if field not in known})
    return default


def _first(rows: Mapping[str, Any], lineage: Sequence[str]) -> dict[str, Any] | None:
    return next((rows[name] for name in lineage if name in rows), None)


def keep(method: str, lm: LM, settings: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
    """Have `settings` use these fields of a method for a model from now on, in every process of this user."""
    path = _tuned(method, lm)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"method": method, "model": lm.name, "settings": settings, "evidence": evidence}
    store.write(path, json.dumps(kept, indent=1) + "\n")


def tuning(method: str, lm: LM) -> dict[str, Any] | None:
    """What `errata tune` kept of a method for a model: `method`, `model`, `settings` and `evidence`.

    Raises:
        ErrataError: the file is damaged.
    """
    path = _tuned(method, lm)
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(kept["settings"]), "evidence": dict(kept["evidence"]), **kept}
    except (ValueError, KeyError, TypeError) as error:
        raise ErrataError(f"{str(path)!r} is damaged ({error}); delete it, or run `errata tune` again") from error


def tunable(lineage: Sequence[str]) -> dict[str, Any]:
    """What tuning tries for a method: `places` (fields), `move` (shares of the depth) and `times` (factors by field).

    Raises:
        UsageError: nothing is known to try.
    """
    grids = _tables()["tune"]
    grid = _first(grids, lineage)
    if grid is None:
        raise UsageError(f"{lineage[0]} has nothing to tune; methods that have: {', '.join(sorted(grids))}")
    return {"places": list(_places(lineage)), "move": [0.0], "times": {}, **grid}


def _tuned(method: str, lm: LM) -> Path:
    return store.Store().folder / "presets" / f"{lm.fingerprint}-{method}.json"


def source(lineage: Sequence[str], lm: LM) -> str | None:
    """Where the settings of a method for a model are from, if it is listed or was tuned."""
    if (kept := tuning(lineage[0], lm)) is not None:
        scores = kept["evidence"]["score on the held-out facts"]
        return f"errata tune: {scores['tuned']:.2f}, default {scores['default']:.2f}"
    model = recognised(lm.config)
    listed = _first(_tables()["models"][model], lineage) if model else None
    return (listed or {}).get("source")


def course(method: str, lm: LM) -> dict[str, Any]:
    """How an editor for a model is trained, where that was tuned: `{field: value}`."""
    model = recognised(lm.config)
    found = _tables()["models"][model].get("courses", {}) if model else {}
    return {k: v for k, v in found.get(method, {}).items() if k != "source"}


def recognised(config: Any) -> str | None:
    """The name of the listed model whose shape a config has."""
    return next((name for name, t in _tables()["models"].items() if _matches(config, t["match"])), None)


def _matches(config: Any, shape: dict[str, Any]) -> bool:
    return all(getattr(config, key, None) == value for key, value in shape.items())


def _config(name: str) -> Any:
    here = isinstance(loading.located(name), Path)
    try:
        return loading.config(name).get_text_config()
    except ErrataError as error:
        if here:
            raise
        raise unknown("preset or model", name, _tables()["models"]) from error


def _places(lineage: Sequence[str]) -> dict[str, Any]:
    """The fields of a method that name a place, with its relative depth."""
    return (_first(_tables()["elsewhere"], lineage) or {}).get("depth", {})


def _scaled(lineage: Sequence[str], config: Any, known: Collection[str]) -> dict[str, Any]:
    """The method's settings for a model that has none: those for any model, at their relative depth."""
    depth = config["num_hidden_layers"] if isinstance(config, dict) else config.num_hidden_layers
    places = {field: _at(relative, depth) for field, relative in _places(lineage).items() if field not in known}
    found = {**(_first(_tables()["elsewhere"], lineage) or {}), **places}
    if "scaled" in found:  # what the caller sets is taken as it is
        found["scaled"] = [field for field in found["scaled"] if field not in known]
    return found


_warned: set[str] = set()
"""Models of which this process has said that they are not listed."""


def _warn(method: str, name: str, places: Mapping[str, Any]) -> None:
    if places and name not in _warned:
        _warned.add(name)
        where = " and ".join(f"{field} = {place}" for field, place in places.items())
        warnings.warn(
            f"{name} has no published settings: methods get those for any model ({method}: {where}); "
            f"`errata tune {name} --method {method}` finds better ones",
            stacklevel=5,
        )


def _at(relative: float | list[float], depth: int) -> int | tuple[int, ...]:
    if isinstance(relative, list):
        return tuple(sorted({min(depth - 1, round(r * depth)) for r in relative}))
    return min(depth - 1, round(relative * depth))


def frozen(value: Any) -> Any:
    """A value as a method's fields have it: tuples in place of the lists of TOML, YAML and JSON, at any depth."""
    if isinstance(value, dict):
        return {name: frozen(one) for name, one in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
