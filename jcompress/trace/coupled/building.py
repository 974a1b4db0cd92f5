"""A traced function as frames: the dimensions of every value tied by the rules of its equations.

What is computed from constants alone is made at its full size, and each use takes what it needs. So what two layers
share of it, such as the slopes of a position bias, does not tie them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import NO_CHOICE, Chosen, Frame, Known, Rule, Site


class Build:
    """What is gathered while frames are built.

    Args:
      rule: that of an equation.
      default: that of an equation whose primitive cannot be read.

    Attributes:
      unread: primitives without a rule, and how often each was met.
      contracted: the dimensions over which products sum, as their operands wrote them.
      traced: derivatives of custom rules, by equation.
      choices: dimensions along which positions were chosen, and why they stay unless what is chosen can be cut too.
      experts: pairs of a dimension along which something was chosen, and one that has what is chosen.
      open: functions with custom derivatives whose derivative is being built; a rule may call its own function.
    """

    def __init__(self, rule: Callable[[jax_core.JaxprEqn], Rule], default: Rule) -> None:
        self.rule, self.default = rule, default
        self.unread: Counter[str] = Counter()
        self.contracted: list[Dim] = []
        self.traced: dict[Any, Any] = {}
        self.choices: list[tuple[Dim, str]] = []
        self.experts: list[tuple[Dim, Dim]] = []
        self.open: dict[str, Site] = {}

    def frame(
        self,
        closed: jax_core.ClosedJaxpr,
        ins: Sequence[Dims],
        known: Sequence[Known | None] = (),
        trained: Sequence[bool] | None = None,
        chosen: Sequence[Chosen] = (),
    ) -> Frame:
        """A call of ``closed`` on values of these dimensions.

        Args:
          closed: what is called.
          ins: the dimensions of its inputs.
          known: how those are made that are constants.
          trained: which of them depend on parameters; all of them by default.
          chosen: for each, the dimensions along which its numbers are positions that were chosen.
        """
        return _Building(self, closed, ins, known, trained, chosen).frame

    def settle(self, params: Sequence[Dims]) -> None:
        """Tie a choice to what is chosen, where that lies on parameters: a router's columns to its experts."""
        own = {leaf for value in params for d in value for leaf in terms.leaves(d)}
        summed = {leaf for d in self.contracted for leaf in terms.leaves(d)}
        free = set()
        for choice, expert in self.experts:
            choice, expert = terms.find(choice), terms.find(expert)
            plain = choice.kind == expert.kind == "leaf" and not choice.pinned and not expert.pinned
            # What is compared with its own scores, as where loads are balanced, has experts if products sum over it.
            if plain and expert in (summed if choice is expert else own):
                terms.unify(choice, expert)
                free.add(terms.find(expert))
        for choice, reason in self.choices:
            if terms.find(choice) not in free:
                terms.pin([choice], reason)


class _Building:
    """One frame while it is built."""

    def __init__(
        self,
        build: Build,
        closed: jax_core.ClosedJaxpr,
        ins: Sequence[Dims],
        known: Sequence[Known | None],
        trained: Sequence[bool] | None,
        chosen: Sequence[Chosen],
    ) -> None:
        jaxpr, self.build, self.frame = closed.jaxpr, build, Frame(closed, list(ins))
        self.dims: dict[Any, Dims] = dict(zip(jaxpr.invars, ins, strict=True))
        self.trained = {v for i, v in enumerate(jaxpr.invars) if trained is None or trained[i]}
        self.chosen = {v: c for v, c in zip(jaxpr.invars, chosen, strict=False) if c}
        self.frame.given = [(i, k) for i, k in enumerate(known) if k is not None]
        self.known: dict[Any, Known] = {jaxpr.invars[i]: k for i, k in self.frame.given}
        for v, c in zip(jaxpr.constvars, closed.consts, strict=True):
            self.known[v] = Known(terms.fresh(np.shape(c)), c)
            self.frame.constants.append(self.known[v])
        for eqn in walk.equations(jaxpr):
            self.equation(eqn)
        self.frame.results = [self.used(x) for x in jaxpr.outvars]
        self.frame.outs = [self.dims_of(x) for x in self.frame.results]
        self.frame.chosen = [self.choice(x) for x in jaxpr.outvars]
        self.frame.known = [self.constant(x) for x in jaxpr.outvars]

    def constant(self, x: Any) -> Known | None:
        """What is known of an operand, or None."""
        return None if isinstance(x, jax_core.Literal) else self.known.get(x)

    def choice(self, x: Any) -> Chosen:
        """Along which dimensions the numbers of an operand are positions that were chosen."""
        return NO_CHOICE if isinstance(x, (jax_core.Literal, Known)) else self.chosen.get(x, NO_CHOICE)

    def equation(self, eqn: jax_core.JaxprEqn) -> None:
        """Tie the dimensions of an equation; with only constants for operands it is one itself."""
        known = [self.constant(x) for x in eqn.invars]
        pairs = list(zip(eqn.invars, known, strict=True))
        if not eqn.effects and all(k is not None or isinstance(x, jax_core.Literal) for x, k in pairs):
            operands = [x if k is None else k for x, k in pairs]
            site = self.site(eqn, operands, [object()] * len(eqn.outvars), known)
            site.places = [Known(d, None, eqn, operands, i) for i, d in enumerate(site.outs)]
            self.known.update(zip(eqn.outvars, site.places, strict=True))
            self.frame.fixed.append(site)
            return
        site = self.site(eqn, [self.used(x) for x in eqn.invars], list(eqn.outvars), known)
        self.dims.update(zip(eqn.outvars, site.outs, strict=True))
        self.trained |= set(eqn.outvars) if any(site.trained) else set()
        self.chosen.update(self.chosen_by(site))
        self.known.update({v: k for v, k in zip(eqn.outvars, site.made, strict=False) if k is not None})
        self.frame.sites.append(site)

    def chosen_by(self, site: Site) -> dict[Any, Chosen]:
        """The results of an equation whose numbers are positions that were chosen."""
        if site.choices is not None:
            found = site.choices
        else:
            passed = NO_CHOICE.union(*site.chosen) if site.rule.tells or not site.rule.reads else NO_CHOICE
            found = [passed] * len(site.places)
        pairs = zip(site.places, site.eqn.outvars, found, strict=True)
        return {place: c for place, v, c in pairs if c and np.issubdtype(walk.aval(v).dtype, np.integer)}

    def used(self, x: Any) -> Any:
        """Where an operand stands; a constant has dimensions of its own for each use."""
        known = self.constant(x)
        if known is None:
            return x
        place = object()
        self.dims[place] = terms.fresh([d.size for d in known.dims])
        self.frame.uses.append((place, known, self.dims[place]))
        return place

    def site(self, eqn: jax_core.JaxprEqn, sources: list[Any], places: list[Any], known: list[Known | None]) -> Site:
        """One equation with its dimensions tied."""
        rule = self.build.rule(eqn)
        if rule is self.build.default:
            self.build.unread[eqn.primitive.name] += 1
        trained = [not isinstance(x, (jax_core.Literal, Known)) and x in self.trained for x in sources]
        chosen = [self.choice(x) for x in sources]
        site = Site(eqn, rule, [self.dims_of(x) for x in sources], sources, places, known, trained, chosen)
        site.outs = [tuple(d) for d in rule.dims(self.build, site)]
        return site

    def dims_of(self, x: Any) -> Dims:
        if isinstance(x, jax_core.Literal):
            return terms.fresh(np.shape(x.val))
        return x.dims if isinstance(x, Known) else self.dims[x]


def value_of(known: Known, largest: int = 1 << 16) -> np.ndarray | None:
    """A constant as an array, or None where it cannot be computed, or takes more numbers than this."""
    done: dict[Any, list[Any]] = {}

    def value(k: Any) -> Any:
        if not isinstance(k, Known):
            return k.val
        if k.eqn is None:
            return k.value
        if k.eqn not in done:
            if any(math.prod(walk.aval(v).shape) > largest for v in k.eqn.outvars):
                raise OverflowError
            done[k.eqn] = walk.bind(k.eqn, [value(x) for x in k.operands])
        return done[k.eqn][k.index]

    try:
        with jax.ensure_compile_time_eval():
            found = value(known)
    except (OverflowError, RecursionError):
        return None
    return None if isinstance(found, jax.core.Tracer) or np.size(found) > largest else np.asarray(found)
