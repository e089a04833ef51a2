"""The explorer as widgets: it shows what an ``Exploration`` knows and passes on what is moved."""

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets
from torch import nn

from decomp._util import tables
from decomp.explorer import svg as sketches
from decomp.explorer.state import Exploration
from decomp.planning.choice import DENSE, Change, Choice
from decomp.planning.plan import Plan
from decomp.ranks import Ranks

NAME, METHOD, RANKS, COST = "180px", "150px", "430px", "170px"


class LayerRow:
    """The widgets of one layer; ``act`` runs what a widget asks for, with the name of the layer."""

    def __init__(self, name: str, state: Exploration, act: Callable[[Callable[[], None]], None]) -> None:
        self.name, self._state, self._act = name, state, act
        self._quiet = False
        choice = state.plan[name]
        short = f"<b>{escape(name or '(the model)')}</b><br><small>{escape(choice.layer)}</small>"
        title = widgets.HTML(short, layout=widgets.Layout(width=NAME))
        self.method = widgets.Dropdown(
            options=state.methods_of(name), value=self._method, layout=widgets.Layout(width="132px")
        )
        self.method.tooltip = f"how {name} is decomposed"
        self.held = widgets.Checkbox(
            description="hold", indent=False, layout=widgets.Layout(width="80px"), value=name in state.held
        )
        self.held.tooltip = "budgets and thresholds leave this layer alone"
        self.sliders: list[widgets.IntSlider] = []
        self._drawings: list[widgets.HTML] = []
        self._modes = widgets.VBox([], layout=widgets.Layout(width=RANKS))
        self._cost = widgets.HTML(layout=widgets.Layout(width=COST))
        choosing = widgets.VBox([self.method, self.held], layout=widgets.Layout(width=METHOD))
        self.box = widgets.HBox([title, choosing, self._modes, self._cost])
        self.box.add_class("decomp-row")
        self._limits: tuple[str, Ranks] = ("", ())
        self.method.observe(self._method_chosen, "value")
        self.held.observe(self._held_chosen, "value")
        self.update()

    @property
    def _choice(self) -> Choice:
        return self._state.plan[self.name]

    @property
    def _method(self) -> str:
        kept = not self._choice.ranks and self.name in self._state.held
        return DENSE if kept else self._state.layers[self.name].method.name

    def update(self) -> None:
        """Show what the plan says of the layer now; nothing that is shown here counts as chosen by hand."""
        candidate, choice = self._state.layers[self.name], self._choice
        self._quiet = True
        try:
            if self._limits != (candidate.method.name, candidate.limits):
                self._rebuild()
            self.method.value = self._method
            self.held.value = self.name in self._state.held
            shown = self._state.shown_ranks(self.name)
            pairs = zip(self.sliders, self._drawings, shown, candidate.output_spectra, strict=True)
            for slider, drawing, rank, spectrum in pairs:
                slider.value = rank
                drawing.value = sketches.spectrum(spectrum.values.max(0), rank)
            self._cost.value = _cost(choice)
        finally:
            self._quiet = False

    def _rebuild(self) -> None:
        candidate = self._state.layers[self.name]
        self._limits = (candidate.method.name, candidate.limits)
        self.sliders, self._drawings, lines = [], [], []
        for mode, limit in zip(candidate.method.rank_names, candidate.limits, strict=True):
            slider = widgets.IntSlider(
                limit, 1, max(limit, 2), description=mode, layout=widgets.Layout(width="290px")
            )
            slider.style.description_width = "34px"
            slider.disabled = limit == 1
            slider.tooltip = f"rank {mode} of {self.name}, at most {limit}"
            slider.observe(self._ranks_chosen, "value")
            drawing = widgets.HTML(layout=widgets.Layout(width="126px"))
            self.sliders.append(slider)
            self._drawings.append(drawing)
            lines.append(widgets.HBox([drawing, slider]))
        self._modes.children = lines

    def _ranks_chosen(self, change: object) -> None:
        if not self._quiet:
            limits = self._state.layers[self.name].limits
            wanted = tuple(min(s.value, limit) for s, limit in zip(self.sliders, limits, strict=True))
            self._act(lambda: self._state.choose_ranks(self.name, wanted))

    def _method_chosen(self, change: object) -> None:
        if not self._quiet:
            self._act(lambda: self._state.choose_method(self.name, self.method.value))

    def _held_chosen(self, change: object) -> None:
        if not self._quiet:
            self._act(lambda: self._state.hold(self.name, self.held.value))


def _cost(choice: Choice) -> str:
    if not choice.ranks:
        return f"<small><i>dense</i><br>{escape(choice.reason)}</small>"
    pairs = (("params", choice.params), ("MACs", choice.macs))
    lines = [
        f"{tables.number(c.after)} {name}{f' ({c.after / c.before:.0%})' if c.before else ''}" for name, c in pairs
    ]
    error = f"error {choice.error:.3f}"
    if choice.output_error is not None:
        error = f"error of output {choice.output_error:.3f}"
    return f"<small>{'<br>'.join(lines)}<br>{error}</small>"


ROWS_PER_PAGE = 8
NAMES = {"macs": "MACs", "params": "parameters", "seconds": "latency (estimate)"}
STYLE = """<style>
.decomp-explorer .decomp-row {border-top: 1px solid rgba(127, 127, 127, .3); padding: 4px 0; align-items: center}
.decomp-explorer .widget-html-content {line-height: 1.35; color: inherit}
.decomp-explorer {color: var(--jp-ui-font-color1, var(--vscode-foreground, inherit)); overflow-x: auto}
.decomp-cards {display: flex; gap: 12px; flex-wrap: wrap}
.decomp-cards div {border: 1px solid rgba(127, 127, 127, .4); border-radius: 4px; padding: 4px 12px}
.decomp-cards b {font-size: 1.25em}
.decomp-explorer svg {color: inherit; overflow: visible}
.decomp-gone {display: none}
.jupyter-widgets-disconnected .decomp-gone {display: block; border: 1px solid #e07b1a; padding: 4px 12px}
.decomp-explorer .jupyter-widgets-disconnected::before {display: none !important}
.decomp-explorer.jupyter-widgets-disconnected > :not(:first-child) {opacity: .4; pointer-events: none}
</style>
<div class="decomp-gone">The kernel that drew this is gone: run this cell again, after those above it.</div>"""


class Explorer:
    """What :func:`decomp.explore` returns: shown by Jupyter as widgets, and usable from the next cell.

    ``plan`` is the decision as it stands, ``model`` what the last Apply made. ``set_budget``, ``set_energy``,
    ``set_ranks``, ``set_method``, ``evaluate`` and ``apply`` do what the widgets do.
    """

    def __init__(self, state: Exploration) -> None:
        self._state = state
        self._model: nn.Module | None = None
        self._quiet = False
        self._by_budget = True
        self._rows: list[LayerRow] = []
        self._build()
        if state.problem:
            self._say(f"There is nothing to choose: {state.problem}.")
        else:
            self._fill()
            self.set_budget(**{self.kind.value: self.budget.value})
            self._say("Move a slider; Evaluate measures the plan, Apply hands it on as explorer.model.")

    @property
    def plan(self) -> Plan:
        """The decision as it stands; it may be edited and applied by itself."""
        return self._state.plan

    @property
    def model(self) -> nn.Module:
        """The model that the last Apply made.

        Raises:
            RuntimeError: nothing was applied yet.
        """
        if self._model is None:
            raise RuntimeError("nothing was applied yet: press Apply, or write explorer.apply()")
        return self._model

    @property
    def tried(self) -> list[Any]:
        """What was evaluated: each with ``plan``, ``totals`` and ``score``."""
        return list(self._state.tried)

    def set_budget(
        self, *, macs: float | None = None, params: float | None = None, seconds: float | None = None
    ) -> None:
        """Spend a share of the whole model's MACs, parameters or seconds, as the budget slider does."""
        given = {k: v for k, v in {"macs": macs, "params": params, "seconds": seconds}.items() if v is not None}
        if len(given) != 1 or not all(0 < share <= 1 for share in given.values()):
            raise ValueError(f"budget {given}: write one of macs=, params=, seconds= as a share in (0, 1]")
        ((kind, share),) = given.items()
        least = self._state.choose_budget(kind, share)
        self._by_budget = True
        self._moved(self.kind, kind)
        self._moved(self.budget, share)
        short = f"; the least that can be reached is {least:.1%}" if share < least else ""
        self._say(f"Chosen by a budget of {share:.0%} of the {NAMES[kind]}{short}.")
        self._refresh()

    def set_energy(self, share: float) -> None:
        """Keep a share of the squared singular values of each layer, as the energy slider does."""
        self._state.choose_energy(share)
        self._by_budget = False
        self._moved(self.energy, share)
        self._say(
            f"Chosen by an energy threshold: every unfolding keeps {share:.0%} of its squared singular values."
        )
        self._refresh()

    def set_ranks(self, layer: str, ranks: tuple[int, ...]) -> None:
        """Set the ranks of one layer and hold them."""
        self._act(lambda: self._state.choose_ranks(layer, ranks))

    def set_method(self, layer: str, method: str) -> None:
        """Set the method of one layer, "dense" for none, and hold it."""
        self._act(lambda: self._state.choose_method(layer, method))

    def evaluate(self) -> float:
        """Apply the plan and measure it, as the Evaluate button does; return its score or output error."""
        self._say("Evaluating ...")
        tried = self._state.evaluate()
        score = f"{self._state.judge.name} {tried.score:.4f}, dense {self._state.baseline:.4f}"
        kind = self.kind.value
        self._say(f"Evaluated at {tried.totals.share(kind):.0%} of the {NAMES[kind]}: {score}.")
        self._refresh()
        return tried.score

    def apply(self) -> nn.Module:
        """Make the model of the plan, as the Apply button does; it is ``explorer.model`` from then on."""
        self._say("Decomposing ...")
        self._model = self._state.apply()
        self._say("Applied: explorer.model is the compressed model, explorer.plan the plan.")
        return self._model

    def _build(self) -> None:
        wide, usable = widgets.Layout(width="420px"), not self._state.problem
        options = [(NAMES[kind], kind) for kind in self._state.kinds]
        self.kind = widgets.Dropdown(options=options, layout=widgets.Layout(width="160px"), disabled=not usable)
        shares = {"min": 0.02, "max": 1.0, "step": 0.01, "readout_format": ".0%", "layout": wide}
        self.budget = widgets.FloatSlider(0.5, description="budget", disabled=not usable, **shares)
        self.energy = widgets.FloatSlider(0.9, description="energy", disabled=not usable, **shares)
        self.evaluate_button = widgets.Button(description="Evaluate", disabled=not usable, icon="check")
        self.apply_button = widgets.Button(description="Apply", disabled=not usable, button_style="primary")
        self._cards, self._charts, self._status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        count = max(len(self._state.layers), 1)
        pages = [
            (f"layers {i + 1} to {min(i + ROWS_PER_PAGE, count)} of {count}", i // ROWS_PER_PAGE)
            for i in range(0, count, ROWS_PER_PAGE)
        ]
        self.page = widgets.Dropdown(options=pages, layout=widgets.Layout(width="220px"), disabled=not usable)
        self._table = widgets.VBox()
        self.budget.tooltip = "what the whole model may cost, as a share of the dense one"
        self.energy.tooltip = "the share of the squared singular values that every layer keeps"
        self._observe()
        buttons = widgets.HBox([self.evaluate_button, self.apply_button])
        parts = [widgets.HTML(STYLE), self._cards, widgets.HBox([self.budget, self.kind]), self.energy]
        self.box = widgets.VBox([*parts, self._charts, buttons, self._status, self.page, self._table])
        self.box.add_class("decomp-explorer")

    def _observe(self) -> None:
        def budget(change: Any) -> None:
            if not self._quiet:
                self._try(lambda: self.set_budget(**{self.kind.value: self.budget.value}))

        self.budget.observe(budget, "value")

        def kind(change: Any) -> None:
            # What a threshold has chosen stays: only the axis of the charts is another one.
            if not self._quiet and not self._by_budget:
                self._refresh()
            else:
                budget(change)

        self.kind.observe(kind, "value")

        def energy(change: Any) -> None:
            if not self._quiet:
                self._try(lambda: self.set_energy(self.energy.value))

        self.energy.observe(energy, "value")
        self.page.observe(lambda change: self._fill(), "value")
        self.evaluate_button.on_click(lambda button: self._try(self.evaluate))
        self.apply_button.on_click(lambda button: self._try(self.apply))

    def _fill(self) -> None:
        """Make the rows of the page: only these exist, so that a model of many layers stays quick."""
        start = self.page.value * ROWS_PER_PAGE
        names = list(self._state.layers)[start : start + ROWS_PER_PAGE]
        self._rows = [
            LayerRow(name, self._state, lambda work: self._try(lambda: self._act(work))) for name in names
        ]
        self._table.children = [row.box for row in self._rows]

    def _act(self, work: Callable[[], None]) -> None:
        work()
        held = [name for name in self._state.layers if name in self._state.held]
        self._say(f"Held: {', '.join(held[:6])}{' ...' if len(held) > 6 else ''}" if held else "No layer is held.")
        self._refresh()

    def _try(self, work: Callable[[], Any]) -> None:
        """Run what a widget asked for; what goes wrong is said in the panel, which stays as it was."""
        try:
            work()
        except (Exception, KeyboardInterrupt) as error:  # an evaluation may be interrupted like any cell
            self._say(f"{type(error).__name__}: {error}", wrong=True)
            self._refresh()

    def _moved(self, widget: Any, value: Any) -> None:
        self._quiet = True
        try:
            widget.value = value
        finally:
            self._quiet = False

    def _say(self, text: str, wrong: bool = False) -> None:
        mark = '<b style="color: #e07b1a">&#9888; ' if wrong else "<b>"
        self._status.value = f'<div role="status" aria-live="polite">{mark}{escape(text)}</b></div>'

    def _refresh(self) -> None:
        for row in self._rows:
            row.update()
        state, kind = self._state, self.kind.value
        totals = state.totals
        what = state.predicts
        cards = [_card("parameters", totals.params, tables.number)]
        if "macs" in state.kinds:
            cards.append(_card("MACs", totals.macs, tables.number))
        if totals.seconds:
            cards.append(_card("latency, interpolated estimate", totals.seconds, tables.milliseconds))
        cards.append(f"<div>predicted error {what}<br><b>{totals.error:.3f}</b></div>")
        self._cards.value = f'<div class="decomp-cards">{"".join(cards)}</div>'
        x, name = f"% of the dense {NAMES[kind]}", state.judge.name
        here = totals.share(kind)
        predicted = sketches.chart(
            "Predicted (line: budgets; dot: this plan)",
            (x, f"error {what}"),
            state.curve(kind),
            (),
            (here, totals.error),
        )
        points = [(tried.totals.share(kind), tried.score) for tried in state.tried]
        baseline = state.baseline if state.tried else None
        title = "Evaluated" if points else "Evaluated: nothing yet"
        less = state.judge.is_error
        tried = sketches.chart(title, (x, name), (), points, (here, None), baseline, less_is_better=less)
        self._charts.value = f'<div class="decomp-cards">{predicted}{tried}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        # Where there are no widgets, on the web say, the plan is shown as text.
        bundle: dict[str, Any] = dict(self.box._repr_mimebundle_(**kwargs))
        return bundle | {"text/plain": f"{self.plan}\n\nRun this cell in Jupyter to move the sliders."}


def _card(name: str, change: Change, write: Callable[[float], str]) -> str:
    share = change.after / (change.before or 1)
    return f"<div>{name}<br><b>{write(change.after)}</b> of {write(change.before)} ({share:.0%})</div>"
