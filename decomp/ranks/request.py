"""What a user may write for ``ranks=``, turned into one rule or fixed ranks per layer name."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import index
from typing import Any, TypeAlias

from decomp.ranks.rule import Ranks, Rule

RankSpec: TypeAlias = "str | int | tuple[int, ...] | Rule"


@dataclass(frozen=True)
class Fixed:
    """Ranks that the user wrote. ``exact`` where they were written for one layer by its full name."""

    ranks: int | tuple[int, ...]
    exact: bool = False

    def fit(
        self, limits: Ranks, preset: tuple[int | None, ...] = (), *, is_matrix: bool = True
    ) -> tuple[Ranks, bool]:
        """Fill every component, clamp it at its limit, and say whether that lowered the ranks.

        An int fills every component that ``preset`` does not, and is meant as "at most"; a tuple means its
        smallest entry for a matrix.

        Raises:
            ValueError: there are too many or too few entries, or a rank for one named layer is past its limit.
        """
        if isinstance(self.ranks, int):
            wanted = tuple(p or self.ranks for p in preset or (None,) * len(limits))
            most = (max(limits),) * len(limits)
        elif len(limits) == 1 and is_matrix:
            wanted, most = (min(self.ranks),), limits
        else:
            wanted, most = self.ranks, limits
        if len(wanted) != len(limits):
            raise ValueError(
                f"ranks={self.ranks} has {len(wanted)} entries, {len(limits)} are needed: e.g. {limits}"
            )
        if self.exact and any(rank > limit for rank, limit in zip(wanted, most, strict=True)):
            raise ValueError(f"ranks={self.ranks} is past its largest ranks: write at most {limits}")
        ranks = tuple(min(rank, limit) for rank, limit in zip(wanted, limits, strict=True))
        return ranks, ranks != wanted


def parse_spec(spec: Any, rules: Mapping[str, Rule], *, exact: bool = False) -> "Rule | Fixed":
    """Turn a rule's name, a rule, an int or a tuple into a rule or fixed ranks.

    Raises:
        TypeError: the value is no rank; a bare float is refused because it can mean three things.
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
        return spec  # type: ignore[no-any-return]
    hint = f"; did you mean {spec.__name__}()?" if isinstance(spec, type) else ""
    raise TypeError(
        f"ranks={spec!r} is not understood: write a rule's name ({', '.join(sorted(rules))}), a rule, an int, "
        f"a tuple of ints, a mapping from globs to any of these, or a Plan{hint}"
    )


def parse_request(
    request: Any, names: Iterable[str], rules: Mapping[str, Rule]
) -> Callable[[str], "Rule | Fixed | None"]:
    """Return the rule or fixed ranks of each layer name; in a mapping the last glob that matches wins.

    Raises:
        ValueError: a glob matches no layer.
    """
    if not isinstance(request, Mapping):
        everywhere = parse_spec(request, rules)
        return lambda name: everywhere
    names = set(names)
    parsed = []
    for glob, spec in request.items():
        if not isinstance(glob, str) or not _matching(glob, names):
            raise ValueError(f"ranks={{{glob!r}: ...}} matches no layer that could be decomposed: {_some(names)}")
        parsed.append((glob, parse_spec(spec, rules, exact=glob in names)))
    return lambda name: next((rule for glob, rule in reversed(parsed) if _matching(glob, [name])), None)


def _matching(glob: str, names: Iterable[str]) -> list[str]:
    """A name that is written out matches itself, whatever brackets it has."""
    return [name for name in names if name == glob or fnmatchcase(name, glob)]


def _some(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:most])) + (f", ... ({len(ordered)} in all)" if len(ordered) > most else "")
