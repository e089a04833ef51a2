"""The explorer as widgets: it shows the state of an ``Exploration`` and passes on what the user moves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Unpack

import ipywidgets as widgets
from torch import nn

from decomp._util import tables
from decomp.explorer import svg
from decomp.explorer.state import Exploration, Trial
from decomp.planning.choice import DENSE, Change, Choice
from decomp.planning.cost import COSTS, Bounds
from decomp.planning.plan import Plan
from decomp.ranks import Ranks

ROWS_PER_PAGE = 8
NAMES_SHOWN = 6
SPECTRUM_WIDTH = 60  # pixels
COST_NAMES = {name: kind.label if kind.count else "latency (estimate)" for name, kind in COSTS.items()}
# noUiSlider gives its track no filled part. The element that carries the handle ends at the handle and is a tenth
# as wide as the track: nine times its width to the left fill the track; what reaches beyond its start is clipped.
STYLE = """<style>
.decomp-explorer {color: var(--jp-ui-font-color1, var(--vscode-foreground, inherit)); overflow-x: auto}
.decomp-explorer .widget-html-content {line-height: 1.3; color: inherit; min-width: 0; flex: 1 1 0}
.decomp-explorer .widget-box {overflow: visible}
.decomp-main {flex-flow: row wrap !important; gap: 4px 20px; align-items: flex-start}
.decomp-left {flex: 1 1 300px; min-width: 290px}
.decomp-right {flex: 2 1 592px; min-width: 300px}
.decomp-row {border-top: 1px solid rgba(127, 127, 127, .35); padding: 2px 0; align-items: center;
  flex-flow: row wrap !important; gap: 0 6px}
.decomp-row > .decomp-name {flex: 1 1 100px; min-width: 88px; font-size: 12px; overflow-wrap: anywhere}
.decomp-row > .decomp-method {flex: 0 0 96px}
.decomp-row > .decomp-modes {flex: 3 1 256px; min-width: 256px}
.decomp-row .decomp-modes .widget-html, .decomp-row .decomp-modes .widget-hslider {margin: 2px 0}
.decomp-row > .decomp-cost {flex: 1 1 122px; min-width: 108px}
.decomp-row .widget-hslider {flex: 1 1 182px; min-width: 182px; width: auto}
.decomp-row .slider-container {min-width: 96px}
.decomp-row .widget-readout {min-width: 38px; flex: 0 0 auto}
.decomp-row small {font-size: 11px}
.decomp-row .widget-dropdown, .decomp-row .widget-checkbox {width: 92px !important}
.decomp-explorer .noUi-base {clip-path: inset(-30px -14px -30px -9px)}
.decomp-explorer .noUi-origin::before {content: ""; position: absolute; left: -900%; right: 0; top: 0; height: 4px;
  background: #4a90d9; pointer-events: none}
.decomp-explorer .noUi-target {background: rgba(127, 127, 127, .45); border: 0}
.decomp-explorer .noUi-handle {background: #4a90d9 !important;
  border: 2px solid var(--jp-layout-color0, #fff) !important; box-shadow: 0 0 0 1px #2c6cb0}
.decomp-idle .noUi-origin::before, .decomp-dense .noUi-origin::before {background: #8a8a8a}
.decomp-idle .noUi-handle, .decomp-dense .noUi-handle {background: #8a8a8a !important;
  box-shadow: 0 0 0 1px #6a6a6a}
.decomp-dense .decomp-modes svg path[stroke] {stroke: currentColor; opacity: .35}
.decomp-cards {display: flex; gap: 6px; flex-wrap: wrap}
.decomp-cards div {border: 1px solid rgba(127, 127, 127, .45); border-radius: 4px; padding: 2px 8px;
  flex: 1 1 120px}
.decomp-cards b {font-size: 1.2em}
.decomp-charts {display: flex; gap: 2px 12px; flex-wrap: wrap}
.decomp-charts svg {flex: 1 1 300px; min-width: 260px; max-width: min(420px, 100%); height: auto}
.decomp-explorer svg {color: inherit; overflow: visible; display: block}
.decomp-gone {display: none}
.jupyter-widgets-disconnected .decomp-gone {display: block; border: 1px solid #e07b1a; padding: 4px 12px}
.decomp-explorer .jupyter-widgets-disconnected::before {display: none !important}
.decomp-explorer.jupyter-widgets-disconnected > :not(:first-child) {opacity: .4; pointer-events: none}
</style>
<div class="decomp-gone">The kernel that drew this is gone: run this cell again, after those above it.</div>"""
NOTHING_TO_APPLY = (
    "There is nothing to apply: every layer stays dense. Lower the budget or the energy, or move the slider of a "
    "layer."
)


class Explorer:
    """What :func:`decomp.explore` returns: shown by Jupyter as widgets, and usable from the next cell.

    ``plan`` is the current decision, ``model`` the model that Apply made last. ``set_budget``, ``set_energy``,
    ``set_ranks``, ``set_method``, ``evaluate`` and ``apply`` do what the widgets do.

    Args:
        state: what is shown and changed.

    >>> import decomp, torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> explorer = decomp.explore(model, torch.ones(1, 64), timed=False, progress=False)
    >>> explorer.set_ranks("1", (8,))
    >>> explorer.set_budget(params=0.5)
    >>> params = explorer.plan.params
    >>> explorer.plan["1"].ranks, params.after < 0.5 * params.before
    ((8,), True)
    """

    def __init__(self, state: Exploration) -> None:
        self._state = state
        self._model: nn.Module | None = None
        self._updating = False
        self._by_budget = True
        self._static: Any = None  # the picture and table that stay in the notebook, once the panel was shown
        self._rows: list[LayerRow] = []
        self._build()
        if state.problem:
            self._show_status(f"There is nothing to choose: {state.problem}.")
        else:
            self._build_page()
            self.set_budget(**{self.kind.value: self.budget.value})
            self._show_status("Move a slider. Evaluate scores the plan, Apply makes explorer.model of it.")

    @property
    def plan(self) -> Plan:
        """The current decision; it may be edited and applied by itself."""
        return self._state.plan

    @property
    def model(self) -> nn.Module:
        """The model that Apply made last.

        Raises:
            RuntimeError: nothing was applied yet.
        """
        if self._model is None:
            raise RuntimeError("nothing was applied yet: press Apply, or write explorer.apply()")
        return self._model

    @property
    def tried(self) -> list[Trial]:
        """The plans that were evaluated, each with ``plan``, ``totals`` and ``score``."""
        return list(self._state.tried)

    def set_budget(self, **shares: Unpack[Bounds]) -> None:
        """Choose the ranks of all layers that are not held for a budget, as the budget slider does.

        Args:
            shares: one of ``macs=``, ``params=``, ``bytes=``, ``seconds=``: the share of the dense model's cost,
                in (0, 1].

        Raises:
            ValueError: there is not exactly one budget, it is out of range, or its cost is not known here.
        """
        given: dict[str, Any] = {kind: share for kind, share in shares.items() if share is not None}
        if len(given) != 1 or not set(given) <= set(COSTS) or not all(0 < share <= 1 for share in given.values()):
            kinds = ", ".join(f"{kind}=" for kind in COSTS)
            raise ValueError(f"budget {given}: write one of {kinds} as a share in (0, 1]")
        ((kind, share),) = given.items()
        least = self._state.choose_budget(kind, share)
        self._by_budget = True
        with self._silently():
            self.kind.value, self.budget.value = kind, share
        unreachable = f"; the least that can be reached is {least:.1%}" if share < least else ""
        self._show_status(f"Chosen by a budget of {share:.0%} of the {COST_NAMES[kind]}{unreachable}.")
        self._refresh()

    def set_energy(self, share: float) -> None:
        """Choose the ranks of all layers that are not held by an energy threshold, as the energy slider does.

        Args:
            share: of the squared singular values of each unfolding, in (0, 1].
        """
        self._state.choose_energy(share)
        self._by_budget = False
        with self._silently():
            self.energy.value = share
        self._show_status(
            f"Chosen by an energy threshold: every unfolding keeps {share:.0%} of its squared singular values."
        )
        self._refresh()

    def set_ranks(self, layer: str, ranks: Ranks) -> None:
        """Set the ranks of one layer and hold it.

        Args:
            layer: its qualified name.
            ranks: one per mode of its method.

        Raises:
            ValueError: there are too many or too few ranks, or one is past its limit.
        """
        self._change_layer(lambda: self._state.choose_ranks(layer, ranks))

    def set_method(self, layer: str, method: str) -> None:
        """Set the method of one layer at about its current cost, and hold the layer.

        Args:
            layer: its qualified name.
            method: the name of the method, "dense" for none.

        Raises:
            ValueError: the layer has no such method.
        """
        self._change_layer(lambda: self._state.choose_method(layer, method))

    def evaluate(self) -> float:
        """Apply the plan and return its score or output error, as the Evaluate button does.

        Raises:
            ValueError: every layer stays dense.
        """
        self._require_ranks()
        self._show_status("Evaluating ...")
        trial = self._state.evaluate()
        score = f"{self._state.scorer.label} {trial.score:.4f}, dense {self._state.baseline:.4f}"
        kind = self.kind.value
        self._refresh()
        self._show_status(f"Evaluated at {trial.totals.share(kind):.0%} of the {COST_NAMES[kind]}: {score}.")
        self._update_static()
        return trial.score

    def apply(self) -> nn.Module:
        """Make the model of the plan, as the Apply button does; it is ``explorer.model`` from then on.

        Raises:
            ValueError: every layer stays dense.
        """
        self._require_ranks()
        self._show_status("Decomposing ...")
        self._model = self._state.apply()
        self._show_status("Applied: explorer.model is the compressed model, explorer.plan the plan.")
        self._update_static()
        return self._model

    def _require_ranks(self) -> None:
        if not any(choice.ranks and not choice.was_factorized for choice in self._state.plan.values()):
            raise NothingToApply(NOTHING_TO_APPLY)

    def _build(self) -> None:
        disabled = bool(self._state.problem)
        options = [(COST_NAMES[kind], kind) for kind in self._state.kinds]
        self.kind = widgets.Dropdown(options=options, layout=widgets.Layout(width="112px"), disabled=disabled)
        shares = {"min": 0.02, "max": 1.0, "step": 0.01, "readout_format": ".0%", "disabled": disabled}
        wide = widgets.Layout(width="auto", flex="1 1 180px", min_width="170px")
        self.budget = widgets.FloatSlider(0.5, description="budget", layout=wide, **shares)
        self.budget.tooltip = "cost of the whole model, as a share of the dense one's"
        self.energy = widgets.FloatSlider(0.9, description="energy", layout=wide, **shares)
        for slider in (self.budget, self.energy):
            slider.style.description_width = "52px"
        self.energy.tooltip = "share of the squared singular values that every layer keeps"
        self.evaluate_button = widgets.Button(description="Evaluate", disabled=disabled, icon="check")
        self.apply_button = widgets.Button(description="Apply", disabled=disabled, button_style="primary")
        count = max(len(self._state.layers), 1)
        pages = [
            (f"layers {first + 1} to {min(first + ROWS_PER_PAGE, count)} of {count}", page)
            for page, first in enumerate(range(0, count, ROWS_PER_PAGE))
        ]
        self.page = widgets.Dropdown(options=pages, layout=widgets.Layout(width="220px"), disabled=disabled)
        self._cards, self._charts, self._status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._table = widgets.VBox()
        self._observe()
        sliders = [widgets.HBox([self.budget, self.kind]), widgets.HBox([self.energy])]
        buttons = widgets.HBox([self.evaluate_button, self.apply_button])
        left = widgets.VBox([self._cards, *sliders, buttons, self._status, self._charts])
        right = widgets.VBox([self.page, self._table])
        main = widgets.HBox([left, right])
        for box, name in ((left, "decomp-left"), (right, "decomp-right"), (main, "decomp-main")):
            box.add_class(name)
        self.box = widgets.VBox([widgets.HTML(STYLE), main])
        self.box.add_class("decomp-explorer")

    def _observe(self) -> None:
        def budget(change: Any) -> None:
            if not self._updating:
                self._guarded(lambda: self.set_budget(**{self.kind.value: self.budget.value}))

        def kind(change: Any) -> None:
            # After a threshold the plan stays as it is: only the axis of the charts changes.
            if not self._updating and not self._by_budget:
                self._refresh()
            else:
                budget(change)

        def energy(change: Any) -> None:
            if not self._updating:
                self._guarded(lambda: self.set_energy(self.energy.value))

        self.budget.observe(budget, "value")
        self.kind.observe(kind, "value")
        self.energy.observe(energy, "value")
        self.page.observe(lambda change: self._build_page(), "value")
        self.evaluate_button.on_click(lambda button: self._guarded(self.evaluate))
        self.apply_button.on_click(lambda button: self._guarded(self.apply))

    def _build_page(self) -> None:
        """Make the rows of the page. Only these exist, so that a model of many layers stays fast."""
        first = self.page.value * ROWS_PER_PAGE
        names = list(self._state.layers)[first : first + ROWS_PER_PAGE]
        self._rows = [
            LayerRow(name, self._state, lambda work: self._guarded(lambda: self._change_layer(work)))
            for name in names
        ]
        self._table.children = [row.box for row in self._rows]

    def _change_layer(self, work: Callable[[], None]) -> None:
        work()
        held = [name for name in self._state.layers if name in self._state.held]
        names = ", ".join(self._described(name) for name in held[:NAMES_SHOWN])
        names += " ..." if len(held) > NAMES_SHOWN else ""
        self._show_status(f"Held: {names}" if held else "No layer is held.")
        self._refresh()

    def _described(self, name: str) -> str:
        return f"{name or '(the model)'}{'' if self._state.plan[name].ranks else ' (dense)'}"

    def _guarded(self, work: Callable[[], Any]) -> None:
        """Run what a widget asked for; an error is shown in the panel, which stays usable."""
        try:
            work()
        except NothingToApply as nothing:
            self._show_status(str(nothing))
        except (Exception, KeyboardInterrupt) as error:  # an evaluation may be interrupted like any cell
            self._show_status(f"{type(error).__name__}: {error}", is_error=True)
            self._refresh()

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Within it a value that is set on a widget does not count as set by the user."""
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def _show_status(self, text: str, is_error: bool = False) -> None:
        mark = f'<b style="color: {svg.MARK}">&#9888; ' if is_error else "<b>"
        self._status.value = f'<div role="status" aria-live="polite">{mark}{escape(text)}</b></div>'

    def _refresh(self) -> None:
        for row in self._rows:
            row.update()
        _set_class(self.budget, "decomp-idle", not self._by_budget)
        _set_class(self.energy, "decomp-idle", self._by_budget)
        self._cards.value = f'<div class="decomp-cards">{"".join(self._draw_cards())}</div>'
        self._charts.value = f'<div class="decomp-charts">{"".join(self._draw_charts())}</div>'

    def _draw_cards(self) -> Iterator[str]:
        totals = self._state.totals
        yield _card("parameters", totals.params, tables.number)
        if "macs" in self._state.kinds:
            yield _card("MACs", totals.macs, tables.number)
        if totals.seconds:
            runtime = self._state.runtime
            name = COST_NAMES["seconds"] if runtime is None else f"latency in {escape(runtime.name)} (estimate)"
            seconds = _card(name, totals.seconds, tables.milliseconds)
            yield seconds.removesuffix("</div>") + f"<br>{self._judge(totals.seconds)}</div>"
        yield f"<div>predicted error {self._state.error_of}<br><b>{totals.error:.3f}</b></div>"

    def _judge(self, seconds: Change) -> str:
        """Whether a latency differs from that of the dense model by more than two measurements of one model do."""
        spread, change = self._state.spread, seconds.after / seconds.before - 1
        says = f"faster by {-change:.0%}"
        if abs(change) <= spread:
            says = "not faster, not slower"
        elif change > 0:
            says = f'<b style="color: {svg.MARK}; font-size: 1em">slower than dense by {change:.0%}</b>'
        why = "interpolated between measured ranks; spread: how much latencies of the dense model differ"
        return f'<small title="{why}">{says} (spread {spread:.0%})</small>'

    def _draw_charts(self) -> Iterator[str]:
        state, kind = self._state, self.kind.value
        totals, x_label = state.totals, f"{COST_NAMES[kind]} (% of the dense model)"
        share = totals.share(kind)
        yield svg.chart(
            "Predicted: line of budgets, this plan",
            (x_label, f"relative error {state.error_of}"),
            curve=state.curve(kind),
            current=(share, totals.error),
            baseline=0.0,
        )
        yield svg.chart(
            "Evaluated: line of the Pareto front" if state.tried else "Evaluated: nothing yet",
            (x_label, state.scorer.label),
            points=[(trial.totals.share(kind), trial.score) for trial in state.tried],
            current=(share, None),
            baseline=state.baseline if state.tried else None,
            less_is_better=state.scorer.is_error,
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        # Where there are no widgets, on the web for example, the plan is shown as a picture and a table.
        bundle: dict[str, Any] = dict(self.box._repr_mimebundle_(**kwargs))
        return bundle | self._as_static()

    def _ipython_display_(self) -> None:
        """Show the widgets, and after them a picture and a table, which only a page without the widgets shows.

        JupyterLab without a kernel takes the widgets out of an output and shows nothing else of it: hence two.
        """
        from IPython.display import display

        hidden = f"<style>#{self._name} {{display: none}}</style>"  # goes with the widgets
        self.box.children = [widgets.HTML(STYLE + hidden), *self.box.children[1:]]
        view = dict(self.box._repr_mimebundle_())
        display(view | {"text/plain": "decomp.explore: run this cell in Jupyter to move the sliders."}, raw=True)
        self._static = display(self._as_static(), raw=True, display_id=True)

    @property
    def _name(self) -> str:
        return f"decomp-static-{self.box.model_id}"

    def _as_static(self) -> dict[str, Any]:
        """The state of the panel for pages that run nothing; images, because styles may be taken out there."""
        drawings = "".join(map(svg.as_image, self._draw_charts()))
        cards = f'<div style="display: flex; flex-wrap: wrap; gap: 24px">{"".join(self._draw_cards())}</div>'
        say = "As of the last Evaluate or Apply."
        html = f'<div id="{self._name}">{cards}{drawings}{self.plan._repr_html_()}<p>{say}</p></div>'
        return {"text/html": html, "text/plain": f"{self.plan}\n\n{say}"}

    def _update_static(self) -> None:
        if self._static is not None:
            self._static.update(self._as_static(), raw=True)


class NothingToApply(ValueError):
    """Every layer of the plan stays dense."""


class LayerRow:
    """The widgets of one layer.

    Args:
        name: the qualified name of the layer.
        state: what is shown and changed.
        change: runs a function that changes the layer, and then shows the new state.
    """

    def __init__(self, name: str, state: Exploration, change: Callable[[Callable[[], None]], None]) -> None:
        self.name, self._state, self._change = name, state, change
        self._updating = False
        self._shown: tuple[str, Ranks] = ("", ())  # the method and the limits that the sliders were made for
        title = f"<b>{escape(name or '(the model)')}</b><br><small>{escape(self._choice.layer)}</small>"
        self.method = widgets.Dropdown(options=state.methods_of(name), value=self._method)
        self.method.tooltip = f"how {name} is decomposed"
        self.held = widgets.Checkbox(description="hold", indent=False, value=name in state.held)
        self.held.tooltip = "budgets and thresholds leave this layer alone"
        self.sliders: list[widgets.IntSlider] = []
        self._drawings: list[widgets.HTML] = []
        self._modes, self._cost = widgets.VBox(), widgets.HTML()
        parts = {
            "decomp-name": widgets.HTML(title),
            "decomp-method": widgets.VBox([self.method, self.held]),
            "decomp-modes": self._modes,
            "decomp-cost": self._cost,
        }
        for css_class, part in parts.items():
            part.add_class(css_class)
        self.box = widgets.HBox(list(parts.values()))
        self.box.add_class("decomp-row")
        self.method.observe(self._on_method, "value")
        self.held.observe(self._on_held, "value")
        self.update()

    @property
    def _choice(self) -> Choice:
        return self._state.plan[self.name]

    @property
    def _method(self) -> str:
        kept_dense = not self._choice.ranks and self.name in self._state.held
        return DENSE if kept_dense else self._state.layers[self.name].method.name

    def update(self) -> None:
        """Show the layer as it is in the plan; what is set here on a widget does not count as set by the user."""
        candidate = self._state.layers[self.name]
        self._updating = True
        try:
            if self._shown != (candidate.method.name, candidate.limits):
                self._build_sliders()
            self.method.value = self._method
            self.held.value = self.name in self._state.held
            ranks = self._state.shown_ranks(self.name)
            modes = zip(self.sliders, self._drawings, ranks, candidate.output_spectra, strict=True)
            for slider, drawing, rank, spectrum in modes:
                slider.value = rank
                drawing.value = svg.spectrum(spectrum.values.max(0), rank, width=SPECTRUM_WIDTH, height=22)
            _set_class(self.box, "decomp-dense", not self._choice.ranks)
            self._cost.value = _cost(self._choice)
        finally:
            self._updating = False

    def _build_sliders(self) -> None:
        candidate = self._state.layers[self.name]
        self._shown = (candidate.method.name, candidate.limits)
        self.sliders, self._drawings, lines = [], [], []
        for mode, limit in zip(candidate.method.rank_names, candidate.limits, strict=False):
            slider = widgets.IntSlider(
                limit, 1, max(limit, 2), description=mode, layout=widgets.Layout(width="auto")
            )
            slider.style.description_width = "26px"
            slider.disabled = limit == 1
            slider.tooltip = f"rank {mode} of {self.name}, at most {limit}"
            slider.observe(self._on_ranks, "value")
            drawing = widgets.HTML(layout=widgets.Layout(width=f"{SPECTRUM_WIDTH + 4}px", flex="0 0 auto"))
            self.sliders.append(slider)
            self._drawings.append(drawing)
            lines.append(widgets.HBox([drawing, slider]))
        self._modes.children = lines

    def _on_ranks(self, change: object) -> None:
        if not self._updating:
            limits = self._state.layers[self.name].limits
            ranks = tuple(min(slider.value, limit) for slider, limit in zip(self.sliders, limits, strict=True))
            self._change(lambda: self._state.choose_ranks(self.name, ranks))

    def _on_method(self, change: object) -> None:
        if not self._updating:
            self._change(lambda: self._state.choose_method(self.name, self.method.value))

    def _on_held(self, change: object) -> None:
        if not self._updating:
            self._change(lambda: self._state.hold(self.name, self.held.value))


def _set_class(widget: Any, name: str, on: bool) -> None:
    (widget.add_class if on else widget.remove_class)(name)


def _card(name: str, change: Change, write: Callable[[float], str]) -> str:
    share = change.after / (change.before or 1)
    return f"<div>{name}<br><b>{write(change.after)}</b> of {write(change.before)} ({share:.0%})</div>"


def _cost(choice: Choice) -> str:
    if not choice.ranks:
        return f"<small><b>dense</b><br>{escape(choice.reason)}</small>"
    pairs = (("params", choice.params), ("MACs", choice.macs))
    lines = [
        f"{tables.number(c.after)} {name}{f' ({c.after / c.before:.0%})' if c.before else ''}" for name, c in pairs
    ]
    if choice.output_error is None:
        lines.append(f"error of the weight {choice.error:.3f}")
    else:
        lines.append(f"error of the output {choice.output_error:.3f}")
    return f"<small>{'<br>'.join(lines)}</small>"
