"""What a prediction rests on: facts, mentions, the score of the notes, shares of feature groups."""

import html
from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Explanation:
    """One row.

    Attributes
    ----------
    proba : float
        Predicted probability (of the second class, or of the task asked for).
    stage1 : float or None
        Probability that stage 1 reads from the notes.
    shares : Series
        What every group of features adds to the log-odds against a row of training medians
        (Shapley values of groups; they sum to the difference of the two rows).
    mentions, knowledge : DataFrame or None
        As `KnowledgeRetriever.explain` gives them.
    """

    proba: float
    stage1: float | None
    shares: pd.Series
    mentions: pd.DataFrame | None
    knowledge: pd.DataFrame | None


class Explanations(list):
    """Explanations of many rows; `to_html` renders them for a reader."""

    def to_html(self):
        """Render all rows as one page.

        Returns
        -------
        page : str
        """
        parts = [_row_html(i, e) for i, e in enumerate(self)]
        return (
            "<!DOCTYPE html><meta charset='utf-8'><title>Risk</title><style>"
            "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}td{padding:0 1em 0 0}"
            "s{color:#777}i{color:#777}</style>" + "".join(parts)
        )

    def _repr_html_(self):
        return self.to_html()


def _row_html(number, e):
    said = [f"<h2>Row {number}: risk {e.proba:.3f}</h2>"]
    if e.stage1 is not None:
        said.append(f"<p>From the notes alone: {e.stage1:.3f}</p>")
    rows = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{v:+.3f}</td></tr>" for k, v in e.shares.items()
    )
    said.append(f"<h3>Log-odds by group of features</h3><table>{rows}</table>")
    if e.mentions is not None and len(e.mentions):
        items = []
        for m in e.mentions.itertuples():
            words = html.escape(f"{m.text}")
            words = f"<s>{words}</s> (denied)" if m.negated else words
            words = f"<i>{words}</i> (relative)" if m.family else words
            items.append(f"<li>{words}: {html.escape(f'{m.name} [{m.id}]')}</li>")
        said.append(f"<h3>Findings</h3><ul>{''.join(items)}</ul>")
    if e.knowledge is not None and len(e.knowledge):
        items = []
        for d in e.knowledge.itertuples():
            from_ = "; ".join(part for part in (d.sources, d.evidence) if part) or d.kind
            items.append(f"<li>{html.escape(d.text)} <i>({html.escape(from_)})</i></li>")
        said.append(f"<h3>Retrieved knowledge</h3><ol>{''.join(items)}</ol>")
    return "".join(said)


def group_shares(predict, Z, reference, groups):
    """Shapley values of groups of columns, exact, against one reference row.

    Parameters
    ----------
    predict : function of an array (n, p) to log-odds (n,)
    Z : array (n, p)
    reference : array (p,)
    groups : dict of str to integer array
        Columns of every group.

    Returns
    -------
    shares : DataFrame (n, n_groups)
    """
    names = list(groups)
    value = {}
    for size in range(len(names) + 1):
        for some in combinations(names, size):
            mixed = np.tile(reference, (len(Z), 1))
            for name in some:
                mixed[:, groups[name]] = Z[:, groups[name]]
            value[some] = predict(mixed)
    shares = {}
    for name in names:
        total = np.zeros(len(Z))
        rest = [other for other in names if other != name]
        for size in range(len(rest) + 1):
            weight = factorial(size) * factorial(len(rest) - size) / factorial(len(names))
            for some in combinations(rest, size):
                both = tuple(other for other in names if other in (*some, name))
                total += weight * (value[both] - value[some])
        shares[name] = total
    return pd.DataFrame(shares, index=range(len(Z)))
