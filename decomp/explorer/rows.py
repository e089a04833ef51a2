"""The rows of the explorer, one layer each: its spectra with the cut, a method, rank sliders and costs."""

from collections.abc import Callable
from html import escape

import ipywidgets as widgets

from decomp._util import tables
from decomp.explorer import svg as sketches
from decomp.explorer.state import Exploration
from decomp.planning.choices import DENSE, Choice
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
