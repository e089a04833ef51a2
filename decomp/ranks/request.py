"""Parsing of ``ranks=`` to one rule or fixed ranks per layer name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from typing_extensions import TypeAliasType

from decomp._util.naming import matches, some
from decomp.ranks.rule import CandidateLike, FunctionRule, Ranks, Rule

RankSpec = TypeAliasType("RankSpec", str | int | tuple[int, ...] | Rule | Callable[[CandidateLike], Ranks])
"""Ranks of one layer or of all: the name of a rule, a rule, a function used as one, or fixed ranks."""


@dataclass(frozen=True)
class Fixed:
    """Ranks given by the user; ``exact`` if for one layer by its full name."""

    ranks: int | tuple[int, ...]
    exact: bool = False

    def fit(
        self, limits: Ranks, preset: tuple[int | None, ...] = (), *, is_matrix: bool = True
    ) -> tuple[Ranks, bool]:
        """The ranks of a layer, clamped to its limits, and whether that changed them.

        An int is an upper bound, and sets every component that ``preset`` does not. For a matrix a tuple means its
        smallest entry; also for the matrices of a recurrent layer, unless it has an entry for each of them.

        Raises:
            ValueError: there are too many or too few entries, or a rank for one named layer exceeds its limit.
        """
        if isinstance(self.ranks, int):
            requested = tuple(p or self.ranks for p in preset or (None,) * len(limits))
            bounds = (max(limits),) * len(limits)
        elif is_matrix and (len(limits) == 1 or len(self.ranks) != len(limits)):
            requested, bounds = (min(self.ranks),) * len(limits), limits
        else:
            requested, bounds = self.ranks, limits
        if len(requested) != len(limits):
            raise ValueError(
                f"ranks={self.ranks} has {len(requested)} entries, {len(limits)} are needed: e.g. {limits}"
            )
        if self.exact and any(rank > limit for rank, limit in zip(requested, bounds, strict=True)):
            raise ValueError(f"ranks={self.ranks} exceeds its largest ranks: write at most {limits}")
        ranks = tuple(min(rank, limit) for rank, limit in zip(requested, limits, strict=True))
        return ranks, ranks != requested


def parse_spec(spec: Any, rules: Mapping[str, Rule], *, exact: bool = False) -> "Rule | Fixed":
    """Turn a rule's name, a rule, an int or a tuple into a rule or fixed ranks.

    Raises:
        TypeError: the value is no rank; a float is refused because it is ambiguous.
        ValueError: the name is unknown or a rank is below 1.
    """
    if isinstance(spec, str):
        if spec not in rules:
            raise ValueError(
                f"ranks={spec!r} is no rank rule: write one of {sorted(rules)}, or decomp.ranks.energy(0.9)"
            )
        return rules[spec]
    if isinstance(spec, float):
        raise TypeError(
            f"ranks={spec} can mean three things: write decomp.ranks.energy({spec}) (share of the squared "
            f"singular values), decomp.ranks.params({spec}) or decomp.ranks.macs({spec}) (share of a layer's cost)"
        )
    if not callable(spec) and not isinstance(spec, bool):
        try:
            numbers = tuple(map(index, spec)) if isinstance(spec, tuple | list) else (index(spec),)
        except TypeError:
            numbers = ()
        if numbers and min(numbers) < 1:
            raise ValueError(f"ranks={spec}: every rank must be at least 1; keep a layer dense with exclude=")
        if numbers:
            return Fixed(numbers if isinstance(spec, tuple | list) else numbers[0], exact)
    if callable(spec) and not isinstance(spec, type):
        is_rule = hasattr(spec, "reads_spectra") and hasattr(spec, "nothing")
        return spec if is_rule else FunctionRule(spec)
    hint = f"; did you mean {spec.__name__}()?" if isinstance(spec, type) else ""
    raise TypeError(
        f"ranks={spec!r} is not understood: write a rule's name ({', '.join(sorted(rules))}), a rule, an int, "
        f"a tuple of ints, a mapping from globs to any of these, or a Plan{hint}"
    )


def parse_request(
    request: Any,
    names: Mapping[str, Sequence[str]],
    rules: Mapping[str, Rule],
    refused: Mapping[str, str],
) -> Callable[[str], "Rule | Fixed | None"]:
    """Return the rule or fixed ranks of each layer; in a mapping the last glob that matches wins.

    Args:
        request: what the user gave as ``ranks=``.
        names: all names of each layer that can be decomposed, by the first.
        rules: the rules by name.
        refused: the reasons of the others, by all their names.

    Raises:
        ValueError: a glob matches no layer.
    """
    if not isinstance(request, Mapping):
        everywhere = parse_spec(request, rules)
        return lambda name: everywhere
    known = {alias for aliases in names.values() for alias in aliases}
    parsed: list[tuple[str, Rule | Fixed]] = []
    for glob, spec in request.items():
        if not isinstance(glob, str) or not any(matches(name, glob) for name in known):
            raise ValueError(_no_match(glob, sorted(known), refused))
        parsed.append((glob, parse_spec(spec, rules, exact=glob in known)))

    def matching(name: str, glob: str) -> bool:
        return any(matches(alias, glob) for alias in names[name])

    return lambda name: next((rule for glob, rule in reversed(parsed) if matching(name, glob)), None)


def _no_match(glob: Any, known: Sequence[str], refused: Mapping[str, str]) -> str:
    text = f"ranks={{{glob!r}: ...}} matches no layer that could be decomposed"
    found = [name for name in refused if isinstance(glob, str) and matches(name, glob)]
    if found:
        more = f", and {len(found) - 1} more that cannot be either" if len(found) > 1 else ""
        text += f": {found[0]!r} cannot ({refused[found[0]]}){more}"
    return f"{text}; those that can are {some(known)}"
