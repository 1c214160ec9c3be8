"""The page for rating by hand in JupyterLab: a dashboard, buttons, a note, and keys that need no field.

The keys are heard in the browser, wherever the focus is but in a text field, while the page is in view: a listener
presses the button of that key. Without the listener (other front ends may drop it) the buttons do the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tclib.blind.ratings import RATINGS, Item, Rating, RatingStore, agreement, counts_by_origin
from tclib.support.errors import InputError

KEYS: dict[str, Rating] = {rating[0]: rating for rating in RATINGS}
HELP = (
    "<b>i</b> interpretable, <b>m</b> maybe, <b>n</b> not; with Shift also context-free; <b>b</b> back. "
    "Keys wait while you write a note: Enter or Escape ends it."
)

# At the window and before all others: JupyterLab would take i, m, n and b for commands to the notebook. An item is
# rated once a key, however long the next takes to come: `rated` is the item that the last key rated.
_LISTENER = """<script>(() => {
  let rated = null;
  const inView = (box) => box.offsetParent !== null && box.getBoundingClientRect().bottom > 0
    && box.getBoundingClientRect().top < window.innerHeight;
  const heard = (event) => {
    const page = [...document.querySelectorAll(".tclib-rating")].find(inView);
    if (!page || event.ctrlKey || event.altKey || event.metaKey) return;
    const field = event.target.closest(
      "input:not([type=checkbox]), textarea, select, [contenteditable=true]");
    if (field) {
      if (page.contains(field) && ["Enter", "Escape"].includes(event.key)) field.blur();
      return;
    }
    const key = event.key.toLowerCase();
    if (!["i", "m", "n", "b"].includes(key)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const item = page.querySelector("[data-item]")?.dataset.item;
    if (item !== rated) rated = null;
    if (event.repeat || (key !== "b" && rated !== null)) return;
    if (key !== "b") rated = item;
    const shift = key !== "b" && key !== event.key ? "shift-" : "";
    page.querySelector(`.tclib-key-${shift}${key}`)?.click();
  };
  window.removeEventListener("keydown", window.tclibRatingKeys, true);
  window.addEventListener("keydown", heard, true);
  window.tclibRatingKeys = heard;
})()</script>"""


def rating_widget(
    items: Sequence[Item],
    store: RatingStore,
    origin: Mapping[int, str] | None = None,
    other: RatingStore | None = None,
) -> Any:
    """The rating page, which goes on at the first item without an answer.

    Args:
        items: the pages.
        store: the rater's answers.
        origin: item to kind, for the results: told when all is rated, or the rater asks.
        other: another rater's answers, for the agreement.
    """
    return _RatingPage(items, store, origin or {}, other).box


class _RatingPage:
    """The widgets of the page, and which item it shows (None at the end)."""

    def __init__(
        self,
        items: Sequence[Item],
        store: RatingStore,
        origin: Mapping[int, str],
        other: RatingStore | None,
    ) -> None:
        import ipywidgets as widgets

        self.items, self.store, self.origin, self.other = items, store, origin, other
        self.shown = store.next_item()
        self.bar, self.progress = widgets.IntProgress(max=len(items)), widgets.Label()
        self.view, self.results = widgets.HTML(), widgets.HTML()
        self.free = widgets.Checkbox(description="context-free", indent=False)
        self.asking = widgets.Button(description="Show my results")
        self.asking.on_click(lambda _: self._ask())
        shown = {"output_type": "display_data", "data": {"text/html": _LISTENER}, "metadata": {}}
        listener = widgets.Output(outputs=(shown,))
        top = widgets.HBox([self.bar, self.progress, self.asking])
        keys = widgets.HBox([*self._rating_buttons(), self._back_button(), self.free])
        self.note_row = widgets.HBox()
        self.box = widgets.VBox(
            [top, keys, self.note_row, widgets.HTML(HELP), self.results, self.view, listener]
        )
        self.box.add_class("tclib-rating")
        self._show()

    def _rating_buttons(self) -> list[Any]:
        """A button a rating and, unseen, one that marks context-free as well: the keys press these."""
        import ipywidgets as widgets

        found = []
        for key, rating in KEYS.items():
            seen = widgets.Button(description=rating)
            shifted = widgets.Button(description=rating, layout={"display": "none"})
            seen.on_click(lambda button: self._rate(button.description, self.free.value))
            shifted.on_click(lambda button: self._rate(button.description, True))
            seen.add_class(f"tclib-key-{key}")
            shifted.add_class(f"tclib-key-shift-{key}")
            found += [seen, shifted]
        return found

    def _back_button(self) -> Any:
        import ipywidgets as widgets

        back = widgets.Button(description="Back", icon="arrow-left")
        back.on_click(lambda _: self._back())
        back.add_class("tclib-key-b")
        return back

    def _note_field(self, number: int) -> Any:
        """A field of this item's own: what arrives late from the browser still goes to its item."""
        import ipywidgets as widgets

        field = widgets.Text(
            self.store.notes.get(number, ""), description="note", layout={"width": "60em"}
        )
        field.observe(lambda change: self.store.annotate(number, change["new"]), names="value")
        return field

    def _rate(self, rating: Rating, context_free: bool) -> None:
        if self.shown is None:
            return
        self.store.rate(self.items[self.shown].number, rating, context_free)
        self.shown = self.store.next_item()
        self._show()

    def _back(self) -> None:
        self.shown = max(0, (len(self.items) if self.shown is None else self.shown) - 1)
        self._show()

    def _ask(self) -> None:
        self.store.show()
        self._show()

    def _show(self) -> None:
        """The item, or the end; and the results, where they may be told."""
        self._show_item()
        self.results.value = self._results() if self.store.may_show else ""
        n_rated = len(self.store.answers)
        self.bar.value, self.progress.value = n_rated, f"{n_rated} of {len(self.items)}"

    def _show_item(self) -> None:
        if self.shown is None:
            self.free.value, self.note_row.children = False, ()
            self.view.value = "<h2>All items are rated.</h2>"
            return
        item = self.items[self.shown]
        answer = self.store.answers.get(item.number)
        self.free.value = bool(answer and answer["context_free"])
        self.note_row.children = (self._note_field(item.number),)
        said = f": rated {answer['rating']}" if answer else ""
        self.view.value = (
            f"<h3 data-item='{item.number}'>Item {item.number + 1}{said}</h3>{item.html}"
        )

    def _results(self) -> str:
        if not self.store.answers:
            return "<p>Nothing is rated yet.</p>"
        counts = counts_by_origin(self.store.table(), self.origin) if self.origin else None
        n_blind = self.store.n_when_shown
        blind = (
            "all blind" if n_blind is None else f"the first {n_blind} before any result was shown"
        )
        said = f"<p>{len(self.store.answers)} of {len(self.items)} rated, {blind}. {self._agreement()}</p>"
        return said + ("" if counts is None else counts.to_html())

    def _agreement(self) -> str:
        if self.other is None:
            return ""
        try:
            found = agreement(self.store, self.other)
        except InputError as error:
            return f"{error}."
        return (
            f"With {self.other.rater}, on {found['n_items']} items: κ {found['kappa_rating']:.2f} for the ratings, "
            f"{found['kappa_context_free']:.2f} for context-free."
        )
