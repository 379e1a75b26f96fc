"""One look for all pictures: colours, sizes, axes, and names that fit."""

import textwrap

from ehrfuse._runtime import import_optional

# Okabe and Ito's colours: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
BLUE, VERMILION, BLACK = "#0072B2", "#D55E00", "#222222"
GREY, POOLED = "#D9D9D9", "#8FA9B8"
DASHES = ("-", "--", "-.", ":")  # told apart in grey print too
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
FONT = 10


def new_axes(ax, width, height):
    """The axes given, or new ones of this size in inches."""
    pyplot = import_optional("matplotlib.pyplot", "plots")
    if ax is None:
        ax = pyplot.figure(figsize=(width, height), layout="constrained").subplots()
    return ax


def new_figure(figure, width, height):
    """The figure given, or a new one of this size in inches."""
    pyplot = import_optional("matplotlib.pyplot", "plots")
    if figure is None:
        figure = pyplot.figure(figsize=(width, height), layout="constrained")
    return figure


def clean(ax, grid=None):
    """Two spines, small ticks, and a grid along one axis."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=FONT - 1)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color=GREY, linewidth=0.6)


def line_style(place):
    """Colour and dashes of the line at a place, new for 24 lines; black is for references."""
    n = len(COLOURS) - 1
    return {"color": COLOURS[place % n], "linestyle": DASHES[place // n % len(DASHES)]}


def mark_style(place):
    """Colour and shape of the marks at a place: either tells them apart, both do for 42."""
    return {"color": COLOURS[place % (len(COLOURS) - 1)], "marker": MARKERS[place % len(MARKERS)]}


def fitted(text, letters, lines=3):
    """Text in lines of at most so many letters, cut where it does not fit.

    One line is cut in its middle, since names often differ at their ends.
    """
    text = str(text)
    if lines == 1 and len(text) > letters:
        tail = (letters - 3) // 2
        return f"{text[: letters - 3 - tail].rstrip()}...{text[-tail:].lstrip()}"
    if lines > 1:
        found = textwrap.wrap(text, letters) or [""]
        if len(found) > lines:
            found = [*found[: lines - 1], " ".join(found[lines - 1 :])]
            found[-1] = found[-1][: letters - 3].rstrip() + "..."
        return "\n".join(found)
    return text


def legend_below(ax):
    """A legend below the axes, where it covers nothing; two entries a row if they are long."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(len(labels), 4 if max(map(len, labels), default=0) <= 16 else 2)
    ax.legend(handles, labels, fontsize=FONT - 1, frameon=False, ncols=columns,
              loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.2)  # fmt: skip


def pattern_title(pattern, names):
    """A pattern by what it lacks, or by what it has, whichever is shorter."""
    if pattern.startswith(("other (", "(")):
        return {"(all)": "all rows", "(none)": "nothing present"}.get(pattern, pattern)
    here = [name for name in names if name in pattern.split("+")]
    away = [name for name in names if name not in here]
    if not away:
        return "everything present"
    return f"without {', '.join(away)}" if len(away) < len(here) else f"only {', '.join(here)}"
