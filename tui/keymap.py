"""Every key of the terminal view, once: dispatch, footer, help, command palette and the manual come from this table."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

ScreenName = Literal["overview", "layer", "flow", "tokens", "alerts", "runs", "latents"]
MAX_FOOTER = 8


class Key(NamedTuple):
    """One thing a person does, and the keys that do it."""

    shown: str
    """How the keys are written."""
    label: str
    """One or two words, for the footer."""
    help: str
    """A sentence, for the help page and the manual."""
    bindings: tuple[tuple[str, str], ...]
    """(Textual key names, action) pairs; the action is a method of the screen, or of the app after `app.`."""
    screen: ScreenName | None = None
    """The screen that it belongs to; None: all of them."""
    footer: bool = False
    """Whether the footer has room for it; the footer of a screen shows `MAX_FOOTER` keys at most."""


class Tab(NamedTuple):
    name: ScreenName
    key: str
    label: str
    question: str
    """What the screen answers."""


TABS = (
    Tab("overview", "1", "Overview", "Which experts get too much or too little, where, and since when?"),
    Tab("layer", "2", "Layer", "How is the load of one layer spread, and who takes over?"),
    Tab("flow", "3", "Flow", "Which experts follow which, from one layer to the next?"),
    Tab("tokens", "4", "Tokens", "Which expert serves which token of a text?"),
    Tab("alerts", "5", "Alerts", "What is wrong, and what can be done?"),
    Tab("runs", "6", "Runs", "Which runs are there?"),
    Tab("latents", "7", "Latents", "What does attention keep in its latents, and how much of them is used?"),
)


def _arrows(left: str, right: str, up: str, down: str) -> tuple[tuple[str, str], ...]:
    return (("left,h", left), ("right,l", right), ("up,k", up), ("down,j", down))


_LIST = (
    ("up,k", "select(-1)"),
    ("down,j", "select(1)"),
    ("pageup", "select(-10)"),
    ("pagedown", "select(10)"),
)

PANE = Key(
    "tab",
    "Pane",
    "The next pane; on a narrow terminal one is shown at a time.",
    (("tab", "pane(1)"), ("shift+tab", "pane(-1)")),
)
HELP = Key("?", "Help", "All keys.", (("question_mark", "app.help"),), None, True)
QUIT = Key("q", "Quit", "Leave; training is not affected.", (("q", "app.quit"),), None, True)

KEYS = (
    Key("←↑↓→", "Cell", "Move the cursor over layers and experts (also h j k l).",
        _arrows("cell(0, -1)", "cell(0, 1)", "cell(-1, 0)", "cell(1, 0)"), "overview", True),
    Key("enter", "Layer", "Open the layer under the cursor.",
        (("enter", "enter"),), "overview", True),
    Key("t", "Token H", "Entropy rows: of the layer's load, or of a token's scores (mean).",
        (("t", "entropy_kind"),), "overview", True),
    Key("←→", "Expert", "Go through the experts in the order of the bars (also h l).",
        (("left,h", "bar(-1)"), ("right,l", "bar(1)")), "layer", True),
    Key("↑↓", "Layer", "Go to the layer before or after (also k j).",
        (("up,k", "cell(-1, 0)"), ("down,j", "cell(1, 0)")), "layer", True),
    Key("s", "Sort", "Bars by load, or by the number of the expert.",
        (("s", "sort"),), "layer", True),
    Key("enter", "Tokens", "See the tokens of this expert.",
        (("enter", "enter"),), "layer", True),
    Key("←↑↓→", "Pair", "Move over pairs of experts of the two layers (also h j k l).",
        _arrows("pair(0, -1)", "pair(0, 1)", "pair(-1, 0)", "pair(1, 0)"), "flow", True),
    Key("[ ]", "Layer", "The flow out of the layer before or after.",
        (("left_square_bracket", "cell(-1, 0)"), ("right_square_bracket", "cell(1, 0)")), "flow", True),
    Key("enter", "Follow", "Go on to the next layer, from the expert in the column.",
        (("enter", "enter"),), "flow", True),
    Key("←→", "Layer", "Colour the text by the layer before or after.",
        (("left", "layer(-1)"), ("right", "layer(1)")), "tokens", True),
    Key("h l ↑↓", "Token", "Move the token cursor: h and l by tokens, up and down (k and j) by lines.",
        (("h", "token(-1)"), ("l", "token(1)"), ("up,k", "text_line(-1)"), ("down,j", "text_line(1)")),
        "tokens", True),
    Key("n p", "Sequence", "The next or the previous sampled sequence.",
        (("n", "sequence(1)"), ("p,N", "sequence(-1)")), "tokens", True),
    Key("f", "Only", "Colour only the expert of the token under the cursor; again: all.",
        (("f", "only"),), "tokens", True),
    Key("enter", "Expert", "Open the layer at the expert of the token under the cursor.",
        (("enter", "enter"),), "tokens"),
    Key("↑↓", "Alert", "Select an alert (also k j).", _LIST, "alerts", True),
    Key("enter", "Go there", "Open the layer and the expert of the alert.",
        (("enter", "enter"),), "alerts", True),
    Key("a", "Seen", "Acknowledge: it stays in the list, in grey.", (("a", "acknowledge"),), "alerts", True),
    Key("m", "Mute", "Hide it from the overview and from the counts, in this view only.",
        (("m", "mute"),), "alerts", True),
    Key("↑↓", "Run", "Select a run (also k j).", _LIST, "runs", True),
    Key("enter", "Open", "Open the selected run.", (("enter", "enter"),), "runs", True),
    Key("↑↓", "Block", "The attention block before or after (also k j).",
        (("up,k", "block(-1)"), ("down,j", "block(1)")), "latents", True),
    Key("←→", "Head", "The head before or after, where heads have slots of their own (also h l).",
        (("left,h", "head(-1)"), ("right,l", "head(1)")), "latents", True),
    Key("t", "Part", "MLA: latents of keys and values, or of queries. Two stages: what slots read, or who reads them.",
        (("t", "part"),), "latents", True),
    Key("pgup pgdn", "Tokens", "Scroll through the tokens of the sequence.",
        (("pageup", "rows(-1)"), ("pagedown", "rows(1)")), "latents", True),
    Key("1-7", "Screens", "Overview, layer, flow, tokens, alerts, runs, latents.",
        tuple((tab.key, f"app.show_screen('{tab.name}')") for tab in TABS)),
    PANE,
    Key("space", "Pause", "Hold the picture; the top line keeps moving. Again: back to the newest step.",
        (("space", "app.pause"),), None, True),
    Key(", .", "Step", "One step back or forward in time.",
        (("comma", "app.step(-1)"), ("full_stop", "app.step(1)"))),
    Key("home end", "Ends", "The oldest step of the history, or back to the newest.",
        (("home", "app.first_step"), ("end", "app.newest_step"))),
    Key("r", "Replay", "Replay from here at 1, 4, 16 steps a refresh; again: stop.", (("r", "app.replay"),)),
    Key("y", "Scale", "Load of the step, mean of 20 steps, share of tokens, change since 100 steps ago.",
        (("y", "app.scale"),)),
    Key("/", "Find", "Go to a layer and an expert: type 11.17, or 11.", (("slash", "app.find"),), None, True),
    Key("c", "Colours", "Dark or light.", (("c", "app.colours"),)),
    Key("e", "Export", "Save what is on the screen as an SVG picture in the current folder.",
        (("e", "app.export"),)),
    Key("ctrl+p", "Commands", "All of these by name.", (("ctrl+p", "app.command_palette"),)),
    Key("esc", "Back", "Close what is open on top, or go back to the overview.", (("escape", "app.go_back"),)),
    HELP,
    QUIT,
)  # fmt: skip


def keys_of(screen: ScreenName | None) -> tuple[Key, ...]:
    """Keys that belong to one screen alone, or (None) to all of them."""
    return tuple(key for key in KEYS if key.screen == screen)


def footer_keys(screen: ScreenName, *, narrow: bool = False) -> tuple[Key, ...]:
    """What the footer shows on a screen, at most `MAX_FOOTER` keys: its own, then those of all screens.

    On a `narrow` terminal the key that shows the next pane is among them. Where there are too many, the last of
    those that can be missed goes first; help and quit always stay.
    """
    own = [key for key in keys_of(screen) if key.footer]
    shared = [key for key in keys_of(None) if key.footer or (narrow and key is PANE)]
    can_miss = [key for key in shared if key not in (PANE, HELP, QUIT)]
    while len(own) + len(shared) > MAX_FOOTER:
        shared.remove(can_miss.pop())
    return (*own, *shared)


def help_sections() -> tuple[tuple[str, tuple[Key, ...]], ...]:
    """All keys under headings: those of every screen first."""
    titles = {tab.name: tab.label for tab in TABS}
    screens: tuple[ScreenName, ...] = get_args(ScreenName)
    return (("Everywhere", keys_of(None)), *((titles[name], keys_of(name)) for name in screens))


def markdown() -> str:
    """The table as Markdown, for the manual."""
    lines: list[str] = []
    for title, keys in help_sections():
        lines += [f"### {title}", "", "| key | does |", "|---|---|"]
        lines += [f"| `{key.shown}` | {key.help} |" for key in keys]
        lines.append("")
    return "\n".join(lines)
